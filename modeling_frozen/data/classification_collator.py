"""DataCollatorForFrozenPrefixClassification: rows of images, texts and labels to a batch for the classifier.

It reads images (videos, audio, stored features) and texts as DataCollatorForFrozenPrefix does; only what is learnt is
another: a label of the row, and none of its tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collator import DataCollatorForFrozenPrefix, _Example, others_of, place_media


@dataclass
class DataCollatorForFrozenPrefixClassification(DataCollatorForFrozenPrefix):
    """Collates rows with an image column, a `text` column and a `label` column; one of the first two may be left out.

    A text is tokenised as the processor does it, with the placeholders of its images, by which the model knows whose they
    are. Use it with `TrainingArguments(remove_unused_columns=False)`.

    Args:
        processor, max_length, image_column, text_column, pad_to_multiple_of: as [`DataCollatorForFrozenPrefix`].
        label_column: name of the column with a class index, a number (regression), or a list with 0 or 1 (several labels)
            or a number for each class. Rows of a batch either all have it or none.

    Returns: `input_ids`, `attention_mask`, the inputs of the images, and `labels`: (batch,) long for class indices, else
    float, (batch,) or (batch, num_labels).

    Raises: ValueError that names the row and the way out.
    """

    label_column: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_encoder_decoder = False  # whatever it is, nothing is written

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        del batch["labels"]
        labels = [sample.get(self.label_column) for _, sample in self._samples(rows)]
        if any(label is not None for label in labels):
            batch["labels"] = self._stack_labels(labels)
        return batch

    def _read(self, index: int, row: Mapping[str, Any]) -> _Example:
        others = others_of(self.processor, row)
        images = self._images(index, row, required=self._shows_something(row, others))
        text = row.get(self.text_column)
        if text is None and not images and not others:
            raise ValueError(
                f"Row {index} has neither {self.text_column!r} nor an image (its columns: {sorted(row)}). Set "
                "remove_unused_columns=False in TrainingArguments, or name the columns: "
                "DataCollatorForFrozenPrefixClassification(processor, image_column=…, text_column=…, label_column=…)."
                " [errors.md#collator]"
            )
        text = "" if text is None else self._draw(index, self.text_column, text)
        # An empty target: the tokenizer's own special tokens, and no end of text to learn.
        return _Example([(place_media(self.processor, text, images, others), False)], images, others, target="")

    def _stack_labels(self, labels: list[Any]) -> torch.Tensor:
        for index, label in enumerate(labels):
            if label is None or isinstance(label, str):
                raise ValueError(
                    f"Row {index}: column {self.label_column!r} holds {label!r}, where it must be a number or a list of them "
                    "(for names: `model.config.label2id[name]`, or `datasets.Dataset.class_encode_column`)."
                    " [errors.md#collator]"
                )
        tensors = [torch.as_tensor(label) for label in labels]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"Labels of shapes {sorted(shapes)} don't make a batch: every row needs as many numbers. [errors.md#collator]"
            )
        stacked = torch.stack(tensors)
        return stacked.float() if stacked.is_floating_point() or stacked.ndim > 1 else stacked.long()


__all__ = ["DataCollatorForFrozenPrefixClassification"]
