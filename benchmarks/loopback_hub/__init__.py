"""A Hub that serves this machine alone: for tests, and for commands that name repositories where there is no network."""
