# SPDX-License-Identifier: Apache-2.0
"""Encode an image once and ask many questions about it: prefixes whose keys and values are kept.

A question costs what a text-only question costs, for neither the towers nor the language model read the prefix again. What
is kept is never written into: caches of transformers grow by concatenation, so each question gets a new list of layers over
the same tensors. A batch of questions is laid out as `generate()` lays out any left-padded batch, so that answers are those
that each question gets by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .caches import changed_cache, copied_cache, narrowed_cache, pick_rows
from .padding import words_of


Rows = int | slice | Sequence[int] | torch.Tensor

# The prefixes of one row's media, by modality.
RowMedia = dict[str, list[torch.Tensor]]


def shifted(tensor: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    """Moves each row's columns (along `dim`) to the right by its number, for padding on the left in place of the right."""
    source = torch.arange(tensor.shape[dim], device=tensor.device)[None] - by.to(tensor.device)[:, None]
    shape = [len(tensor)] + [1] * (tensor.ndim - 1)
    shape[dim] = tensor.shape[dim]
    # What comes in from beyond the edge is masked; a repeated column keeps it finite.
    return tensor.gather(dim, source.clamp(min=0).view(shape).expand_as(tensor))


# ------------------------------------------------------------------------------------------------- what is kept


@dataclass
class PrefixCache:
    """
    What [`~FrozenPrefixForConditionalGeneration.encode_prefix`] keeps of images and the words with them, row by row.

    Pass it as `prefix_cache` to `generate()`, `score()` or, to go on from it, `encode_prefix()`; none of them changes it.
    `len(prefix)` is the number of rows; `prefix[2]`, `prefix[[0, 0, 1]]` are prefixes of those rows.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(rows, length)`):
            The words so far, placeholders among them, padded on the left.
        logits (`torch.FloatTensor` of shape `(rows, vocabulary)`, *optional*): for the word after.
        cache (`DynamicCache`, *optional*): keys and values of the words so far; take [`past_key_values`] to use it.
        media (`list[dict[str, list[torch.Tensor]]]`):
            Each row's encoded media, by modality. Language models whose cache can't be kept (recurrent, encoder-decoder,
            gated cross-attention), and ways of decoding that want a cache of their own, read the words again with them;
            the towers never run again.
        encoder_outputs (`BaseModelOutput`, *optional*): of encoder-decoders.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    logits: torch.Tensor | None = None
    cache: DynamicCache | None = None
    media: list[RowMedia] = field(default_factory=list)
    encoder_outputs: BaseModelOutput | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Rows) -> "PrefixCache":
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
        index = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self.input_ids.device)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        if len(index) == 0 or index.min() < -len(self) or index.max() >= len(self):
            raise IndexError(f"The prefix cache has {len(self)} rows, and not {index.tolist()}. [errors.md#prefix-cache]")
        return self._select(index % len(self))._without_empty_columns()

    def _select(self, rows: torch.Tensor) -> "PrefixCache":
        encoded = self.encoder_outputs
        return PrefixCache(
            input_ids=pick_rows(self.input_ids, rows),
            attention_mask=pick_rows(self.attention_mask, rows),
            logits=None if self.logits is None else pick_rows(self.logits, rows),
            cache=None if self.cache is None else copied_cache(self.cache, rows),
            media=[self.media[0 if len(self.media) == 1 else row] for row in rows.tolist()],
            encoder_outputs=None if encoded is None else BaseModelOutput(last_hidden_state=pick_rows(encoded[0], rows)),
        )

    def _without_empty_columns(self) -> "PrefixCache":
        """Leaves columns out that are padding in every row, as a batch of these rows alone would have none."""
        empty = int(self.attention_mask.shape[1] - self.attention_mask.sum(-1).max())
        if empty == 0:
            return self
        cache, encoder_outputs = self.cache, self.encoder_outputs
        if cache is not None:
            cache = changed_cache(cache, lambda tensor: tensor[:, :, empty:], num_dropped=empty)
        if encoder_outputs is not None:  # encoders are padded on the right
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0][:, :-empty])
        ids, mask = self.input_ids[:, empty:], self.attention_mask[:, empty:]
        return replace(self, input_ids=ids, attention_mask=mask, cache=cache, encoder_outputs=encoder_outputs)

    @property
    def past_key_values(self) -> DynamicCache:
        """A new cache over the kept tensors, for `generate(input_ids=all words so far and new ones, past_key_values=...)` and
        `forward`; growing it leaves the kept one as it is."""
        if self.cache is None:
            raise ValueError(
                "This language model's cache can't be kept (it is recurrent, an encoder-decoder, or reads images by "
                "cross-attention): pass the whole as `prefix_cache` to `generate` or `score`. [errors.md#prefix-cache]"
            )
        return narrowed_cache(copied_cache(self.cache))

    def _followed_by(self, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of the prefix and of what comes after it."""
        return torch.cat([self.input_ids, input_ids], dim=1), torch.cat([self.attention_mask, mask], dim=1)

    def _for(self, rows: int) -> "PrefixCache":
        """As many rows as there are questions."""
        if len(self) == rows:
            return self
        if len(self) == 1:
            return self._select(torch.zeros(rows, dtype=torch.long, device=self.input_ids.device))
        raise ValueError(
            f"{rows} question(s) were asked about {len(self)} prefixes: say which question is about which prefix, for example "
            f"`prefix_cache[[0, 0, 1]]` for two about the first and one about the second. [errors.md#prefix-cache]"
        )


def prefix_output(prefixes: list[torch.Tensor], outputs: ModelOutput | None = None) -> BaseModelOutputWithPooling:
    """The output of `get_image_features` and its like: prefixes `(vectors, embedding_dim)`, and what the tower gave."""
    return BaseModelOutputWithPooling(
        last_hidden_state=getattr(outputs, "last_hidden_state", None),
        pooler_output=prefixes,  # type: ignore[arg-type]  # a list in transformers' own models too
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def take_prefixes(prefixes: Iterator[torch.Tensor], num_vectors: int) -> list[torch.Tensor]:
    """The next prefixes, which have so many vectors together."""
    taken: list[torch.Tensor] = []
    while sum(map(len, taken)) < num_vectors:
        taken.append(next(prefixes))
    return taken


def media_by_row(
    model: Any, input_ids: torch.Tensor | None, encoded: dict[str, Any], inputs_embeds: torch.Tensor | None = None
) -> list[RowMedia]:
    """Encoded media (`encode`), each with the row of ids, or of embeddings, that holds its placeholders."""
    rows: list[RowMedia] = [{} for _ in words_of(input_ids, inputs_embeds)]
    for modality, output in encoded.items():
        mask = model.get_placeholder_mask(input_ids, inputs_embeds, output.pooler_output, modality)
        prefixes = iter(output.pooler_output)
        for row, count in zip(rows, mask.sum((1, 2)).tolist(), strict=True):
            row[modality] = take_prefixes(prefixes, count)
    return rows


def joined_media(rows: list[RowMedia], more: list[RowMedia]) -> list[RowMedia]:
    """Each row's media, and after them `more` of the same row."""
    return [
        {key: [*old.get(key, []), *new.get(key, [])] for key in {**old, **new}} for old, new in zip(rows, more, strict=True)
    ]


def media_together(rows: Iterable[RowMedia]) -> dict[str, BaseModelOutputWithPooling]:
    """The media of all rows in reading order, as `mm_encoder_outputs` holds them."""
    prefixes: RowMedia = {}
    for row in rows:
        for modality, tensors in row.items():
            prefixes.setdefault(modality, []).extend(tensors)
    return {key: prefix_output(tensors) for key, tensors in prefixes.items() if tensors}


def padded_left(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding moved to the left; columns of nothing but padding are left out."""
    order = (mask != 0).int().argsort(dim=-1, stable=True)
    start = int(mask.shape[1] - mask.sum(-1).max())
    return input_ids.gather(1, order)[:, start:], mask.gather(1, order)[:, start:]


def padded_right(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding moved to the right; columns of nothing but padding are left out."""
    order = (mask == 0).int().argsort(dim=-1, stable=True)
    end = int(mask.sum(-1).max())
    return input_ids.gather(1, order)[:, :end], mask.gather(1, order)[:, :end]


def mask_or_none(mask: torch.Tensor) -> torch.Tensor | None:
    """No mask where nothing is masked, as `generate()` has it: attention is faster so."""
    return None if bool((mask != 0).all()) else mask


__all__ = [
    "PrefixCache",
    "RowMedia",
    "joined_media",
    "mask_or_none",
    "media_by_row",
    "media_together",
    "padded_left",
    "padded_right",
    "prefix_output",
    "shifted",
    "take_prefixes",
]
