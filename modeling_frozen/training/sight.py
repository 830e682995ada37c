"""Does the loss depend on the image? Said while a training runs: where it does not, everything else looks as it should.

The loss falls, for the language model learns from the connector's constant part how a caption sounds; and every image is
described by the same sentence. What users of ClipCap and LLaVA report as such is seen here after a few dozen steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..connectors import in_eval_mode
from ..data.draws import seeded
from ..parts import MODALITIES


logger = logging.get_logger(__name__)

_BLIND = """\
Step {step}: the loss does not depend on the image: {right:.3f} nats a token with the right image, {wrong:.3f} with another \
one ({images} images). So far every image gets the same words. What to look at, in this order:
- the data: does each text stand beside its own image, and can it be known from it? See `frozen-prefix check`;
- the learning rate: try a third and three times as much ({rate});
- what trains: `model.config.trainable` is {trainable}, and the connector's gradient must not be 0 (`grad_norm` in the log);
- the features: are those of two images different? `model.get_image_features(...).last_hidden_state` shows them;
- time: a connector may need its first few hundred steps. Train on while this number still moves."""


class SightCallback(TrainerCallback):
    """
    Compares, every so many steps, the loss of a fixed batch with that of the same batch with its images exchanged, and warns
    where the image makes no difference. The difference goes into the log as `sight`, in nats a token, and into `history`.

    It costs what reading the batch twice without gradient costs: with the defaults less than a thirtieth of the training at
    batches of 16. It draws nothing from a global generator: the weights are those of a training without it.

    Args:
        rows (`Sequence`): rows as the collator takes them, best of a validation split. Some of them are read once.
        collator ([`DataCollatorForFrozenPrefix`]): Trainer's.
        every (`int`): steps from one comparison to the next.
        num_rows (`int`): how many rows, evenly spread over `rows`.
        smallest (`float`): nats a token below which the image counts as making no difference. Where it is seen, the
            difference is a tenth of a nat and more.

    Raises: ValueError where no two images of the rows can be exchanged.

    Example:

    ```python
    >>> trainer = Trainer(model, args, …, callbacks=[SightCallback(validation_rows, collator)])
    ```"""

    def __init__(self, rows: Sequence[Any], collator: Any, every: int = 50, num_rows: int = 16, smallest: float = 0.01):
        if every < 1 or num_rows < 2:
            raise ValueError(f"every={every} must be at least 1, and num_rows={num_rows} at least 2. [errors.md#sight]")
        self.rows, self.collator, self.every, self.num_rows, self.smallest = rows, collator, every, num_rows, smallest
        self.history: list[dict[str, float]] = []
        self._batch: dict[str, Any] | None = None
        self._warned = 0

    def compare(self, model: Any) -> tuple[float, float]:
        """The loss of the batch as it is, and with each image exchanged for another, in nats a token."""
        if self._batch is None:
            count = min(self.num_rows, len(self.rows))
            chosen = [self.rows[index * len(self.rows) // count] for index in range(count)]
            with seeded("sight"):
                self._batch = dict(self.collator(chosen))
        batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in self._batch.items()}
        media = {key: batch.pop(key) for key in MODALITIES["image"].inputs if key in batch}
        with torch.no_grad(), in_eval_mode(model), seeded("sight"):
            encoded = model.get_image_features(**media) if media else None
            prefixes = [] if encoded is None else list(encoded.pooler_output)
            losses = []
            for order in (list(range(len(prefixes))), _others(prefixes, media.get("image_index"))):
                encoded.pooler_output = [prefixes[index] for index in order]  # type: ignore[union-attr]  # no images: _others raised
                losses.append(model(**batch, mm_encoder_outputs={"image": encoded}).loss.item())
        return losses[0], losses[1]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._look(args, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            self._look(args, state, model)

    def _look(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        right, wrong = self.compare(model)
        self.history.append({"step": state.global_step, "right": right, "wrong": wrong})
        if not state.is_world_process_zero:
            return
        state.log_history.append({"sight": wrong - right, "epoch": state.epoch, "step": state.global_step})
        if wrong - right >= self.smallest:
            self._warned = 0
        elif self._warned < 3:
            self._warned += 1
            said = {"step": state.global_step, "right": right, "wrong": wrong, "images": min(self.num_rows, len(self.rows))}
            trainable = list(model.config.trainable)
            logger.warning(_BLIND.format(**said, rate=f"it is {args.learning_rate:g}", trainable=trainable))


def _others(prefixes: list[torch.Tensor], index: torch.Tensor | None) -> list[int]:
    """For each image in reading order the place of another one of as many prefix vectors, in one cycle through all."""
    same = list(range(len(prefixes))) if index is None else index.tolist()
    first: dict[int, dict[int, int]] = {}  # by length: the first place of each distinct image
    for place, image in enumerate(same):
        first.setdefault(len(prefixes[place]), {}).setdefault(image, place)
    if not any(len(places) > 1 for places in first.values()):
        raise ValueError(
            "SightCallback exchanges images for others of as many prefix vectors, and its rows have no two such images: give "
            "it rows of a validation split with different images, or a larger num_rows. [errors.md#sight]"
        )
    other = list(range(len(prefixes)))
    for places in first.values():
        images = list(places)
        after = dict(zip(images, images[1:] + images[:1], strict=True))
        for place, image in enumerate(same):
            if image in places and len(prefixes[place]) == len(prefixes[places[image]]):
                other[place] = places[after[image]]
    return other


__all__ = ["SightCallback"]
