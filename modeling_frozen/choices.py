# SPDX-License-Identifier: Apache-2.0
"""What is said of a name that nobody knows."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """A question with the known name that is most like it, and a space behind; `otherwise` where none is like it."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean `{nearest[0]}`? " if nearest else otherwise
