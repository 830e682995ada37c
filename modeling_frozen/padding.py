# SPDX-License-Identifier: Apache-2.0
"""Small pieces of putting a prefix among words: counting placeholders, positions and order under padding, equal rows."""

from contextvars import ContextVar
from typing import Any

import torch


# Set while `generate()` reads a prompt in chunks, which cut images in two; the whole was counted before.
reads_in_chunks: ContextVar[bool] = ContextVar("reads_in_chunks", default=False)


def counts_fit(counts: list[int], lengths: list[int]) -> bool:
    """Whether samples with so many placeholders each hold whole prefixes of these lengths, in order."""
    remaining = iter(lengths)
    for count in counts:
        while count > 0:
            count -= next(remaining, count + 1)
        if count != 0:
            return False
    return next(remaining, None) is None


def describe_mismatch(counts: list[int], lengths: list[int], modality: str = "image") -> str:
    """The message for placeholders that don't fit prefixes: both numbers, the sample, and the way out."""
    each = lengths[0] if len(set(lengths)) == 1 else lengths
    what = f"{len(lengths)} {modality}(s) were passed, of {each} prefix vectors each"
    way_out = f"Let the processor place them (it repeats `<{modality}>` itself), and don't cut `input_ids` afterwards."
    if len(set(lengths)) == 1:
        for index, count in enumerate(counts):
            if count % lengths[0]:
                return (
                    f"Sample {index} holds {count} {modality} placeholders, which is no multiple of the prefix length "
                    f"{lengths[0]}: some were cut off or added. {what}. {way_out}"
                )
    return (
        f"The batch holds {sum(counts)} {modality} placeholders ({counts} per sample), but the {modality}s fill "
        f"{sum(lengths)}: {what}. {way_out}"
    )


def words_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """
    Ids `(batch, sequence)`, or embeddings `(batch, sequence, embedding_dim)` where there are no ids.

    Raises:
        ValueError: if there is neither.
    """
    words = inputs_embeds if input_ids is None else input_ids
    if words is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds [errors.md#contradiction]")
    return words


def distinct_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each distinct row of a 2-D tensor stands first, and for every row which of these it equals."""
    distinct, groups = rows.unique(dim=0, return_inverse=True)
    order = torch.arange(len(rows), device=rows.device)
    return order.new_full((len(distinct),), len(rows)).scatter_reduce(0, groups, order, "amin"), groups


def position_ids_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions counted from each sample's first real token: what the language model itself assumes without padding on
    the left, and right with it."""
    padding = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)[None] - padding
    return positions.clamp(min=0)[:, -length:]


def pad_right(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
    """Moves padding of an encoder's input to the right. Many encoders count positions from the row's start and take no
    `position_ids`; what attends to them doesn't count at all, so the order of rows is free."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return input_ids, inputs_embeds, attention_mask
    order = (attention_mask == 0).int().argsort(dim=-1, stable=True)
    if input_ids is not None:
        input_ids = input_ids.gather(1, order)
    if inputs_embeds is not None:
        inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
    return input_ids, inputs_embeds, attention_mask.gather(1, order)
