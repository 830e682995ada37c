"""DataCollatorForFrozenPrefixRetrieval: rows of an image and its captions to pairs for the contrastive loss.

It reads images (files, objects, stored features) and draws captions as DataCollatorForFrozenPrefix does; the texts hold no
placeholder. It says which pairs show the same image, so that its captions aren't each other's negatives.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..processors import load_rgb_image
from .collator import DataCollatorForFrozenPrefix, image_identity
from .feature_store import StoredImage
from .image_reading import digest_of_image, read_image


@dataclass
class DataCollatorForFrozenPrefixRetrieval(DataCollatorForFrozenPrefix):
    """Collates rows with an image column (one image each) and a `text` column (a caption, or several of which one is drawn,
    or with `all_texts` each makes a pair).

    Use it with `TrainingArguments(remove_unused_columns=False)`. Batches say `return_loss=True`, so that `trainer.evaluate()`
    gives a loss.

    Args:
        processor, max_length, image_column, text_column, pad_to_multiple_of, share_images, all_texts:
            As [`DataCollatorForFrozenPrefix`].
        image_id_column: name of a column that names the image by a number or a string. Where a row has none, images are told
            apart by their content ([`digest_of_image`]).
        captions: give what `config.caption_loss_weight` asks for as well: the same captions, behind their image's
            placeholders.

    Returns: `input_ids`, `attention_mask` (batch, sequence), padded on the right; the inputs of the images, with
    `image_index` where one stands twice; `image_ids` (batch,); `return_loss`; with `captions`
    `caption_input_ids`, `caption_attention_mask` and `caption_targets`.

    Raises: ValueError that names the row and the way out.
    """

    image_id_column: str = "image_id"
    captions: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images, texts, ids = [], [], []
        known: dict[Any, tuple[Any, bytes]] = {}
        for index, row in self._samples(rows):
            own = self._images(index, row, required=True)
            if len(own) != 1 or not isinstance(row.get(self.text_column), str | list | tuple):
                raise ValueError(
                    f"Row {index} has {len(own)} images and {row.get(self.text_column)!r:.80} as {self.text_column!r}: a "
                    "pair is one image and a text, or a list of texts of which one is drawn. Leave other rows out."
                    " [errors.md#collator]"
                )
            identity = image_identity(own[0])
            if identity not in known:
                name = f"the image of row {index}"
                content = own[0] if isinstance(own[0], StoredImage) else read_image(own[0], name=name)
                digest = digest_of_image(content)
                known[identity] = load_rgb_image(content, name) if isinstance(content, Mapping) else content, digest
            image, digest = known[identity]
            images.append(image)
            texts.append(self._draw(index, self.text_column, row[self.text_column]))
            ids.append(_image_id(index, row.get(self.image_id_column), digest))
        if self.processor.crop_to_patches:
            raise ValueError(
                "crop_to_patches=True makes several tiles of an image, and an image is matched by one embedding: leave it out."
                " [errors.md#collator]"
            )
        limits = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        encoded = self.processor.tokenizer(
            texts,
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
            **limits,
        )
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        batch.update(image_ids=torch.tensor(ids), return_loss=True)
        if not self.captions:
            return {**batch, **self.process_images(images)}
        name = self.image_column or "image"
        pairs = [{name: image, self.text_column: text} for image, text in zip(images, texts, strict=True)]
        described = super().__call__(pairs)
        for key, new in {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "targets"}.items():
            batch[f"caption_{new}"] = described.pop(key)
        return {**described, **batch}


def _image_id(index: int, value: Any, digest: bytes) -> int:
    """The same number for the same image in every process: by the row's own name for it, else by its content."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or torch
    if value is None or value != value or value == "":  # pandas writes NaN where there is none
        return int.from_bytes(digest[:8], "big", signed=True)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(
            f"Row {index}: an image is named by a number or a string, not by {value!r:.80} ({type(value).__name__})."
            " [errors.md#collator]"
        )
    if not isinstance(value, str) and value % 1 == 0 and abs(value) < 2**63:
        return int(value)
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "big", signed=True)


__all__ = ["DataCollatorForFrozenPrefixRetrieval"]
