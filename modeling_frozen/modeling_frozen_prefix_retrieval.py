# SPDX-License-Identifier: Apache-2.0
"""FrozenPrefixForImageTextRetrieval: images and texts in one space, each retrieved by the other.

Contrastive tuning with a lock on either side: with `trainable=("text",)` it is LiT (arXiv 2111.07991), with the default
`("connector",)` both backbones stay frozen and connector, projections and scale learn (FROMAGe, arXiv 2301.13823), with
`("vision",)` it is LiT's mirror. Arguments and outputs are those of transformers' CLIP.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .checkpoints import Loading, while_loading
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connectors import Head
from .contrastive_losses import CONTRASTIVE_LOSSES, LOGIT_BIAS_STARTS, LOGIT_SCALE_STARTS, process_rank
from .modeling_frozen_prefix import FrozenPrefixForConditionalGeneration, FrozenPrefixModel
from .modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from .parts import PARTS, take_media
from .text_reading import pack_text, pool_text, probe_text_width, read_text, text_reader
from .weights import brought, to_weight


if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_PROJECTION_DIM = 512
MAX_LOGIT_SCALE = 100.0  # CLIP, arXiv 2103.00020, section 2.5: beyond it training diverges


class ContrastiveHead(Head):
    """
    Two projections into one space, and the scale and bias of the cosines there (CLIP, arXiv 2103.00020).

    Args:
        image_width (`int`): width of what the image's embedding is projected from: the prefix's mean, or the tower's.
        embedding_dim (`int`): width of words.
        text_width (`int`): width of a pooled text.
        projection_dim (`int`): width of the shared space.
        logit_scale (`float`): logarithm of the inverse temperature at the start.
        logit_bias (`float`, *optional*): what is added to the scaled cosine at the start (SigLIP); `None`: nothing, ever.
        projection_std (`float`, *optional*): of the projections' start; by default it keeps variance, as connectors' maps do.
        projection_dropout (`float`): share of what the image's projection reads that is set to zero in training.
        ret (`bool`): holds a learnt vector `[RET]` of width `embedding_dim`, to be read behind the words (FROMAGe).
    """

    def __init__(
        self,
        *,
        image_width: int,
        embedding_dim: int,
        text_width: int,
        projection_dim: int,
        logit_scale: float,
        logit_bias: float | None = None,
        projection_std: float | None = None,
        projection_dropout: float = 0.0,
        ret: bool = False,
    ):
        super().__init__()
        self.visual_projection = nn.Linear(image_width, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_width, projection_dim, bias=False)
        self.dropout = nn.Dropout(projection_dropout)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.empty(()))
        self.ret = nn.Parameter(torch.empty(embedding_dim)) if ret else None
        self._starts = (logit_scale, logit_bias)
        self._projection_std = projection_std

    def _reset_own(self) -> None:
        scale, bias = self._starts
        init.constant_(self.logit_scale, scale)
        if self._projection_std is not None:
            for projection in (self.visual_projection, self.text_projection):
                init.normal_(projection.weight, std=self._projection_std)
        if self.logit_bias is not None and bias is not None:
            init.constant_(self.logit_bias, bias)
        if self.ret is not None:
            init.normal_(self.ret, std=1 / math.sqrt(len(self.ret)))

    @torch.no_grad()
    def set_output_norm(self, norm: float) -> None:
        """Gives `[RET]` the norm of a word, so that the language model reads it as one."""
        if self.ret is not None:
            self.ret.mul_(norm / self.ret.norm())


@dataclass
class FrozenPrefixImageTextOutput(ModelOutput):
    """
    Output of `FrozenPrefixForImageTextRetrieval`, in the order of CLIP's.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): the weighted sum of the two below.
        logits_per_image (`torch.FloatTensor` of shape `(num_images, num_texts)`): scaled cosines.
        logits_per_text (`torch.FloatTensor` of shape `(num_texts, num_images)`): their transpose.
        text_embeds, image_embeds (`torch.FloatTensor` of shape `(number, projection_dim)`): of length 1.
        text_model_output, vision_model_output (`BaseModelOutputWithPooling`): of the two sides, as the features' methods
            give them.
        contrastive_loss, caption_loss (`torch.FloatTensor` of shape `()`, *optional*): before weighting.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    contrastive_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        nested = ("text_model_output", "vision_model_output")
        return tuple(self[key].to_tuple() if key in nested else self[key] for key in self.keys())


class FrozenPrefixForImageTextRetrieval(FrozenPrefixPreTrainedModel):
    """
    Tower, connector and text model that embed images and texts in one space.

    The image's embedding is the mean over its prefix, projected, or over the tower's own features
    (`config.image_embedding="tower"`); the text's are the pooled hidden states of the text model (`config.text_pooling`),
    projected. Any text model serves: a decoder, an encoder, the encoder of an encoder-decoder. With one that only reads, no
    prefix is ever read, and joining it chooses `"tower"` unless a connector is asked for.

    As in CLIP, [`get_image_features`] and [`get_text_features`] give embeddings in the shared space. The prefix, which the
    generative class's method of that name gives, is `model.model.get_image_features(...)` here; `model.generator` is the
    generative class around the same weights, so that one connector may describe, answer and retrieve.

    Example:

    ```python
    >>> from modeling_frozen import FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor

    >>> model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
    ...     "google/siglip2-base-patch16-224", "sentence-transformers/all-MiniLM-L6-v2", trainable=("connector", "text")
    ... )
    ```"""

    _keep_in_fp32_modules_strict = ["contrastive_head"]
    _head_name = "contrastive_head"
    _text_headless = None
    # What `Trainer` would divide by is a number of words; a contrastive loss is of the batch.
    accepts_loss_kwargs = False

    def __init__(self, config: FrozenPrefixConfig):
        if config.text_pooling == "cls" and not (config.text_reads_ahead or config.text_headless):
            raise ValueError(
                '`text_pooling="cls"` reads the first word, which in a causal model does not attend to the '
                'others, so all texts would be the same: take "last", "mean" or "ret". [errors.md#language-model]'
            )
        if config.text_width is None:
            config.text_width = probe_text_width(config.backbone_configs["text"], config.text_headless)
        if config.projection_dim is None:
            config.projection_dim = DEFAULT_PROJECTION_DIM
        super().__init__(config)
        self.model = FrozenPrefixModel(config)
        starts = (config.logit_scale_init_value, config.logit_bias_init_value)
        kind = config.contrastive_loss_type
        self.contrastive_head = ContrastiveHead(
            image_width=config.features_width if self._reads_tower else config.embedding_dim,  # type: ignore[arg-type]
            embedding_dim=config.embedding_dim,  # type: ignore[arg-type]  # without it FrozenPrefixModel raises
            text_width=config.text_width,
            projection_dim=config.projection_dim,
            logit_scale=LOGIT_SCALE_STARTS[kind] if starts[0] is None else starts[0],
            logit_bias=LOGIT_BIAS_STARTS[kind] if starts[1] is None else starts[1],
            # transformers' own start: of a larger matrix, Adam's steps are a smaller part, and it learns more slowly.
            projection_std=0.02 if self._reads_tower else None,
            projection_dropout=config.projection_dropout,
            ret=config.text_pooling == "ret",
        )
        self.post_init()
        self._finish_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedModel | Sequence[str | PreTrainedModel] | None,
        text_model_name_or_path: str | PreTrainedModel,
        audio_model_name_or_path: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> "Self":
        """
        Joins pretrained models by a new connector and new projections.

        Args:
            vision_model_name_or_path, text_model_name_or_path, audio_model_name_or_path:
                As [`FrozenPrefixPreTrainedModel.from_vision_text_pretrained`]; the text model may be an encoder without a
                language model's head. Where it has one, it is kept (`text_headless=True` leaves it out).
            kwargs: keys of [`FrozenPrefixConfig`] (`projection_dim`, `contrastive_loss_type`, `text_pooling`, `trainable`,
                `unlocked_layers`, `caption_loss_weight` …) and options of loading, as there.
        """
        return super().from_vision_text_pretrained(
            vision_model_name_or_path, text_model_name_or_path, audio_model_name_or_path, **kwargs
        )

    @classmethod
    def _choose_options(cls, options: dict[str, Any]) -> None:
        # A prefix is written to be read among words. Where nothing reads it, a second map between tower and shared space
        # only learns the training images by heart (docs/search.md has the figures).
        asked = {"connector_type", "connector_config", "prefix_length", "prefix_lengths"} & options.keys()
        if options["text_headless"] and not asked:
            options.setdefault("image_embedding", "tower")

    @property
    def _reads_tower(self) -> bool:
        return self.config.image_embedding == "tower"

    def _layered(self, part: str) -> nn.Module:
        return text_reader(self.backbones[part]) if part == "text" else super()._layered(part)

    def _ids_of_idle_parameters(self) -> set[int]:
        language_model = self.backbones.get("text")
        if language_model is None or self.config.caption_loss_weight:
            return set()
        used = {id(parameter) for parameter in text_reader(language_model).parameters()}
        return {id(parameter) for parameter in language_model.parameters()} - used

    # ------------------------------------------------------------------------------------------------ embeddings

    @property
    def visual_projection(self) -> nn.Linear:
        """From the mean of a prefix to the shared space."""
        return self.contrastive_head.visual_projection

    @property
    def text_projection(self) -> nn.Linear:
        """From a pooled text to the shared space."""
        return self.contrastive_head.text_projection

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature, as in CLIP."""
        return self.contrastive_head.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Added to the scaled cosines, with the sigmoid loss."""
        return self.contrastive_head.logit_bias

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Embeddings of images, as CLIP's method of that name.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): images.
            kwargs: `vision_features`, `vision_features_mask`, `image_index` and the options of some towers, as
                [`FrozenPrefixModel.get_image_features`].

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(num_images, projection_dim)`, not normalised; the other fields
            are the tower's own.
        """
        return self._embed_images({"pixel_values": pixel_values, **kwargs})[0]

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Embeddings of texts, as CLIP's method of that name.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, sequence)`):
                Padded on any side: the result is that of each text alone. Placeholders of images are not read.
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence)`, *optional*): 1 for words, 0 for padding.
            position_ids: taken as CLIP takes it, and made anew from the mask.
            inputs_embeds (`torch.FloatTensor` of shape `(num_texts, sequence, embedding_dim)`, *optional*): in place of ids.
            kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(num_texts, projection_dim)`, not normalised; the other fields
            are the text model's own, of words moved to the start of their rows.
        """
        for unused in ("token_type_ids", "mm_token_type_ids", "return_loss"):
            kwargs.pop(unused, None)
        pooling = self.config.resolved_text_pooling
        embeds: torch.Tensor | None = inputs_embeds
        if pooling == "ret":
            embeds, attention_mask = self._append_ret(input_ids, inputs_embeds, attention_mask)
            pooling, input_ids = "last", None
        states, mask, outputs = read_text(self.model, input_ids, embeds, attention_mask, **kwargs)
        weight = self.text_projection.weight
        pooled = to_weight(pool_text(states, mask, pooling), weight)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=self.text_projection(pooled),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _append_ret(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Word embeddings with `[RET]` right behind each text's last word, and their mask."""
        skipped = None if input_ids is None else self.model.placeholders(input_ids)
        input_ids, inputs_embeds, mask = pack_text(input_ids, inputs_embeds, attention_mask, skipped)
        words = self.model.embed_words(input_ids) if inputs_embeds is None else inputs_embeds
        words = nn.functional.pad(words, (0, 0, 0, 1))
        lengths = mask.sum(-1, keepdim=True)
        columns = torch.arange(words.shape[1], device=mask.device)
        ret = brought(self.contrastive_head, "ret").to(words.device, words.dtype)
        words = torch.where((columns == lengths)[..., None], ret, words)
        return words, (columns <= lengths).long()

    def _embed_images(self, media: dict[str, Any]) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """Embeddings, and the prefixes from which they come, as generation takes them."""
        if self._reads_tower:
            return self._embed_features(media)
        prefixes = self.model.get_image_features(**media, return_dict=True)
        width: Any = self.config.embedding_dim
        rows = [row.reshape(-1, width) for row in prefixes.pooler_output]
        if len({row.shape for row in rows}) == 1:
            means = torch.stack(rows).mean(1)
        else:
            means = torch.stack([row.mean(0) for row in rows])
        embeds = self._project_image(means)
        return type(prefixes)(**{**prefixes, "pooler_output": embeds}), prefixes

    def _embed_features(self, media: dict[str, Any]) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """The same from the tower's own features, without the connector; there are no prefixes."""
        flags = {key: media.pop(key) for key in ("output_hidden_states", "output_attentions") if key in media}
        index = media.pop("image_index", None)
        features, mask, outputs = self.model.read_images(media, flags)
        embeds = self._project_image(pool_text(features.float(), mask, "mean"))
        output = BaseModelOutputWithPooling(
            last_hidden_state=None if outputs is None else outputs.get("last_hidden_state"),
            pooler_output=embeds if index is None else embeds[index.to(embeds.device)],
            hidden_states=None if outputs is None else outputs.get("hidden_states"),
            attentions=None if outputs is None else outputs.get("attentions"),
        )
        return output, output

    def _project_image(self, means: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(self.contrastive_head.dropout(to_weight(means, self.visual_projection.weight)))

    # --------------------------------------------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        image_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        caption_input_ids: torch.LongTensor | None = None,
        caption_attention_mask: torch.Tensor | None = None,
        caption_targets: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FrozenPrefixImageTextOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, sequence)`): texts, padded on any side.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images, or in their place among `kwargs` `vision_features`, with which the tower isn't run at all.
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence)`, *optional*): 1 for words, 0 for padding.
            position_ids: taken as CLIP takes it, and made anew from the mask.
            return_loss (`bool`, *optional*): whether to compute the loss, of text n with image n. Defaults to doing so in
                training.
            image_ids (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
                Equal numbers, in whichever process, say that pairs have the same image: then their texts are not negatives
                of each other.
            image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
                For each text the row of its image in `pixel_values`, so that an image with several texts is encoded
                once; images count as the same by it where there are no `image_ids`.
            caption_input_ids, caption_attention_mask, caption_targets (`torch.LongTensor`, *optional*):
                `input_ids`, `attention_mask` and `labels` of [`FrozenPrefixForConditionalGeneration`] for the same images,
                where `config.caption_loss_weight` is not zero.
            kwargs: other inputs of images (`vision_features`, `vision_features_mask`, `pixel_attention_mask`,
                `spatial_shapes`, `interpolate_pos_encoding`), `output_hidden_states`, `output_attentions`.

        Returns:
            [`FrozenPrefixImageTextOutput`]

        Raises:
            ValueError: if one side is missing, or, for the loss, images and texts are no pairs or captions are missing.
        """
        kwargs.pop("num_items_in_batch", None)
        media = take_media(kwargs, pixel_values=pixel_values)
        flags: dict[str, Any] = {key: kwargs[key] for key in ("output_hidden_states", "output_attentions") if key in kwargs}
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                "Retrieval takes images and texts, but `input_ids` is missing: for images alone call `get_image_features`."
                " [errors.md#search]"
            )
        vision_outputs, prefixes = self._embed_images({**media, **flags})
        text_outputs = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        image_embeds = vision_outputs.pooler_output.float()  # type: ignore[union-attr]  # see `_embed_images`
        image_embeds = nn.functional.normalize(image_embeds, dim=-1)
        text_embeds = nn.functional.normalize(text_outputs.pooler_output.float(), dim=-1).to(image_embeds.device)
        if image_index is not None:
            image_embeds = image_embeds[image_index.to(image_embeds.device)]
        scale = brought(self.contrastive_head, "logit_scale").float().exp().clamp(max=MAX_LOGIT_SCALE).to(image_embeds.device)
        logits_per_text = text_embeds @ image_embeds.T * scale
        bias = None if self.logit_bias is None else brought(self.contrastive_head, "logit_bias").to(scale.device)
        if bias is not None:
            logits_per_text = logits_per_text + bias.float()

        loss = contrastive_loss = caption_loss = None
        if self.training if return_loss is None else return_loss:
            weights = self.config.contrastive_loss_weight, self.config.caption_loss_weight
            terms: list[torch.Tensor] = []
            if weights[0]:
                if image_ids is None and image_index is not None:
                    rank, processes = process_rank()
                    image_ids = image_index.to(image_embeds.device) * processes + rank  # type: ignore[assignment]  # long
                contrastive_loss = CONTRASTIVE_LOSSES[self.config.contrastive_loss_type](
                    image_embeds,
                    text_embeds,
                    logit_scale=scale,
                    logit_bias=bias,
                    image_ids=image_ids,
                    **(self.config.contrastive_loss_config or {}),
                )
                terms.append(weights[0] * contrastive_loss)
            if weights[1]:
                caption_loss = self._caption_loss(
                    prefixes, image_index, caption_input_ids, caption_attention_mask, caption_targets
                )
                terms.append(weights[1] * caption_loss)
            elif idle := self._idle_parts():  # distributed training wants a gradient, if zero, for all that trains
                terms.append(self.model._zero_of(idle).to(terms[0].device))
            loss = sum(terms[1:], terms[0])
        return FrozenPrefixImageTextOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            contrastive_loss=contrastive_loss,
            caption_loss=caption_loss,
        )

    def _idle_parts(self) -> list[nn.Module]:
        """What trains and has no part in retrieval: gated blocks, the audio connector."""
        parts = self.model._idle_parts({"image"})
        if self._reads_tower and self.training and torch.is_grad_enabled():
            connector = self.model.connector
            parts += [connector] if any(parameter.requires_grad for parameter in connector.parameters()) else []
        gated = self.model.cross_attention
        trains = gated is not None and any(parameter.requires_grad for parameter in gated.parameters())
        return [*parts, gated] if trains and torch.is_grad_enabled() else parts

    # --------------------------------------------------------------------------------------------------- captions

    @property
    def generator(self) -> FrozenPrefixForConditionalGeneration:
        """
        The generative class around this model's own tower, connector and language model: `model.generator.generate(...)`.

        Raises:
            ValueError: if the text model only reads.
        """
        generator = self.__dict__.get("_generator")
        if generator is None or generator.model is not self.model:
            # Not registered as a child: its tensors are this model's already.
            generator = self.__dict__["_generator"] = generator_around(self.model)
        generator.training = self.training
        return generator

    def _caption_loss(
        self,
        prefixes: BaseModelOutputWithPooling,
        image_index: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        if input_ids is None or targets is None:
            raise ValueError(
                f"`caption_loss_weight={self.config.caption_loss_weight}` needs captions, but `caption_input_ids` or "
                "`caption_targets` is missing: DataCollatorForFrozenPrefixRetrieval(processor, captions=True) makes them."
                " [errors.md#search]"
            )
        rows: list[torch.Tensor] = list(prefixes.pooler_output)  # type: ignore[arg-type]  # one tensor per image
        if image_index is not None:
            rows = [rows[index] for index in image_index.tolist()]
        encoded = {"image": type(prefixes)(**{**prefixes, "pooler_output": rows})}
        return self.generator(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=targets,
            mm_encoder_outputs=encoded,
            return_dict=True,
        ).loss


def generator_around(base_model: FrozenPrefixModel) -> FrozenPrefixForConditionalGeneration:
    """
    The generative class around a base model that exists already, sharing every tensor with it.

    Raises:
        ValueError: if its text model only reads.
    """
    if base_model.config.text_headless:
        raise ValueError(
            f"{type(base_model.language_model).__name__} reads texts and writes none, so it can't describe an image: join "
            "the tower to a language model. [errors.md#language-model]"
        )
    with while_loading(Loading(frozenset(PARTS))), torch.device("meta"):  # a base model without weights, for a moment
        generator = FrozenPrefixForConditionalGeneration(base_model.config)
    generator.model = base_model
    generator._is_assembled = True
    generator.post_init()
    # Not `_finish_init`, which would freeze by another model's rules what this one trains.
    for name in ("input_modalities", "_is_stateful", "_can_compile_fullgraph"):
        setattr(generator, name, getattr(base_model, name))
    generator.generation_config = copy.deepcopy(base_model.backbones["text"].generation_config)
    return generator


__all__ = ["FrozenPrefixForImageTextRetrieval", "FrozenPrefixImageTextOutput", "generator_around"]
