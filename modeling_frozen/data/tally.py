"""What a collator left out of its batches or cut from them, counted over all processes that its data loader runs it in."""

import json
import os
import tempfile
import uuid
import weakref
from collections import Counter


class Tally:
    """Counts, and what was counted, in a file that worker processes append to; it goes with the collator that made it."""

    def __init__(self) -> None:
        self.path = os.path.join(tempfile.gettempdir(), f"frozen-prefix-{uuid.uuid4().hex}.jsonl")
        weakref.finalize(self, _remove, self.path, os.getpid())

    def add(self, kind: str, what: str) -> None:
        line = json.dumps([kind, what]) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:  # a line at a time: processes don't write into each other's
            file.write(line)

    def read(self, start: int = 0) -> list[tuple[str, str]]:
        """(kind, what) of each, in order, from number `start` on."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8") as file:
            return [tuple(json.loads(line)) for line in file][start:]

    def counts(self) -> dict[str, int]:
        return dict(Counter(kind for kind, _ in self.read()))


def _remove(path: str, process: int) -> None:
    if os.getpid() == process and os.path.exists(path):
        os.remove(path)


__all__ = ["Tally"]
