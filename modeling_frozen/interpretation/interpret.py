"""What the prefix says, where words attend, and how much they depend on the image: three questions to a trained model.

`nearest_words` reads prefix vectors as the words they lie nearest to (ClipCap, arXiv 2111.09734, section 4).
`attention_to_image` tells how much attention each word pays to the prefix and, where places are known, to which places
of the image. `sightedness` tells by how many nats a word becomes less likely when the image is another: what the
model does with the image, where attention tells only what it looked at.

All three answer in data (see `results`), which draw their figures by `plot()`. None changes the model, so other threads may
go on generating with it.
"""

import math
import os
from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from ..connectors import in_eval_mode
from ..data.collator import IGNORE_INDEX, DataCollatorForFrozenPrefix
from ..data.processes import refuse_parts
from ..modeling_frozen_prefix import FrozenPrefixModel
from ..parts import MODALITIES
from ..vision_towers import grid_of
from .connector_attention import prefix_origins, twin_of
from .results import ImageAttention, NearestWords, Sightedness, WordSightedness


# ------------------------------------------------------------------------------------------------------ what all share


def _core(model: Any) -> Any:
    """The part that holds tower, connector and language model."""
    core = model if isinstance(model, FrozenPrefixModel) else getattr(model, "model", None)
    if not isinstance(core, FrozenPrefixModel) or core.connector is None:
        raise ValueError(
            f"{type(model).__name__} is no frozen-prefix model with a vision tower, which this needs. [errors.md#figures]"
        )
    refuse_parts(model)
    return core


def _listed(images: Any) -> list[Any]:
    images = list(images) if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
    if not images:
        raise ValueError("There are no images: give one or several. [errors.md#figures]")
    return images


def _pixels(processor: Any, images: list[Any], device: Any) -> dict[str, Any]:
    """What the image processor makes of them, by the names that the model takes."""
    inputs = processor(images=images, return_tensors="pt").to(device)
    return {name: inputs[name] for name in MODALITIES["image"].inputs if name in inputs}


def _prefixes(core: Any, processor: Any, images: list[Any], batch_size: int) -> tuple[list[torch.Tensor], list[bytes]]:
    """One prefix per image, and what tells equal images apart from others."""
    prefixes, keys = [], []
    for start in range(0, len(images), batch_size):
        pixels = _pixels(processor, images[start : start + batch_size], core.device)
        prefixes += list(core.get_image_features(**pixels, return_dict=True).pooler_output)
        keys += [one.numpy().tobytes() for one in pixels["pixel_values"].float().cpu()]
    return prefixes, keys


def _encoded(prefixes: list[torch.Tensor]) -> dict[str, BaseModelOutputWithPooling]:
    # The connector's prefixes differ in length, so they are a list, as in transformers' own composite models.
    return {"image": BaseModelOutputWithPooling(pooler_output=prefixes)}  # type: ignore[arg-type]


def _word(tokenizer: Any, index: int) -> str:
    """A token as text; the vocabulary's own spelling where it is no text by itself (a part of a character)."""
    text = tokenizer.decode([index], skip_special_tokens=False)
    if text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(index) or f"<{index}>"  # a row of the table that no word has


def _words(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    return [_word(tokenizer, index) for index in ids.tolist()]


def _joined(tokenizer: Any, tokens: torch.Tensor) -> list[tuple[str, int, int]]:
    """Words and the tokens that each is made of, `[start, end)`. White space parts words; so do special tokens, and letters of
    scripts that write no space (wide ones)."""
    ids, special = tokens.tolist(), set(tokenizer.all_special_ids)
    starts: list[int] = []
    begin, before = 0, ""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for place in range(len(ids)):
        text = tokenizer.decode(ids[: place + 1], **options)
        if text.endswith("\ufffd") and place + 1 < len(ids):
            continue  # a part of a letter
        piece = text[len(os.path.commonprefix([before, text])) :]
        parted = not begin or before[-1:].isspace() or piece[:1].isspace() or bool(special & {ids[begin], ids[begin - 1]})
        if parted or (piece and east_asian_width(piece[0]) in "WF"):
            starts.append(begin)
        begin, before = place + 1, text
    ends = [*starts[1:], len(ids)][: len(starts)]
    spans = list(zip(starts, ends, strict=True))
    return [(_word(tokenizer, ids[a]) if b == a + 1 else tokenizer.decode(ids[a:b], **options), a, b) for a, b in spans]


# -------------------------------------------------------------------------------------------------------- nearest words


def nearest_words(
    model: Any,
    processor: Any,
    images: Any,
    top_k: int = 5,
    *,
    skip_special_tokens: bool = True,
    batch_size: int = 8,
) -> NearestWords:
    """
    The words whose embeddings lie nearest to each prefix vector, by cosine (ClipCap, arXiv 2111.09734, section 4).

    A prefix need not lie near words to be read rightly: LiMBeR (arXiv 2209.15162, section 5) finds that it seldom does.

    Args:
        model: a frozen-prefix model whose prefix stands among the words.
        processor: its processor.
        images: an image or a list, whatever the processor takes.
        top_k: how many words.
        skip_special_tokens: leave BOS, EOS and their like out. Placeholders always are.
        batch_size: images encoded at a time.

    Raises:
        ValueError: for a model with gated cross-attention, whose visual tokens never stand in the words' space.
    """
    core, tokenizer, images = _core(model), processor.tokenizer, _listed(images)
    if core.cross_attention is not None:
        raise ValueError(
            "This model reads images through gated blocks, which read the connector's vectors by weights of their "
            "own, so they lie in no space of words. Ask `attention_to_image` or `sightedness`. [errors.md#cross-attention]"
        )
    known = set(tokenizer.get_vocab().values()) - set(core.config.placeholder_ids.values())
    if skip_special_tokens:
        known -= set(tokenizer.all_special_ids)
    ids = torch.tensor(sorted(index for index in known if index < core.get_input_embeddings().weight.shape[0]))
    if not 1 <= top_k <= len(ids):
        raise ValueError(f"top_k={top_k} must be from 1 to the {len(ids)} words of the vocabulary. [errors.md#range]")
    with torch.no_grad(), in_eval_mode(core):
        prefixes = [one.float() for one in _prefixes(core, processor, images, batch_size)[0]]
        wanted = torch.nn.functional.normalize(torch.cat(prefixes), dim=-1)
        best = wanted.new_full((len(wanted), 0), 0)
        nearest = torch.empty(len(wanted), 0, dtype=torch.long, device=wanted.device)
        norms = []
        for chunk in ids.to(core.device).split(16384):  # the whole of a large vocabulary at once is as big as its table
            words = core.embed_words(chunk[None])[0].float().to(wanted.device)
            norms.append(words.norm(dim=-1))
            cosines = wanted @ torch.nn.functional.normalize(words, dim=-1).T
            best, order = torch.cat([best, cosines], dim=1).topk(min(top_k, best.shape[1] + len(chunk)), dim=1)
            nearest = torch.cat([nearest, chunk.to(nearest.device).expand(len(nearest), -1)], dim=1).gather(1, order)
    lengths = [len(one) for one in prefixes]
    ids_of, cosines_of = nearest.cpu().split(lengths), best.cpu().split(lengths)
    return NearestWords(
        words=[[_words(tokenizer, row) for row in one] for one in ids_of],
        ids=list(ids_of),
        similarities=list(cosines_of),
        norms=[one.norm(dim=-1).cpu() for one in prefixes],
        word_norm=float(torch.cat(norms).median()),
        images=images,
    )


# ---------------------------------------------------------------------------------------------------- image attention


def attention_to_image(
    model: Any,
    processor: Any,
    image: Any,
    prompt: str = "",
    *,
    text: str | None = None,
    skip_special_tokens: bool = True,
    **generate_kwargs: Any,
) -> ImageAttention:
    """
    How much attention each word pays to the image: what the model looked at when it wrote the word.

    One pass over prompt and answer with the eager attention, the only one that gives its weights, in a twin of the
    model that shares its weights: the model itself keeps its own implementation. Decoders: self-attention to the
    prefix; encoder-decoders: the decoder's cross-attention to the places where the prefix stood; gated cross-attention:
    the blocks' own. Attention is no explanation by itself; set `sightedness` beside it.

    Args:
        model: a `FrozenPrefixForConditionalGeneration`.
        processor: its processor.
        image: one image.
        prompt: what the model is asked, as for the processor.
        text: an answer to ask about; else the model writes one.
        skip_special_tokens: leave EOS and its like out of the words.
        generate_kwargs: for `generate()`; greedy, 20 tokens by default.

    Raises:
        ValueError: for language models without attention (Mamba, RWKV …), or that do not give theirs.
    """
    core, tokenizer = _core(model), processor.tokenizer
    config, device = core.config, core.device
    if not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} writes no words: give the FrozenPrefixForConditionalGeneration. [errors.md#figures]"
        )
    with torch.no_grad(), in_eval_mode(model):
        pixels = _pixels(processor, [image], device)
        if len(pixels["pixel_values"]) != 1:
            raise ValueError(
                f"This processor cuts the image into {len(pixels['pixel_values'])} tiles (crop_to_patches=True), and the map "
                "is of one: draw it with a processor that does not. [errors.md#processor]"
            )
        features, mask, _ = core.read_images(pixels, {})
        encoded = _encoded(core.write_prefix(features, mask, pixels.get("spatial_shapes")))
        inputs, queries, ids = _read_or_write(model, processor, image, prompt, text, encoded, generate_kwargs)
        columns = (inputs["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
        if core.connector.separator is not None:  # of no place in the image
            columns = columns[:-1]
        weights, kind = _attentions(model, {**inputs, "mm_encoder_outputs": encoded}, queries, columns)
    if skip_special_tokens:
        special = set(tokenizer.all_special_ids)
        kept = torch.tensor([index not in special for index in ids.tolist()], dtype=torch.bool)
        ids, weights = ids[kept], [one[:, kept] for one in weights]
    image, grid = _seen_image(processor, pixels), None
    origins = prefix_origins(core.connector, features, mask, pixels.get("spatial_shapes"))
    leading = config.num_leading_tokens if config.vision_feature_select_strategy == "full" else 0
    why = None
    if features.shape[1] == 1:
        why = "the tower gives one pooled vector per image."
    elif origins is None:
        why = f"the connector {config.connector_type!r} has no attention that says where its vectors come from."
    else:
        spatial = pixels.get("spatial_shapes")
        count = origins.shape[1] - leading
        grid = grid_of(count, *image.shape[:2]) if spatial is None else tuple(spatial[0].tolist())
        if grid is None or math.prod(grid) != count:
            grid, why = None, f"the tower's {count} positions are no grid on {tuple(image.shape[:2])} pixels."
    return ImageAttention(
        _words(tokenizer, ids), ids, weights, kind, origins, grid, leading, why, image, _joined(tokenizer, ids)
    )


def _read_or_write(
    model: Any, processor: Any, image: Any, prompt: str, text: str | None, encoded: Any, generate_kwargs: dict
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Model inputs that hold prompt and answer, the places that wrote each word of the answer, and these words' ids."""
    if text is not None:
        batch = DataCollatorForFrozenPrefix(processor, prefix_length=processor.prefix_length)(
            [{"image": image, "prompt": prompt, "answer": text}]
        )
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        labels = batch["labels"]
        if not model.config.is_encoder_decoder:
            places = (labels[0] != IGNORE_INDEX).nonzero()[:, 0]
            return inputs, places - 1, labels[0, places]
        prepare = getattr(model.model.language_model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:
            start = torch.tensor([[model.generation_config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], dim=1).to(model.device)
        else:
            inputs["decoder_input_ids"] = prepare(labels=labels.to(model.device))
        return inputs, torch.arange(labels.shape[1]), labels[0]
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    # A placeholder in the answer would be taken for another image's place.
    never = [*(model.generation_config.suppress_tokens or []), *model.config.placeholder_ids.values()]
    options = {"do_sample": False, "max_new_tokens": 20, "suppress_tokens": never, **generate_kwargs}
    output = model.generate(**inputs, mm_encoder_outputs=encoded, **options)
    output = getattr(output, "sequences", output)[:1]
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = output[:, :-1]
        return inputs, torch.arange(output.shape[1] - 1), output[0, 1:].cpu()
    length = inputs["input_ids"].shape[1]
    inputs = {"input_ids": output, "attention_mask": torch.ones_like(output)}
    return inputs, torch.arange(length - 1, output.shape[1] - 1), output[0, length:].cpu()


def _attentions(
    model: Any, inputs: dict[str, Any], queries: torch.Tensor, columns: torch.Tensor
) -> tuple[list[torch.Tensor], str]:
    """Weights (heads, words, prefix) per layer, from `queries` to `columns`; and their kind."""
    twin = twin_of(model, model.model.vision_tower, model.model.audio_tower, model.model.connector)
    if model.model.cross_attention is not None:
        layers: list[torch.Tensor] = []
        for block in twin.model.cross_attention:
            block.register_forward_pre_hook(lambda block, args: layers.append(_gated_weights(block, *args)))
        twin(**inputs, use_cache=False)
        return [one[0][:, queries.to(one.device)].float().cpu() for one in layers], "gated"
    language_model = twin.model.language_model
    _make_eager(language_model)
    output = twin(**inputs, output_attentions=True, use_cache=False)
    kind = "cross" if model.config.is_encoder_decoder else "self"
    length = inputs["input_ids"].shape[1]
    weights = (output.cross_attentions if kind == "cross" else output.attentions) or ()
    weights = [one for one in weights if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[-1] == length]
    if not weights:
        raise ValueError(
            f"{type(language_model).__name__} gives no attention weights: it is recurrent, or keeps them to itself. "
            "`sightedness` asks nothing of the inside of a language model. [errors.md#figures]"
        )
    # An implementation that doesn't fit its masks attends to the future and says nothing.
    logits, expected = (one.logits.float() for one in (output, model(**inputs, use_cache=False)))
    if (logits - expected).norm() > 0.05 * expected.norm():
        raise ValueError(
            f"With eager attention {type(language_model).__name__} computes something else than with "
            f"{model.model.language_model.config._attn_implementation!r}, so its weights would mislead. Load the language "
            'model with attn_implementation="eager". [errors.md#figures]'
        )
    return [one[0][:, queries.to(one.device)][..., columns.to(one.device)].float().cpu() for one in weights], kind


def _make_eager(language_model: Any) -> None:
    """For a twin alone. What transformers does not switch (Falcon, of one class for all) reads its config."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of what can't be switched
    try:
        language_model.set_attn_implementation("eager")
    finally:
        logging.set_verbosity(verbosity)
    for module in language_model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "eager"


def _gated_weights(
    block: Any, hidden_states: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor | None, *others: Any
) -> torch.Tensor:
    """What a gated block's fused attention keeps to itself: (batch, heads, words, visual tokens)."""
    weight = block.query.weight
    queries = block._heads(block.query(block.query_norm(hidden_states.to(weight.device, weight.dtype))))
    keys, _ = block.read(visual)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask.to(scores.device), -math.inf)).softmax(dim=-1)


def _seen_image(processor: Any, pixels: dict[str, Any]) -> torch.Tensor:
    """What the tower saw, (height, width, channels) from 0 to 1: resized and cropped as the image processor does."""
    values, part = pixels["pixel_values"][0].float().cpu(), processor.image_processor
    if values.ndim == 2:  # patches (NaFlex): row by row, each of (rows, columns, channels)
        rows, columns = pixels["spatial_shapes"][0].tolist()
        channels = len(getattr(part, "image_mean", None) or (0, 0, 0))
        side = math.isqrt(values.shape[1] // channels)
        values = values[: rows * columns].reshape(rows, columns, side, side, channels)
        values = values.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, channels)
    else:
        values = values.movedim(0, -1)
    mean, std = getattr(part, "image_mean", None), getattr(part, "image_std", None)
    if getattr(part, "do_normalize", False) and mean is not None and len(mean) == values.shape[-1]:
        values = values * torch.tensor(std) + torch.tensor(mean)
    if values.min() < -0.05 or values.max() > 1.05:  # a range of its own
        values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)
    return values.clamp(0, 1)


# --------------------------------------------------------------------------------------------------------- sightedness


def sightedness(
    model: Any,
    processor: Any,
    images: Any,
    texts: str | Sequence[str],
    *,
    prompts: str | Sequence[str] | None = None,
    other_images: Any = None,
    batch_size: int = 16,
) -> Sightedness:
    """
    The drop of each word's log-likelihood, in nats, when the image is swapped for another.

    Texts are read as in training (`DataCollatorForFrozenPrefix`), each after one image; each image is encoded once.

    Args:
        model: a `FrozenPrefixForConditionalGeneration`.
        processor: its processor.
        images: one image per text.
        texts: what is scored, word by word.
        prompts: what stands before each text and is not scored (one for all, or one each).
        other_images: the images to swap in (one or several); else every other one of `images` that differs.
        batch_size: texts at a time.

    Raises:
        ValueError: if there is no other image, or a text has several.
    """
    core, images = _core(model), _listed(images)
    texts = [texts] if isinstance(texts, str) else list(texts)
    asked = [prompts] * len(texts) if prompts is None or isinstance(prompts, str) else list(prompts)
    if not len(images) == len(texts) == len(asked):
        raise ValueError(
            f"{len(images)} images, {len(texts)} texts and {len(asked)} prompts: give one of each. [errors.md#figures]"
        )
    for index, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
        if processor.count_image_tokens((prompt or "") + text) > 1:
            raise ValueError(
                f"Text {index} holds several {processor.image_token}: which of them is to be swapped? [errors.md#figures]"
            )
    rows = [
        {"image": image, "text": text} if prompt is None else {"image": image, "prompt": prompt, "answer": text}
        for image, prompt, text in zip(images, asked, texts, strict=True)
    ]
    batch = DataCollatorForFrozenPrefix(processor, prefix_length=processor.prefix_length)(rows)
    with torch.no_grad(), in_eval_mode(model):
        prefixes, keys = _prefixes(core, processor, images, batch_size)
        if other_images is None:
            others = [[j for j, key in enumerate(keys) if key != own] for own in keys]
        else:
            more, _ = _prefixes(core, processor, _listed(other_images), batch_size)
            others = [list(range(len(images), len(images) + len(more)))] * len(images)
            prefixes += more
        if not all(others):
            raise ValueError(
                f"Text {others.index([])} has no other image to swap in: give several different images, or `other_images`."
                " [errors.md#figures]"
            )
        pairs = [(text, image) for text, some in enumerate(others) for image in [text, *some]]
        scores = []
        for start in range(0, len(pairs), batch_size):
            chosen = pairs[start : start + batch_size]
            scores += _log_likelihoods(model, batch, [text for text, _ in chosen], [prefixes[i] for _, i in chosen])
    samples, taken = [], iter(scores)
    for index, some in enumerate(others):
        ids = batch["labels"][index][batch["labels"][index] != IGNORE_INDEX]
        own, *swapped = [next(taken) for _ in range(1 + len(some))]
        words = _words(processor.tokenizer, ids)
        joined = _joined(processor.tokenizer, ids)
        samples.append(WordSightedness(words, ids, own, torch.stack(swapped), images[index], asked[index] or "", joined))
    return Sightedness(samples)


def _log_likelihoods(
    model: Any, batch: dict[str, torch.Tensor], texts: list[int], prefixes: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Nats of each labelled word of the texts with these indices, before these prefixes."""
    inputs = {name: batch[name][texts].to(model.device) for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][texts].to(model.device)
    if model.config.is_encoder_decoder:
        inputs["labels"] = labels  # the language model makes its decoder's input of them
    logits = model(**inputs, mm_encoder_outputs=_encoded(prefixes), use_cache=False, skip_logits=False).logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    nats = []
    for row, target in zip(logits, labels, strict=True):
        learnt = target != IGNORE_INDEX
        scores = row[learnt].float().log_softmax(dim=-1).gather(1, target[learnt][:, None])[:, 0]
        nats.append(scores.cpu())
    return nats


__all__ = ["attention_to_image", "nearest_words", "sightedness"]
