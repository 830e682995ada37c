"""Encode a picture once and ask it many questions: prefixes whose keys and values are kept.

A question costs what a text-only question costs, for neither the towers nor the language model read the prefix again. What
is kept is never written into: caches of the library grow by concatenation, so each question gets a new list of layers over
the same tensors. A batch of questions is laid out as `generate()` lays out any left-padded batch, so that answers are those
that each question gets by itself.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .kept_caches import can_be_kept, copied_cache, narrowed_cache, new_kept_cache, pick_rows
from .modalities import MEDIA_INPUTS, take_media
from .prefix_merging import pad_right, reads_in_chunks
from .transformers_compat import CACHE, CACHE_NAMES, CHUNKS_HOLD_MEDIA, cache_of, cached_length, take_cache


Rows = int | slice | Sequence[int] | torch.Tensor


def _shift(tensor: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    """Moves each row's columns (along `dim`) to the right by its number, for padding on the left in place of the right."""
    source = torch.arange(tensor.shape[dim], device=tensor.device)[None] - by.to(tensor.device)[:, None]
    shape = [len(tensor)] + [1] * (tensor.ndim - 1)
    shape[dim] = tensor.shape[dim]
    # What comes in from beyond the edge is masked; a repeated column keeps it finite.
    return tensor.gather(dim, source.clamp(min=0).view(shape).expand_as(tensor))


# ------------------------------------------------------------------------------------------------- what is kept


@dataclass
class PrefixCache:
    """
    What [`~FrozenPrefixForConditionalGeneration.encode_prefix`] keeps of pictures and the words with them, row by row.

    Pass it as `prefix_cache` to `generate()`, `score()` or, to go on from it, `encode_prefix()`; none of them changes it.
    `len(prefix)` is the number of rows; `prefix[2]`, `prefix[[0, 0, 1]]` are prefixes of those rows.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(rows, length)`):
            The words so far, placeholders among them, padded on the left.
        logits (`torch.FloatTensor` of shape `(rows, vocabulary)`, *optional*): for the word after.
        cache (`DynamicCache`, *optional*): keys and values of the words so far; take [`past_key_values`] to use it.
        media (`list[dict[str, list[torch.Tensor]]]`):
            Each row's encoded media, by modality. Language models whose cache can't be kept (recurrent, encoder-decoder,
            gated cross-attention), and ways of decoding that want a cache of their own, read the words again with them;
            the towers never run again.
        encoder_outputs (`ModelOutput`, *optional*): of encoder-decoders.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    logits: torch.FloatTensor | None = None
    cache: DynamicCache | None = None
    media: list[dict[str, list[torch.Tensor]]] = field(default_factory=list)
    encoder_outputs: ModelOutput | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Rows) -> "PrefixCache":
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
        rows = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self.input_ids.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        if len(rows) == 0 or rows.min() < -len(self) or rows.max() >= len(self):
            raise IndexError(f"The prefix cache has {len(self)} rows, and not {rows.tolist()}.")
        return self._select(rows % len(self))._without_empty_columns()

    def _select(self, rows: torch.Tensor) -> "PrefixCache":
        encoder_outputs = self.encoder_outputs
        if encoder_outputs is not None:
            states = pick_rows(encoder_outputs.last_hidden_state, rows)
            encoder_outputs = type(encoder_outputs)(last_hidden_state=states)
        return PrefixCache(
            input_ids=pick_rows(self.input_ids, rows),
            attention_mask=pick_rows(self.attention_mask, rows),
            logits=None if self.logits is None else pick_rows(self.logits, rows),
            cache=None if self.cache is None else copied_cache(self.cache, rows),
            media=[self.media[0 if len(self.media) == 1 else row] for row in rows.tolist()],
            encoder_outputs=encoder_outputs,
        )

    def _without_empty_columns(self) -> "PrefixCache":
        """Leaves columns out that are padding in every row, as a batch of these rows alone would have none."""
        empty = int(self.attention_mask.shape[1] - self.attention_mask.sum(-1).max())
        if empty == 0:
            return self
        cache, encoder_outputs = self.cache, self.encoder_outputs
        if cache is not None:
            cache = copied_cache(cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length -= empty
        if encoder_outputs is not None:  # encoders are padded on the right
            encoder_outputs = type(encoder_outputs)(last_hidden_state=encoder_outputs.last_hidden_state[:, :-empty])
        ids, mask = self.input_ids[:, empty:], self.attention_mask[:, empty:]
        return replace(self, input_ids=ids, attention_mask=mask, cache=cache, encoder_outputs=encoder_outputs)

    @property
    def past_key_values(self) -> DynamicCache:
        """A new cache over the kept tensors, for `generate(input_ids=all words so far and new ones, past_key_values=...)` and
        `forward`; growing it leaves the kept one as it is."""
        if self.cache is None:
            raise ValueError(
                "This language model's cache can't be kept (it is recurrent, an encoder-decoder, or looks at pictures by "
                "cross-attention): pass the whole as `prefix_cache` to `generate` or `score`."
            )
        return narrowed_cache(copied_cache(self.cache))

    def _for(self, rows: int) -> "PrefixCache":
        """As many rows as there are questions."""
        if len(self) == rows:
            return self
        if len(self) == 1:
            return self._select(torch.zeros(rows, dtype=torch.long, device=self.input_ids.device))
        raise ValueError(
            f"{rows} question(s) were asked of {len(self)} prefixes: say which question is about which prefix, for example "
            f"`prefix_cache[[0, 0, 1]]` for two about the first and one about the second."
        )


def _by_row(model: Any, input_ids: torch.LongTensor, encoded: dict[str, ModelOutput]) -> list[dict[str, list[torch.Tensor]]]:
    """Encoded media, each with the row that holds its placeholders."""
    rows: list[dict[str, list[torch.Tensor]]] = [{} for _ in input_ids]
    for modality, output in encoded.items():
        # Gated blocks never look at embeddings, the others do to check.
        counts = model.get_placeholder_mask(input_ids, None, output.pooler_output, modality).sum((1, 2)).tolist()
        rest = iter(output.pooler_output)
        for row, count in zip(rows, counts, strict=True):
            own: list[torch.Tensor] = []
            while sum(map(len, own)) < count:
                own.append(next(rest))
            row[modality] = own
    return rows


def _joined(
    rows: list[dict[str, list[torch.Tensor]]], more: list[dict[str, list[torch.Tensor]]]
) -> list[dict[str, list[torch.Tensor]]]:
    return [
        {key: [*old.get(key, []), *new.get(key, [])] for key in {**old, **new}} for old, new in zip(rows, more, strict=True)
    ]


def _answers_of_a_prompt(generation_config: GenerationConfig) -> int:
    """How often `generate()` repeats each row: for its beams, or for several answers."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def _are_the_same(rows: list[dict[str, list[torch.Tensor]]]) -> bool:
    """Whether rows hold the very same tensors."""
    held = [[(key, *map(id, tensors)) for key, tensors in row.items()] for row in rows]
    return all(one == held[0] for one in held)


def media_together(rows: Iterable[dict[str, list[torch.Tensor]]]) -> dict[str, BaseModelOutputWithPooling]:
    flat: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for modality, tensors in row.items():
            flat.setdefault(modality, []).extend(tensors)
    return {key: BaseModelOutputWithPooling(pooler_output=tensors) for key, tensors in flat.items() if tensors}


def padded_left(input_ids: torch.LongTensor, mask: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Padding moved to the left; columns of nothing but padding are left out."""
    order = (mask != 0).int().argsort(dim=-1, stable=True)
    start = int(mask.shape[1] - mask.sum(-1).max())
    return input_ids.gather(1, order)[:, start:], mask.gather(1, order)[:, start:]


def padded_right(input_ids: torch.LongTensor, mask: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    input_ids, _, mask = pad_right(input_ids, None, mask)
    end = int(mask.sum(-1).max())
    return input_ids[:, :end], mask[:, :end]


def mask_or_none(mask: torch.Tensor) -> torch.Tensor | None:
    """No mask where nothing is masked, as `generate()` has it: attention is faster so."""
    return None if bool((mask != 0).all()) else mask


# ------------------------------------------------------------------------------------------------- the model's part


class PrefixCacheMixin:
    """`encode_prefix` and `generate(prefix_cache=...)` of [`FrozenPrefixForConditionalGeneration`]."""

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
        Encodes pictures, and words that many questions share, once.

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
            images, text, processor:
                In place of ids: what `processor(images=images, text=text)` takes, and the processor. Without `text`
                the pictures stand alone, one a row.
            prefix_cache (`PrefixCache`, *optional*): go on from this one, with more words (or more pictures).
            inputs: `pixel_values` and all else that `forward` takes of media, `mm_encoder_outputs` too.

        Raises:
            ValueError: if there are no words, or rows and prefixes don't match.
        """
        if images is not None or text is not None:
            input_ids, attention_mask, inputs = self._processed(images, text, processor, prefix_cache, inputs)
        if input_ids is None:
            raise ValueError("`encode_prefix` needs `input_ids` (from the processor), or `images` or `text` with `processor`.")
        mask = self._mask_of(input_ids, attention_mask)
        encoded = self.model.encode(take_media(inputs), inputs.pop("mm_encoder_outputs", None))
        inputs.pop("mm_token_type_ids", None)
        if inputs:
            raise TypeError(f"`encode_prefix` takes words and media, and not {sorted(inputs)}.")
        if prefix_cache is None:
            input_ids, mask = padded_left(input_ids, mask)
            media = _by_row(self, input_ids, encoded)
            cache = new_kept_cache(self.model)
            if cache is None:
                return self._without_cache(input_ids, mask, media)
            empty = PrefixCache(input_ids[:, :0], mask[:, :0], cache=cache, media=[{} for _ in input_ids])
            return self._extended(empty, input_ids, mask, encoded, media)
        prefix, input_ids, mask = self._after(prefix_cache, input_ids, mask, may_begin=not encoded)
        media = _by_row(self, input_ids, encoded)
        if prefix.cache is not None:
            return self._extended(prefix, input_ids, mask, encoded, media)
        together = torch.cat([prefix.input_ids, input_ids], dim=1), torch.cat([prefix.attention_mask, mask], dim=1)
        return self._without_cache(*padded_left(*together), _joined(prefix.media, media))

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
            inputs, args, kwargs: as the library's.

        Returns:
            As the library's; sequences begin with the prefix's ids, as if each question had been asked afresh.
        """
        if prefix_cache is not None:
            question = kwargs.pop("input_ids", None) if inputs is None else inputs
            inputs, kwargs = (
                None,
                {**kwargs, **self._continued(prefix_cache, question, kwargs.pop("attention_mask", None), kwargs)},
            )
        cache = take_cache(kwargs)  # under whichever name, now under this release's
        return super().generate(inputs, *args, **kwargs, **({} if cache is None else {CACHE: cache}))

    # ------------------------------------------------------------------------------------------------ the parts of it

    def _processed(
        self, images: Any, text: Any, processor: Any, prefix_cache: PrefixCache | None, inputs: dict[str, Any]
    ) -> tuple[torch.LongTensor, torch.Tensor, dict[str, Any]]:
        if processor is None:
            raise ValueError("Models hold no tokenizer: pass `processor` with `images` or `text`, or `input_ids`.")
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

    def _mask_of(self, input_ids: torch.LongTensor, mask: torch.Tensor | None) -> torch.LongTensor:
        if mask is not None:
            if mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` of shape {tuple(mask.shape)} should be that of `input_ids`, {tuple(input_ids.shape)}: "
                    "beside a `prefix_cache` both are of the question, or both of the whole prompt."
                )
            return mask.long()
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()

    def _after(
        self, prefix: PrefixCache, input_ids: torch.LongTensor, mask: torch.LongTensor, may_begin: bool = True
    ) -> tuple[PrefixCache, torch.LongTensor, torch.LongTensor]:
        """As many rows of the prefix as there are questions, and what comes after it, padded on the right. Placeholders
        without new pictures mean that whole prompts were given, which begin with the prefix."""
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
                    "prefix cache: pass the same prompt again, or the question alone; for another picture, go on by "
                    "`encode_prefix(..., prefix_cache=...)` first."
                )
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            return prefix, *padded_right(input_ids, mask * (columns[None] >= begun[:, None]))
        return prefix, input_ids, mask

    def _without_cache(
        self, input_ids: torch.LongTensor, mask: torch.LongTensor, media: list[dict[str, list[torch.Tensor]]]
    ) -> PrefixCache:
        prefix = PrefixCache(input_ids, mask, media=media)
        if self.config.is_encoder_decoder:
            made = self._maybe_prepare_encoder_kwargs_for_generation(
                input_ids,
                {"attention_mask": mask, "mm_encoder_outputs": media_together(media)},
                "input_ids",
                self.generation_config,
            )
            # The encoder's own order of padding, which the mask must follow.
            prefix.encoder_outputs = BaseModelOutputWithPooling(last_hidden_state=made["encoder_outputs"][0])
        return prefix

    def _extended(
        self,
        prefix: PrefixCache,
        input_ids: torch.LongTensor,
        mask: torch.LongTensor,
        encoded: dict[str, ModelOutput],
        media: list[dict[str, list[torch.Tensor]]],
    ) -> PrefixCache:
        """Reads more words, padded on the right so that they follow the prefix, and then moves the padding to the left."""
        lengths, begun = mask.sum(-1), prefix.attention_mask.sum(-1)
        if prefix.input_ids.shape[1] == 0:
            position_ids, last = None, None  # padded on the left already: a plain call
        else:
            position_ids = begun[:, None] + torch.arange(input_ids.shape[1], device=mask.device)[None]
            last = (lengths - 1).clamp(min=0)
        keep = 1 if last is None or bool((last == last[0]).all()) else last.unique()
        cache = copied_cache(prefix.cache)
        whole_mask = torch.cat([prefix.attention_mask, mask], dim=1)
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
        whole = torch.cat([prefix.input_ids, input_ids], dim=1)
        if isinstance(keep, torch.Tensor):
            rows = torch.arange(len(last), device=last.device)
            logits = outputs.logits[rows, torch.searchsorted(keep, last)]
        if last is not None and prefix.logits is not None and bool((lengths == 0).any()):
            logits = torch.where((lengths == 0)[:, None], prefix.logits, logits)
        by = mask.shape[1] - lengths
        if last is not None and bool(by.any()):
            for layer in cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = _shift(layer.keys, by, 2), _shift(layer.values, by, 2)
            whole, whole_mask = _shift(whole, by, 1), _shift(whole_mask, by, 1)
            whole_mask = whole_mask * (torch.arange(whole_mask.shape[1], device=by.device)[None] >= by[:, None])
            whole = whole.masked_fill(whole_mask == 0, self.generation_config.pad_token_id or 0)
        media = _joined(prefix.media, media)
        return PrefixCache(whole, whole_mask, logits=logits, cache=cache, media=media)._without_empty_columns()

    def _continued(
        self, prefix: PrefixCache, question: torch.LongTensor | None, mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What `generate()` is called with to go on from a prefix."""
        given = [name for names in MEDIA_INPUTS.values() for name in names if kwargs.get(name) is not None]
        given += [name for name in ("mm_encoder_outputs", "inputs_embeds", *CACHE_NAMES) if kwargs.get(name) is not None]
        if given:
            raise ValueError(
                f"`{given[0]}` was passed beside `prefix_cache`, which holds what was encoded: leave it out, or, for another "
                "picture, go on by `encode_prefix(..., prefix_cache=...)` first."
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
            ids, mask = padded_left(
                torch.cat([prefix.input_ids, question], dim=1), torch.cat([prefix.attention_mask, mask], dim=1)
            )
            return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": media_together(prefix.media)}
        if not bool((lengths > 0).all()):
            raise ValueError("Each question needs a word at least: pass one, or encode the prefix without its last word.")
        if bool((lengths != lengths[0]).any()):
            # All words but each row's last are read here, where they may be of unequal length; the last by `generate()`.
            columns = torch.arange(mask.shape[1], device=mask.device)[None]
            rest = mask * (columns < lengths[:, None] - 1)
            final = question.gather(1, lengths[:, None] - 1)
            pad = self.generation_config.pad_token_id or 0
            prefix = self._extended(prefix, question.masked_fill(rest == 0, pad)[:, :-1], rest[:, :-1], {}, [{}] * len(rest))
            question, mask = final, torch.ones_like(final)
        return {
            "input_ids": torch.cat([prefix.input_ids, question], dim=1),
            "attention_mask": torch.cat([prefix.attention_mask, mask], dim=1),
            CACHE: prefix.past_key_values,
        }

    def _wants_its_own_cache(self, kwargs: dict[str, Any]) -> bool:
        """Assisted decoding starts from an empty cache; static, quantised and offloaded ones are made by the library."""
        config = kwargs.get("generation_config") or self.generation_config
        names = ("prompt_lookup_num_tokens", "assistant_early_exit", "cache_implementation")
        asked = [kwargs.get(name, getattr(config, name, None)) for name in names]
        return kwargs.get("assistant_model") is not None or any(value is not None for value in asked)

    def _continued_without_question(self, prefix: PrefixCache) -> dict[str, Any]:
        words = {"input_ids": prefix.input_ids, "attention_mask": prefix.attention_mask}
        if prefix.encoder_outputs is not None:
            mask = pad_right(None, None, prefix.attention_mask)[2]  # as the encoder saw it
            # A new object: `generate()` writes into it.
            states = type(prefix.encoder_outputs)(last_hidden_state=prefix.encoder_outputs.last_hidden_state)
            return {**words, "attention_mask": mask, "encoder_outputs": states}
        if prefix.cache is None:
            return {**words, "mm_encoder_outputs": media_together(prefix.media)}
        if bool(self.model.placeholders(prefix.input_ids[:, -1]).any()):
            raise ValueError(
                "The prefix ends with a picture and no question was asked: pass a word at least, or call `generate` on the "
                "picture itself."
            )
        cache = copied_cache(prefix.cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= 1
        return {**words, CACHE: narrowed_cache(cache)}

    # ------------------------------------------------------------------------------------------- generate()'s hooks

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # What the language model itself takes (`encoder_outputs`, `decoder_attention_mask`) is passed on to it.
        own = inspect.signature(self.model.language_model.forward).parameters
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in own})

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get(CACHE)  # as it was passed: where none was, the library makes one here
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if cached_length(cache) > 0:
            generation_config.use_cache = True  # some families are configured without (MPT), and would read all again
            # Beams and several answers repeat all inputs but a cache that was passed.
            repeats = _answers_of_a_prompt(generation_config)
            positions = model_kwargs.get("position_ids")
            if repeats > 1 and positions is not None and can_be_kept(cache):
                if len(positions) == repeats * len(cache.layers[0].keys):
                    cache.batch_repeat_interleave(repeats)
        return made

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        encoded = model_kwargs.get("mm_encoder_outputs")
        repeats = self._repeats_of_a_prompt(input_ids, generation_config, model_kwargs)
        media = _by_row(self, input_ids, encoded) if repeats > 1 and encoded else [{}]
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
            cache_of(outputs).batch_repeat_interleave(repeats)
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
        cache = model_kwargs.get(CACHE)
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

    def _without_what_is_cached(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leaves encoded media out whose placeholders a passed cache has read already, so that a dialogue goes on from
        `past_key_values` with all its pictures passed again."""
        cache, encoded = model_kwargs.get(CACHE), model_kwargs.get("mm_encoder_outputs")
        past = cached_length(cache)
        mask = model_kwargs.get("attention_mask")
        whole = input_ids.ndim == 2 and not input_ids.is_floating_point() and input_ids.shape[1] > past
        if not encoded or past == 0 or not whole or (mask is not None and mask.shape[1] != input_ids.shape[1]):
            return model_kwargs
        kept: list[dict[str, list[torch.Tensor]]] = []
        for ids, own in zip(input_ids[:, :past], _by_row(self, input_ids, encoded), strict=True):
            row = {}
            for modality, tensors in own.items():
                read = int((ids == self.config.placeholder_ids[modality]).sum())
                rest = iter(tensors)
                while read > 0:
                    read -= len(next(rest))
                row[modality] = list(rest)
            kept.append(row)
        return {**model_kwargs, "mm_encoder_outputs": media_together(kept)}


__all__ = [
    "PrefixCache",
    "PrefixCacheMixin",
    "mask_or_none",
    "media_together",
    "padded_left",
    "padded_right",
]
