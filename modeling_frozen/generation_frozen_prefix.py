# SPDX-License-Identifier: Apache-2.0
"""`generate()` of [`FrozenPrefixForConditionalGeneration`]: every hook of it, the one mixin of the package.

Images are encoded once, before the first step, and repeated with their row. A prefix that was read before
(`encode_prefix`) is gone on from (`generate(prefix_cache=...)`). A prompt is read once for all its beams and answers. An
assistant that takes no images gets text alone. Logits processors meet placeholders, whose ids may lie past the head.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.modeling_outputs import BaseModelOutput

from .backbones import language_model_geometry
from .caches import can_be_kept, changed_cache, copied_cache, narrowed_cache, new_kept_cache
from .configuration_frozen_prefix import FrozenPrefixConfig
from .padding import pad_right, reads_in_chunks, words_of
from .parts import MEDIA_INPUTS, take_media
from .prefix_cache import (
    PrefixCache,
    RowMedia,
    joined_media,
    mask_or_none,
    media_by_row,
    media_together,
    padded_left,
    padded_right,
    shifted,
    take_prefixes,
)
from .transformers_compat import (
    CACHE,
    CACHE_NAMES,
    CHUNKS_HOLD_MEDIA,
    GenerationMixin,
    cache_of,
    cached_length,
    forward_parameters,
    generation_cache,
    masks_maker,
    refuse_prompts_of_old_peft,
    take_cache,
)


# Options of `generate()` that can't be served, and why.
UNSUPPORTED = {
    "assistant_early_exit": "stops in the middle of a model's own layers, and these are its language model's: pass a smaller "
    "language model as `assistant_model`, or `prompt_lookup_num_tokens`.",
    "token_healing": "writes the prompt anew as text, in which placeholders of images are lost: end the prompt at a word, "
    "without a space behind it.",
}


class NoPlaceholdersLogitsProcessor(LogitsProcessor):
    """Placeholders are never written: one would stand for an image in the next turn. transformers' `SuppressTokens…` does the
    same by a search of the whole vocabulary for them, one per cent of a step of a small language model.

    Args:
        ids (`list[int]`): that the head has.
    """

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` of shape `(batch, vocabulary)`, those of placeholders minus infinity."""
        self.ids = self.ids.to(scores.device)
        return scores.index_fill(-1, self.ids, -float("inf"))


class PaddedLogitsProcessorList(LogitsProcessorList):
    """Runs the processors on scores widened so that placeholders' ids, which lie past the head, are columns of their
    own: processors that gather at prompt ids read it there and nowhere else. One that asks the model itself for scores
    (classifier-free guidance) compares them with scores of the head's width."""

    last_placeholder_id: int

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        width = scores.shape[-1]
        missing = max(0, self.last_placeholder_id + 1 - width)
        for processor in self:
            num_added = 0 if hasattr(processor, "model") else missing
            widened = nn.functional.pad(scores, (0, num_added), value=-float("inf"))
            scores = LogitsProcessorList([processor])(input_ids, widened, **kwargs)[..., :width]
        return scores


class CandidatesOfText(CandidateGenerator):
    """
    A candidate generator of transformers whose candidates end before a placeholder, and where learned positions run out.

    Args:
        generator (`CandidateGenerator`): transformers'.
        placeholders (`Callable`): gives the mask of `input_ids`' placeholders.
        word (`int`, *optional*):
            For a generator that takes no images: the id that it gets where a placeholder stands, which is masked from its
            attention. `None`: it gets all as they are.
        limit (`int`, *optional*): how many positions the language model has.
    """

    def __init__(
        self,
        generator: CandidateGenerator,
        placeholders: Callable[[torch.Tensor], torch.Tensor],
        word: int | None,
        limit: int | None,
    ):
        self.generator, self.placeholders, self.word, self.limit = generator, placeholders, word, limit
        self.requires_model_outputs = generator.requires_model_outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["generator"], name)

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[Any, Any]:
        """Candidates after `input_ids`."""
        length = input_ids.shape[1]
        words: Any = input_ids if self.word is None else input_ids.masked_fill(self.placeholders(input_ids), self.word)
        ids, logits = self.generator.get_candidates(words, **kwargs)
        new = ids[:, length:].to(input_ids.device)
        ends = self.placeholders(new).any(0).nonzero()[:, 0].tolist()
        ends += [] if self.limit is None else [max(0, self.limit - length)]
        count = min(ends, default=new.shape[1])
        return torch.cat([input_ids, new[:, :count]], dim=1), None if logits is None else logits[:, :count]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """As transformers'."""
        return self.generator.update_candidate_strategy(input_ids, scores, num_matches)


def _answers_of_a_prompt(generation_config: GenerationConfig) -> int:
    """How often `generate()` repeats each row: for its beams, or for several answers."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def _are_the_same(rows: list[RowMedia]) -> bool:
    """Whether rows hold the very same tensors."""
    identities = [[(key, *map(id, tensors)) for key, tensors in row.items()] for row in rows]
    return all(one == identities[0] for one in identities)


class FrozenPrefixGenerationMixin(GenerationMixin):
    """`generate()`, and what goes with it, for a model that holds a [`FrozenPrefixModel`] as `model`."""

    config: Any  # `FrozenPrefixConfig`; a mixin that says so is at odds with `PreTrainedModel`
    generation_config: GenerationConfig
    model: Any  # `FrozenPrefixModel`, whose file imports this one

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, prefix_cache: PrefixCache | None = None, **kwargs: Any
    ) -> Any:
        """
        As `GenerationMixin.generate`, and with `prefix_cache` from there on.

        Args:
            prefix_cache (`PrefixCache`, *optional*):
                Of [`encode_prefix`]. `input_ids` (and `attention_mask`, padding on either side) are then the questions
                alone, or, where they hold placeholders, the whole prompts, which must begin with the prefix. One prefix
                serves any number of questions; several serve as many questions, in their order. Leave `pixel_values` out.
            inputs (`torch.Tensor`, *optional*), args, kwargs (`Any`): as transformers'.

        Returns:
            As transformers'; sequences begin with the prefix's ids, as if each question had been asked anew.
        """
        config = kwargs.get("generation_config") or self.generation_config
        for option, reason in UNSUPPORTED.items():
            if kwargs.get(option, getattr(config, option, None)):
                raise ValueError(f"`{option}` {reason} [errors.md#generate]")
        refuse_prompts_of_old_peft(self)
        if kwargs.get("labels") is not None and not self.config.is_encoder_decoder:
            raise ValueError(
                "generate() takes no `labels`: as Seq2SeqTrainer calls it with predict_with_generate=True, the prompts hold "
                "the answers. Score what a decoder generates by `modeling_frozen.evaluation.EvaluationCallback`."
                " [errors.md#generate]"
            )
        if prefix_cache is not None:
            question = kwargs.pop("input_ids", None) if inputs is None else inputs
            mask, inputs = kwargs.pop("attention_mask", None), None
            kwargs = {**kwargs, **self._continued(prefix_cache, question, mask, kwargs)}
        cache = take_cache(kwargs)  # under whichever name, now under this release's
        return super().generate(inputs, *args, **kwargs, **({} if cache is None else {CACHE: cache}))

    @torch.no_grad()
    def encode_prefix(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        images: Any = None,
        text: str | list[str] | None = None,
        processor: Any = None,
        prefix_cache: PrefixCache | None = None,
        **inputs: Any,
    ) -> PrefixCache:
        """
        Encodes images, and words that many questions share, once.

        ```python
        prefix = model.encode_prefix(**processor(images=image, text="<image>", return_tensors="pt"))
        questions = processor.tokenizer(
            [" what is it ?", " which colour ?"], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        answers = model.generate(**questions, prefix_cache=prefix, max_new_tokens=20)
        ```

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(rows, length)`):
                Words with placeholders, as the processor gives them; padding may be on either side.
            images (`Any`), text (`str` or `list[str]`), processor ([`FrozenPrefixProcessor`]), *optional*:
                In place of ids: what `processor(images=images, text=text)` takes, and the processor. Without `text`
                the images stand alone, one a row.
            prefix_cache (`PrefixCache`, *optional*): go on from this one, with more words (or more images).
            inputs (`Any`): `pixel_values` and all else that `forward` takes of media, `mm_encoder_outputs` too.

        Returns:
            [`PrefixCache`]: a row for each row of ids.

        Raises:
            ValueError: if there are no words, or rows and prefixes don't match.
            TypeError: for an input that is neither words nor media.
        """
        if images is not None or text is not None:
            input_ids, attention_mask, inputs = self._processed(images, text, processor, prefix_cache, inputs)
        if input_ids is None:
            raise ValueError(
                "`encode_prefix` needs `input_ids` (from the processor), or `images` or `text` with `processor`."
                " [errors.md#generate]"
            )
        ids: torch.Tensor = input_ids
        mask = self._mask_of(ids, attention_mask)
        encoded = self.model.encode(take_media(inputs), inputs.pop("mm_encoder_outputs", None), ids)
        inputs.pop("mm_token_type_ids", None)
        if inputs:
            raise TypeError(f"`encode_prefix` takes words and media, and not {sorted(inputs)}. [errors.md#generate]")
        if prefix_cache is None:
            ids, mask = padded_left(ids, mask)
            prefix = PrefixCache(ids[:, :0], mask[:, :0], cache=new_kept_cache(self.model), media=[{} for _ in ids])
        else:
            prefix, ids, mask = self._after(prefix_cache, ids, mask, may_begin=not encoded)
        media = media_by_row(self, ids, encoded)
        if prefix.cache is not None:
            return self._extended(prefix, prefix.cache, ids, mask, encoded, media)
        return self._without_cache(*padded_left(*prefix._followed_by(ids, mask)), joined_media(prefix.media, media))

    # ------------------------------------------------------------------------------------------ encoding before the first step

    def _prepare_multimodal_encoder_kwargs_for_generation(
        self, model_kwargs: dict[str, Any], input_ids: torch.Tensor | None = None
    ) -> dict[str, Any]:
        # transformers' own knows images and videos.
        media = take_media(model_kwargs)
        model_kwargs["mm_encoder_outputs"] = self.model.encode(media, model_kwargs.get("mm_encoder_outputs"), input_ids)
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        # transformers' own knows images and videos, and writes into the caller's output.
        ids = None if input_ids is None or input_ids.numel() == 0 else input_ids
        media = media_by_row(self, ids, mm_encoder_output, inputs_embeds)
        repeated = {key: [prefix for row in media for prefix in row[key] * expand_size] for key in mm_encoder_output}
        return {key: type(output)(**{**output, "pooler_output": repeated[key]}) for key, output in mm_encoder_output.items()}

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        if model_kwargs.get("encoder_outputs") is not None:
            return model_kwargs
        ids = None if inputs_tensor.is_floating_point() else inputs_tensor
        model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs, ids)
        if cache_of(model_kwargs) is None and ids is not None and ids.ndim == 2:
            self.model.refuse_placeholders_alone(ids, {}, model_kwargs.get("mm_encoder_outputs"))
        if not self.config.is_encoder_decoder:
            return self._without_what_is_cached(inputs_tensor, model_kwargs)
        # The prefix goes among the encoder's words, so images are merged before the encoder runs.
        inputs_embeds = model_kwargs.pop("inputs_embeds", None)
        ids = inputs_tensor if inputs_embeds is None else None
        input_ids, inputs_embeds, _ = self.model.merge(ids, inputs_embeds, {}, model_kwargs.pop("mm_encoder_outputs", None))
        input_ids, inputs_embeds, mask = pad_right(input_ids, inputs_embeds, model_kwargs.get("attention_mask"))
        self.model.refuse_too_long(words_of(input_ids, inputs_embeds).shape[1])
        if mask is not None:
            model_kwargs["attention_mask"] = mask
        name, tensor = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        model_kwargs = self._prepare_text_encoder_decoder_kwargs_for_generation(tensor, model_kwargs, name, generation_config)
        model_kwargs.pop("inputs_embeds", None)
        return model_kwargs

    def _without_what_is_cached(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leaves encoded media out whose placeholders a passed cache has read already, so that a dialogue goes on from
        `past_key_values` with all its images passed again."""
        cache, encoded = model_kwargs.get(CACHE), model_kwargs.get("mm_encoder_outputs")
        past = cached_length(cache)
        mask = model_kwargs.get("attention_mask")
        whole = input_ids.ndim == 2 and not input_ids.is_floating_point() and input_ids.shape[1] > past
        if not encoded or past == 0 or not whole or (mask is not None and mask.shape[1] != input_ids.shape[1]):
            return model_kwargs
        rows = media_by_row(self, input_ids, encoded)
        for ids, row in zip(input_ids[:, :past], rows, strict=True):
            for modality, prefixes in row.items():
                num_read = int((ids == self.config.placeholder_ids[modality]).sum())
                row[modality] = prefixes[len(take_prefixes(iter(prefixes), num_read)) :]
        return {**model_kwargs, "mm_encoder_outputs": media_together(rows)}

    # ---------------------------------------------------------------------------------------------------- caches and masks

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # What the language model itself takes (`encoder_outputs`, `decoder_attention_mask`) is passed on to it.
        known = (*MEDIA_INPUTS, *forward_parameters(type(self.model.language_model)))
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in known})

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not self.model.keeps_cache:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        cache: Any = model_kwargs.get(CACHE)  # as it was passed: where none was, transformers makes one here
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if cached_length(cache) > 0:
            generation_config.use_cache = True  # some families are configured without (MPT), and would read all anew
            # Beams and several answers repeat all inputs but a cache that was passed.
            repeats = _answers_of_a_prompt(generation_config)
            positions = model_kwargs.get("position_ids")
            if repeats > 1 and positions is not None and can_be_kept(cache):
                if len(positions) == repeats * len(cache.layers[0].keys):
                    cache.batch_repeat_interleave(repeats)
        name = generation_cache(forward_parameters(type(self.model.language_model)))
        if name != CACHE and CACHE in model_kwargs:
            model_kwargs[name] = model_kwargs.pop(CACHE)

    def create_masks_for_generate(self, config: FrozenPrefixConfig, **kwargs: Any) -> Any:
        """The masks of compilable caches, as the language model itself makes them (ALiBi wants them 2-D)."""
        return masks_maker(self.model.language_model)(config=config.get_text_config(decoder=True), **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        placeholders = list(self.config.placeholder_ids.values())
        rows = language_model_geometry(self.model.language_model).num_embeddings
        inside = [index for index in placeholders if index < rows]
        if inside:
            processors.insert(0, NoPlaceholdersLogitsProcessor(inside))
        if max(placeholders) < rows:
            return processors
        padded = PaddedLogitsProcessorList(processors)
        padded.last_placeholder_id = max(placeholders)
        return padded

    def _prepare_generated_length(
        self, *, model_input_name: str, input_ids_length: int, inputs_tensor: torch.Tensor, **kwargs: Any
    ) -> GenerationConfig:
        # Where learned positions run out an answer ends, as at any length limit; a prompt that is longer is refused.
        generation_config = super()._prepare_generated_length(
            model_input_name=model_input_name, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        if self.model.max_positions is not None:
            # Embeddings without ids are no part of what is written.
            alone = model_input_name == "inputs_embeds" and not self.config.is_encoder_decoder and input_ids_length == 0
            last = self.model.max_positions + 1 - (inputs_tensor.shape[1] if alone else 0)
            if input_ids_length < last:
                generation_config.max_length = min(generation_config.max_length, last)
        return generation_config

    # -------------------------------------------------------------------------------- one prompt for all its beams and answers

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        encoded = model_kwargs.get("mm_encoder_outputs")
        repeats = self._repeats_of_a_prompt(input_ids, generation_config, model_kwargs)
        media = media_by_row(self, input_ids, encoded) if repeats > 1 and encoded else [{}]
        if repeats > 1 and all(_are_the_same(media[at : at + repeats]) for at in range(0, len(media), repeats)):
            # Beams and several answers begin as the same prompt: it is read once, and its keys and values are repeated.
            rows = len(input_ids)
            once = {
                name: value[::repeats] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value
                for name, value in model_kwargs.items()
            }
            if encoded:
                once["mm_encoder_outputs"] = media_together(media[::repeats])
            outputs = super()._prefill(input_ids[::repeats], generation_config, once, **kwargs)
            cache: Any = cache_of(outputs)
            cache.batch_repeat_interleave(repeats)
            outputs.logits = outputs.logits[:, -1:].repeat_interleave(repeats, dim=0)
            return outputs
        if generation_config.prefill_chunk_size is None or not encoded or input_ids.numel() == 0:
            return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        if not CHUNKS_HOLD_MEDIA:
            whole = copy.copy(generation_config)
            whole.prefill_chunk_size = None
            return super()._prefill(input_ids, whole, model_kwargs, **kwargs)
        for modality, output in encoded.items():
            self.get_placeholder_mask(input_ids, None, output.pooler_output, modality)
        token = reads_in_chunks.set(True)
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            reads_in_chunks.reset(token)

    def _repeats_of_a_prompt(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> int:
        """How often `generate()` has repeated each row, where reading it once is enough; else 1."""
        repeats = _answers_of_a_prompt(generation_config)
        cache: Any = model_kwargs.get(CACHE)
        plain = (
            repeats > 1
            and can_be_kept(cache)
            and cache.get_seq_length() == 0
            and self.model.cross_attention is None
            and model_kwargs.get("inputs_embeds") is None
            and generation_config.prefill_chunk_size is None
            and not (generation_config.output_attentions or generation_config.output_hidden_states)
        )
        if not plain or input_ids.ndim != 2 or len(input_ids) % repeats or input_ids.shape[1] == 0:
            return 1
        same = input_ids.unflatten(0, (-1, repeats))
        return repeats if bool((same == same[:, :1]).all()) else 1

    # -------------------------------------------------------------------------------------------------- assisted decoding

    def _get_candidate_generator(
        self,
        *,
        input_ids: torch.LongTensor,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> CandidateGenerator:
        takes_images = getattr(getattr(assistant_model, "config", None), "model_type", None) == self.config.model_type
        # With a tokenizer of its own an assistant gets the text anew, without placeholders.
        own_words = kwargs.get("target_tokenizer") is not None and kwargs.get("assistant_tokenizer") is not None
        word = None if takes_images or own_words else self.generation_config.pad_token_id or 0
        if not takes_images and assistant_model is not None:
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "mm_encoder_outputs"}
        if word is not None and assistant_model is not None:
            if not torch.is_floating_point(inputs_tensor):
                inputs_tensor = inputs_tensor.masked_fill(self.model.placeholders(inputs_tensor), word)
            if not self.config.is_encoder_decoder:
                # Mask and positions of the words without the placeholders between them.
                mask, words = model_kwargs.get("attention_mask"), (~self.model.placeholders(input_ids)).long()
                words = words if mask is None or mask.shape != words.shape else words * mask
                model_kwargs.update(attention_mask=words, position_ids=(words.cumsum(-1) - 1).clamp(min=0))
        options = {"model_kwargs": model_kwargs, "assistant_model": assistant_model, **kwargs}
        generator = super()._get_candidate_generator(input_ids=input_ids, inputs_tensor=inputs_tensor, **options)
        return CandidatesOfText(generator, self.model.placeholders, word, self.model.max_positions)

    # ------------------------------------------------------------------------------------------- going on from a kept prefix

    def _processed(
        self, images: Any, text: Any, processor: Any, prefix_cache: PrefixCache | None, inputs: dict[str, Any]
    ) -> tuple[torch.LongTensor, torch.Tensor | None, dict[str, Any]]:
        """`input_ids`, `attention_mask` and media that the processor makes of images and text."""
        if processor is None:
            raise ValueError(
                "Models hold no tokenizer: pass `processor` with `images` or `text`, or `input_ids`. [errors.md#generate]"
            )
        if images is None and prefix_cache is not None:
            # In the middle of a text no special tokens are added.
            texts = [text] if isinstance(text, str) else text
            made = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        else:
            if text is None:
                images = list(images) if isinstance(images, (list, tuple)) else [images]
                text = [processor.image_token] * len(images)
                images = [image if isinstance(image, (list, tuple)) else [image] for image in images]
            made = processor(images=images, text=text, padding=True, return_tensors="pt")
        made = {key: value.to(self.device) for key, value in made.items()}
        made.pop("token_type_ids", None)
        return made.pop("input_ids"), made.pop("attention_mask", None), {**inputs, **made}

    def _mask_of(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The attention mask of ids; without one, the padding token is padding, unless it ends sequences as well."""
        if mask is not None:
            if mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` of shape {tuple(mask.shape)} should be that of `input_ids`, {tuple(input_ids.shape)}: "
                    "beside a `prefix_cache` both are of the question, or both of the whole prompt. [errors.md#generate]"
                )
            return mask.long()
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()

    def _after(
        self, prefix: PrefixCache, input_ids: torch.Tensor, mask: torch.Tensor, may_begin: bool = True
    ) -> tuple[PrefixCache, torch.Tensor, torch.Tensor]:
        """As many rows of the prefix as there are questions, and what comes after it, padded on the right. Placeholders
        without new images mean that whole prompts were passed, which begin with the prefix."""
        prefix = prefix._for(len(input_ids))
        input_ids, mask = padded_right(input_ids, mask)
        if may_begin and bool(self.model.placeholders(input_ids).any()):
            start, start_mask = padded_right(prefix.input_ids, prefix.attention_mask)
            width = min(start.shape[1], input_ids.shape[1])
            same = ((input_ids[:, :width] == start[:, :width]) & (mask[:, :width] != 0)) | (start_mask[:, :width] == 0)
            begun = start_mask.sum(-1)
            begins = same.all(-1) & (begun <= input_ids.shape[1])
            if not bool(begins.all()):
                row = int((~begins).nonzero()[0, 0])
                raise ValueError(
                    f"The prompt of row {row} holds placeholders, but does not begin with the {int(begun[row])} ids of the "
                    "prefix cache: pass the same prompt again, or the question alone; for another image, go on by "
                    "`encode_prefix(..., prefix_cache=...)` first. [errors.md#placeholders]"
                )
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            input_ids, mask = padded_right(input_ids, mask * (columns[None] >= begun[:, None]))
        return prefix, input_ids, mask

    def _without_cache(self, input_ids: torch.Tensor, mask: torch.Tensor, media: list[RowMedia]) -> PrefixCache:
        """A prefix of words and media alone, and, of an encoder-decoder, the encoder's output."""
        prefix = PrefixCache(input_ids, mask, media=media)
        if self.config.is_encoder_decoder:
            inputs: dict[str, Any] = {"attention_mask": mask, "mm_encoder_outputs": media_together(media)}
            inputs = self._maybe_prepare_encoder_kwargs_for_generation(input_ids, inputs, "input_ids", self.generation_config)
            # The encoder's own order of padding, which the mask must follow.
            prefix.encoder_outputs = BaseModelOutput(last_hidden_state=inputs["encoder_outputs"][0])
        return prefix

    def _extended(
        self,
        prefix: PrefixCache,
        cache: DynamicCache,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        encoded: dict[str, Any],
        media: list[RowMedia],
    ) -> PrefixCache:
        """Reads more words behind the prefix and its cache, padded on the right so that they follow it, and then moves the
        padding to the left."""
        lengths, begun = mask.sum(-1), prefix.attention_mask.sum(-1)
        if prefix.input_ids.shape[1] == 0:
            position_ids, last = None, None  # padded on the left already: a plain call
        else:
            position_ids = begun[:, None] + torch.arange(input_ids.shape[1], device=mask.device)[None]
            last = (lengths - 1).clamp(min=0)
        keep = 1 if last is None or bool((last == last[0]).all()) else last.unique()
        cache = copied_cache(cache)
        whole, whole_mask = prefix._followed_by(input_ids, mask)
        outputs = self(
            input_ids=input_ids,
            attention_mask=mask_or_none(whole_mask),
            position_ids=position_ids,
            cache=cache,
            mm_encoder_outputs=encoded,
            logits_to_keep=keep,
            use_cache=True,
            return_dict=True,
        )
        logits = outputs.logits[:, -1]
        if last is not None and isinstance(keep, torch.Tensor):
            rows = torch.arange(len(last), device=last.device)
            logits = outputs.logits[rows, torch.searchsorted(keep, last)]
        if last is not None and prefix.logits is not None and bool((lengths == 0).any()):
            logits = torch.where((lengths == 0)[:, None], prefix.logits, logits)
        by = mask.shape[1] - lengths
        if last is not None and bool(by.any()):
            cache = changed_cache(cache, lambda tensor: shifted(tensor, by, 2))
            whole, whole_mask = shifted(whole, by, 1), shifted(whole_mask, by, 1)
            whole_mask = whole_mask * (torch.arange(whole_mask.shape[1], device=by.device)[None] >= by[:, None])
            whole = whole.masked_fill(whole_mask == 0, self.generation_config.pad_token_id or 0)
        media = joined_media(prefix.media, media)
        return PrefixCache(whole, whole_mask, logits=logits, cache=cache, media=media)._without_empty_columns()

    def _continued(
        self, prefix: PrefixCache, question: torch.Tensor | None, mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What `generate()` is called with to go on from a prefix."""
        names = (*MEDIA_INPUTS, "mm_encoder_outputs", "inputs_embeds", *CACHE_NAMES)
        passed = [name for name in names if kwargs.get(name) is not None]
        if passed:
            raise ValueError(
                f"`{passed[0]}` was passed beside `prefix_cache`, which holds what was encoded: leave it out, or, for another "
                "image, go on by `encode_prefix(..., prefix_cache=...)` first. [errors.md#generate]"
            )
        if self._wants_its_own_cache(kwargs):
            prefix = replace(prefix, cache=None)
        if question is None or question.shape[1] == 0:
            return self._continued_without_question(prefix)
        prefix, question, mask = self._after(prefix, question, self._mask_of(question, mask))
        lengths = mask.sum(-1)
        if prefix.cache is None:
            if self.config.is_encoder_decoder and not bool(lengths.any()):
                return self._continued_without_question(prefix)
            ids, mask = padded_left(*prefix._followed_by(question, mask))
            return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": media_together(prefix.media)}
        if not bool((lengths > 0).all()):
            raise ValueError(
                "Each question needs a word at least: pass one, or encode the prefix without its last word."
                " [errors.md#generate]"
            )
        if bool((lengths != lengths[0]).any()):
            # All words but each row's last are read here, where they may be of unequal length; the last by `generate()`.
            columns = torch.arange(mask.shape[1], device=mask.device)[None]
            rest = mask * (columns < lengths[:, None] - 1)
            final = question.gather(1, lengths[:, None] - 1)
            words = question.masked_fill(rest == 0, self.generation_config.pad_token_id or 0)
            prefix = self._extended(prefix, prefix.cache, words[:, :-1], rest[:, :-1], {}, [{}] * len(rest))
            question, mask = final, torch.ones_like(final)
        ids, mask = prefix._followed_by(question, mask)
        return {"input_ids": ids, "attention_mask": mask, CACHE: prefix.past_key_values}

    def _wants_its_own_cache(self, kwargs: dict[str, Any]) -> bool:
        """Assisted decoding starts from an empty cache; static, quantised and offloaded ones are made by transformers."""
        config = kwargs.get("generation_config") or self.generation_config
        names = ("prompt_lookup_num_tokens", "assistant_early_exit", "cache_implementation")
        asked = [kwargs.get(name, getattr(config, name, None)) for name in names]
        return kwargs.get("assistant_model") is not None or any(value is not None for value in asked)

    def _continued_without_question(self, prefix: PrefixCache) -> dict[str, Any]:
        """What `generate()` is called with to go on from a prefix with no more words: its last one is read anew."""
        words = {"input_ids": prefix.input_ids, "attention_mask": prefix.attention_mask}
        if prefix.encoder_outputs is not None:
            mask = pad_right(None, None, prefix.attention_mask)[2]  # as the encoder read it
            encoder_outputs = BaseModelOutput(last_hidden_state=prefix.encoder_outputs[0])  # `generate()` writes into it
            return {**words, "attention_mask": mask, "encoder_outputs": encoder_outputs}
        if prefix.cache is None:
            return {**words, "mm_encoder_outputs": media_together(prefix.media)}
        if bool(self.model.placeholders(prefix.input_ids[:, -1]).any()):
            raise ValueError(
                "The prefix ends with an image and no question was asked: pass a word at least, or call `generate` on the "
                "image itself. [errors.md#generate]"
            )
        cache = changed_cache(prefix.cache, lambda tensor: tensor[:, :, :-1], num_dropped=1)
        return {**words, CACHE: narrowed_cache(cache)}


__all__ = ["FrozenPrefixGenerationMixin"]
