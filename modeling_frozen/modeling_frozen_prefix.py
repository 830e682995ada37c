"""The model: a frozen vision tower and a frozen language model, joined by a connector that writes the visual prefix.

`FrozenPrefixModel` holds the parts and merges prefix and words; `FrozenPrefixForConditionalGeneration` adds the loss and
`generate()`. Freezing, saving and loading are their common base's.
"""

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .answer_scoring import AnswerScoringMixin
from .assisted_decoding import AssistedDecodingMixin
from .audio_towers import build_audio_tower
from .base_models import build_language_model, language_model_geometry, max_learned_positions, skips_padding
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connectors import build_connector
from .cross_attention import GatedCrossAttention
from .losses import (
    IGNORE_INDEX,
    HeadlessCall,
    check_loss_config,
    chunked_loss,
    headless_path,
    is_plain_cross_entropy,
    language_modeling_loss,
    shift_for_causal_model,
)
from .modalities import MediaGenerationMixin, MediaMixin
from .modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel, parts_to_build
from .prefix_cache import PrefixCacheMixin
from .prefix_merging import PaddedLogitsProcessorList, pad_right, position_ids_from_mask
from .shared_reading import SharedLead, SharedReadingMixin
from .transformers_compat import (
    CACHE,
    AnyCacheName,
    GenerationMixin,
    cache_argument,
    cached_length,
    generation_cache,
    slice_logits_to_keep,
    takes_cache,
)
from .vision_towers import build_vision_tower


logger = logging.get_logger(__name__)


@functools.lru_cache(maxsize=128)
def _parameters_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _accepts(module: nn.Module, name: str) -> bool:
    return name in _parameters_of(type(module))


def _warn_of_labels_taken_away() -> None:
    logger.warning_once(
        "The labels were taken out of the batch before `forward`, as Trainer does for `label_smoothing_factor` and "
        "`compute_loss_func`: logits of every position are made. Trainer's own smoothing does not shift the labels of this "
        'class, so its loss is wrong; set `model.config.loss_config = {"label_smoothing": 0.1}` in its place.'
    )


@dataclass
class FrozenPrefixModelOutputWithPast(AnyCacheName, BaseModelOutputWithPast):
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
class FrozenPrefixCausalLMOutputWithPast(AnyCacheName, CausalLMOutputWithPast):
    """
    Output of `FrozenPrefixForConditionalGeneration`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): returned when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch, sequence, vocabulary)`, *optional*):
            `None` in training with labels unless `skip_logits=False`: the head then runs only where a label is.
        cache (or, before transformers 5.24, past_key_values; read it by either name), hidden_states, attentions, …:
            as the language model gives them.
        image_hidden_states, video_hidden_states, audio_hidden_states (`torch.FloatTensor`, *optional*):
            The prefix vectors `(sum of prefix lengths, embedding_dim)` as the language model read them.
    """

    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None


class FrozenPrefixModel(MediaMixin, SharedReadingMixin, FrozenPrefixPreTrainedModel):
    """
    Towers, connectors and language model; gives hidden states, without the head's logits.

    `language_model` is the whole model of the library, head included: scaled, soft-capped or biased heads stay as they
    are, and [`FrozenPrefixForConditionalGeneration`] calls it whole.
    """

    def __init__(self, config: FrozenPrefixConfig):
        super().__init__(config)
        sees, hears = config.vision_config is not None, config.audio_config is not None
        known = (not sees or config.vision_width is not None) and (not hears or config.audio_width is not None)
        if not known or config.embedding_dim is None:
            raise ValueError(
                "This config does not know the geometry of its parents (`vision_width`, `embedding_dim`): build it with "
                "FrozenPrefixConfig.from_vision_text_configs(vision_config, text_config, ...), which probes them."
            )
        built = parts_to_build(config)
        self._parts_with_home: frozenset[str] = frozenset()
        # Registered in this order: the connector is initialised last, at the norm of the words.
        self.register_module("vision_tower", build_vision_tower(config.vision_config) if "vision" in built else None)
        text = build_language_model(config.text_config, config.text_headless) if "text" in built else None
        self.register_module("language_model", text)
        self.register_module("audio_tower", build_audio_tower(config.audio_config) if "audio" in built else None)
        self.connector = build_connector(**config.connector_arguments) if sees else None
        self.audio_connector = build_connector(**config.audio_connector_arguments) if hears else None
        self.cross_attention = None
        if config.fusion == "cross_attention":
            self.cross_attention = GatedCrossAttention(
                hidden_size=config.text_hidden_size,
                num_layers=config.text_num_layers,
                embedding_dim=config.embedding_dim,
                options=config.cross_attention_config,
            )
        # What trains stays in fp32 whatever the parents' dtype is: in half precision its updates would be lost.
        trained = {name: getattr(self, name) for name in ("connector", "audio_connector", "cross_attention")}
        self._keep_in_fp32_modules_strict = {name for name, part in trained.items() if part is not None and part.state_dict()}
        self.post_init()
        self._settle()

    @property
    def embed_scale(self) -> float:
        """Factor that some encoders (Pegasus, Marian) put on words after the lookup, and not on `inputs_embeds`."""
        if not self.config.is_encoder_decoder:
            return 1.0
        if getattr(self.get_input_embeddings(), "embed_scale", None) is not None:
            return 1.0  # inside the lookup, which we call
        return float(getattr(self.language_model.get_encoder(), "embed_scale", None) or 1.0)

    def embed_words(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Word embeddings `(batch, sequence, embedding_dim)` of valid ids, as the language model itself would make them."""
        embeds = self.get_input_embeddings()(input_ids)
        return embeds if self.embed_scale == 1.0 else embeds * self.embed_scale

    def language_inputs(
        self,
        callee: nn.Module,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments for the language model (or its headless base), by the names that `callee` has for them."""
        names = _parameters_of(type(callee))
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        self._refuse_too_long(length, cache)
        inputs = dict(kwargs)
        inputs.pop("mm_token_type_ids", None)
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        else:
            inputs["inputs_embeds"] = inputs_embeds
        if attention_mask is not None and "attention_mask" in names:
            inputs["attention_mask"] = attention_mask
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and self.is_recurrent:
                self._refuse_left_padding(attention_mask)
                # A state has no columns to mask: what is past is in it already.
                inputs["attention_mask"] = attention_mask[:, -length:]
        if "position_ids" in names:
            if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                position_ids = position_ids_from_mask(attention_mask, length)
            if position_ids is not None:
                inputs["position_ids"] = position_ids
        if not self.keeps_cache:
            inputs["use_cache"] = False
        elif cache is not None:
            inputs[cache_argument(names)] = cache
        if "kwargs" not in names:
            inputs = {key: value for key, value in inputs.items() if key in names}
        return {key: value for key, value in inputs.items() if value is not None}

    def _refuse_too_long(self, length: int, cache: Cache | None) -> None:
        if torch.compiler.is_compiling() or self._max_positions is None:
            return
        past = cached_length(cache)
        if length + past > self._max_positions:
            raise ValueError(
                f"The input is {length + past} long, prefix included, but the language model has {self._max_positions} "
                "learned positions: shorten the text (the processor's `max_length` does), use fewer images, or a smaller "
                "`prefix_length`."
            )

    @property
    def keeps_cache(self) -> bool:
        """Whether the language model's cache is one of the library's. Others (RWKV's list of states) can't be reordered or
        stepped in batches, so such a model reads its input anew at every step."""
        # Private: the library keeps the list to itself. What only reads has no cache to ask of.
        ask = getattr(self.language_model, "_supports_default_dynamic_cache", None)
        return ask is None or ask()

    @property
    def is_recurrent(self) -> bool:
        """Whether the language model carries a state along the sequence in place of keys and values."""
        return bool(getattr(self.language_model, "_is_stateful", False))

    def _refuse_left_padding(self, attention_mask: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if (attention_mask[:, 0] == 0).any() and not self._skips_padding:
            raise ValueError(
                f"{type(self.language_model).__name__} reads padding as if it were words, so a left-padded batch would give "
                "wrong results: pad on the right to train, and generate for one sample, or samples of equal length, at a time."
            )

    @functools.cached_property
    def _skips_padding(self) -> bool:
        return skips_padding(self.language_model)

    @functools.cached_property
    def _max_positions(self) -> int | None:
        return max_learned_positions(self.language_model)

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
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        is_longer: torch.BoolTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_features_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FrozenPrefixModelOutputWithPast:
        """
        Args: as [`FrozenPrefixForConditionalGeneration.forward`].

        Returns:
            [`FrozenPrefixModelOutputWithPast`]
        """
        callee = self.language_model.base_model
        # Some encoder-decoders have no headless model: the whole one then gives its decoder's hidden states.
        whole = callee is self.language_model
        outputs, prefixes = self.run(
            callee,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            media={
                "pixel_values": pixel_values,
                "vision_features": vision_features,
                "vision_features_mask": vision_features_mask,
                "image_index": image_index,
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
                "interpolate_pos_encoding": interpolate_pos_encoding,
                "pixel_values_videos": pixel_values_videos,
                "input_features": input_features,
                "input_features_mask": input_features_mask,
                "is_longer": is_longer,
            },
            kwargs={**kwargs, "output_hidden_states": True} if whole else dict(kwargs),
        )
        fields = _fields(FrozenPrefixModelOutputWithPast, outputs)
        if whole:
            states = fields["decoder_hidden_states"] if self.config.is_encoder_decoder else fields["hidden_states"]
            fields["last_hidden_state"] = states[-1]
        return FrozenPrefixModelOutputWithPast(**{**fields, **prefixes})

    def run(
        self,
        callee: nn.Module,
        *,
        input_ids: torch.LongTensor | None,
        media: dict[str, Any],
        attention_mask: Any,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        kwargs: dict[str, Any],
        lead: SharedLead | None = None,
    ) -> tuple[ModelOutput, dict[str, torch.Tensor]]:
        """Merges prefixes and words and calls the language model (or its headless base). `media` holds what was given of
        `MEDIA_INPUTS`; what rows have in common by `lead` is read once, and the output is of what follows it. Returns the
        output and the prefixes, as `image_hidden_states` and so on."""
        given_ids = input_ids  # merging takes the placeholders out
        if self.config.is_encoder_decoder and kwargs.get("encoder_outputs") is not None:
            inputs = {"attention_mask": attention_mask, cache_argument(_parameters_of(type(callee))): cache, **kwargs}
            return callee(**inputs, return_dict=True), {}
        input_ids, inputs_embeds, prefixes = self.merge(input_ids, inputs_embeds, media, mm_encoder_outputs)
        if self.config.is_encoder_decoder:
            input_ids, inputs_embeds, attention_mask = pad_right(input_ids, inputs_embeds, attention_mask)
        if lead is not None and not self.config.is_encoder_decoder:
            cache = self.read_lead(lead, inputs_embeds)
            inputs_embeds, kwargs = inputs_embeds[:, lead.length :], {**kwargs, "use_cache": True}
        if lead is not None and self.config.is_encoder_decoder:
            encoded = self.encode_alike(lead, inputs_embeds, attention_mask)
            inputs = {**kwargs, "attention_mask": attention_mask, "encoder_outputs": encoded}
        else:
            inputs = self.language_inputs(
                callee, input_ids, inputs_embeds, attention_mask, position_ids, cache, kwargs
            )
        if self.cross_attention is not None:
            seen = prefixes.get(None)
            placeholders = None if given_ids is None else self.placeholders(given_ids)
            outputs = self.cross_attention.call(callee, inputs, placeholders, seen)
            return outputs, {} if seen is None else {"image_hidden_states": torch.cat(seen)}
        outputs = callee(**inputs, return_dict=True)
        return outputs, {f"{modality}_hidden_states": prefix for modality, prefix in prefixes.items()}


def _fields(output_class: type, outputs: ModelOutput) -> dict[str, Any]:
    return {name: outputs.get(name) for name in output_class.__dataclass_fields__}


class FrozenPrefixForConditionalGeneration(
    MediaGenerationMixin,
    PrefixCacheMixin,
    AnswerScoringMixin,
    AssistedDecodingMixin,
    FrozenPrefixPreTrainedModel,
    GenerationMixin,
):
    """
    Frozen tower, connector and frozen language model, with its head: trains by `Trainer`, writes by `generate()`.

    Causal and encoder-decoder language models serve alike; for the latter the prefix goes to the encoder and `labels` to
    the decoder.
    """

    def __init__(self, config: FrozenPrefixConfig):
        if config.text_headless:
            raise ValueError(
                "This checkpoint's text model reads and doesn't write (`text_headless=True`): load it with "
                "FrozenPrefixForImageTextRetrieval, or join the tower to a language model."
            )
        super().__init__(config)
        self.model = FrozenPrefixModel(config)
        self.post_init()
        self._settle()

    def _settle(self) -> None:
        super()._settle()
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
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        is_longer: torch.BoolTensor | None = None,
        vision_features: torch.FloatTensor | None = None,
        vision_features_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, embedding_dim)`, *optional*).
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                -100, or a placeholder, where nothing is to be learnt. Causal models: aligned with `input_ids`, shifted inside.
                Encoder-decoders: what the decoder is to write.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): as in the library; 0 keeps all.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}`, and so with `"video"` and `"audio"`, encoded before.
            pixel_attention_mask, spatial_shapes, interpolate_pos_encoding: for towers that take them.
            pixel_values_videos, input_features, input_features_mask, is_longer:
                The videos and sounds of the whole batch, likewise; see [`FrozenPrefixModel.get_video_features`] and
                [`FrozenPrefixModel.get_audio_features`].
            vision_features (`torch.FloatTensor` of shape `(num_images, positions, vision_width)`, *optional*):
                In place of `pixel_values`: what the frozen tower would have given the connector (see
                `modeling_frozen.feature_cache`). The tower then need not be loaded.
            vision_features_mask (`torch.BoolTensor` of shape `(num_images, positions)`, *optional*):
                True at real positions, where their number varies.
            image_index (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                For every image of the batch in reading order its row in `pixel_values` or `vision_features`, so that an
                image of several samples is encoded once.
            decoder_input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): encoder-decoders only.
            skip_logits (`bool`, *optional*):
                Run the head only where a label is, on a chunk of labels at a time, and return no logits. Defaults to doing
                so in training with labels, but for models compiled as a whole.
            kwargs:
                `num_items_in_batch`, what the summed loss is divided by; `loss_config`, for this call, in place of the
                config's (which holds in training alone); all else goes to the language model.

        Returns:
            [`FrozenPrefixCausalLMOutputWithPast`]

        Raises:
            ValueError: if placeholders and images don't match, or the input is longer than the model's positions.
        """
        language_model = self.model.language_model
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        if skip_logits is None:
            skip_logits = self.training and not torch.compiler.is_compiling()
        loss_config = kwargs.pop("loss_config", None)
        if loss_config is None:
            loss_config = self.config.loss_config if self.training else {}
        loss_config = check_loss_config(loss_config)
        targets = path = None
        if labels is None and self.training and num_items_in_batch is not None:
            _warn_of_labels_taken_away()
        if labels is not None:
            # No word stands at a placeholder: collators that copy ids into labels would have it learnt, or overrun the head.
            labels = labels.masked_fill(self.model.placeholders(labels), IGNORE_INDEX)
            kwargs.setdefault("use_cache", False)
            if skip_logits and is_plain_cross_entropy(self.loss_function):
                path = headless_path(language_model)
            if self.config.is_encoder_decoder:
                targets = labels
                if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
                    prepare = getattr(language_model, "prepare_decoder_input_ids_from_labels", None)
                    if prepare is not None:
                        decoder_input_ids = prepare(labels=labels)
                    else:
                        kwargs["labels"] = labels  # the model shifts them itself; its own loss is left alone
                        path = None
                skip_logits = path is not None
            else:
                targets = shift_for_causal_model(labels) if shift_labels is None else shift_labels
            if skip_logits:
                logits_to_keep = targets != IGNORE_INDEX
                targets = targets[logits_to_keep]

        media = {
            "pixel_values": pixel_values,
            "vision_features": vision_features,
            "vision_features_mask": vision_features_mask,
            "image_index": image_index,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "pixel_values_videos": pixel_values_videos,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "is_longer": is_longer,
        }
        callee, keeps, apart, lead = language_model, _accepts(language_model, "logits_to_keep"), None, None
        if path is not None:
            # Who asks for more (a cache, attentions) wants it of every row.
            asked = {name for name, value in kwargs.items() if value} - {"mm_token_type_ids"}
            plain = not asked and position_ids is None and cache is None
            if plain and image_index is not None and input_ids is not None:
                mm_encoder_outputs, media = self.model.encode(media, mm_encoder_outputs), {}
                images = mm_encoder_outputs["image"]
                lead = self.model.find_lead(input_ids, attention_mask, images, image_index, path, logits_to_keep)
            if lead is not None and not self.config.is_encoder_decoder:
                logits_to_keep = logits_to_keep[:, lead.length :]
            apart = HeadlessCall(language_model, path, logits_to_keep)
            callee = apart.callee
        elif keeps:
            kwargs["logits_to_keep"] = logits_to_keep
        outputs, prefixes = self.model.run(
            callee,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            media=media,
            kwargs={**kwargs, "decoder_input_ids": decoder_input_ids},
            lead=lead,
        )
        loss, logits = None, outputs.logits
        if apart is not None:
            vocab_size = logits.shape[-1]
            loss = chunked_loss(
                apart, targets, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **loss_config
            )
        else:
            logits = logits if keeps else slice_logits_to_keep(logits, logits_to_keep)
            if targets is not None:
                loss_config.pop("chunk_size")
                loss = language_modeling_loss(
                    self.loss_function,
                    logits,
                    targets.to(logits.device),
                    num_items_in_batch=num_items_in_batch,
                    **loss_config,
                )
        if targets is not None and skip_logits:
            logits = None
        fields = _fields(FrozenPrefixCausalLMOutputWithPast, outputs)
        if lead is not None:
            fields[CACHE] = None  # of our own making
        fields.update(loss=loss, logits=logits, **prefixes)
        return FrozenPrefixCausalLMOutputWithPast(**fields)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Of the encoder-decoder language model, for collators that ask."""
        return self.model.language_model.prepare_decoder_input_ids_from_labels(labels=labels)

    # ------------------------------------------------------------------------------------------- generate()'s hooks

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        last = max(self.config.placeholder_ids.values())
        if last < language_model_geometry(self.model.language_model).num_embeddings:
            return processors
        padded = PaddedLogitsProcessorList(processors)
        padded.last_placeholder_id = last
        return padded

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not self.model.keeps_cache:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        name = generation_cache(_parameters_of(type(self.model.language_model)))
        if name != CACHE and CACHE in model_kwargs:
            model_kwargs[name] = model_kwargs.pop(CACHE)

    def create_masks_for_generate(self, config: FrozenPrefixConfig, **kwargs: Any) -> Any:
        """The masks of compilable caches, as the language model itself makes them (ALiBi wants them 2-D)."""
        own = getattr(self.model.language_model, "create_masks_for_generate", create_masks_for_generate)
        return own(config=config.get_text_config(decoder=True), **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        if not self.config.is_encoder_decoder:
            model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
            return self._without_what_is_cached(inputs_tensor, model_kwargs)
        if model_kwargs.get("encoder_outputs") is not None:
            return model_kwargs
        # The prefix goes among the encoder's words, so images are encoded and merged before the encoder runs.
        model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        inputs_embeds = model_kwargs.pop("inputs_embeds", None)
        input_ids, inputs_embeds, _ = self.model.merge(
            inputs_tensor if inputs_embeds is None else None,
            inputs_embeds,
            {},
            model_kwargs.pop("mm_encoder_outputs", None),
        )
        input_ids, inputs_embeds, mask = pad_right(input_ids, inputs_embeds, model_kwargs.get("attention_mask"))
        if mask is not None:
            model_kwargs["attention_mask"] = mask
        name, tensor = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        model_kwargs = self._prepare_text_encoder_decoder_kwargs_for_generation(
            tensor, model_kwargs, name, generation_config
        )
        model_kwargs.pop("inputs_embeds", None)
        return model_kwargs


__all__ = [
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixModel",
    "FrozenPrefixModelOutputWithPast",
    "FrozenPrefixCausalLMOutputWithPast",
    "FrozenPrefixPreTrainedModel",
]
