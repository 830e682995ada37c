"""What a collator left out of its batches or cut from them, counted over all processes that its data loader runs it in."""

import json
import os
import tempfile
import uuid
import weakref
from collections import Counter
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


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


class SkippedRowsCallback(TrainerCallback):
    """
    Logs at the end of each epoch how many rows a collator left out or cut in it, and which were the first.

    Args:
        collator ([`DataCollatorForFrozenPrefix`]): Trainer's.
        first (`int`): how many to name.
    """

    def __init__(self, collator: Any, first: int = 5):
        self.collator, self.first = collator, first
        self.seen = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.collator.tally.read(self.seen)
        self.seen += len(found)
        for kind, count in Counter(kind for kind, _ in found).items():
            first = "".join(f"\n  {what}" for one, what in [pair for pair in found if pair[0] == kind][: self.first])
            logger.warning(f"{kind}: {count} in epoch {state.epoch:.2f}, the first of them:{first}")


__all__ = ["SkippedRowsCallback", "Tally"]
