# SPDX-License-Identifier: Apache-2.0
"""The model: a frozen vision tower and a frozen language model, joined by a connector that writes the visual prefix.

`FrozenPrefixModel` holds the parts and merges prefix and words; `FrozenPrefixForConditionalGeneration` adds the loss and
`generate()`. Freezing, saving and loading are their common base's.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .answer_scoring import score_answers
from .audio_towers import build_audio_tower, encode_audio
from .backbones import build_language_model, language_model_geometry, max_learned_positions, skips_padding
from .checkpoints import parts_to_build
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connectors import Connector, build_connector, draws
from .cross_attention import GatedCrossAttention
from .generation_frozen_prefix import FrozenPrefixGenerationMixin
from .losses import LossPlan, compiled_part, trains_beside_graph
from .modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from .padding import counts_fit, describe_mismatch, pad_right, position_ids_from_mask, reads_in_chunks, words_of
from .parts import FURTHER_IMAGE_INPUTS, MODALITIES, PARTS, FrozenPrefixKwargs, input_of, take_media
from .prefix_cache import PrefixCache, prefix_output
from .prefix_sharing import SharedStart, encode_alike, find_shared_start, read_shared_start
from .transformers_compat import (
    CACHE,
    AnyCacheName,
    cache_argument,
    cached_length,
    forward_parameters,
    takes_cache,
)
from .vision_towers import build_vision_tower, encode_images, join_features
from .weights import alone, gathers_layers


# Inputs of images that mean nothing without `pixel_values` or `vision_features`.
_WITH_A_SOURCE = ("image_index", "vision_features_mask", *FURTHER_IMAGE_INPUTS)


def _gradients_through(tower: nn.Module, inputs: torch.Tensor) -> torch.set_grad_enabled:
    # A frozen tower keeps no graph, unless somebody asks for gradients of the image itself.
    tower_trains = any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and (tower_trains or inputs.requires_grad))


def _output_flags(kwargs: Any) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("output_hidden_states", "output_attentions") if key in kwargs}


def _checked_index(index: torch.Tensor, count: int) -> torch.Tensor:
    """`image_index` where it points into `count` rows; in a compiled graph that is left to the lookup itself."""
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"`image_index` of shape {tuple(index.shape)} and {index.dtype} should be (images,) of integers: for every "
            "image in reading order its row in `pixel_values` or `vision_features`. [errors.md#stored-features]"
        )
    if not torch.compiler.is_compiling() and ((index < 0) | (index >= count)).any():
        each_once = torch.arange(count, device=index.device)
        if len(index) == count and torch.equal(index - index[0], each_once):
            return each_once  # rows cut out of a batch in which each image occurs once
        raise ValueError(
            f"`image_index` runs from {index.min()} to {index.max()}, but {count} distinct images were passed: 0 to "
            f"{count - 1}. Where something cuts batches up row by row (`dispatch_batches`, `nn.DataParallel`), give the "
            "collator share_images=False. [errors.md#shape]"
        )
    return index


def _repeated(prefix: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    if len({vectors.shape for vectors in prefix}) == 1:
        return list(torch.stack(prefix)[index.to(prefix[0].device)])
    return [prefix[row] for row in index.tolist()]


@dataclass
class _FurtherOutputs:
    """What both outputs have beyond those of a causal language model."""

    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None


@dataclass
class FrozenPrefixModelOutputWithPast(_FurtherOutputs, AnyCacheName, BaseModelOutputWithPast):
    """
    Output of `FrozenPrefixModel`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`):
            Of the language model (for encoder-decoders: of its decoder).
        cache (or, before transformers 5.24, past_key_values; read it by either name), hidden_states, attentions, …:
            as the language model gives them.
        image_hidden_states, video_hidden_states, audio_hidden_states (`torch.FloatTensor`, *optional*):
            The prefix vectors `(sum of prefix lengths, embedding_dim)` as the language model read them.
    """


@dataclass
class FrozenPrefixCausalLMOutputWithPast(_FurtherOutputs, AnyCacheName, CausalLMOutputWithPast):
    """
    Output of `FrozenPrefixForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): returned when `labels` are passed.
        logits (`torch.FloatTensor` of shape `(batch, sequence, vocabulary)`, *optional*):
            `None` in training with labels unless `skip_logits=False`: the head then runs only where a label is.
        cache (or, before transformers 5.24, past_key_values; read it by either name), hidden_states, attentions, …:
            as the language model gives them.
        image_hidden_states, video_hidden_states, audio_hidden_states (`torch.FloatTensor`, *optional*):
            The prefix vectors `(sum of prefix lengths, embedding_dim)` as the language model read them.
    """


class FrozenPrefixModel(FrozenPrefixPreTrainedModel):
    """
    Towers, connectors and language model; gives hidden states, without the head's logits.

    `language_model` is the whole model of transformers, head included: scaled, soft-capped or biased heads stay as they
    are, and [`FrozenPrefixForConditionalGeneration`] calls it whole.
    """

    # Each is `None` where the model is without it, or it is unloaded, which is refused before it is used: hence no `| None`.
    vision_tower: PreTrainedModel
    language_model: PreTrainedModel
    audio_tower: PreTrainedModel
    vision_tower_2: PreTrainedModel
    vision_tower_3: PreTrainedModel
    connector: Connector
    audio_connector: Connector
    cross_attention: GatedCrossAttention | None

    def __init__(self, config: FrozenPrefixConfig):
        super().__init__(config)
        has_vision, has_audio = config.vision_config is not None, config.audio_config is not None
        known = (not has_vision or config.features_width is not None) and (not has_audio or config.audio_width is not None)
        if not known or config.embedding_dim is None:
            raise ValueError(
                "This config does not know the geometry of its backbones (`vision_width`, `embedding_dim`): build it with "
                "FrozenPrefixConfig.from_vision_text_configs(vision_config, text_config, ...), which probes them."
                " [errors.md#language-model]"
            )
        built = parts_to_build(config)
        # Of the backbones' weights at their source, once they were compared with those here (see `equals_source`).
        self.source_digests: dict[tuple[str, ...], Any] = {}
        # Registered in this order: the connector is initialised last, at the norm of the words.
        builders: dict[str, Callable[[Any], PreTrainedModel]] = {
            "vision": build_vision_tower,
            "text": functools.partial(build_language_model, headless=config.text_headless),
            "audio": build_audio_tower,
        }
        for name, part in PARTS.items():
            backbone = builders[part.kind](getattr(config, f"{name}_config")) if name in built else None
            self.register_module(part.attribute, backbone)
        self.connector = build_connector(**config.connector_arguments) if has_vision else None  # type: ignore[assignment]
        self.audio_connector = build_connector(**config.audio_connector_arguments) if has_audio else None  # type: ignore[assignment]
        self.cross_attention = None
        if config.fusion == "cross_attention":
            # The numbers of layers and widths are checked by the config.
            sizes: dict[str, Any] = {"hidden_size": config.text_hidden_size, "num_layers": config.text_num_layers}
            options = config.cross_attention_config
            self.cross_attention = GatedCrossAttention(**sizes, embedding_dim=config.embedding_dim, options=options)
        # What trains stays in fp32 whatever the backbones' dtype is: in half precision its updates would be lost.
        trained = {name: getattr(self, name) for name in ("connector", "audio_connector", "cross_attention")}
        self._keep_in_fp32_modules_strict = {name for name, part in trained.items() if part is not None and part.state_dict()}
        self.post_init()
        self._finish_init()

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[FrozenPrefixKwargs],
    ) -> FrozenPrefixModelOutputWithPast:
        """
        Args: as [`FrozenPrefixForConditionalGeneration.forward`].

        Returns:
            [`FrozenPrefixModelOutputWithPast`]
        """
        self.refuse_without_words()
        callee = self.language_model.base_model
        # Some encoder-decoders have no headless model: the whole one then gives its decoder's hidden states.
        whole = callee is self.language_model
        media = take_media(kwargs, pixel_values=pixel_values)
        if cache is None and kwargs.get("encoder_outputs") is None:  # else the images may have been read before
            self.refuse_placeholders_alone(input_ids, media, mm_encoder_outputs)
        outputs, prefixes = self.run(
            callee,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            media=media,
            kwargs={**kwargs, "output_hidden_states": True} if whole else dict(kwargs),
        )
        fields = {name: outputs.get(name) for name in FrozenPrefixModelOutputWithPast.__dataclass_fields__}
        if whole:
            states = "decoder_hidden_states" if self.config.is_encoder_decoder else "hidden_states"
            fields["last_hidden_state"] = outputs[states][-1]
        return FrozenPrefixModelOutputWithPast(**{**fields, **prefixes})

    def run(
        self,
        callee: nn.Module,
        *,
        input_ids: torch.Tensor | None,
        media: dict[str, Any],
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        kwargs: dict[str, Any],
        shared: SharedStart | None = None,
    ) -> tuple[ModelOutput, dict[str, torch.Tensor]]:
        """Merges prefixes and words and calls the language model (or its headless base). `media` holds what there is of
        `MEDIA_INPUTS`; what rows have in common by `shared` is read once, and the output is of what follows it. Returns the
        output and the prefixes, as `image_hidden_states` and so on."""
        ids_with_placeholders = input_ids  # merging takes them out
        if self.config.is_encoder_decoder and kwargs.get("encoder_outputs") is not None:
            inputs = {"attention_mask": attention_mask, cache_argument(forward_parameters(type(callee))): cache, **kwargs}
            return callee(**inputs, return_dict=True), {}
        input_ids, inputs_embeds, prefixes = self.merge(input_ids, inputs_embeds, media, mm_encoder_outputs)
        if self.config.is_encoder_decoder:
            input_ids, inputs_embeds, attention_mask = pad_right(input_ids, inputs_embeds, attention_mask)
        if shared is not None and inputs_embeds is not None and self.config.is_encoder_decoder:
            encoded = encode_alike(self, shared, inputs_embeds, attention_mask)
            inputs = {**kwargs, "attention_mask": attention_mask, "encoder_outputs": encoded}
        else:
            if shared is not None and inputs_embeds is not None:
                cache = read_shared_start(self, shared, inputs_embeds)
                inputs_embeds, kwargs = inputs_embeds[:, shared.length :], {**kwargs, "use_cache": True}
            inputs = self.language_inputs(callee, input_ids, inputs_embeds, attention_mask, position_ids, cache, kwargs)
        if self.cross_attention is not None:
            ordered = prefixes.get("in_reading_order")
            placeholders = None if ids_with_placeholders is None else self.placeholders(ids_with_placeholders)
            outputs = self.cross_attention.call(callee, inputs, placeholders, ordered)
            return outputs, {} if ordered is None else {"image_hidden_states": torch.cat(ordered)}
        outputs = compiled_part(callee, **inputs, return_dict=True)
        return outputs, {f"{modality}_hidden_states": prefix for modality, prefix in prefixes.items()}

    # ------------------------------------------------------------------------------------------ from images to prefixes

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_features_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images into prefixes: once, for any number of texts.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                All images of the batch in reading order; with `image_index`, the distinct ones.
            pixel_attention_mask, spatial_shapes (`torch.Tensor`), interpolate_pos_encoding (`bool`), *optional*:
                For towers that take them.
            vision_features (`torch.FloatTensor` of shape `(num_images, positions, vision_width)`, *optional*):
                In place of `pixel_values`: what the tower would have given the connector, of any float dtype. The tower
                then need not be loaded.
            vision_features_mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*):
                True at real positions, where their number varies.
            image_index (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                For every image in reading order its row in `pixel_values` or `vision_features`, so that an image that
                stands in several places is encoded once. Left out, each row stands once, in order.
            pixel_values_2, pixel_values_3, vision_features_2, vision_features_3 (`torch.FloatTensor`, *optional*):
                The same images as a second and third vision tower read them, or their features, of models with several.
            prefix_length (`int`, *optional*): one of `config.prefix_lengths`; the longest by default.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor `(prefix_length, embedding_dim)` per
            image (of `image_index`, where passed); the other fields are the (first) tower's own, one row per image that it
            read, and `None` where features were passed. Pass it on as `mm_encoder_outputs={"image": output}`.

        Raises:
            ValueError: for neither or both of `pixel_values` and `vision_features`, features of another width, an index out
                of range, or a length that the model was not made for.
        """
        self._check_length(prefix_length)
        media = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "vision_features": vision_features,
            "vision_features_mask": vision_features_mask,
        }
        features, mask, outputs = self.read_images(take_media(kwargs, **media), kwargs)
        grids: torch.Tensor | None = spatial_shapes
        index = None if image_index is None else _checked_index(image_index, len(features)).to(features.device)
        if index is not None and draws(self.connector):
            # Dropout falls on each use by itself, as if the image had been encoded for each.
            features, mask = features[index], None if mask is None else mask[index.to(mask.device)]
            grids = None if grids is None else grids[index.to(grids.device)]
            index = None
        prefix = self.write_prefix(features, mask, grids, prefix_length)
        return prefix_output(prefix if index is None else _repeated(prefix, index), outputs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes videos into prefixes, as [`get_image_features`] does images.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, frames, channels, height, width)`):
                All videos of the batch in reading order.
            interpolate_pos_encoding (`bool`, *optional*): for towers that take it.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor per video, of `frames *
            prefix_length` vectors with `video_pooling="none"`, else of `prefix_length`; the other fields are the
            tower's own, frame by frame. Pass it on as `mm_encoder_outputs={"video": output}`.
        """
        self._require("video")
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"`pixel_values_videos` of shape {tuple(pixel_values_videos.shape)} should be (videos, frames, "
                "channels, height, width): every video of a batch has the same number of frames. [errors.md#media]"
            )
        videos, frames = pixel_values_videos.shape[:2]
        options = {"interpolate_pos_encoding": interpolate_pos_encoding}
        features, _, outputs = self._encode_pixels("vision", pixel_values_videos.flatten(0, 1), options, kwargs)
        by_video = features.unflatten(0, (videos, frames))
        if self.config.video_pooling == "none":
            prefix = self._connect(self.connector, features).unflatten(0, (videos, frames)).flatten(1, 2)
        elif self.config.video_pooling == "mean":
            prefix = self._connect(self.connector, by_video.mean(dim=1))
        else:
            prefix = self._connect(self.connector, by_video.flatten(1, 2), frames=frames)
        return prefix_output(self._by_placeholder(prefix), outputs)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.FloatTensor,
        input_features_mask: torch.Tensor | None = None,
        is_longer: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes audio into prefixes, as [`get_image_features`] does images.

        Args:
            input_features (`torch.FloatTensor` of shape `(num_audios, ...)`):
                All audio inputs of the batch in reading order, as the tower's feature extractor makes them (also where that
                calls them `input_values`).
            input_features_mask (`torch.Tensor` of shape `(num_audios, samples or frames)`, *optional*):
                1 where audio is, 0 where it was padded.
            is_longer (`torch.BoolTensor`, *optional*): for CLAP.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor `(audio_prefix_length,
            embedding_dim)` per audio; the other fields are the tower's own. Pass it on as
            `mm_encoder_outputs={"audio": output}`.
        """
        self._require("audio")
        self._refuse_unloaded("audio", "")
        options = {"is_longer": is_longer, **_output_flags(kwargs)}
        with _gradients_through(self.audio_tower, input_features):
            features, mask, outputs = encode_audio(
                self.audio_tower,
                input_features,
                mask=input_features_mask,
                layer=self.config.audio_feature_layer,
                select_strategy=self.config.audio_feature_select_strategy,
                **options,
            )
        # What keeps positions has one placeholder for each, padded or not.
        mask = mask if self.audio_connector.reads_positions else None
        prefix = self._connect(self.audio_connector, features, attention_mask=mask)
        return prefix_output(self._by_placeholder(prefix), outputs)

    def read_images(self, media: dict[str, Any], kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None, ModelOutput | None]:
        """
        What the connector reads of images: what the vision tower makes of them, or several, joined.

        Args:
            media (`dict`): what there is of the inputs of images.
            kwargs (`dict`): flags of what the tower is to return.

        Returns:
            The features `(images, positions, width)`; a mask `(images, positions)`, true at real positions, or `None` where
            all are; the first tower's own output, where it ran.

        Raises:
            ValueError: for a tower with neither or both of `pixel_values` and `vision_features`, or inputs of one that the
                model lacks.
        """
        self._require("image")
        parts = self.config.vision_parts
        known = [input_of(part, name) for part in parts for name in MODALITIES["image"].sources]
        if unknown := [name for name in FURTHER_IMAGE_INPUTS if media.get(name) is not None and name not in known]:
            raise ValueError(
                f"{unknown} were passed, and this model has {len(parts)} vision tower{'s' * (len(parts) > 1)}, which read"
                f"{'s' * (len(parts) == 1)} {known}: take a processor, or stored features, made for this model."
                " [errors.md#not-loaded]"
            )
        if len(parts) > 1 and media.get("vision_features_mask") is not None:
            raise ValueError(
                "`vision_features_mask` goes with one vision tower: several give a grid each, without padding."
                " [errors.md#stored-features]"
            )
        read = [self._read_images(part, media, kwargs) for part in parts]
        if len(parts) == 1:
            return read[0]
        features, _, outputs = zip(*read, strict=True)
        return join_features(features, [self.config.geometry_of(part)["grid"] for part in parts]), None, outputs[0]

    def _read_images(
        self, part: str, media: dict[str, Any], kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, ModelOutput | None]:
        pixels, stored = (input_of(part, name) for name in MODALITIES["image"].sources)
        pixel_values: Any = media.get(pixels)
        features, mask = media.get(stored), media.get("vision_features_mask")
        if (pixel_values is None) == (features is None):
            raise ValueError(
                f"You must specify exactly one of {pixels} or {stored}"
                + (f", which the {PARTS[part].description} reads" if len(self.config.vision_parts) > 1 else "")
                + " [errors.md#contradiction]"
            )
        if features is not None:
            return features, self._check_features(part, features, mask), None
        if mask is not None:
            raise ValueError(
                f"`vision_features_mask` goes with `vision_features`, and `{pixels}` were passed. [errors.md#stored-features]"
            )
        names = ("pixel_attention_mask", "spatial_shapes", "interpolate_pos_encoding")
        return self._encode_pixels(part, pixel_values, {name: media.get(name) for name in names}, kwargs)

    def _check_features(self, part: str, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        width = self.config.geometry_of(part)["vision_width"]
        if features.ndim != 3 or features.shape[-1] != width or not features.is_floating_point():
            raise ValueError(
                f"`{input_of(part, 'vision_features')}` of shape {tuple(features.shape)} and {features.dtype} should be "
                f"(images, positions, {width}) of a float dtype: what the {PARTS[part].description} gives the connector at "
                f"`{part}_feature_layer={getattr(self.config, f'{part}_feature_layer')}`, behind "
                f"`vision_feature_select_strategy={self.config.vision_feature_select_strategy!r}`. `cache_vision_features` "
                "makes them. [errors.md#shape]"
            )
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"`vision_features_mask` of shape {tuple(mask.shape)} should be {tuple(features.shape[:2])}: the (images, "
                "positions) of `vision_features`. [errors.md#stored-features]"
            )
        return None if mask is None else mask.to(features.device, torch.bool)

    def _encode_pixels(
        self, part: str, pixel_values: torch.Tensor, options: dict[str, Any], kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, ModelOutput]:
        self._refuse_unloaded(part, f", or pass `{input_of(part, 'vision_features')}`, which `cache_vision_features` stores")
        tower = getattr(self, PARTS[part].attribute)
        with _gradients_through(tower, pixel_values):
            return compiled_part(
                encode_images,
                tower,
                pixel_values,
                layer=getattr(self.config, f"{part}_feature_layer"),
                select_strategy=self.config.vision_feature_select_strategy,
                num_leading_tokens=self.config.geometry_of(part)["num_leading_tokens"] or 0,
                **{key: value for key, value in {**options, **_output_flags(kwargs)}.items() if value is not None},
            )

    def _refuse_unloaded(self, part: str, or_else: str) -> None:
        if getattr(self, PARTS[part].attribute) is None:
            raise ValueError(
                f'The {PARTS[part].description} is not loaded: load it by `model.load_base_model("{part}")`{or_else}.'
                " [errors.md#not-loaded]"
            )

    def refuse_without_words(self) -> None:
        """
        Raises:
            ValueError: if the language model was left where it is.
        """
        if self.language_model is None:
            raise ValueError(
                "The language model is not loaded (`load_language_model=False`), so this model encodes alone: "
                "`get_image_features` and the like. Load the checkpoint without that option to read or write words."
                " [errors.md#not-loaded]"
            )

    def _require(self, modality: str) -> None:
        if modality not in self.config.media:
            raise ValueError(
                f"This model takes {list(self.config.media)}, and no {modality}: {MODALITIES[modality].way_out}."
                " [errors.md#not-loaded]"
            )

    def _check_length(self, prefix_length: int | None) -> None:
        allowed: Sequence[int | None] = self.config.prefix_lengths or [self.config.prefix_length]
        if prefix_length is not None and prefix_length not in allowed:
            raise ValueError(
                f"A prefix of {prefix_length} vectors an image, and this model writes {' or '.join(map(str, allowed))}: pass "
                "`prefix_length=` of these to the processor, or join a model with others in `prefix_lengths`."
                " [errors.md#connector-fit]"
            )

    def _length_of_placeholders(self, input_ids: torch.Tensor | None, inputs: dict[str, Any], source: str) -> dict[str, int]:
        """The length that the placeholders stand for, where the model writes several."""
        if not self.config.prefix_lengths or input_ids is None:
            return {}
        images = len(inputs["image_index"] if "image_index" in inputs else inputs[source])
        placeholders = int(input_ids.eq(self.config.image_token_id or 0).sum())
        if placeholders % images or placeholders // images not in self.config.prefix_lengths:
            raise ValueError(
                f"`input_ids` hold {placeholders} image placeholders for {images} images, where each image has the same "
                f"number of them, one of {self.config.prefix_lengths}. [errors.md#placeholders]"
            )
        return {"prefix_length": placeholders // images}

    def write_prefix(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        prefix_length: int | None = None,
    ) -> list[torch.Tensor]:
        """
        Runs the connector.

        Args:
            features (`torch.Tensor` of shape `(num_images, positions, vision_width)`): of the tower.
            mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*): valid positions.
            spatial_shapes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Rows and columns of each image's positions, for connectors that read a grid where each image has its own.
            prefix_length (`int`, *optional*): a shorter length than the connector's own.

        Returns:
            `list[torch.Tensor]`: one prefix `(prefix_length, embedding_dim)` per image; with cross-attention
            `(1, prefix_length * embedding_dim)`, for transformers' `generate` counts one row per placeholder.
        """
        grids: dict[str, Any] = {"spatial_shapes": spatial_shapes} if self.connector.reads_grid else {}
        if prefix_length is not None:
            grids["prefix_length"] = prefix_length
        prefix: Iterable[torch.Tensor] = self._connect(self.connector, features, attention_mask=mask, **grids)
        if mask is not None and not self.connector.reads_positions and self.config.num_positions != 1:
            prefix = [vectors[valid] for vectors, valid in zip(prefix, mask, strict=True)]
        return self._by_placeholder(prefix)

    @staticmethod
    def _connect(connector: Connector, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        parameters = list(connector.parameters())  # torch 2.6 traces no `next` with a default
        # Offloaded, its weights are on the meta device until accelerate's hooks bring them, and the features with them.
        device = parameters[0].device if parameters and not parameters[0].is_meta else features.device
        kwargs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        return compiled_part(connector, features.to(device), **kwargs)

    def _by_placeholder(self, prefix: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [vectors if self.cross_attention is None else vectors.flatten()[None] for vectors in prefix]

    # ------------------------------------------------------------------------------------------------ among the words

    def _valid_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.cross_attention is not None:
            return input_ids.masked_fill(self.placeholders(input_ids), self.config.image_word_id)
        # A placeholder past the last row has no embedding; any row serves, for it is overwritten.
        rows = language_model_geometry(self.language_model).num_embeddings
        for placeholder in self.config.placeholder_ids.values():
            if placeholder >= rows:
                input_ids = input_ids.masked_fill(input_ids == placeholder, 0)
        return input_ids

    def placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where `input_ids` hold a placeholder of any modality."""
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for placeholder in self.config.placeholder_ids.values():
            mask = mask | (input_ids == placeholder)
        return mask

    def refuse_placeholders_alone(
        self, input_ids: torch.Tensor | None, media: dict[str, Any], mm_encoder_outputs: Mapping[str, Any] | None
    ) -> None:
        """
        Raises:
            ValueError: for placeholders of a modality of which nothing was passed, under no name or a mistyped one: the model
                would read, or learn, without it.
        """
        if input_ids is None or torch.compiler.is_compiling():
            return
        for name, index in self.config.placeholder_ids.items():
            sources = MODALITIES[name].sources
            # What goes with a source and came without one is refused, by its own name, by `encode`.
            named = [one for one in MODALITIES[name].inputs if one in (*sources, *_WITH_A_SOURCE)]
            given = [(mm_encoder_outputs or {}).get(name), *(media.get(one) for one in named)]
            count = int((input_ids == index).sum()) if all(one is None for one in given) else 0
            if count:
                raise ValueError(
                    f"`input_ids` hold {count} {name} placeholders, and no {name} was passed for them: pass "
                    f"{' or '.join(f'`{source}`' for source in sources)} too, as the processor makes them of text and {name}s "
                    f"together, or leave `<{name}>` out of the text. [errors.md#placeholders]"
                )

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: list[torch.Tensor],
        modality: str = "image",
    ) -> torch.Tensor:
        """
        Where the prefix goes: `(batch, sequence, 1)`. Asked of `inputs_embeds` where there are no `input_ids`.

        Raises:
            ValueError: if the placeholders of a sample are no whole number of images, or their total is not that of the
                prefix vectors; names both numbers and the sample.
        """
        index = self.config.placeholder_ids[modality]
        words = words_of(input_ids, inputs_embeds)
        if input_ids is not None:
            mask = words == index
        else:
            if index >= language_model_geometry(self.language_model).num_embeddings:
                raise ValueError(
                    f"The placeholder's id {index} has no embedding, so {modality}s can't be placed into "
                    f"`inputs_embeds`: pass `input_ids`, or embeddings with the prefix already in them and no "
                    f"{modality}s. [errors.md#vocabulary]"
                )
            placeholder = torch.full((1, 1), index, dtype=torch.long, device=words.device)
            mask = (words == self.embed_words(placeholder)).all(-1)
        lengths = [len(vectors) for vectors in image_features]
        if not torch.compiler.is_compiling() and reads_in_chunks.get():
            lengths = [1] * sum(lengths)
        counts = mask.sum(-1)
        # Equal lengths let a device check all samples at once; only variable ones need the samples' counts on the host.
        same = len(set(lengths)) == 1
        right = counts.sum() == sum(lengths)
        if same:
            right = right & (counts % lengths[0] == 0).all()
        if torch.compiler.is_compiling():
            torch_compilable_check(right, "Features and placeholders do not match.")
        elif not right or (not same and not counts_fit(counts.tolist(), lengths)):
            raise ValueError(describe_mismatch(counts.tolist(), lengths, modality) + " [errors.md#placeholders]")
        return mask.unsqueeze(-1)

    def encode(
        self,
        media: dict[str, Any],
        mm_encoder_outputs: Mapping[str, ModelOutput | None] | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Encodes what there is of each modality.

        Args:
            media (`dict`): what there is of `MEDIA_INPUTS`.
            mm_encoder_outputs (`dict`, *optional*): what was encoded before, by modality.
            input_ids (`torch.LongTensor`, *optional*):
                With the placeholders, by whose number the length of the prefix is known where a model writes several.

        Returns:
            `dict`: outputs of `get_image_features`, `get_video_features`, `get_audio_features` by modality.
        """
        encoded = {key: output for key, output in (mm_encoder_outputs or {}).items() if output is not None}
        for name, modality in MODALITIES.items():
            inputs = {key: media[key] for key in modality.inputs if media.get(key) is not None}
            sources = [key for key in modality.sources if key in inputs]
            if not sources:
                alone = next((key for key in _WITH_A_SOURCE if key in inputs), None)
                if alone is not None:
                    raise ValueError(
                        f"`{alone}` goes with `pixel_values` or `vision_features`, and neither was passed."
                        " [errors.md#stored-features]"
                    )
                continue
            if name in encoded:
                raise ValueError(
                    f"You cannot specify both {sources[0]} and mm_encoder_outputs at the same time [errors.md#contradiction]"
                )
            if len(sources) > 1:
                raise ValueError(f"You cannot specify both {' and '.join(sources)} at the same time [errors.md#contradiction]")
            self._require(name)
            if name == "image":
                inputs.update(self._length_of_placeholders(input_ids, inputs, sources[0]))
            encoded[name] = getattr(self, f"get_{name}_features")(return_dict=True, **inputs)
        return encoded

    def merge(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        media: dict[str, Any],
        mm_encoder_outputs: Mapping[str, ModelOutput | None] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any]]:
        """
        Puts prefixes into the word embeddings. Without media, and outside training, ids pass through untouched, so
        that text-only calls are the language model's own.

        Returns:
            `(input_ids, inputs_embeds, prefixes)`, one of the first two `None`; `prefixes` by modality: `(vectors,
            embedding_dim)`, or, with cross-attention, `"in_reading_order"`: a list of one tensor per placeholder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds [errors.md#contradiction]")
        words = words_of(input_ids, inputs_embeds)
        encoded = self.encode(media, mm_encoder_outputs, input_ids)
        idle, merges = self._idle_parts(set(encoded)), self.cross_attention is None
        # Before the words, as encoding is: what is sharded over processes is gathered in one order by all of them.
        nothing = self._zero_of(idle) if idle else None
        prefixes: dict[str, Any] = {}
        if encoded and not merges:
            prefixes["in_reading_order"] = self._in_reading_order(input_ids, encoded)
        if input_ids is not None:
            words = self._valid_ids(words)
            if not idle and not (encoded and merges):
                return words, None, prefixes
            words = self.embed_words(words)
        merged = words
        for modality, output in encoded.items() if merges else ():
            mask = self.get_placeholder_mask(input_ids, words, output.pooler_output, modality)
            prefix = torch.cat(list(output.pooler_output), dim=0).to(words.device, words.dtype)
            merged, prefixes[modality] = merged.masked_scatter(mask, prefix), prefix
        if nothing is not None:
            merged = merged + nothing.to(merged.device, merged.dtype)
        return None, merged, prefixes

    def _in_reading_order(self, input_ids: torch.Tensor | None, encoded: dict[str, Any]) -> list[torch.Tensor]:
        """One tensor `(vectors, embedding_dim)` per placeholder, for gated blocks, to which it matters what stands where."""
        if input_ids is None:
            raise ValueError(
                "Gated blocks find an image's place by its placeholder: pass `input_ids` with images."
                " [errors.md#cross-attention]"
            )
        rows = {}
        for modality, output in encoded.items():
            self.get_placeholder_mask(input_ids, None, output.pooler_output, modality)
            rows[self.config.placeholder_ids[modality]] = iter([row for rows in output.pooler_output for row in rows])
        ordered = []
        for index in input_ids[self.placeholders(input_ids)].tolist():
            if index not in rows:
                raise ValueError(
                    f"`input_ids` hold the placeholder {index} of {self.config.placeholder_ids}, and nothing comes for it."
                    " [errors.md#placeholders]"
                )
            ordered.append(next(rows[index]).unflatten(0, (-1, self.config.embedding_dim)))
        return ordered

    def _idle_parts(self, encoded: set[str]) -> list[nn.Module]:
        """Connectors (and gated blocks) that train and have no part in this batch."""
        if not (self.training and torch.is_grad_enabled()):
            return []
        used = {MODALITIES[name].connector for name in encoded}
        parts = [
            getattr(self, name) for name in dict.fromkeys(one.connector for one in MODALITIES.values()) if name not in used
        ]
        if not encoded:
            parts.append(self.cross_attention)
            self._refuse_uneven_gathering()
        return [part for part in parts if part is not None and any(p.requires_grad for p in part.parameters())]

    def _refuse_uneven_gathering(self) -> None:
        """
        Raises:
            ValueError: where what this batch does not run is gathered from other processes, which would wait for ever.
        """
        towers = {part: backbone for part, backbone in self.backbones.items() if part != "text"}
        if alone() or not (waiting := [part for part, tower in towers.items() if gathers_layers(tower)]):
            return
        raise ValueError(
            f"This process's batch holds no image, video or audio, and the {waiting[0]} tower is sharded in layers (DeepSpeed "
            "ZeRO-3, or FSDP2 that wraps its layers), for which all processes run it together: they would wait for each other "
            "for ever. Give each batch a row with one, wrap the language model's layers alone "
            "(`transformer_layer_cls_to_wrap`), train from stored features with the tower unloaded, or take DDP or ZeRO-2."
            " [errors.md#devices]"
        )

    def _zero_of(self, parts: list[Any]) -> torch.Tensor:
        """Zero, through connectors without input: a batch without images then has a loss with a (zero) gradient for them, as
        distributed training and `backward()` itself require."""
        total: Any = 0.0
        for part in parts:
            if hasattr(part, "zero"):  # asked of the part, for PEFT may have wrapped it
                total = total + part.zero()
                continue
            parameter = next(part.parameters())
            positions = part.num_positions or part.prefix_length or 1
            features = torch.zeros(1, positions, part.vision_width, dtype=parameter.dtype, device=parameter.device)
            total = (
                total
                + part(features, **part.grid_for(1, positions)).sum().to(getattr(total, "device", parameter.device)) * 0.0
            )
        return total

    # -------------------------------------------------------------------------------------------------- the language model

    @property
    def embed_scale(self) -> float:
        """Factor that some encoders (Pegasus, Marian) put on words after the lookup, and not on `inputs_embeds`."""
        if not self.config.is_encoder_decoder:
            return 1.0
        if getattr(self.get_input_embeddings(), "embed_scale", None) is not None:
            return 1.0  # inside the lookup, which we call
        return float(getattr(self.language_model.get_encoder(), "embed_scale", None) or 1.0)

    def embed_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings `(batch, sequence, embedding_dim)` of valid ids, as the language model itself would make them."""
        embeds = self.get_input_embeddings()(input_ids)
        return embeds if self.embed_scale == 1.0 else embeds * self.embed_scale

    def language_inputs(
        self,
        callee: nn.Module,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments for the language model (or its headless base), by the names that `callee` has for them."""
        names = forward_parameters(type(callee))
        length = words_of(input_ids, inputs_embeds).shape[1]
        self.refuse_too_long(length, cache)
        inputs = {key: value for key, value in kwargs.items() if key != "mm_token_type_ids"}
        inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}  # what is `None` goes at the end
        is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if "attention_mask" in names:
            inputs["attention_mask"] = attention_mask
            if is_2d and self.is_recurrent:
                self._refuse_left_padding(attention_mask)
                # A state has no columns to mask: what is past is in it already.
                inputs["attention_mask"] = attention_mask[:, -length:]
        if "position_ids" in names:
            wanted = position_ids is None and is_2d
            inputs["position_ids"] = position_ids_from_mask(attention_mask, length) if wanted else position_ids
        if not self.keeps_cache:
            inputs["use_cache"] = False
        elif cache is not None:
            inputs[cache_argument(names)] = cache
        if "kwargs" not in names:
            inputs = {key: value for key, value in inputs.items() if key in names}
        return {key: value for key, value in inputs.items() if value is not None}

    def refuse_too_long(self, length: int, cache: Cache | None = None) -> None:
        """
        Raises:
            ValueError: if an input of this length, behind what the cache holds, has more words than there are positions.
        """
        if torch.compiler.is_compiling() or self.max_positions is None:
            return
        past = cached_length(cache)
        if length + past > self.max_positions:
            raise ValueError(
                f"The input is {length + past} long, prefix included, but the language model has {self.max_positions} "
                "learned positions: shorten the text (the processor's `max_length` does), use fewer images, or a smaller "
                "`prefix_length`. [errors.md#too-long]"
            )

    @property
    def keeps_cache(self) -> bool:
        """Whether the language model's cache is one of transformers'. Others (RWKV's list of states) can't be reordered or
        stepped in batches, so such a model reads its input anew at every step."""
        # Private: transformers keeps the list to itself. What only reads has no cache to ask of.
        ask = getattr(self.language_model, "_supports_default_dynamic_cache", None)
        return ask is None or ask()

    @property
    def is_recurrent(self) -> bool:
        """Whether the language model carries a state along the sequence in place of keys and values."""
        return bool(getattr(self.language_model, "_is_stateful", False))

    def _refuse_left_padding(self, attention_mask: torch.Tensor) -> None:
        if not torch.compiler.is_compiling() and (attention_mask[:, 0] == 0).any() and not self._skips_padding:
            raise ValueError(
                f"{type(self.language_model).__name__} reads padding as if it were words, so a left-padded batch would give "
                "wrong results: pad on the right to train, and generate for one sample, or samples of equal length, at a time."
                " [errors.md#padding]"
            )

    @functools.cached_property
    def _skips_padding(self) -> bool:
        return skips_padding(self.language_model)

    @functools.cached_property
    def max_positions(self) -> int | None:
        """How many learned positions the language model has; `None` where it computes them."""
        return max_learned_positions(self.language_model)


class FrozenPrefixForConditionalGeneration(FrozenPrefixGenerationMixin, FrozenPrefixPreTrainedModel):
    """
    Frozen tower, connector and frozen language model, with its head: trains by `Trainer`, writes by `generate()`.

    Causal and encoder-decoder language models serve alike; for the latter the prefix goes to the encoder and `labels` to
    the decoder.
    """

    def __init__(self, config: FrozenPrefixConfig):
        if config.text_headless:
            raise ValueError(
                "This checkpoint's text model reads and doesn't write (`text_headless=True`): load it with "
                "FrozenPrefixForImageTextRetrieval, or join the tower to a language model. [errors.md#language-model]"
            )
        super().__init__(config)
        self.model = FrozenPrefixModel(config)
        self.post_init()
        self._finish_init()

    def _finish_init(self) -> None:
        super()._finish_init()
        language_model, own = self.model.language_model, self.generation_config
        # What a checkpoint says of generation holds; where it says nothing, which the private mark alone tells, what the
        # language model is used to.
        if language_model is not None and (own is None or own._from_model_config):
            self.generation_config = copy.deepcopy(language_model.generation_config)
            self.generation_config._from_model_config = False

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.language_model.set_output_embeddings(new_embeddings)

    @trains_beside_graph
    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[FrozenPrefixKwargs],
    ) -> FrozenPrefixCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`):
                Words, with `prefix_length` placeholders (`config.image_token_id`) for each image.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of the whole batch in reading order; left out for text alone.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 1 for words, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Made from the mask where the language model takes them, so that left padding is right.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, embedding_dim)`, *optional*):
                In place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                -100, or a placeholder, where nothing is to be learnt. Causal models: aligned with `input_ids`, shifted inside.
                Encoder-decoders: what the decoder is to write.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): as in transformers; 0 keeps all.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}`, and so with `"video"` and `"audio"`, encoded before.
            pixel_attention_mask, spatial_shapes (`torch.Tensor`), interpolate_pos_encoding (`bool`), *optional*:
                For towers that take them.
            pixel_values_videos, input_features, input_features_mask, is_longer (`torch.Tensor`, *optional*):
                The videos and audio of the whole batch, likewise; see [`FrozenPrefixModel.get_video_features`] and
                [`FrozenPrefixModel.get_audio_features`].
            vision_features (`torch.FloatTensor` of shape `(num_images, positions, vision_width)`, *optional*):
                In place of `pixel_values`: what the frozen tower would have given the connector (see
                `modeling_frozen.data.feature_cache`). The tower then need not be loaded.
            vision_features_mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*):
                True at real positions, where their number varies.
            pixel_values_2, pixel_values_3, vision_features_2, vision_features_3 (`torch.FloatTensor`, *optional*):
                The same of a second and third vision tower, of models with several.
            image_index (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                For every image of the batch in reading order its row in `pixel_values` or `vision_features`, so that an
                image of several samples is encoded once.
            decoder_input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): encoder-decoders only.
            skip_logits (`bool`, *optional*):
                Run the head only where a label is, on a chunk of labels at a time, and return no logits. Defaults to doing
                so in training with labels; where the model is compiled that runs beside its graphs, and `False` keeps one.
            kwargs (`Any`):
                `num_items_in_batch`, what the summed loss is divided by; `loss_config`, for this call, in place of the
                config's (which holds in training alone); all else goes to the language model.

        Returns:
            [`FrozenPrefixCausalLMOutputWithPast`]

        Raises:
            ValueError: if placeholders and images don't match, or the input is longer than the model's positions.
        """
        self.model.refuse_without_words()
        media = take_media(kwargs, pixel_values=pixel_values)
        if cache is None and kwargs.get("encoder_outputs") is None:  # else the images may have been read before
            self.model.refuse_placeholders_alone(input_ids, media, mm_encoder_outputs)
        plan = LossPlan(self, labels, decoder_input_ids, logits_to_keep, dict(kwargs))
        shared, skipped = None, 0
        encoded: dict[str, Any] | None = mm_encoder_outputs
        may_share = plan.may_share and position_ids is None and cache is None and "image_index" in media
        if may_share and input_ids is not None and plan.path is not None and plan.learnt is not None:
            index = media["image_index"]
            encoded, media = self.model.encode(media, mm_encoder_outputs, input_ids), {}
            lengths = [len(vectors) for vectors in encoded["image"].pooler_output]
            shared = find_shared_start(self.model, input_ids, attention_mask, lengths, index, plan.path, plan.learnt)
            skipped = 0 if shared is None or self.config.is_encoder_decoder else shared.length
        outputs, prefixes = self.model.run(
            plan.callee(skipped),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=encoded,
            media=media,
            kwargs=plan.kwargs,
            shared=shared,
        )
        loss, logits = plan.loss_and_logits(outputs.logits)
        fields = {name: outputs.get(name) for name in FrozenPrefixCausalLMOutputWithPast.__dataclass_fields__}
        if shared is not None:
            fields[CACHE] = None  # of our own making
        return FrozenPrefixCausalLMOutputWithPast(**{**fields, **prefixes, "loss": loss, "logits": logits})

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Of the encoder-decoder language model, for collators that ask."""
        return self.model.language_model.prepare_decoder_input_ids_from_labels(labels=labels)

    @can_return_tuple
    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As [`FrozenPrefixModel.get_image_features`]."""
        return self.model.get_image_features(*args, return_dict=True, **kwargs)

    @can_return_tuple
    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As [`FrozenPrefixModel.get_video_features`]."""
        return self.model.get_video_features(*args, return_dict=True, **kwargs)

    @can_return_tuple
    def get_audio_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As [`FrozenPrefixModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, return_dict=True, **kwargs)

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`FrozenPrefixModel.get_placeholder_mask`]."""
        return self.model.get_placeholder_mask(*args, **kwargs)

    @torch.no_grad()
    def score(
        self,
        candidates: Sequence[Any] | torch.LongTensor,
        *,
        tokenizer: Any = None,
        candidates_mask: torch.Tensor | None = None,
        prefix_cache: PrefixCache | None = None,
        reduction: str = "sum",
        batch_size: int = 32,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Log-likelihood of each candidate answer after each prompt: for multiple choice, zero-shot classification, re-ranking.
        The prompt is read once, whatever the number of candidates.

        Args:
            candidates (`list[str]`, `list[list[int]]`, or `torch.LongTensor` of shape `(candidates, length)`):
                The answers, the same for each prompt; or a list of such lists, one for each prompt. Strings are tokenised
                as they stand, without special tokens.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): for strings.
            candidates_mask (`torch.Tensor` of shape `(candidates, length)`, *optional*):
                0 where a tensor of candidates is padded, on either side.
            prefix_cache (`PrefixCache`, *optional*): of [`encode_prefix`]; the prompt, or what comes before it.
            reduction (`"sum"` or `"mean"`, defaults to `"sum"`): over an answer's tokens.
            batch_size (`int`, defaults to 32): answers that are read at a time.
            inputs (`Any`): the prompt, as [`encode_prefix`] takes it; left out where `prefix_cache` is the whole prompt.

        Returns:
            `torch.FloatTensor` of shape `(prompts, candidates)`; -inf past a shorter list's end.
        """
        return score_answers(
            self,
            candidates,
            tokenizer=tokenizer,
            candidates_mask=candidates_mask,
            prefix_cache=prefix_cache,
            reduction=reduction,
            batch_size=batch_size,
            **inputs,
        )


__all__ = [
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixModel",
    "FrozenPrefixModelOutputWithPast",
    "FrozenPrefixCausalLMOutputWithPast",
    "FrozenPrefixPreTrainedModel",
]
