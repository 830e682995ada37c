"""Tells data loader workers that outlive an epoch which one it is."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..data.draws import share_epoch


class EpochCallback(TrainerCallback):
    """
    With `dataloader_persistent_workers=True` draws of texts, views and augmentations depend on seed, epoch and row as they do
    without it. Workers of one epoch, and those of a [`~modeling_frozen.data.streaming.RowStream`], need no telling.

    Example:

    ```python
    >>> args = TrainingArguments("run", dataloader_num_workers=2, dataloader_persistent_workers=True)
    >>> trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[EpochCallback()])
    ```"""

    def __init__(self) -> None:
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if not state.global_step or not has_length(train_dataloader):
            self._epoch = 0
        else:  # resumed: as Trainer counts
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            self._epoch = state.global_step // max(steps, 1)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share_epoch(None)


__all__ = ["EpochCallback"]
