# SPDX-License-Identifier: Apache-2.0
"""Any audio encoder of transformers, read as (clips, positions, width): what `vision_towers` is for images.

An encoder is a model of its own (wav2vec2, AST), the encoder half of an encoder-decoder (Whisper) or the audio half of a
dual model (CLAP). It reads raw samples or a spectrogram, of one fixed length or of any. All of that is found from the
signature, `get_encoder()`, the feature extractor beside it, and runs on the meta device.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .transformers_compat import forward_parameters
from .vision_towers import (
    _HUB_OPTIONS,
    _check_choice,
    _on_meta,
    _select,
    load_with_every_weight,
    vision_tower_class,
)


_INPUT_NAMES = ("input_features", "input_values")
# Masks of positions that training draws at random; a frozen encoder needs none, nor the vector in their place.
_RANDOM_MASKS = ("mask_time_prob", "mask_feature_prob")


@dataclass(frozen=True)
class AudioGeometry:
    """What an audio tower gives to its connector: `num_positions` vectors per clip (`None` where a longer one gives more),
    each of `audio_width`."""

    num_positions: int | None
    audio_width: int


def audio_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the audio half: the audio sub-config of a dual model (CLAP), or `config` itself, in either
    case without random masking. Of an encoder-decoder (Whisper) the config describes both halves; the tower is the
    encoder. Applying this function twice changes nothing."""
    half = getattr(config, "audio_config", None)
    if "audio_config" in getattr(config, "sub_configs", {}) and isinstance(half, PreTrainedConfig):
        config = half
    masked = [name for name in _RANDOM_MASKS if getattr(config, name, 0)]
    if masked:
        config = copy.deepcopy(config)
        for name in masked:
            setattr(config, name, 0.0)
    return config


_ENCODER_CLASSES: dict[type, type[PreTrainedModel]] = {}


def audio_tower_class(audio_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the tower: what `AutoModel` builds, or, where that is an encoder-decoder, its encoder's.

    Raises:
        ValueError: transformers has no such class.
    """
    if not audio_config.is_encoder_decoder:
        return vision_tower_class(audio_config)
    config_class = type(audio_config)
    if config_class not in _ENCODER_CLASSES:
        encoder = _whole_on_meta(audio_config).get_encoder()
        if not isinstance(encoder, PreTrainedModel):
            raise ValueError(
                f"The encoder of {config_class.__name__} ({type(encoder).__name__}) can't be a tower by itself."
                " [errors.md#tower]"
            )
        _ENCODER_CLASSES[config_class] = type(encoder)
    return _ENCODER_CLASSES[config_class]


def _whole_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with _on_meta():
        return AutoModel.from_config(copy.deepcopy(config))


def build_audio_tower(audio_config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A tower with random weights from its config; `kwargs` as for `AutoModel.from_config`."""
    audio_config = audio_half(audio_config)
    # Private: `AutoModel.from_config`, the public way, gives no encoder out of an encoder-decoder.
    return audio_tower_class(audio_config)._from_config(audio_config, **kwargs)


def load_audio_tower(name_or_path: str, *, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    A tower with its own weights, out of its repository or that of the model which it is one half of.

    Args:
        name_or_path (`str`): repository or folder.
        config (`PreTrainedConfig`, *optional*): the tower's config where it is known; else the repository's own.
        kwargs: as for `from_pretrained`.

    Raises:
        ValueError: weights of the tower are missing there.
    """
    hub = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS}
    whole = AutoConfig.from_pretrained(name_or_path, **hub) if config is None else config
    half = audio_half(whole)

    def place(tower_class: type) -> str | None:
        model = _whole_on_meta(whole if half.is_encoder_decoder else AutoConfig.from_pretrained(name_or_path, **hub))
        names = (name for name, module in model.named_modules() if name and type(module) is tower_class)
        # Checkpoints with a head have everything under one more name.
        return next((rf"(?:{model.base_model_prefix}\.)?{name}" for name in names), None)

    return load_with_every_weight(audio_tower_class(half), name_or_path, place, config=half, **kwargs)


# --------------------------------------------------------------------------------------------- audio in, features out


def encode_audio(
    audio_tower: PreTrainedModel,
    input_features: Tensor,
    *,
    mask: Tensor | None = None,
    layer: int | list[int] = -1,
    select_strategy: str = "full",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, ModelOutput]:
    """
    Runs the tower and brings its output into (clips, positions, width).

    Args:
        audio_tower (`PreTrainedModel`): any audio encoder of transformers, in eval mode.
        input_features (`torch.Tensor`):
            What its feature extractor makes, under whatever name: samples `(clips, samples)` or a spectrogram.
        mask (`torch.Tensor` of shape `(clips, samples or frames)`, *optional*): 1 where audio is, 0 where it was padded.
        layer (`int` or `list[int]`, defaults to -1): as for [`encode_images`].
        select_strategy (`str`, defaults to `"full"`):
            `"full"` gives all positions, `"pooled"` one vector per clip: the tower's own pooled output, else the mean over
            its positions.
        kwargs: passed on where the tower takes them (CLAP's `is_longer`, `output_hidden_states`).

    Returns:
        `tuple`: the features; a bool mask `(clips, positions)`, true where audio is, or `None` where all is; the tower's
        output.
    """
    layers = _check_choice(layer, select_strategy)
    # Normalised over the whole time, padding included (wav2vec2's first models): then each length is run on its own.
    if mask is not None and getattr(audio_tower.config, "feat_extract_norm", None) == "group" and not mask.all():
        return _by_length(audio_tower, input_features, mask, layer, select_strategy, kwargs)
    takes = forward_parameters(type(audio_tower))
    name = next((name for name in _INPUT_NAMES if name in takes), audio_tower.main_input_name)
    inputs = {key: value for key, value in kwargs.items() if value is not None and (key in takes or key.startswith("output_"))}
    if mask is not None and "attention_mask" in takes:
        inputs["attention_mask"] = mask
    if layers != [-1]:
        inputs["output_hidden_states"] = True
    output = audio_tower(**{name: input_features.to(audio_tower.dtype)}, **inputs)
    states = output.last_hidden_state
    pooled = getattr(output, "pooler_output", None)
    # Of a map, the axis of the width is the one that pooling keeps.
    axis = 1 if states.ndim > 3 and pooled is not None and pooled.shape[-1] == states.shape[1] else states.ndim - 1
    positions_mask = None if mask is None or states.ndim != 3 else _positions_mask(audio_tower, mask, states.shape[1])
    features, positions_mask = _select(
        output, layers, select_strategy, 0, positions_mask, width_axis=lambda index: axis, use_pooler=True
    )
    return features, positions_mask, output


def _by_length(
    tower: PreTrainedModel, inputs: Tensor, mask: Tensor, layer: Any, strategy: str, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, ModelOutput]:
    lengths = mask.sum(-1).tolist()
    by_row: list[Tensor] = [inputs] * len(lengths)
    for length in set(lengths):
        rows = [row for row, other in enumerate(lengths) if other == length]
        own = inputs[rows][mask[rows].bool()].unflatten(0, (len(rows), length))  # padded on either side
        features, _, _ = encode_audio(tower, own, layer=layer, select_strategy=strategy, **kwargs)
        for row, one in zip(rows, features, strict=True):
            by_row[row] = one
    padded = torch.nn.utils.rnn.pad_sequence(by_row, batch_first=True)
    ends = torch.tensor([len(one) for one in by_row], device=padded.device)
    valid = torch.arange(padded.shape[1], device=padded.device) < ends[:, None]
    return padded, valid, BaseModelOutput(last_hidden_state=padded)


def _positions_mask(tower: PreTrainedModel, mask: Tensor, positions: int) -> Tensor:
    """Which positions hold audio, from which samples or frames do, by the tower's own rule where it has one."""
    if mask.shape[1] == positions:
        return mask.bool()
    lengths = mask.sum(-1)
    of_tower = getattr(tower, "_get_feat_extract_output_lengths", None)  # private: models have no other name for it
    if of_tower is not None:
        lengths = of_tower(lengths)
    else:
        lengths = -(-lengths * positions // mask.shape[1])
    return torch.arange(positions, device=mask.device) < lengths.clamp(min=1, max=positions)[:, None]


# -------------------------------------------------------------------------------------------- probing without weights


def probe_audio_tower(
    audio_config: PreTrainedConfig,
    *,
    layer: int | list[int] = -1,
    select_strategy: str = "full",
    feature_extractor: Any = None,
) -> AudioGeometry:
    """
    What [`encode_audio`] will give for this tower, probed on the meta device.

    Args:
        audio_config (`PreTrainedConfig`): of the tower, or of a model that it is one half of.
        layer, select_strategy: as for [`encode_audio`].
        feature_extractor (*optional*):
            The tower's own, which has the shape of its inputs. Without it, shapes that the config suggests are tried.

    Returns:
        [`AudioGeometry`]

    Raises:
        ValueError: none of the inputs tried was taken.
    """
    audio_config = copy.deepcopy(audio_half(audio_config))
    audio_config._attn_implementation = None
    if getattr(audio_config, "enable_fusion", False):  # four views of long clips, distinguished by their values
        audio_config.enable_fusion = False
    with _on_meta():
        tower = audio_tower_class(audio_config)(audio_config).eval()

    def positions_and_width(shape: tuple[int, ...]) -> tuple[int, int]:
        with _on_meta():
            inputs = torch.empty(1, *shape, dtype=tower.dtype)
            features, _, _ = encode_audio(tower, inputs, layer=layer, select_strategy=select_strategy)
        return features.shape[1], features.shape[2]

    tried: list[tuple[int, ...]] = []
    reason: Exception | None = None
    for short, long in _shapes(audio_config, feature_extractor):
        tried.append(short)
        try:
            positions, width = positions_and_width(short)
        except Exception as error:
            reason = reason or error
            continue
        try:
            fixed = short == long or positions_and_width(long)[0] == positions
        except Exception:  # it takes this one length
            fixed = True
        return AudioGeometry(positions if fixed else None, width)
    raise ValueError(
        f"{type(tower).__name__} took none of the inputs tried (of shapes {tried}): {reason}. An audio tower must give "
        "`last_hidden_state` for `input_features` or `input_values` alone; pass its feature extractor, which has "
        "their shape. [errors.md#tower]"
    ) from reason


def _shapes(config: PreTrainedConfig, feature_extractor: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of shapes that a short and a long clip may have."""
    if feature_extractor is not None:
        import numpy

        rate = feature_extractor.sampling_rate
        pair: list[tuple[int, ...]] = []
        for seconds in (1, 3):
            noise = numpy.random.default_rng(0).standard_normal(seconds * rate).astype("float32")
            try:
                made = feature_extractor(noise, sampling_rate=rate, return_tensors="np")
            except ValueError:
                if not pair:
                    raise
                break  # too long for it
            shape = next(made[name] for name in _INPUT_NAMES if name in made).shape[1:]
            pair.append((1, *shape[1:]) if len(shape) == 3 else tuple(shape))
        return [(pair[0], pair[-1])]

    def of(*names: str, default: int) -> int:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)

    mels = of("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", default=80)
    frames = (
        2 * of("max_source_positions", default=1500)
        if hasattr(config, "max_source_positions")
        else of("max_length", default=1024)
    )
    spectrograms = [(mels, frames), (frames, mels), (1, frames, mels)]
    doubled = [(mels, 2 * frames), (2 * frames, mels), (1, 2 * frames, mels)]
    return [((16000,), (48000,)), *zip(spectrograms, doubled, strict=True), ((1, 64, mels), (1, 128, mels))]


__all__ = [
    "AudioGeometry", "audio_half", "audio_tower_class", "build_audio_tower", "encode_audio",
    "load_audio_tower", "probe_audio_tower",
]  # fmt: skip
