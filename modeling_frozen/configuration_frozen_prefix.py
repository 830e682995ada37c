# SPDX-License-Identifier: Apache-2.0
"""The configuration: two full sub-configs, the record of where each backbone came from, and the connector between them.

Nothing here loads a weight. Geometry (how many positions the tower gives, how wide the word embeddings are) is probed
once, on the meta device, by `from_vision_text_configs`, and stored, so that building a model never has to guess it.
"""

import copy
import math
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from packaging import version
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .hub import AUTO_MAP
from .parts import MODALITIES, PARTS, TRAINABLE, VISION_PARTS
from .transformers_compat import CACHE_NAMES, CompositeConfig, SubConfigSpec


logger = logging.get_logger(__name__)

VERSION = "0.2.0"  # of the package; here, because this file goes to the Hub without the rest of it

# What a config's constructor takes in transformers beside the fields of the class.
_TRANSFORMERS_KEYS = {
    "model_type", "name_or_path", "attn_implementation", "experts_implementation", "output_attentions", "torch_dtype",
    "num_labels", "auto_map", "custom_pipelines", "per_layer_config", "fusion_config", "quantization_config",
    "distributed_config", "custom_generate",
}  # fmt: skip

# What is written down of a backbone; see `backbones.record_of` for what some have besides.
RECORD_KEYS = ("name_or_path", "revision", "dtype", "fingerprint")

# Set while a config is read from a file, whose keys are not the user's own.
_reading: ContextVar[bool] = ContextVar("reading", default=False)

# Set while transformers builds a model whose backbones are attached afterwards.
building_skeleton: ContextVar[bool] = ContextVar("building_skeleton", default=False)

_SERIALIZED_TRANSFORMERS_KEYS = {"model_type", "auto_map", "_name_or_path", "output_attentions", "quantization_config"}


def as_list_of_towers(towers: Any) -> list[Any]:
    """The vision towers of an argument that takes one, none, or a list of them."""
    return list(towers) if isinstance(towers, (list, tuple)) else [] if towers is None else [towers]


@strict
class FrozenPrefixConfig(CompositeConfig):
    r"""
    Configuration of a frozen vision tower, a frozen language model and the connector that joins them.

    Args:
        vision_config (`PreTrainedConfig` or `dict`):
            Full config of the vision tower (of dual models such as CLIP: of its vision half).
        text_config (`PreTrainedConfig` or `dict`):
            Full config of the language model, causal or encoder-decoder.
        vision_base_model, text_base_model (`dict`, *optional*):
            Record of each backbone: `name_or_path`, `revision` (commit), `dtype` and `fingerprint` of its weights; with
            `gguf_file` where they lie in one, `quantization` where it was quantised while loading, and `processor_files`,
            digests of the files that its tokenizer, image processor or feature extractor is made of.
            `None` for one that has no repository or folder of its own: it is saved whole.
        connector_type (`str`, defaults to `"mlp"`):
            Exact name in `modeling_frozen.connectors.CONNECTORS`.
        connector_config (`dict`):
            Keyword arguments of that connector, for example `{"num_layers": 4, "dropout": 0.1}`.
        prefix_length (`int`, *optional*):
            Number of prefix vectors per image. Left out, per-position connectors take the tower's positions.
        prefix_lengths (`list[int]`, *optional*):
            Lengths that one connector writes, the longest of them its `prefix_length` (Matryoshka: arXiv 2405.17430,
            2405.19315): by its first queries, or a coarser grid. In training one is drawn a batch; else the model follows
            the placeholders, of which the processor writes `prefix_length=` an image.
        vision_feature_layer (`int` or `list[int]`, defaults to -1):
            Which hidden states of the tower are read; several are concatenated along the width.
        vision_feature_select_strategy (`"default"`, `"full"` or `"pooled"`, defaults to `"default"`):
            `"default"` drops leading class, register and distillation tokens, `"full"` keeps them, `"pooled"` takes
            one vector per image.
        fusion (`"prefix"` or `"cross_attention"`, defaults to `"prefix"`):
            How the language model reads the image. `"prefix"`: the connector's vectors are embeddings among the words'.
            `"cross_attention"`: words attend to them through gated blocks between the frozen layers (Flamingo); one
            placeholder marks an image's place, and is read as the beginning-of-text token.
        cross_attention_config (`dict`):
            Options of those blocks: `every_n_layers`, `num_heads`, `head_dim`, `feedforward_multiple`, `dropout`
            (see `modeling_frozen.cross_attention.check_cross_attention`).
        num_leading_tokens, num_positions, vision_width, embedding_dim, text_hidden_size, text_num_layers (`int`, *optional*):
            Geometry of the two backbones, probed by [`from_vision_text_configs`]; the last two for cross-attention alone.
        vision_grid (`list[int]` or `"variable"`, *optional*):
            Rows and columns of the tower's positions, for connectors that read them as a grid; `"variable"` where each image
            has its own (NaFlex), `None` where they are no grid. Probed as well.
        image_token_id (`int`, *optional*):
            Id of the placeholder in `input_ids`; `num_image_tokens` of them are one image's. Defaults to one past
            the vocabulary. The language model is never resized for it.
        num_frames (`int`, *optional*):
            Frames sampled from a video. Set, the model takes videos, through the vision tower and its connector.
        video_pooling (`"none"`, `"mean"` or `"connector"`, defaults to `"none"`):
            `"none"`: a prefix per frame, one after another. `"mean"`: one prefix for the mean of the frames' features,
            so their order is lost. `"connector"`: the positions of all frames, with a code of time, are one sequence for
            a connector that reads positions (`resampler`, `transformer`, `qformer`, `lstm`), which writes one prefix.
        vision_2_config, vision_3_config (`PreTrainedConfig` or `dict`, *optional*):
            Full configs of further vision towers, whose features the one connector reads joined over the width with those of
            the first, on its grid (see `vision_towers.join_features`).
        vision_2_base_model, vision_3_base_model (`dict`, *optional*): records of those backbones.
        vision_2_feature_layer, vision_3_feature_layer: as `vision_feature_layer`, each tower's own.
        vision_2_geometry, vision_3_geometry (`dict`, *optional*):
            `num_leading_tokens`, `num_positions`, `vision_width` and `grid` of those towers, probed.
        audio_config (`PreTrainedConfig` or `dict`, *optional*):
            Full config of an audio encoder. Set, the model takes audio; it may then have no vision tower at all.
        audio_base_model (`dict`, *optional*): record of that backbone.
        audio_connector_type, audio_connector_config, audio_prefix_length:
            As for the vision tower, of the audio tower's own connector (`"resampler"` of 32 vectors by default).
        audio_feature_layer, audio_feature_select_strategy:
            As for the vision tower; the strategy is `"full"` or `"pooled"`.
        audio_num_positions, audio_width (`int`, *optional*):
            Geometry of the audio tower, probed. No number of positions where longer audio has more.
        video_token_id, audio_token_id (`int`, *optional*): as `image_token_id`; the ids that follow it by default.
        trainable (`tuple[str]`, defaults to `("connector",)`):
            Which of `"connector"`, `"vision"`, `"text"`, `"audio"`, `"vision_2"`, `"vision_3"` train. All else is frozen, bit
            for bit.
        loss_config (`dict`):
            Options of the training loss: `label_smoothing`, `z_loss`, `chunk_size` (see
            `modeling_frozen.losses.check_loss_config`). In evaluation the loss is the plain one.
        fused_inputs (`tuple[str]`, *optional*):
            What a classifier reads, in this order: of `"image"`, `"video"`, `"audio"`, `"text"`. Defaults to the tower's
            medium and text.
        image_embedding (`"prefix"` or `"tower"`, defaults to `"prefix"`):
            The image's embedding in a classifier, or for retrieval: the mean over its prefix, or over the tower's own
            features, without the connector. Retrieval with a text model that only reads is joined with `"tower"`, unless a
            connector is asked for.
        prompt_sees_media (`bool`, defaults to `False`):
            Whether the language model of a classifier reads the prefix among the words (dearer: the backward pass goes through
            its layers), or the words alone.
        text_pooling (`"last"`, `"mean"`, `"cls"` or `"ret"`, *optional*):
            How a text's hidden states become one vector (see `text_reading.pool_text`); `"ret"`, for retrieval alone: read
            at a learnt vector behind the words (FROMAGe, arXiv 2301.13823). Defaults to `"last"` for causal
            models, which read in one direction, and `"mean"` for others.
        text_width (`int`, *optional*): width of the language model's last hidden states, probed.
        classifier_config (`dict`):
            Options of a classifier's head: `hidden_size` (`None` for one linear layer) and `dropout`.
        class_weights (`list[float]`, *optional*):
            Weight of each class in a classifier's loss (see `classification_loss`).
        unlocked_layers (`dict[str, int]`, *optional*):
            Of a part that is not `trainable`, how many of its last layers train nevertheless: `{"vision": 2}`.
        text_headless (`bool`, defaults to `False`):
            The text model reads and doesn't write: an encoder such as BERT, or any other without its head.
        projection_dim (`int`, *optional*): width of the space of image and text embeddings.
        projection_dropout (`float`, defaults to 0.0):
            Share of what the image's projection reads that is set to zero in training. Pays where the photos are few
            (docs/search.md has the figures).
        contrastive_loss_type (`"clip"`, `"siglip"` or `"triplet"`, defaults to `"clip"`):
            See `modeling_frozen.contrastive_losses`.
        contrastive_loss_config (`dict`): options of that loss, `margin` and `negatives` of `"triplet"`.
        logit_scale_init_value, logit_bias_init_value (`float`, *optional*):
            Where the (logarithm of the) scale of the cosines and their bias start; default as in the loss's paper.
        contrastive_loss_weight, caption_loss_weight (`float`, defaults to 1.0 and 0.0):
            Weights of the two losses where one connector learns retrieval and captions.
        saved_parts (`tuple[str]`, *optional*):
            Which parts' weights lie in the checkpoint itself. Written by `save_pretrained`; not set by hand.
        frozen_prefix_version (`str`, *optional*):
            The version of this package that wrote the config.

    Raises:
        ValueError: for an unknown key (naming the nearest valid one) or values that do not fit each other.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, GPT2Config
    >>> from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration

    >>> config = FrozenPrefixConfig.from_vision_text_configs(
    ...     CLIPVisionConfig(), GPT2Config(), connector_type="resampler", prefix_length=32
    ... )
    >>> model = FrozenPrefixForConditionalGeneration(config)  # random backbones; see from_vision_text_pretrained
    ```"""

    model_type = "frozen-prefix"
    # What Trainer's evaluation leaves aside: every field of an output that is no score.
    keys_to_ignore_at_inference = [
        *CACHE_NAMES, "text_model_output", "vision_model_output", "contrastive_loss", "caption_loss",
        "image_hidden_states", "video_hidden_states", "audio_hidden_states", "hidden_states", "attentions",
        "cross_attentions", "decoder_hidden_states", "decoder_attentions",
        "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions",
    ]  # fmt: skip
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "vision_2_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "vision_3_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
    }

    # The class before `dict`: transformers' check tries one after the other, and writes a whole config into each refusal.
    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    vision_base_model: dict | None = None
    text_base_model: dict | None = None
    connector_type: str = "mlp"
    connector_config: dict | None = None
    prefix_length: int | None = None
    prefix_lengths: list[int] | tuple[int, ...] | None = None
    fusion: Literal["prefix", "cross_attention"] = "prefix"
    cross_attention_config: dict | None = None
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["default", "full", "pooled"] = "default"
    num_leading_tokens: int | None = None
    num_positions: int | None = None
    vision_width: int | None = None
    vision_grid: list[int] | tuple[int, ...] | str | None = None
    embedding_dim: int | None = None
    text_hidden_size: int | None = None
    text_num_layers: int | None = None
    image_token_id: int | None = None
    vision_2_config: PreTrainedConfig | dict | None = None
    vision_2_base_model: dict | None = None
    vision_2_feature_layer: int | list[int] = -1
    vision_2_geometry: dict | None = None
    vision_3_config: PreTrainedConfig | dict | None = None
    vision_3_base_model: dict | None = None
    vision_3_feature_layer: int | list[int] = -1
    vision_3_geometry: dict | None = None
    num_frames: int | None = None
    video_pooling: Literal["none", "mean", "connector"] = "none"
    video_token_id: int | None = None
    audio_config: PreTrainedConfig | dict | None = None
    audio_base_model: dict | None = None
    audio_connector_type: str = "resampler"
    audio_connector_config: dict | None = None
    audio_prefix_length: int | None = None
    audio_feature_layer: int | list[int] = -1
    audio_feature_select_strategy: Literal["full", "pooled"] = "full"
    audio_num_positions: int | None = None
    audio_width: int | None = None
    audio_token_id: int | None = None
    trainable: list[str] | tuple[str, ...] = ("connector",)
    loss_config: dict | None = None
    fused_inputs: list[str] | tuple[str, ...] | None = None
    image_embedding: Literal["prefix", "tower"] = "prefix"
    prompt_sees_media: bool = False
    text_pooling: Literal["last", "mean", "cls", "ret"] | None = None
    text_width: int | None = None
    classifier_config: dict | None = None
    class_weights: list[float] | tuple[float, ...] | None = None
    unlocked_layers: dict[str, int] | None = None
    text_headless: bool = False
    projection_dim: int | None = None
    projection_dropout: float = 0.0
    contrastive_loss_type: str = "clip"
    contrastive_loss_config: dict | None = None
    logit_scale_init_value: float | None = None
    logit_bias_init_value: float | None = None
    contrastive_loss_weight: float = 1.0
    caption_loss_weight: float = 0.0
    saved_parts: list[str] | tuple[str, ...] | None = None
    tie_word_embeddings: bool = False
    frozen_prefix_version: str | None = None

    def __post_init__(self, **kwargs: Any):
        if _reading.get():
            self._keep_unknown_keys(kwargs)
        else:
            self._refuse_unknown_keys(kwargs)
        if self.vision_config is None and self.audio_config is None:
            self.vision_config = {"model_type": self.sub_configs_defaults["vision_config"].model_type}
        # transformers writes the outer choice over all sub-configs, `None` too: a loaded backbone would lose its own. (A
        # config holds its choice under the private name alone, by which every model of transformers reads it.)
        sub_configs = [config for config in self.backbone_configs.values() if isinstance(config, PreTrainedConfig)]
        choices = [(config, config._attn_implementation, config._experts_implementation) for config in sub_configs]
        super().__post_init__(**kwargs)
        for config, attn_implementation, experts_implementation in choices:
            if kwargs.get("attn_implementation") is None:
                config._attn_implementation = attn_implementation
            if kwargs.get("experts_implementation") is None:
                config._experts_implementation = experts_implementation
        for name in (
            "connector_config", "cross_attention_config", "audio_connector_config", "classifier_config", "loss_config",
            "contrastive_loss_config", "unlocked_layers",
        ):  # fmt: skip
            setattr(self, name, dict(getattr(self, name) or {}))
        if isinstance(self.vision_grid, tuple):
            self.vision_grid = list(self.vision_grid)
        self.trainable = tuple(self.trainable)
        self.fused_inputs = None if self.fused_inputs is None else tuple(self.fused_inputs)
        self.saved_parts = None if self.saved_parts is None else tuple(self.saved_parts)
        self.class_weights = None if self.class_weights is None else list(self.class_weights)
        # Both are facts of the language model, mirrored where transformers reads them.
        text_config = self.backbone_configs["text"]
        self.is_encoder_decoder = bool(text_config.is_encoder_decoder)
        self.tie_word_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        next_id = text_config.get_text_config().vocab_size
        for modality in self.media:
            name = f"{modality}_token_id"
            if getattr(self, name) is None:
                setattr(self, name, next_id)
            next_id = max(next_id, getattr(self, name) + 1)
        self.validate_architecture()

    @classmethod
    def _refuse_unknown_keys(cls, kwargs: dict[str, Any], allowed: Collection[str] = _TRANSFORMERS_KEYS) -> None:
        """For calls by the user: a key that nothing reads is a typo."""
        for key in kwargs:
            if key not in allowed and not key.startswith("_"):
                raise ValueError(
                    f"`{key}` is not a key of {cls.__name__}. {cls._nearest_key(key)}Options of the connector itself go into "
                    "`connector_config`. [errors.md#choices]"
                )

    @classmethod
    def _nearest_key(cls, key: str) -> str:
        from .connectors import did_you_mean

        own = sorted(FrozenPrefixConfig.__annotations__)
        return did_you_mean(key, own, f"Valid keys are {own}. ")

    def _keep_unknown_keys(self, kwargs: dict[str, Any]) -> None:
        """For files: a later frozen-prefix, or transformers, may know the key, so it is kept and written back."""
        self._unknown_keys = tuple(key for key in kwargs if key not in _TRANSFORMERS_KEYS and not key.startswith("_"))
        written_by = self.frozen_prefix_version
        for key in self._unknown_keys:
            if written_by is not None and version.parse(written_by) > version.parse(VERSION):
                hint = f"The checkpoint was written by {written_by}: upgrade (`pip install -U frozen-prefix`) if it matters."
            else:
                hint = self._nearest_key(key).rstrip()
            logger.warning(f"`{key}` in this config is unknown to frozen-prefix {VERSION}: it is kept, and not used. {hint}")

    @property
    def connector_arguments(self) -> dict[str, Any]:
        """What `build_connector` and `check_connector` ask of the connector between tower and language model."""
        return self._connector_arguments("", self.features_width)

    @property
    def audio_connector_arguments(self) -> dict[str, Any]:
        """The same of the connector between audio tower and language model."""
        return self._connector_arguments("audio_", self.audio_width)

    def _connector_arguments(self, prefix: str, width: int | None) -> dict[str, Any]:
        keys = ("connector_type", "num_positions", "prefix_length", "connector_config")
        return {
            "vision_width": width,
            "embedding_dim": self.embedding_dim,
            "grid": None if prefix else self.vision_grid,
            **{key: getattr(self, prefix + key) for key in keys},
        }

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """The vision towers, by part: `("vision",)`, and of several `"vision_2"` and `"vision_3"` too."""
        return tuple(part for part in VISION_PARTS if getattr(self, f"{part}_config") is not None)

    def geometry_of(self, part: str) -> dict[str, Any]:
        """`num_leading_tokens`, `num_positions`, `vision_width` and `grid` of a vision tower."""
        if part != "vision":
            return getattr(self, f"{part}_geometry") or {}
        keys = ("num_leading_tokens", "num_positions", "vision_width")
        return {**{key: getattr(self, key) for key in keys}, "grid": self.vision_grid}

    @property
    def features_width(self) -> int | None:
        """Width of what the connector reads of an image: of all vision towers together."""
        widths: list[Any] = [self.geometry_of(part).get("vision_width") for part in self.vision_parts]
        return None if None in widths or not widths else sum(widths)

    @property
    def resolved_fused_inputs(self) -> tuple[str, ...]:
        """What a classifier reads: `fused_inputs`, or its default."""
        return (self.media[0], "text") if self.fused_inputs is None else tuple(self.fused_inputs)

    @property
    def text_reads_ahead(self) -> bool:
        """Whether the text model's hidden states of a word know the words behind it."""
        return bool(self.is_encoder_decoder or getattr(self.text_config, "is_decoder", True) is False)

    @property
    def resolved_text_pooling(self) -> str:
        """`text_pooling`, or its default for the language model."""
        return self.text_pooling or ("mean" if self.text_reads_ahead else "last")

    @property
    def num_image_tokens(self) -> int | None:
        """Placeholders in `input_ids` for one image."""
        return 1 if self.fusion == "cross_attention" else self.prefix_length

    @property
    def num_video_tokens(self) -> int | None:
        """Placeholders in `input_ids` for one video of `num_frames` frames."""
        if self.fusion == "cross_attention" or self.prefix_length is None:
            return self.num_image_tokens
        return self.prefix_length * (self.num_frames or 1) if self.video_pooling == "none" else self.prefix_length

    @property
    def num_audio_tokens(self) -> int | None:
        """Placeholders in `input_ids` for one audio clip."""
        return 1 if self.fusion == "cross_attention" else self.audio_prefix_length

    @property
    def backbone_configs(self) -> dict[str, PreTrainedConfig]:
        """Configs of the backbones that the model has, by part: `"vision"`, `"text"`, `"audio"`, `"vision_2"` …"""
        configs = {part: getattr(self, f"{part}_config") for part in PARTS}
        return {part: config for part, config in configs.items() if config is not None}

    @property
    def media(self) -> tuple[str, ...]:
        """What the model takes beside text: of `"image"`, `"video"` and `"audio"`."""
        return tuple(
            name
            for name, modality in MODALITIES.items()
            if getattr(self, f"{modality.part}_config") is not None and (name != "video" or self.num_frames is not None)
        )

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of the placeholder of each medium that the model takes."""
        return {modality: getattr(self, f"{modality}_token_id") for modality in self.media}

    @property
    def image_word_id(self) -> int:
        """With `fusion="cross_attention"`, the word as which a placeholder is read: beginning of text, or its end where
        the language model has no beginning."""
        text_config = self.get_text_config()
        ids = (getattr(text_config, name, None) for name in ("bos_token_id", "eos_token_id"))
        first = next((index for index in ids if index is not None), 0)
        return first[0] if isinstance(first, list) else first

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        reading = _reading.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)
        finally:
            _reading.reset(reading)

    def to_dict(self) -> dict[str, Any]:
        # Tools set attributes on configs (Trainer sets `use_cache`); in a file they would be unknown keys.
        known = _SERIALIZED_TRANSFORMERS_KEYS.union(self.__dataclass_fields__, self.__dict__.get("_unknown_keys", ()))
        serialized = {key: value for key, value in super().to_dict().items() if key in known}
        serialized["frozen_prefix_version"] = VERSION
        for part in PARTS:
            if {"quantization", "gguf_file"}.intersection(getattr(self, f"{part}_base_model") or {}):
                # Kept, it would say that the backbone's repository holds quantised weights; the record says how to load them.
                sub_config = dict(serialized[f"{part}_config"])
                sub_config.pop("quantization_config", None)
                serialized[f"{part}_config"] = sub_config
        return {**dict.fromkeys(self.sub_configs), **serialized}  # tools read every name in `sub_configs`, absent ones too

    def to_diff_dict(self) -> dict[str, Any]:
        # What is not set, and what belongs to a modality that the model lacks, is left out. All else is written, default or
        # not: a default may be another one in a later version, and a checkpoint stays what it is.
        unset = {name for name, field in self.__dataclass_fields__.items() if field.default is None or field.default is False}
        absent = tuple(f"{modality}_" for modality in MODALITIES if modality not in self.media)
        absent += tuple(f"{part}_" for part in VISION_PARTS[1:] if part not in self.vision_parts)
        return {
            key: value
            for key, value in super().to_diff_dict().items()
            if key not in self.__dataclass_fields__
            or not (key in unset and (value is None or value is False or value == {}) or key.startswith(absent))
        }

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's config (of an encoder-decoder, by the flags, as its own config gives it)."""
        text_config = self.backbone_configs["text"].get_text_config(decoder=decoder, encoder=encoder)
        if building_skeleton.get() and hasattr(text_config, "quantization_config"):
            # transformers would quantise the model that is being built, whose connector is not; the backbone comes later.
            text_config = copy.copy(text_config)
            del text_config.quantization_config
        return text_config

    def validate_architecture(self) -> None:
        """Checks the values together; part of transformers' own validation, so it runs before each save as well."""
        unknown = [part for part in self.trainable if part not in TRAINABLE]
        if unknown:
            raise ValueError(
                f"`trainable` holds {unknown}, but only {list(TRAINABLE)} can train: remove or correct them."
                " [errors.md#choices]"
            )
        for part in VISION_PARTS:
            if getattr(self, f"{part}_feature_layer") == []:
                raise ValueError(
                    f"`{part}_feature_layer=[]` reads no layer: give one index, such as -1, or a list of them."
                    " [errors.md#range]"
                )
        if self.image_token_id is not None and self.image_token_id < 0:
            raise ValueError(f"`image_token_id={self.image_token_id}` is negative; token ids start at 0. [errors.md#range]")
        if self.prefix_length is not None and self.prefix_length < 1:
            raise ValueError(
                f"`prefix_length={self.prefix_length}` leaves no prefix vector; it must be at least 1. [errors.md#range]"
            )
        self._validate_lengths()
        from .losses import check_loss_config

        check_loss_config(self.loss_config or {})
        self._validate_records()
        self._validate_fusion()
        self._validate_media()
        self._validate_classifier()
        self._validate_retrieval()
        self._validate_towers()
        if self.features_width is None or self.embedding_dim is None:
            return  # geometry unknown yet: from_vision_text_configs fills it, and checks then
        from .connectors import check_connector

        self.prefix_length = check_connector(**self.connector_arguments)
        max_positions = getattr(self.get_text_config(), "max_position_embeddings", None)
        if max_positions is not None and (self.num_image_tokens or 0) >= max_positions:
            raise ValueError(
                f"A prefix of {self.prefix_length} vectors leaves no room for words: the language model has "
                f"{max_positions} positions. Choose a smaller `prefix_length`, with a connector that can shorten "
                "(`resampler`, `avg_pool`, `pixel_shuffle`, …), or a language model with more positions."
                " [errors.md#connector-fit]"
            )

    def changed_processor_files(self, part: str) -> list[str]:
        """Of the folder that a backbone was joined from, names of files of its tokenizer, image processor or feature extractor
        that changed since; none where the record doesn't know, or a commit of the Hub decides."""
        from .backbones import changed_processor_files

        return changed_processor_files(part, getattr(self, f"{part}_base_model"))

    def _validate_lengths(self) -> None:
        if self.prefix_lengths is None:
            return
        from .connectors import CONNECTORS

        self.prefix_lengths = lengths = sorted(set(self.prefix_lengths))
        if not lengths or min(lengths) < 1 or self.prefix_length not in (None, lengths[-1]):
            raise ValueError(
                f"`prefix_lengths={lengths}` must be lengths of at least 1, the longest of them `prefix_length`, which is "
                f"{self.prefix_length}: leave `prefix_length` out. [errors.md#connector-fit]"
            )
        self.prefix_length = lengths[-1]
        kind = CONNECTORS.get(self.connector_type)
        if kind is None:
            return  # said with the choices below
        if not kind.takes_lengths or self.fusion == "cross_attention":
            able = [name for name, one in CONNECTORS.items() if one.takes_lengths]
            raise ValueError(
                f"`prefix_lengths={lengths}` needs a connector that can write shorter prefixes than its own, one of {able}, "
                f"with `fusion='prefix'`; this is {self.connector_type!r} with {self.fusion!r}. [errors.md#connector-fit]"
            )
        if (self.connector_config or {}).get("separator"):
            raise ValueError(
                f"`prefix_lengths={lengths}` go without `separator=True`, which is of one length: leave one out."
                " [errors.md#connector-fit]"
            )
        wrong = [length for length in lengths if math.isqrt(length) ** 2 != length]
        if kind.reads_grid and (wrong or "output_size" in (self.connector_config or {})):
            raise ValueError(
                f"`prefix_lengths={lengths}` of the connector {self.connector_type!r} must be squares (1, 4, 16 …), and go "
                f"without `output_size`: {wrong or self.connector_config} does not fit. [errors.md#connector-fit]"
            )

    def _validate_towers(self) -> None:
        parts = self.vision_parts
        if parts != VISION_PARTS[: len(parts)]:
            raise ValueError(
                f"The vision towers of this config are {list(parts)}: a further one comes behind {list(VISION_PARTS[:2])}, so "
                "that their order says which one's grid counts. [errors.md#tower]"
            )
        if len(parts) < 2:
            return
        for part in parts:
            grid, positions = (self.geometry_of(part).get(key) for key in ("grid", "num_positions"))
            if not isinstance(grid, (list, tuple)) and self.vision_width is not None:
                found = "none" if grid is None else "one of each image (NaFlex)"
                raise ValueError(
                    f"Several vision towers are joined on the grid of the first, and the {PARTS[part].description} "
                    f"({self.backbone_configs[part].model_type}) has {found} with "
                    f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}: its {positions} positions can't "
                    "be brought to another one. Take `vision_feature_select_strategy='default'`, towers of images of one "
                    "size, or this tower alone. [errors.md#tower]"
                )
        if self.num_frames is not None:
            raise ValueError(
                f"`num_frames={self.num_frames}` samples frames for one vision tower, and this model has {len(parts)}: join "
                "it with one tower for videos, or leave `num_frames` out. [errors.md#tower]"
            )

    def _validate_records(self) -> None:
        for part in PARTS:
            record = getattr(self, f"{part}_base_model")
            lacking = [] if record is None else [key for key in RECORD_KEYS if key not in record]
            if lacking:
                raise ValueError(
                    f"`{part}_base_model={record}` lacks {lacking}, without which the {PARTS[part].description} can't be "
                    "loaded and checked: restore the config that was saved, or set it to `None` and name the place when "
                    f'loading, `from_pretrained(..., {part}_base_model="id or folder")`. [errors.md#no-parent]'
                )

    def _validate_media(self) -> None:
        from .connectors import CONNECTORS, check_connector

        ids = self.placeholder_ids
        if len(set(ids.values())) < len(ids):
            raise ValueError(
                f"The placeholders {ids} share an id, so they can't be distinguished: give each its own."
                " [errors.md#placeholders]"
            )
        readers = [name for name, kind in CONNECTORS.items() if kind.reads_positions and not kind.reads_grid]
        if self.num_frames is not None:
            if self.num_frames < 1 or self.vision_config is None:
                raise ValueError(
                    f"`num_frames={self.num_frames}` is the number of frames that the vision tower reads of a video: it "
                    "must be at least 1, and there must be a vision tower. Leave it out for a model without videos."
                    " [errors.md#tower]"
                )
            if self.video_pooling == "connector" and self.connector_type not in readers:
                raise ValueError(
                    f"`video_pooling='connector'` lets the connector read all frames as one sequence, but "
                    f"`connector_type={self.connector_type!r}` does not: take one of {readers}, or "
                    "`video_pooling='mean'`. [errors.md#connector-fit]"
                )
        if self.audio_width is None or self.embedding_dim is None:
            return
        reads = self.audio_connector_type in readers
        try:
            if reads and self.audio_prefix_length is None:
                self.audio_prefix_length = 32
            self.audio_prefix_length = check_connector(**self.audio_connector_arguments)
        except ValueError as error:
            raise ValueError(f"Of the audio connector (its keys begin with `audio_`): {error}") from error
        if self.audio_num_positions is None and not reads:
            raise ValueError(
                f"`audio_connector_type={self.audio_connector_type!r}` writes a vector per position, and longer audio "
                f"has more of them, while its placeholders are a fixed number: take one of {readers}, or "
                "`audio_feature_select_strategy='pooled'`. [errors.md#placeholders]"
            )

    def _validate_retrieval(self) -> None:
        if self.contrastive_loss_type != type(self).contrastive_loss_type or self.contrastive_loss_config:
            from .contrastive_losses import check_contrastive_loss  # which no other model needs

            check_contrastive_loss(self.contrastive_loss_type, self.contrastive_loss_config or {})
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(
                f"`projection_dim={self.projection_dim}` leaves no space to match in; it must be at least 1. [errors.md#range]"
            )
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(
                f"`projection_dropout={self.projection_dropout}` must be at least 0 and below 1. [errors.md#range]"
            )
        weights = {name: getattr(self, name) for name in ("contrastive_loss_weight", "caption_loss_weight")}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"{weights}: weights of losses can't be negative, nor both zero. [errors.md#range]")
        if self.text_headless and self.caption_loss_weight:
            raise ValueError(
                f"`caption_loss_weight={self.caption_loss_weight}` trains captions, and this text model only reads "
                "(`text_headless=True`): take a language model that writes, or leave the weight out. [errors.md#contradiction]"
            )
        if self.image_embedding == "tower" and self.caption_loss_weight:
            raise ValueError(
                f"`image_embedding='tower'` leaves the connector out and `caption_loss_weight={self.caption_loss_weight}` "
                "needs it: choose one. [errors.md#contradiction]"
            )
        for part, count in (self.unlocked_layers or {}).items():
            if part not in PARTS or isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"`unlocked_layers={self.unlocked_layers}` must say of some of {list(PARTS)} "
                    "how many of their last layers train, at least 1. [errors.md#choices]"
                )

    def _validate_classifier(self) -> None:
        known = (*self.media, "text")
        if self.fused_inputs is not None:
            wrong = [name for name in self.fused_inputs if name not in known]
            if wrong or not self.fused_inputs or len(set(self.fused_inputs)) < len(self.fused_inputs):
                raise ValueError(
                    f"`fused_inputs={list(self.fused_inputs)}` must name, once each, some of what this model takes: "
                    f"{list(known)}. [errors.md#choices]"
                )
        if self.image_embedding == "tower" and self.prompt_sees_media:
            raise ValueError(
                "`image_embedding='tower'` leaves the connector out and `prompt_sees_media=True` needs it: choose one."
                " [errors.md#contradiction]"
            )
        unknown = set(self.classifier_config or {}) - {"hidden_size", "dropout"}
        if unknown:
            raise ValueError(
                f"`classifier_config` takes `hidden_size` and `dropout`, and not {sorted(unknown)}. [errors.md#choices]"
            )
        if self.class_weights is None:
            return
        if len(self.class_weights) != self.num_labels or self.problem_type == "regression":
            raise ValueError(
                f"`class_weights` holds {len(self.class_weights)} weights, for {self.num_labels} labels and "
                f"`problem_type={self.problem_type!r}`: give one for each class, and none for regression. [errors.md#choices]"
            )

    def _validate_fusion(self) -> None:
        if self.fusion == "prefix":
            if self.cross_attention_config:
                raise ValueError(
                    f"`cross_attention_config={self.cross_attention_config}` is for gated blocks, and `fusion='prefix'` has "
                    "none: set `fusion='cross_attention'`, or leave the options out. [errors.md#cross-attention]"
                )
            return
        if (self.connector_config or {}).get("separator"):
            raise ValueError(
                "`separator=True` ends each tile among the words, and with `fusion='cross_attention'` no vector stands there: "
                "leave it out, or take `fusion='prefix'`. [errors.md#cross-attention]"
            )
        from .cross_attention import check_cross_attention, probe_decoder

        check_cross_attention(self.cross_attention_config or {}, self.text_num_layers)
        if self.is_encoder_decoder:
            probe_decoder(self.backbone_configs["text"])  # says why not

    @classmethod
    def from_vision_text_configs(
        cls,
        vision_config: PreTrainedConfig | Sequence[PreTrainedConfig] | None,
        text_config: PreTrainedConfig,
        image_processor: Any = None,
        *,
        audio_config: PreTrainedConfig | None = None,
        feature_extractor: Any = None,
        **kwargs: Any,
    ) -> "FrozenPrefixConfig":
        """
        Joins configs: takes the vision or audio halves of dual models, and probes the geometry of all on the meta
        device.

        Args:
            vision_config, text_config (`PreTrainedConfig`):
                Configs of the two backbones. Without a vision tower (`None`) there must be an audio tower. Of several vision
                towers for one prefix a list, the one on whose grid they are joined first.
            image_processor (`BaseImageProcessor`, *optional*):
                The tower's own. It gives the size of the images, which many configs don't, or give wrongly. Of several
                towers a list, with `None` where there is none.
            audio_config (`PreTrainedConfig`, *optional*): of an audio encoder, for a model that takes audio.
            feature_extractor (*optional*): the audio encoder's own; it gives the shape of its inputs.
            kwargs: any other key of this class.

        Raises:
            ValueError: where the two can't be joined (see the class).
        """
        from .backbones import probe_language_model
        from .connectors import norm_of_each_layer
        from .vision_towers import probe_vision_tower, vision_half

        towers = as_list_of_towers(vision_config)
        if not towers and audio_config is None:
            raise ValueError(
                "`vision_config` and `audio_config` are both `None`: a model needs a vision or an audio tower beside its "
                "language model. [errors.md#language-model]"
            )
        image_processors = image_processor if isinstance(image_processor, (list, tuple)) else [image_processor] * len(towers)
        if len(towers) > len(VISION_PARTS) or len(image_processors) != len(towers):
            raise ValueError(
                f"{len(towers)} vision towers with {len(image_processors)} image processors: give one for each of at most "
                f"{len(VISION_PARTS)} towers. [errors.md#tower]"
            )
        layer_widths: list[int] = []
        for part, tower, own_processor in zip(VISION_PARTS, towers, image_processors, strict=False):
            kwargs[f"{part}_config"] = vision_half(tower)
            geometry = probe_vision_tower(
                kwargs[f"{part}_config"],
                layer=kwargs.get(f"{part}_feature_layer", -1),
                select_strategy=kwargs.get("vision_feature_select_strategy", cls.vision_feature_select_strategy),
                image_processor=own_processor,
            )
            layer_widths += geometry.layer_widths or (geometry.vision_width,)
            for key, value in geometry.as_config(part).items():
                kwargs.setdefault(key, value)
        if towers:
            kwargs["connector_config"] = norm_of_each_layer(
                kwargs.get("connector_type", cls.connector_type), kwargs.get("connector_config"), layer_widths
            )
        if audio_config is not None:
            from .audio_towers import audio_half, probe_audio_tower

            kwargs["audio_config"] = audio_half(audio_config)
            audio_geometry = probe_audio_tower(
                kwargs["audio_config"],
                layer=kwargs.get("audio_feature_layer", cls.audio_feature_layer),
                select_strategy=kwargs.get("audio_feature_select_strategy", cls.audio_feature_select_strategy),
                feature_extractor=feature_extractor,
            )
            kwargs.setdefault("audio_num_positions", audio_geometry.num_positions)
            kwargs.setdefault("audio_width", audio_geometry.audio_width)
        if kwargs.get("embedding_dim") is None:
            headless = kwargs.get("text_headless", False)
            kwargs["embedding_dim"] = probe_language_model(text_config, headless).embedding_dim
        if kwargs.get("fusion") == "cross_attention" and kwargs.get("text_hidden_size") is None:
            from .cross_attention import probe_decoder

            decoder = probe_decoder(text_config)
            kwargs["text_hidden_size"], kwargs["text_num_layers"] = decoder.hidden_size, decoder.num_layers
        return cls(text_config=text_config, **{"vision_config": None, **kwargs})


if __name__.startswith("transformers_modules."):
    # Loaded from a checkpoint, without the package. Pipelines and `transformers serve --trust-remote-code` ask for
    # classes by their names in these tables, whatever the checkpoint's `auto_map` says.
    from transformers.models.auto import modeling_auto

    for _auto_class, _target in AUTO_MAP.items():
        if _auto_class.startswith("AutoModelFor"):
            # Private, as in `_registration.py`: a class is known by its name before it is imported.
            _names = getattr(modeling_auto, _auto_class)._model_mapping._model_mapping
            _names.setdefault(FrozenPrefixConfig.model_type, _target.split(".")[1])


__all__ = ["FrozenPrefixConfig"]
