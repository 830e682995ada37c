# SPDX-License-Identifier: Apache-2.0
"""transformers' key-value caches, kept and used several times: which can be, and how rows of one serve many rows."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .transformers_compat import windows_remember


def can_be_kept(cache: Any) -> bool:
    """Whether growing the cache leaves the tensors in it alone. States of recurrent layers are written in place, and can't be
    stepped in batches of unequal questions."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def pick_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows of a tensor by their numbers; all of them for `None`."""
    if rows is None:
        return tensor
    if len(tensor) == 1:  # one row for all: no copy
        return tensor.expand(len(rows), *tensor.shape[1:])
    return tensor.index_select(0, rows.to(tensor.device))


def changed_cache(cache: DynamicCache, change: Callable[[torch.Tensor], torch.Tensor], num_dropped: int = 0) -> DynamicCache:
    """A cache of its own with what `change` makes of the keys and values `(rows, heads, length, head_dim)`, which may leave
    out `num_dropped` positions; windows still hold all of their past."""
    changed = copy.copy(cache)
    changed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in changed.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= num_dropped
    return changed


def copied_cache(cache: DynamicCache, rows: torch.Tensor | None = None) -> DynamicCache:
    """A cache of its own over the same tensors, or over the chosen rows of them."""
    return changed_cache(cache, lambda tensor: pick_rows(tensor, rows))


def narrowed_cache(cache: DynamicCache) -> DynamicCache:
    """Cuts sliding layers, in place, down to their window, as they are in `generate()`."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
            layer.record_past = False
            start = max(0, layer.keys.shape[-2] - layer.sliding_window + 1)
            layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]
    return cache


def new_kept_cache(model: Any) -> DynamicCache | None:
    """An empty cache that can be kept, whose windows forget nothing; `None` for a language model without one."""
    if model.config.is_encoder_decoder or model.cross_attention is not None or model.is_recurrent or not model.keeps_cache:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not can_be_kept(cache) or (any(cache.is_sliding) and not windows_remember()):
        return None
    cache.activate_past_recording()
    return cache


__all__ = ["can_be_kept", "changed_cache", "copied_cache", "narrowed_cache", "new_kept_cache", "pick_rows"]
