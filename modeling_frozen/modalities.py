"""What is seen and heard, from tower to placeholder: pictures, videos and sounds all go the same way.

A modality is a tower, a connector that writes its prefix, and a placeholder whose embeddings the prefix takes. Videos
share the vision tower and its connector; sounds have their own two. `MediaMixin` is the part of `FrozenPrefixModel`
that encodes and merges them, `MediaGenerationMixin` the hooks by which `generate()` encodes each once.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .audio_towers import encode_audio
from .base_models import language_model_geometry
from .connectors import Connector
from .prefix_merging import counts_fit, describe_mismatch, reads_in_chunks
from .vision_towers import encode_images


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


class MediaMixin:
    """From pictures, videos and sounds to embeddings among words, for a model that holds the towers and connectors."""

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images into prefixes: once, for any number of texts.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                All images of the batch in reading order; with `image_index`, the distinct ones.
            pixel_attention_mask, spatial_shapes, interpolate_pos_encoding: for towers that take them.
            vision_features (`torch.FloatTensor` of shape `(num_images, positions, vision_width)`, *optional*):
                In place of `pixel_values`: what the tower would have given the connector, of any float dtype. The tower
                then need not be loaded.
            vision_features_mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*):
                True at real positions, where their number varies.
            image_index (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                For every image in reading order its row in `pixel_values` or `vision_features`, so that an image that
                stands in several places is encoded once. Left out, each row stands once, in order.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor `(prefix_length, embedding_dim)` per
            image (of `image_index`, where given); the other fields are the tower's own, one row per image that it saw, and
            `None` where features were given. Pass it on as `mm_encoder_outputs={"image": output}`.

        Raises:
            ValueError: for neither or both of `pixel_values` and `vision_features`, features of another width, or an
            index out of range.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("You must specify exactly one of pixel_values or vision_features")
        outputs: ModelOutput | None = None
        if vision_features is not None:
            features, mask = vision_features, self._check_features(vision_features, vision_features_mask)
        else:
            if vision_features_mask is not None:
                raise ValueError("`vision_features_mask` goes with `vision_features`, and `pixel_values` were given.")
            options = {
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
                "interpolate_pos_encoding": interpolate_pos_encoding,
            }
            features, mask, outputs = self._look(pixel_values, options, kwargs)
        if image_index is not None:
            image_index = _checked_index(image_index, len(features)).to(features.device)
            if draws(self.connector):
                # Dropout falls on each use by itself, as if the image had been encoded for each.
                features, mask = features[image_index], None if mask is None else mask[image_index.to(mask.device)]
                image_index = None
        prefix = self.write_prefix(features, mask)
        return _encoded(outputs, prefix if image_index is None else _repeated(prefix, image_index))

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes videos into prefixes, as [`get_image_features`] does images.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, frames, channels, height, width)`):
                All videos of the batch in reading order.
            interpolate_pos_encoding: for towers that take it.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor per video, of `frames *
            prefix_length` vectors with `video_pooling="none"`, else of `prefix_length`; the other fields are the
            tower's own, frame by frame. Pass it on as `mm_encoder_outputs={"video": output}`.
        """
        self._require("video")
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"`pixel_values_videos` of shape {tuple(pixel_values_videos.shape)} should be (videos, frames, "
                "channels, height, width): every video of a batch has the same number of frames."
            )
        videos, frames = pixel_values_videos.shape[:2]
        options = {"interpolate_pos_encoding": interpolate_pos_encoding}
        features, _, outputs = self._look(pixel_values_videos.flatten(0, 1), options, kwargs)
        by_video = features.unflatten(0, (videos, frames))
        if self.config.video_pooling == "none":
            prefix = self._connect(self.connector, features).unflatten(0, (videos, frames)).flatten(1, 2)
        elif self.config.video_pooling == "mean":
            prefix = self._connect(self.connector, by_video.mean(dim=1))
        else:
            prefix = self._connect(self.connector, by_video.flatten(1, 2), frames=frames)
        return _encoded(outputs, self._by_placeholder(list(prefix)))

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        is_longer: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes sounds into prefixes, as [`get_image_features`] does images.

        Args:
            input_features (`torch.FloatTensor` of shape `(num_sounds, ...)`):
                All sounds of the batch in reading order, as the tower's feature extractor makes them (also where that
                calls them `input_values`).
            input_features_mask (`torch.Tensor` of shape `(num_sounds, samples or frames)`, *optional*):
                1 where a sound is, 0 where it was padded.
            is_longer: for CLAP.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list of one tensor `(audio_prefix_length,
            embedding_dim)` per sound; the other fields are the tower's own. Pass it on as
            `mm_encoder_outputs={"audio": output}`.
        """
        self._require("audio")
        self._refuse_unloaded("audio")
        options = {"is_longer": is_longer, **_output_flags(kwargs)}
        with _graph_of(self.audio_tower, input_features):
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
        return _encoded(outputs, self._by_placeholder(list(prefix)))

    def _check_features(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        self._require("image")
        width = self.config.vision_width
        if features.ndim != 3 or features.shape[-1] != width or not features.is_floating_point():
            raise ValueError(
                f"`vision_features` of shape {tuple(features.shape)} and {features.dtype} should be (images, positions, "
                f"{width}) of a float dtype: what the tower gives the connector at `vision_feature_layer="
                f"{self.config.vision_feature_layer}`, behind `vision_feature_select_strategy="
                f"{self.config.vision_feature_select_strategy!r}`. `cache_vision_features` makes them."
            )
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"`vision_features_mask` of shape {tuple(mask.shape)} should be {tuple(features.shape[:2])}: the (images, "
                "positions) of `vision_features`."
            )
        return None if mask is None else mask.to(features.device, torch.bool)

    def _look(
        self, pixel_values: torch.Tensor, options: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None, ModelOutput]:
        self._require("image")
        self._refuse_unloaded("vision", ", or give `vision_features`, which `cache_vision_features` stores")
        with _graph_of(self.vision_tower, pixel_values):
            return encode_images(
                self.vision_tower,
                pixel_values,
                layer=self.config.vision_feature_layer,
                select_strategy=self.config.vision_feature_select_strategy,
                num_leading_tokens=self.config.num_leading_tokens,
                **{key: value for key, value in {**options, **_output_flags(kwargs)}.items() if value is not None},
            )

    def _refuse_unloaded(self, part: str, or_else: str = "") -> None:
        if getattr(self, f"{part}_tower") is None:
            raise ValueError(f'The {part} tower is not loaded: load it by `model.load_base_model("{part}")`{or_else}.')

    def _require(self, modality: str) -> None:
        if modality not in self.config.media:
            way_out = {
                "image": "join one to it (`from_vision_text_pretrained`)",
                "video": "set `num_frames` in its config",
                "audio": "join an audio tower to it (`audio_model_name_or_path` of `from_vision_text_pretrained`)",
            }[modality]
            raise ValueError(f"This model takes {list(self.config.media)}, and no {modality}: {way_out}.")

    def write_prefix(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """
        Runs the connector.

        Args:
            features (`torch.Tensor` of shape `(num_images, positions, vision_width)`): of the tower.
            mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*): valid positions.

        Returns:
            `list[torch.Tensor]`: one prefix `(prefix_length, embedding_dim)` per image; with cross-attention
            `(1, prefix_length * embedding_dim)`, for the library's `generate` counts one row per placeholder.
        """
        prefix = self._connect(self.connector, features, attention_mask=mask)
        if mask is not None and not self.connector.reads_positions and self.config.num_positions != 1:
            prefix = [vectors[valid] for vectors, valid in zip(prefix, mask, strict=True)]
        return self._by_placeholder(list(prefix))

    @staticmethod
    def _connect(connector: Connector, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        parameter = next(connector.parameters(), None)
        device = features.device if parameter is None else parameter.device
        kwargs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        return connector(features.to(device), **kwargs)

    def _by_placeholder(self, prefix: list[torch.Tensor]) -> list[torch.Tensor]:
        return prefix if self.cross_attention is None else [vectors.flatten()[None] for vectors in prefix]

    # ------------------------------------------------------------------------------------------------ among the words

    def _valid_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        if self.cross_attention is not None:
            return input_ids.masked_fill(self.placeholders(input_ids), self.config.image_word_id)
        # A placeholder past the last row has no embedding; any row serves, for it is overwritten.
        rows = language_model_geometry(self.language_model).num_embeddings
        for placeholder in self.config.placeholder_ids.values():
            if placeholder >= rows:
                input_ids = input_ids.masked_fill(input_ids == placeholder, 0)
        return input_ids

    def placeholders(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Where `input_ids` hold a placeholder of any modality."""
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for placeholder in self.config.placeholder_ids.values():
            mask = mask | (input_ids == placeholder)
        return mask

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: list[torch.Tensor],
        modality: str = "image",
    ) -> torch.BoolTensor:
        """
        Where the prefix goes: `(batch, sequence, 1)`.

        Raises:
            ValueError: if the placeholders of a sample are no whole number of images, or their total is not that of
            the
                prefix vectors; names both numbers and the sample.
        """
        index = self.config.placeholder_ids[modality]
        if input_ids is not None:
            mask = input_ids == index
        else:
            if index >= language_model_geometry(self.language_model).num_embeddings:
                raise ValueError(
                    f"The placeholder's id {index} has no embedding, so {modality}s can't be placed into "
                    f"`inputs_embeds`: pass `input_ids`, or embeddings with the prefix already in them and no "
                    f"{modality}s."
                )
            placeholder = torch.full((1, 1), index, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.embed_words(placeholder)).all(-1)
        lengths = [len(vectors) for vectors in image_features]
        if not torch.compiler.is_compiling() and reads_in_chunks.get():
            lengths = [1] * sum(lengths)
        counts = mask.sum(-1)
        # Equal lengths let a device check all samples at once; only variable ones need the samples' counts on the
        # host.
        same = len(set(lengths)) == 1
        right = counts.sum() == sum(lengths)
        if same:
            right = right & (counts % lengths[0] == 0).all()
        if torch.compiler.is_compiling():
            torch_compilable_check(right, "Features and placeholders do not match.")
        elif not right or (not same and not counts_fit(counts.tolist(), lengths)):
            raise ValueError(describe_mismatch(counts.tolist(), lengths, modality))
        return mask.unsqueeze(-1)

    def encode(
        self, media: dict[str, Any], mm_encoder_outputs: dict[str, ModelOutput | None] | None = None
    ) -> dict[str, ModelOutput]:
        """
        Encodes what is given of each modality.

        Args:
            media (`dict`): of the names in `MEDIA_INPUTS`, those that were given.
            mm_encoder_outputs (`dict`, *optional*): what was encoded before, by modality.

        Returns:
            `dict`: outputs of `get_image_features`, `get_video_features`, `get_audio_features` by modality.
        """
        encoded = {key: output for key, output in (mm_encoder_outputs or {}).items() if output is not None}
        for modality, names in MEDIA_INPUTS.items():
            given = {name: media[name] for name in names if media.get(name) is not None}
            sources = [name for name in SOURCES[modality] if name in given]
            if not sources:
                alone = [name for name in ("image_index", "vision_features_mask") if name in given]
                if alone and modality == "image":
                    raise ValueError(f"`{alone[0]}` goes with `pixel_values` or `vision_features`, and neither was given.")
                continue
            if modality in encoded:
                raise ValueError(f"You cannot specify both {sources[0]} and mm_encoder_outputs at the same time")
            if len(sources) > 1:
                raise ValueError(f"You cannot specify both {' and '.join(sources)} at the same time")
            self._require(modality)
            encoded[modality] = getattr(self, f"get_{modality}_features")(return_dict=True, **given)
        return encoded

    def merge(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        media: dict[str, Any],
        mm_encoder_outputs: dict[str, ModelOutput | None] | None = None,
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None, dict[str, Any]]:
        """
        Puts prefixes into the word embeddings. Without media, and outside training, ids pass through untouched, so
        that text-only calls are the language model's own.

        Returns:
            `(input_ids, inputs_embeds, prefixes)`, one of the first two `None`; `prefixes` by modality: `(vectors,
            embedding_dim)`, or, with cross-attention, under `None` a list of one tensor per placeholder in reading
            order.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded = self.encode(media, mm_encoder_outputs)
        prefixes: dict[str | None, Any] = {}
        if self.cross_attention is not None and encoded:
            prefixes[None] = self._in_reading_order(input_ids, encoded)
        elif encoded:
            words = self.embed_words(self._valid_ids(input_ids)) if inputs_embeds is None else inputs_embeds
            merged = words
            for modality, output in encoded.items():
                mask = self.get_placeholder_mask(input_ids, words, output.pooler_output, modality)
                prefix = torch.cat(list(output.pooler_output), dim=0).to(words.device, words.dtype)
                merged, prefixes[modality] = merged.masked_scatter(mask, prefix), prefix
            input_ids, inputs_embeds = None, merged
        if input_ids is not None:
            input_ids = self._valid_ids(input_ids)
        idle = self._idle_parts(set(encoded))
        if idle:
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_words(input_ids)
            inputs_embeds = inputs_embeds + self._zero_of(idle).to(inputs_embeds.device, inputs_embeds.dtype)
        return input_ids, inputs_embeds, prefixes

    def _in_reading_order(
        self, input_ids: torch.LongTensor | None, encoded: dict[str, ModelOutput]
    ) -> list[torch.Tensor]:
        """One tensor `(vectors, embedding_dim)` per placeholder, for gated blocks, which look at what stands where."""
        if input_ids is None:
            raise ValueError("Gated blocks find an image's place by its placeholder: pass `input_ids` with images.")
        rows = {}
        for modality, output in encoded.items():
            self.get_placeholder_mask(input_ids, None, output.pooler_output, modality)
            rows[self.config.placeholder_ids[modality]] = iter([row for rows in output.pooler_output for row in rows])
        ordered = []
        for index in input_ids[self.placeholders(input_ids)].tolist():
            if index not in rows:
                raise ValueError(
                    f"`input_ids` hold the placeholder {index} of {self.config.placeholder_ids}, and nothing was "
                    f"given for it."
                )
            ordered.append(next(rows[index]).unflatten(0, (-1, self.config.embedding_dim)))
        return ordered

    def _idle_parts(self, encoded: set[str]) -> list[nn.Module]:
        """Connectors (and gated blocks) that train and have no part in this batch."""
        if not (self.training and torch.is_grad_enabled()):
            return []
        parts = []
        if not encoded & {"image", "video"}:
            parts.append(self.connector)
        if "audio" not in encoded:
            parts.append(self.audio_connector)
        if not encoded:
            parts.append(self.cross_attention)
        return [part for part in parts if part is not None and any(p.requires_grad for p in part.parameters())]

    def _zero_of(self, parts: list[nn.Module]) -> torch.Tensor:
        """Zero, through connectors without input: a batch without images then has a loss with a (zero) gradient for
        them,
        as distributed training and `backward()` itself require."""
        total: Any = 0.0
        for part in parts:
            if hasattr(part, "zero"):  # asked of the part, for PEFT may have wrapped it
                total = total + part.zero()
                continue
            parameter = next(part.parameters())
            positions = part.num_positions or part.prefix_length or 1
            features = torch.zeros(1, positions, part.vision_width, dtype=parameter.dtype, device=parameter.device)
            total = total + part(features).sum().to(getattr(total, "device", parameter.device)) * 0.0
        return total


def _graph_of(tower: nn.Module, inputs: torch.Tensor) -> torch.set_grad_enabled:
    # A frozen tower keeps no graph, unless somebody asks for gradients of the picture itself.
    tower_trains = any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and (tower_trains or inputs.requires_grad))


def _output_flags(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("output_hidden_states", "output_attentions") if key in kwargs}


def _checked_index(index: torch.Tensor, count: int) -> torch.Tensor:
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


def _repeated(prefix: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    if len({vectors.shape for vectors in prefix}) == 1:
        return list(torch.stack(prefix)[index.to(prefix[0].device)])
    return [prefix[row] for row in index.tolist()]


def _encoded(outputs: ModelOutput | None, prefix: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=getattr(outputs, "last_hidden_state", None),
        pooler_output=prefix,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


class MediaGenerationMixin:
    """The hooks of `generate()`: everything is encoded once, before the first step, and repeated with its row."""

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

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> torch.BoolTensor:
        """As [`FrozenPrefixModel.get_placeholder_mask`]."""
        return self.model.get_placeholder_mask(*args, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # The library's own knows images and videos.
        media = take_media(model_kwargs)
        model_kwargs["mm_encoder_outputs"] = self.model.encode(media, model_kwargs.get("mm_encoder_outputs"))
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor | None,
        mm_encoder_output: dict[str, ModelOutput],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, ModelOutput]:
        # The library's own knows images and videos, and writes into the caller's output.
        from_words = input_ids is None or input_ids.numel() == 0
        expanded = {}
        for modality, output in mm_encoder_output.items():
            mask = self.get_placeholder_mask(
                None if from_words else input_ids, inputs_embeds, output.pooler_output, modality
            )
            rest, rows = iter(output.pooler_output), []
            for count in mask.sum((1, 2)).tolist():
                row = []
                while count > 0:
                    row.append(next(rest))
                    count -= len(row[-1])
                rows += row * expand_size
            expanded[modality] = type(output)(**{**output, "pooler_output": rows})
        return expanded


__all__ = ["MEDIA_INPUTS", "MediaGenerationMixin", "MediaMixin", "draws", "take_media"]
