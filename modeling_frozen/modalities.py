"""What `forward` takes of images, videos and audio, and small pieces of encoding them.

A modality is a tower, a connector that writes its prefix, and a placeholder whose embeddings the prefix takes. Videos
share the vision tower and its connector; audio has its own two.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


# What `forward` takes of each modality: the input itself, or what stands for it, and what may go with either.
MEDIA_INPUTS = {
    "image": (
        "pixel_values",
        "vision_features",
        "vision_features_mask",
        "image_index",
        "pixel_attention_mask",
        "spatial_shapes",
        "interpolate_pos_encoding",
    ),
    "video": ("pixel_values_videos", "interpolate_pos_encoding"),
    "audio": ("input_features", "input_features_mask", "is_longer"),
}
SOURCES = {"image": ("pixel_values", "vision_features"), "video": ("pixel_values_videos",), "audio": ("input_features",)}


def take_media(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `kwargs` all that `MEDIA_INPUTS` names and that is there."""
    names = {name for names in MEDIA_INPUTS.values() for name in names}
    taken = {name: kwargs.pop(name) for name in names.intersection(kwargs)}
    return {name: value for name, value in taken.items() if value is not None}


def graph_of(tower: nn.Module, inputs: torch.Tensor) -> torch.set_grad_enabled:
    # A frozen tower keeps no graph, unless somebody asks for gradients of the picture itself.
    tower_trains = any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and (tower_trains or inputs.requires_grad))


def output_flags(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("output_hidden_states", "output_attentions") if key in kwargs}


def checked_index(index: torch.Tensor, count: int) -> torch.Tensor:
    """`image_index` where it points into `count` rows; in a compiled graph that is left to the lookup itself."""
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"`image_index` of shape {tuple(index.shape)} and {index.dtype} should be (images,) of integers: for every "
            "image in reading order its row in `pixel_values` or `vision_features`."
        )
    if not torch.compiler.is_compiling() and ((index < 0) | (index >= count)).any():
        raise ValueError(
            f"`image_index` runs from {index.min()} to {index.max()}, but {count} distinct images were given: 0 to "
            f"{count - 1}."
        )
    return index


def draws(module: nn.Module) -> bool:
    """Whether a module's output is random: it trains with dropout."""
    return module.training and any(isinstance(one, nn.Dropout) and one.p > 0 or _drops(one) for one in module.modules())


def _drops(module: nn.Module) -> bool:
    rate = getattr(module, "dropout", 0.0)  # of attention, where it is a number
    return isinstance(rate, float) and rate > 0


def repeated_prefix(prefix: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    if len({vectors.shape for vectors in prefix}) == 1:
        return list(torch.stack(prefix)[index.to(prefix[0].device)])
    return [prefix[row] for row in index.tolist()]


def encoder_output(outputs: ModelOutput | None, prefix: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=getattr(outputs, "last_hidden_state", None),
        pooler_output=prefix,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


__all__ = [
    "MEDIA_INPUTS",
    "SOURCES",
    "checked_index",
    "draws",
    "encoder_output",
    "graph_of",
    "output_flags",
    "repeated_prefix",
    "take_media",
]
