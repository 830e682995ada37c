# SPDX-License-Identifier: Apache-2.0
"""Training rows that begin alike: the language model reads what they have in common once.

Captions of one image all follow the same prefix, and a causal language model makes of it the same keys and values each
time. So the common start of such rows is read once, with gradient, and each row goes on from its keys and values, as in
generation. Nothing is approximated: losses and gradients are those of the plain way up to rounding. With five captions of
30 words behind 196 prefix vectors a step reads 346 positions in place of 1130. An encoder reads rows that are alike
throughout once. Whether reading in parts equals reading at once is tried once per language model; where not (a recurrent
state, dropout that draws for each row), each row is read by itself.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from .caches import copied_cache, narrowed_cache, new_kept_cache
from .connectors import draws, in_eval_mode
from .losses import compiled_part, nearly_equal, parts_uncompiled
from .padding import distinct_rows
from .weights import gathers_layers


# Reading in two parts has a cost of its own: it must spare at least this share of the batch's positions.
SMALLEST_SHARE = 0.1

# Language model -> whether it reads the same in parts as at once.
_TRIED: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@dataclass
class SharedStart:
    """
    What rows of a batch have in common at their start.

    Args:
        reader (`nn.Module`): the part of the language model that reads it, without its head.
        length (`int`): its columns; of an encoder all of them.
        rows (`torch.LongTensor` of shape `(distinct starts,)`): a row that has each of them.
        groups (`torch.LongTensor` of shape `(batch,)`): for each row its start in `rows`.
        lead (`int`): columns of words at the beginning that are the same in all starts, to be read by themselves.
    """

    reader: nn.Module
    length: int
    rows: torch.Tensor
    groups: torch.Tensor
    lead: int = 0


def mark_images(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    placeholder_ids: dict[str, int],
    image_lengths: list[int],
    image_index: torch.Tensor,
) -> torch.Tensor:
    """
    Ids by which to tell what stands where: those of words as they are, and negative ones for all else.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(batch, sequence)`): the mask, if any, of 0 and 1.
        placeholder_ids (`dict[str, int]`): by modality.
        image_lengths (`list[int]`): prefix vectors of each image in reading order.
        image_index (`torch.LongTensor` of shape `(num_images,)`): which image each of them is.

    Returns:
        `torch.LongTensor` of shape `(batch, sequence)`: equal where the same word, or the same image, stands. Videos and
        audio are equal to nothing.
    """
    marks = input_ids.clone()
    next_mark = -2
    for modality, placeholder in placeholder_ids.items():
        at = input_ids == placeholder
        if modality == "image":
            lengths = torch.tensor(image_lengths, device=marks.device)
            own = -2 - image_index.to(marks.device).repeat_interleave(lengths)
            next_mark = -3 - int(image_index.max())
        else:
            own = next_mark - torch.arange(int(at.sum()), device=marks.device)
            next_mark -= len(own)
        marks.masked_scatter_(at, own)
    return marks if attention_mask is None else marks.masked_fill(attention_mask == 0, -1)


def best_shared_start(marks: torch.Tensor, limit: int, whole: bool = False) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """
    The common start that spares most positions, one length for all rows, for their keys and values make one tensor.

    Args:
        marks (`torch.LongTensor` of shape `(batch, sequence)`): of [`mark_images`].
        limit (`int`): longest start.
        whole (`bool`): whether it must be of that length (an encoder reads rows whole).

    Returns:
        `length`, `rows` and `groups` of a [`SharedStart`], or `None` where too little would be spared.
    """
    if limit < 1 or len(marks) < 2:
        return None
    distinct = marks[:, :limit].unique(dim=0)  # sorted, so that those with the longest common start are neighbours
    common = (distinct[1:] != distinct[:-1]).int().argmax(-1)
    lengths = torch.cat([common, common.new_tensor([limit])]).unique() if not whole else common.new_tensor([limit])
    starts = 1 + (common[None] < lengths[:, None]).sum(-1)
    spared, best = (lengths * (len(marks) - starts)).max(0)
    if int(spared) < SMALLEST_SHARE * marks.numel():
        return None
    length = int(lengths[best])
    return length, *distinct_rows(marks[:, :length])


def words_in_common(marks: torch.Tensor) -> int:
    """How many columns at the beginning of rows are words, and the same ones in all of them."""
    return int(((marks >= 0) & (marks == marks[:1])).all(0).int().cumprod(0).sum())


def begin_alike(input_ids: torch.Tensor, attention_mask: torch.Tensor, placeholder_ids: Iterable[int]) -> bool:
    """Whether the words that all rows of a batch begin with are worth reading once, whatever images follow; the collator then
    says so by an `image_index`, also where no image occurs twice."""
    marks = input_ids.masked_fill(attention_mask == 0, -1)
    for placeholder in placeholder_ids:
        marks = marks.masked_fill(input_ids == placeholder, -1)
    return words_in_common(marks) * (len(marks) - 1) >= SMALLEST_SHARE * marks.numel()


def words_before_starts(marks: torch.Tensor, length: int, num_starts: int) -> int:
    """How many words at the beginning of all starts of this length are to be read by themselves: 0 where that spares too
    little."""
    words = words_in_common(marks[:, :length])
    if num_starts == 1:
        return words if words == length else 0  # nothing is spared but the gradient, which words alone have none of
    read = num_starts * length + len(marks) * (marks.shape[1] - length)
    return words if words * (num_starts - 1) >= SMALLEST_SHARE * read else 0


def find_shared_start(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: Any,
    image_lengths: list[int],
    image_index: torch.Tensor,
    path: str,
    learnt: torch.Tensor,
) -> SharedStart | None:
    """
    What to read once in a batch of training.

    Args:
        input_ids, attention_mask, image_index (`torch.Tensor`), image_lengths (`list[int]`): as of [`mark_images`].
        path (`str`): of the headless part in the language model.
        learnt (`torch.BoolTensor`): whose hidden states are wanted, `(batch, sequence)`; of a decoder, `(batch, target)`.

    Returns:
        [`SharedStart`], or `None` where each row is to be read by itself.
    """
    masks = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)
    reader, encodes = model.language_model.get_submodule(path), model.config.is_encoder_decoder
    if torch.compiler.is_compiling() or not masks or draws(model.connector) or model.cross_attention is not None:
        return None
    if gathers_layers(model.language_model):  # all processes run each layer as often, and none knows of the others' rows
        return None
    if not reads_in_parts(model, reader):
        return None
    limit = input_ids.shape[1]
    if not encodes:
        # Each row goes on before its first hidden state that is wanted, and behind no padding.
        first = torch.where(learnt.any(-1), learnt.int().argmax(-1), limit - 1)
        if attention_mask is not None:
            first = first.minimum((attention_mask != 0).cumprod(-1).sum(-1).to(first.device) - 1)
        limit = int(first.min())
    marks = mark_images(input_ids, attention_mask, model.config.placeholder_ids, image_lengths, image_index)
    start = best_shared_start(marks, limit, whole=encodes)
    if start is None:
        return None
    length, rows, groups = start
    lead = 0 if encodes else words_before_starts(marks, length, len(rows))
    return SharedStart(reader, length, rows, groups, lead)


def read_shared_start(model: Any, start: SharedStart, inputs_embeds: torch.Tensor) -> DynamicCache:
    """
    Reads each distinct start.

    Args:
        start ([`SharedStart`]).
        inputs_embeds (`torch.Tensor` of shape `(batch, sequence, embedding_dim)`): words and prefixes merged.

    Returns:
        `DynamicCache`: the starts' keys and values for every row of the batch, with their graph.

    Raises:
        ValueError: if the language model's cache can't be kept.
    """
    cache, reader = new_kept_cache(model), start.reader
    if cache is None:
        raise ValueError(
            f"{type(model.language_model).__name__} has no cache that can be kept: read each row by itself."
            " [errors.md#prefix-cache]"
        )
    embeds = inputs_embeds[start.rows.to(inputs_embeds.device), : start.length]
    mask = None
    if start.lead:
        # No image stands in it: where nothing of the language model trains it has no gradient, and passes none on.
        frozen = not any(parameter.requires_grad for parameter in model.language_model.parameters())
        with torch.no_grad() if frozen else nullcontext():
            inputs = model.language_inputs(reader, None, embeds[:1, : start.lead], None, None, cache, {"use_cache": True})
            compiled_part(reader, **inputs, return_dict=True)
        cache = copied_cache(cache, start.rows.new_zeros(len(start.rows)))
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if start.lead < start.length:
        inputs = model.language_inputs(reader, None, embeds[:, start.lead :], mask, None, cache, {"use_cache": True})
        compiled_part(reader, **inputs, return_dict=True)
    return narrowed_cache(copied_cache(cache, start.groups))


def encode_alike(model: Any, start: SharedStart, inputs_embeds: torch.Tensor, attention_mask: Any) -> BaseModelOutput:
    """The encoder's output `(batch, sequence, hidden_size)` of rows of which some are alike, each read once."""
    encoder, rows = model.language_model.get_encoder(), start.rows.to(inputs_embeds.device)
    mask = None if attention_mask is None else attention_mask[rows]
    inputs = model.language_inputs(encoder, None, inputs_embeds[rows], mask, None, None, {})
    states = compiled_part(encoder, **inputs, return_dict=True)[0]
    return BaseModelOutput(last_hidden_state=states.index_select(0, start.groups.to(states.device)))


def reads_in_parts(model: Any, reader: nn.Module) -> bool:
    """Whether hidden states, and the gradient of what was read, are the same read in two parts as read at once: tried on
    eight words, once, where nothing draws."""
    language_model = model.language_model
    # Layers computed again in the backward pass keep no cache.
    if draws(language_model) or any(getattr(one, "gradient_checkpointing", False) for one in language_model.modules()):
        return False
    if language_model not in _TRIED:
        try:
            with in_eval_mode(language_model), parts_uncompiled():
                _TRIED[language_model] = _try_parts(model, reader)
        except Exception:  # whatever it is that this model does otherwise, the plain way is always open
            _TRIED[language_model] = False
    return _TRIED[language_model]


def _try_parts(model: Any, reader: nn.Module) -> bool:
    encodes = model.config.is_encoder_decoder
    embeddings = model.get_input_embeddings()
    ids = torch.arange(8, device=embeddings.weight.device).repeat(3, 1)
    lead = 0 if encodes else 2
    ids[2, lead:] += 8
    if not encodes:
        ids[1, 4:] += 4
    at, every, groups = 8 if encodes else 4, ids.new_tensor([0, 1, 2]), ids.new_tensor([0, 0, 1])
    with torch.no_grad():
        words = model.embed_words(ids % embeddings.weight.shape[0])
    ways = []
    with torch.enable_grad():
        for start in (SharedStart(reader, at, every, every), SharedStart(reader, at, ids.new_tensor([0, 2]), groups, lead)):
            in_parts, leaf = len(start.rows) < 3, words.clone().requires_grad_()
            embeds = leaf * 1  # some models scale embeddings in place
            if encodes:
                states = encode_alike(model, start, embeds, None)[0]
            else:
                cache = read_shared_start(model, start, embeds) if in_parts else None
                rest = embeds[:, at:] if in_parts else embeds
                mask, kwargs = torch.ones_like(ids), {"use_cache": in_parts}
                inputs = model.language_inputs(reader, None, rest, mask, None, cache, kwargs)
                states = reader(**inputs, return_dict=True)[0][:, -4:]
            weights = torch.arange(states.numel(), device=states.device).sin().view(states.shape)
            (gradient,) = torch.autograd.grad((states.float() * weights).sum(), leaf)
            # What rows have in common gets its gradient in the first of them; the words before it may have none.
            shared = gradient.new_zeros(2, at, gradient.shape[-1]).index_add(0, groups, gradient[:, :at])
            ways.append((states.detach(), shared[:, lead:], *([] if encodes else [gradient[:, at:]])))
    # Wider than for logits: gradients gather rounding on their way through all layers.
    return all(nearly_equal(one, other, 1e-3, 5e-2) for one, other in zip(*ways, strict=True))


__all__ = [
    "SharedStart",
    "begin_alike",
    "best_shared_start",
    "encode_alike",
    "find_shared_start",
    "mark_images",
    "read_shared_start",
]
