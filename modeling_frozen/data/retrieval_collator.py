"""DataCollatorForFrozenPrefixRetrieval: rows of a picture and its captions to pairs for the contrastive loss.

It reads pictures (files, objects, stored features) and draws captions as DataCollatorForFrozenPrefix does; texts to be
matched hold no placeholder. It says which pairs show the same picture, so that its captions aren't each other's negatives.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collator import DataCollatorForFrozenPrefix
from .feature_store import StoredImage


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
            apart by path, content or place in a store.
        captions: give what `config.caption_loss_weight` asks for as well: the same captions, behind their image's
            placeholders.

    Returns: `input_ids`, `attention_mask` (batch, sequence), padded on the right; the inputs of the images, with
    `image_index` where one stands twice; `image_ids` (batch,) where they are known; `return_loss`; with `captions`
    `caption_input_ids`, `caption_attention_mask` and `caption_targets`.

    Errors: ValueError that names the row and the way out.
    """

    image_id_column: str = "image_id"
    captions: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images, texts, ids = [], [], []
        for index, row in self._samples(rows):
            found = self._images(index, row, required=True)
            if len(found) != 1 or not isinstance(row.get(self.text_column), str | list | tuple):
                raise ValueError(
                    f"Row {index} has {len(found)} images and {row.get(self.text_column)!r:.80} as {self.text_column!r}: a "
                    "pair is one image and a text, or a list of texts of which one is drawn. Leave other rows out."
                )
            images += found
            texts.append(self._draw(index, self.text_column, row[self.text_column]))
            ids.append(_stable_id(row.get(self.image_id_column), found[0]))
        limits = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        read = self.processor.tokenizer(
            texts,
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
            **limits,
        )
        batch = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "return_loss": True}
        if None not in ids:
            batch["image_ids"] = torch.tensor(ids)
        if not self.captions:
            return {**batch, **self.process_images(images)}
        name = self.image_column or "image"
        pairs = [{name: image, self.text_column: text} for image, text in zip(images, texts, strict=True)]
        described = super().__call__(pairs)
        for key, new in {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "targets"}.items():
            batch[f"caption_{new}"] = described.pop(key)
        return {**described, **batch}


def _stable_id(given: Any, image: Any) -> int | None:
    """The same number for the same image in every process, or `None` where nothing tells."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(given, str):
        known: Any = given.encode()
    elif isinstance(image, StoredImage):
        known = f"{image.store}:{image.index}".encode()
    else:
        known = image.encode() if isinstance(image, str) else image if isinstance(image, bytes) else _content(image)
    return None if known is None else int.from_bytes(hashlib.blake2b(known, digest_size=8).digest(), "big", signed=True)


def _content(image: Any) -> bytes | None:
    """Of decoded pictures: `datasets` decodes anew for every row."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    to_bytes = getattr(image, "tobytes", None)
    if to_bytes is None:
        return None
    return f"{getattr(image, 'size', '')}{getattr(image, 'shape', '')}{getattr(image, 'mode', '')}".encode() + to_bytes()


__all__ = ["DataCollatorForFrozenPrefixRetrieval"]
