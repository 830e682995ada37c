"""What a collator left out or cut, said at the end of each epoch of a training."""

from collections import Counter
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


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
        skipped = self.collator.tally.read(self.seen)
        self.seen += len(skipped)
        for kind, count in Counter(kind for kind, _ in skipped).items():
            first = "".join(f"\n  {what}" for one, what in [pair for pair in skipped if pair[0] == kind][: self.first])
            logger.warning(f"{kind}: {count} in epoch {state.epoch:.2f}, the first of them:{first}")


__all__ = ["SkippedRowsCallback"]
