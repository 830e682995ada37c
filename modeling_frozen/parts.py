# SPDX-License-Identifier: Apache-2.0
"""The one table of the parts of a model.

A part is a backbone: the vision tower, the language model, the audio tower. A modality is a tower, a connector that writes its
prefix, a placeholder whose embeddings the prefix takes, and the inputs that bring it. Videos share the vision tower and its
connector; audio has its own two. Several vision towers that one connector reads are parts of their own, so that record,
fingerprint, loading and freezing are each one's; their inputs have its number. Whatever goes over parts or modalities goes
over these tables.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from transformers.utils import TransformersKwargs


@dataclass(frozen=True)
class Part:
    """
    A backbone.

    Attributes:
        attribute: under which [`FrozenPrefixModel`] holds it.
        description: what messages call it.
        kind: by which it is built, loaded and probed: `"vision"`, `"text"` or `"audio"`.
        can_be_unloaded: whether a model can do without it for a while.
    """

    attribute: str
    description: str
    kind: str
    can_be_unloaded: bool = True


PARTS = {
    "vision": Part("vision_tower", "vision tower", "vision"),
    "text": Part("language_model", "language model", "text", can_be_unloaded=False),
    "audio": Part("audio_tower", "audio tower", "audio"),
    "vision_2": Part("vision_tower_2", "second vision tower", "vision"),
    "vision_3": Part("vision_tower_3", "third vision tower", "vision"),
}
# The towers whose features one connector can read together.
VISION_PARTS = tuple(name for name, part in PARTS.items() if part.kind == "vision")
# What `trainable` may name.
TRAINABLE = ("connector", *PARTS)


class ImageInputs(TypedDict, total=False):
    """What `forward` takes of images."""

    pixel_values: torch.FloatTensor | None
    vision_features: torch.FloatTensor | None
    vision_features_mask: torch.Tensor | None
    image_index: torch.LongTensor | None
    pixel_attention_mask: torch.Tensor | None
    spatial_shapes: torch.LongTensor | None
    interpolate_pos_encoding: bool | None
    pixel_values_2: torch.FloatTensor | None
    pixel_values_3: torch.FloatTensor | None
    vision_features_2: torch.FloatTensor | None
    vision_features_3: torch.FloatTensor | None


class VideoInputs(TypedDict, total=False):
    """What `forward` takes of videos."""

    pixel_values_videos: torch.FloatTensor | None


class AudioInputs(TypedDict, total=False):
    """What `forward` takes of audio."""

    input_features: torch.FloatTensor | None
    input_features_mask: torch.Tensor | None
    is_longer: torch.BoolTensor | None


class FrozenPrefixKwargs(ImageInputs, VideoInputs, AudioInputs, TransformersKwargs, total=False):
    """What `forward` takes beside its named arguments; all else in `TransformersKwargs` goes to the language model."""

    shift_labels: torch.LongTensor | None
    loss_config: dict[str, Any] | None
    skip_logits: bool | None


@dataclass(frozen=True)
class Modality:
    """
    A modality beside text.

    Attributes:
        part: the tower that reads it, in `PARTS`.
        connector: attribute of [`FrozenPrefixModel`] that holds its connector.
        inputs: names of all that `forward` takes of it.
        sources: those of `inputs` of which exactly one brings it; the others go with a source.
        way_out: how a model comes to take it, for messages.
    """

    part: str
    connector: str
    inputs: tuple[str, ...]
    sources: tuple[str, ...]
    way_out: str


MODALITIES = {
    "image": Modality(
        part="vision",
        connector="connector",
        inputs=tuple(ImageInputs.__annotations__),
        sources=("pixel_values", "vision_features"),
        way_out="join a vision tower to it (`from_vision_text_pretrained`)",
    ),
    "video": Modality(
        part="vision",
        connector="connector",
        inputs=(*VideoInputs.__annotations__, "interpolate_pos_encoding"),
        sources=("pixel_values_videos",),
        way_out="set `num_frames` in its config",
    ),
    "audio": Modality(
        part="audio",
        connector="audio_connector",
        inputs=tuple(AudioInputs.__annotations__),
        sources=("input_features",),
        way_out="join an audio tower to it (`audio_model_name_or_path` of `from_vision_text_pretrained`)",
    ),
}
# Of towers behind the first; each goes with what the first one reads.
FURTHER_IMAGE_INPUTS = tuple(name for name in ImageInputs.__annotations__ if name[-1].isdigit())
MEDIA_INPUTS = tuple(dict.fromkeys(name for modality in MODALITIES.values() for name in modality.inputs))


def input_of(part: str, name: str) -> str:
    """What `pixel_values` or `vision_features` of a vision tower are called: those of the second are `pixel_values_2`."""
    return name + part.removeprefix("vision")


def part_of(key: str) -> str | None:
    """The part to which a key such as `vision_2_dtype` belongs."""
    return max((part for part in PARTS if key.startswith(f"{part}_")), key=len, default=None)


def take_media(kwargs: Any, **named: Any) -> dict[str, Any]:
    """Takes out of `kwargs` what is there of `MEDIA_INPUTS`, and adds what `forward` takes by name; without what is `None`."""
    media = {**named, **{name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}}
    return {name: value for name, value in media.items() if value is not None}


__all__ = [
    "FURTHER_IMAGE_INPUTS", "MEDIA_INPUTS", "MODALITIES", "PARTS", "TRAINABLE", "VISION_PARTS", "FrozenPrefixKwargs",
    "Modality", "Part", "input_of", "part_of", "take_media",
]  # fmt: skip
