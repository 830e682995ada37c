"""transformers' key-value caches, kept and used several times: which can be, and how rows of one serve many rows."""

import copy
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
    if rows is None:
        return tensor
    if len(tensor) == 1:  # one row for all: no copy
        return tensor.expand(len(rows), *tensor.shape[1:])
    return tensor.index_select(0, rows.to(tensor.device))


def copied_cache(cache: DynamicCache, rows: torch.Tensor | None = None) -> DynamicCache:
    """A cache of its own over the same tensors, or over the chosen rows of them; windows still hold all of their past."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        if layer.is_initialized:
            layer.keys, layer.values = pick_rows(layer.keys, rows), pick_rows(layer.values, rows)
    return copied


def narrowed_cache(cache: DynamicCache) -> DynamicCache:
    """Cuts sliding layers down to what they look at, as they are in `generate()`."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            layer.record_past = False
            seen = layer.sliding_window - 1
            layer.keys, layer.values = (
                tensor[:, :, max(0, tensor.shape[-2] - seen) :] for tensor in (layer.keys, layer.values)
            )
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


__all__ = ["can_be_kept", "copied_cache", "narrowed_cache", "new_kept_cache", "pick_rows"]
