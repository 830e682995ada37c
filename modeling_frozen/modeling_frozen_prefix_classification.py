# SPDX-License-Identifier: Apache-2.0
"""FrozenPrefixForSequenceClassification: one vector of image and text together, and a small head that predicts its class.

The image's embedding comes through tower and connector, the text's from the hidden states of the language model; each is
scaled to norm 1, so that neither outweighs the other, and only connector and head train. The losses are here too:
transformers', made exact under gradient accumulation, with weights for rare classes.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_frozen_prefix import FrozenPrefixConfig
from .connectors import Head
from .losses import IGNORE_INDEX
from .modeling_frozen_prefix import FrozenPrefixModel
from .modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from .parts import MODALITIES, take_media
from .text_reading import pool_text, probe_text_width, read_text
from .weights import to_weight


if TYPE_CHECKING:
    from typing_extensions import Self


def fuse(embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Joins embeddings of several kinds into one vector of norm 1: each is scaled to norm 1 first, so that all count the same,
    then `v = [f; p] / ||[f; p]||`.

    Args:
        embeddings (`Iterable[torch.Tensor]` of shape `(batch, width)`, each of its own width).

    Returns:
        `torch.FloatTensor` of shape `(batch, sum of widths)`, in fp32.
    """
    parts = [nn.functional.normalize(embedding.float(), dim=-1) for embedding in embeddings]
    parts = [part.to(parts[0].device) for part in parts]
    return nn.functional.normalize(torch.cat(parts, dim=-1), dim=-1)


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    class_weights: Sequence[float] | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    transformers' losses of sequence classifiers: cross-entropy, binary cross-entropy for every class, or squared error.

    Sums are divided by the number of labels (of the whole accumulated batch, where that is known), with class weights as
    well: divided by the sum of weights, a sample would count more or less by what else is in its batch.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`).
        labels (`torch.Tensor`):
            `(batch,)` class indices, -100 to be left out; `(batch, num_labels)` 0 or 1; or for regression `(batch,)` or
            `(batch, num_labels)` numbers.
        problem_type (`str`): as in transformers' configs.
        class_weights (`list[float]`, *optional*):
            Of one label: the weight of each class's samples. Of several: the weight of each class's positives.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): number of label values, as `Trainer` counts them.

    Returns:
        `torch.Tensor` of shape `()`, in fp32.

    Raises:
        ValueError: if labels and logits don't fit each other.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    num_labels = logits.shape[-1]
    weight = None if class_weights is None else torch.tensor(class_weights, device=logits.device)
    expected = (len(logits),) if problem_type == "single_label_classification" else tuple(logits.shape)
    if problem_type == "regression" and num_labels == 1:
        labels = labels.reshape(-1, 1)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"Labels have shape {tuple(labels.shape)}, where `problem_type='{problem_type}'` with {num_labels} "
            f"labels takes {expected}: check `num_labels` and `problem_type`. [errors.md#shape]"
        )
    if problem_type == "single_label_classification":
        loss = nn.functional.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE_INDEX, reduction="sum")
        count: Any = (labels != IGNORE_INDEX).sum().clamp(min=1)
    else:
        labels = labels.to(logits.dtype)
        if problem_type == "regression":
            loss = nn.functional.mse_loss(logits, labels, reduction="sum")
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="sum")
        count = labels.numel()
    count = count if num_items_in_batch is None else num_items_in_batch
    return loss / (count.to(loss.device) if torch.is_tensor(count) else count)


class ClassificationHead(Head):
    """
    Logits of a vector of norm 1, by a linear layer, GELU, dropout and another linear layer.

    Args:
        in_features (`int`): width of the vector.
        num_labels (`int`): how many logits.
        hidden_size (`int`, *optional*, defaults to 512): width between the two layers; `None` for a single linear layer.
        dropout (`float`, defaults to 0.1): before the last layer.
    """

    def __init__(self, in_features: int, num_labels: int, *, hidden_size: int | None = 512, dropout: float = 0.1):
        super().__init__()
        self.in_features, self.num_labels = in_features, num_labels
        self.dense = None if hidden_size is None else nn.Linear(in_features, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size or in_features, num_labels)

    def _reset_own(self) -> None:
        # A vector of norm 1 has parts of about 1/sqrt(width): by weights of variance 1 its activations have variance 1.
        init.normal_((self.dense or self.out_proj).weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(batch, in_features)`, of norm 1, to logits `(batch, num_labels)`."""
        features = to_weight(features, self.out_proj.weight)
        if self.dense is not None:
            features = nn.functional.gelu(self.dense(features))
        return self.out_proj(self.dropout(features))


class FrozenPrefixForSequenceClassification(FrozenPrefixPreTrainedModel):
    """
    Frozen tower, connector and frozen language model with a classification head on their fused embeddings.

    With `f` the image's embedding (mean over its prefix), `p` the text's (pooled hidden states of the language model), both
    of norm 1, the head reads `v = [f; p] / ||[f; p]||`. `config.fused_inputs` says which of them take part; connector and
    head train, the backbones are frozen bit for bit.

    Example:

    ```python
    >>> from modeling_frozen import FrozenPrefixForSequenceClassification, FrozenPrefixProcessor

    >>> model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
    ...     "google/siglip2-base-patch16-224", "Qwen/Qwen3-0.6B", id2label={0: "harmless", 1: "hateful"}
    ... )
    >>> processor = FrozenPrefixProcessor.from_model(model)
    >>> logits = model(**processor(images=image, text="a caption", return_tensors="pt")).logits
    ```"""

    _keep_in_fp32_modules_strict = ["classifier"]
    _head_name = "classifier"
    _text_headless = None  # what reads texts and writes none, such as BERT, serves as well

    def __init__(self, config: FrozenPrefixConfig):
        if config.text_width is None and "text" in config.resolved_fused_inputs:
            config.text_width = probe_text_width(config.backbone_configs["text"], config.text_headless)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FrozenPrefixModel(config)
        embedding_dim: Any = config.embedding_dim  # without it FrozenPrefixModel raises
        widths: dict[str, Any] = {
            "text": config.text_width,
            "image": config.features_width if self._reads_tower else embedding_dim,
        }
        in_features = sum(widths.get(name, embedding_dim) for name in config.resolved_fused_inputs)
        num_labels: Any = config.num_labels  # transformers sets it
        self.classifier = ClassificationHead(in_features, num_labels, **(config.classifier_config or {}))
        self.post_init()
        self._finish_init()

    @property
    def _reads_tower(self) -> bool:
        return self.config.image_embedding == "tower"

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedModel | Sequence[str | PreTrainedModel] | None,
        text_model_name_or_path: str | PreTrainedModel,
        audio_model_name_or_path: str | PreTrainedModel | None = None,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        label2id: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> "Self":
        """
        Joins pretrained models, all frozen, by a new connector and a new head.

        Args:
            vision_model_name_or_path, text_model_name_or_path, audio_model_name_or_path:
                As [`FrozenPrefixPreTrainedModel.from_vision_text_pretrained`].
            num_labels (`int`, *optional*, defaults to 2): how many classes, where they have no names.
            id2label, label2id (`dict`, *optional*): names of the classes; one gives the other.
            kwargs: keys of [`FrozenPrefixConfig`] (`fused_inputs`, `text_pooling`, `problem_type`, `class_weights` …) and
                options of loading, as there.
        """
        if id2label is None and label2id is not None:
            id2label = {index: name for name, index in label2id.items()}
        if id2label is None:
            id2label = {index: f"LABEL_{index}" for index in range(2 if num_labels is None else num_labels)}
        if num_labels not in (None, len(id2label)):
            raise ValueError(
                f"`num_labels={num_labels}`, but {len(id2label)} classes have names: leave `num_labels` out."
                " [errors.md#contradiction]"
            )
        label2id = label2id or {name: index for index, name in id2label.items()}
        return super().from_vision_text_pretrained(
            vision_model_name_or_path,
            text_model_name_or_path,
            audio_model_name_or_path,
            id2label=id2label,
            label2id=label2id,
            **kwargs,
        )

    # ------------------------------------------------------------------------------------------------ embeddings

    def get_fused_features(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        What the head reads: `v = [f; p] / ||[f; p]||` of `config.fused_inputs`, in their order.

        Args: as [`forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch, classifier.in_features)`, each row of norm 1.
        """
        media = take_media(kwargs, pixel_values=pixel_values)
        return self._fuse(input_ids, inputs_embeds, attention_mask, media, mm_encoder_outputs, kwargs)[0]

    def _fuse(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        media: dict[str, Any],
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        fused = self.config.resolved_fused_inputs
        media = {name: value for name, value in media.items() if value is not None}
        embeddings, encoded, outputs = {}, {}, None
        if "image" in fused and self._reads_tower:
            embeddings["image"] = self._mean_by_sample(self._tower_embeddings(media), "image", input_ids, inputs_embeds)
            media = {name: value for name, value in media.items() if name not in MODALITIES["image"].inputs}
        if self.config.prompt_sees_media or set(fused) - {"text", *embeddings}:
            encoded = self.model.encode(media, mm_encoder_outputs)
        for name in fused:
            if name == "text":
                if input_ids is None and inputs_embeds is None:
                    raise ValueError(
                        f"This classifier reads {list(fused)}, but there is no text: pass `input_ids`, or train one with "
                        f"`fused_inputs={[one for one in fused if one != 'text']}`. [errors.md#choices]"
                    )
                prefixes = encoded if self.config.prompt_sees_media else None
                states, mask, outputs = read_text(self.model, input_ids, inputs_embeds, attention_mask, prefixes, **kwargs)
                embeddings[name] = pool_text(states, mask, self.config.resolved_text_pooling)
            elif name not in embeddings:
                if name not in encoded:
                    raise ValueError(
                        f"This classifier reads {list(fused)}, but there is no {name}: pass it, or train one with "
                        f"`fused_inputs={[one for one in fused if one != name]}`. [errors.md#choices]"
                    )
                width: Any = self.config.embedding_dim
                vectors = [prefix.reshape(-1, width) for prefix in encoded[name].pooler_output]
                embeddings[name] = self._mean_by_sample(vectors, name, input_ids, inputs_embeds)
        vector = fuse(embeddings[name] for name in fused)
        idle = self.model._idle_parts(set(encoded))
        if idle:  # distributed training wants a gradient, if zero, for all that trains
            vector = vector + self.model._zero_of(idle).to(vector.device)
        return vector, outputs

    def _tower_embeddings(self, media: dict[str, Any]) -> list[torch.Tensor]:
        """One `(positions, vision_width)` per image: what the connector would read."""
        if media.get("vision_features") is None and media.get("pixel_values") is None:
            raise ValueError("This classifier reads images, but there is none: pass `pixel_values`. [errors.md#search]")
        features, mask, _ = self.model.read_images(media, {})
        rows = [row if mask is None else row[mask[index].bool()] for index, row in enumerate(features)]
        index = media.get("image_index")
        return rows if index is None else [rows[one] for one in index.tolist()]

    def _mean_by_sample(
        self,
        vectors: list[torch.Tensor],
        modality: str,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """The mean over all vectors of a sample. By the placeholders each sample has its images (videos, audio clips); without
        any, each has one."""
        means = [one.float().mean(0) for one in vectors]
        if torch.compiler.is_compiling():
            return torch.stack(means)
        text = input_ids if input_ids is not None else inputs_embeds
        batch = len(means) if text is None else len(text)
        each = getattr(self.config, f"num_{modality}_tokens")
        counts = [0]
        if input_ids is not None:
            counts = (input_ids == self.config.placeholder_ids[modality]).sum(-1).tolist()
        if any(counts) and each is not None:
            counts = [-(-count // each) for count in counts]
        else:  # images of as many placeholders as they have positions: one image per sample is all that can be known
            counts = [1] * batch
        if sum(counts) != len(means) or 0 in counts:
            raise ValueError(
                f"There are {len(means)} {modality}s for {batch} samples that hold {counts}: a sample needs at least one, and "
                "where some have more, the placeholders of the processor assign them. [errors.md#placeholders]"
            )
        rest, rows = iter(zip(means, vectors, strict=True)), []
        for count in counts:
            own = [next(rest) for _ in range(count)]
            rows.append(own[0][0] if count == 1 else torch.cat([vector.float() for _, vector in own]).mean(0))
        return torch.stack(rows)

    # --------------------------------------------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                The text, padded on any side. Placeholders of images, as the processor writes them, assign images to
                samples; the language model reads them with `config.prompt_sees_media` alone, else skips them.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of the whole batch in reading order.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 1 for words, 0 for padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, embedding_dim)`, *optional*):
                In place of `input_ids`.
            labels (`torch.Tensor`, *optional*): see [`classification_loss`].
            mm_encoder_outputs (`dict`, *optional*): what was encoded before, as in generation.
            kwargs:
                The other inputs of images, videos and audio, as [`FrozenPrefixForConditionalGeneration.forward`] names
                them (`vision_features`, `image_index`, `input_features` …), `output_hidden_states`, `output_attentions`.

        Returns:
            `SequenceClassifierOutput`: `loss` where there are labels, `logits` `(batch, num_labels)` in fp32, and the
            language model's hidden states and attentions where they are requested.

        Raises:
            ValueError: if an input that `config.fused_inputs` names is missing, or images don't fit the samples.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        for unused in ("position_ids", "token_type_ids", "mm_token_type_ids"):  # made from the mask, once it is packed
            kwargs.pop(unused, None)
        media = take_media(kwargs, pixel_values=pixel_values)
        vector, outputs = self._fuse(input_ids, inputs_embeds, attention_mask, media, mm_encoder_outputs, kwargs)
        logits = self.classifier(vector)
        loss = None
        if labels is not None:
            loss = classification_loss(
                logits, labels, self._problem_type(labels), self.config.class_weights, num_items_in_batch
            )
        outputs = outputs or {}
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _problem_type(self, labels: torch.Tensor) -> str:
        if self.config.problem_type is None:  # transformers' rule, and as there it is applied once and kept
            many = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            self.config.problem_type = "regression" if self.num_labels == 1 else many  # type: ignore[assignment]  # a literal
        return str(self.config.problem_type)


__all__ = ["FrozenPrefixForSequenceClassification", "classification_loss", "fuse"]
