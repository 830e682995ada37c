# SPDX-License-Identifier: Apache-2.0
"""Reading a text with the frozen language model: hidden states in place of logits, for whatever needs a text's embedding.

A causal model gives its last hidden states, an encoder-decoder those of its encoder (its decoder never runs). Padding, on
whichever side, and placeholders that are not to be read are taken out of the rows first, so that a text is read as if it
stood alone: that serves models without `position_ids`, and recurrent ones, as well.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import fake_language_model
from .padding import distinct_rows, pad_right, words_of


TEXT_POOLINGS: tuple[str, ...] = ("last", "mean", "cls")


def text_reader(language_model: PreTrainedModel) -> nn.Module:
    """The part of a language model that reads a text: the encoder of an encoder-decoder, else all but the head."""
    return language_model.get_encoder() if language_model.config.is_encoder_decoder else language_model.base_model


def last_hidden_state(outputs: ModelOutput) -> torch.Tensor:
    """Of a headless model, or of a whole one that was asked for all hidden states."""
    states = outputs.get("last_hidden_state")
    return outputs["hidden_states"][-1] if states is None else states


def probe_text_width(text_config: PreTrainedConfig, headless: bool = False) -> int:
    """
    Width of the hidden states that the described language model gives for a text, found with fake tensors: no weight is
    allocated. It is neither the width of words nor `hidden_size` in every model (OPT-350m projects both ends).

    Raises:
        ValueError: where the model can't be asked, with the reason.
    """
    with fake_language_model(text_config, headless) as language_model:
        reader = text_reader(language_model)
        whole = {"output_hidden_states": True} if reader is language_model else {}
        logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it prints what is caught here
        try:
            outputs = reader(input_ids=torch.zeros(2, 3, dtype=torch.long), return_dict=True, **whole)
            return last_hidden_state(outputs).shape[-1]
        except Exception as error:  # mixtures of experts count on the host: what a fake can't be asked, its config says
            width = getattr(text_config.get_text_config(), "hidden_size", None)
            if width is None:
                raise ValueError(
                    f"{type(language_model).__name__} can't be asked for the width of its hidden states "
                    f"({type(error).__name__}: {error}): set `text_width` in the config. [errors.md#language-model]"
                ) from error
            return width
        finally:
            logging.getLogger("torch._subclasses.fake_tensor").disabled = False


def pack_text(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    skipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """
    Moves the words of every row to its start, in their order, and cuts off columns that hold none.

    Args:
        input_ids, inputs_embeds, attention_mask (`torch.Tensor`, *optional*):
            As a language model takes them; one of the first two `None`.
        skipped (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): words that are not to be read.

    Returns:
        The same three; the mask is always there.
    """
    words = words_of(input_ids, inputs_embeds)
    kept = words.new_ones(words.shape[:2]) if attention_mask is None else attention_mask.to(words.device)
    kept = kept != 0 if skipped is None else (kept != 0) & ~skipped
    input_ids, inputs_embeds, mask = pad_right(input_ids, inputs_embeds, kept.long())
    if not torch.compiler.is_compiling():
        length = max(1, int(mask.sum(-1).max()))
        input_ids = None if input_ids is None else input_ids[:, :length]
        inputs_embeds = None if inputs_embeds is None else inputs_embeds[:, :length]
        mask = mask[:, :length]
    return input_ids, inputs_embeds, mask


def read_text(
    model: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    mm_encoder_outputs: dict[str, ModelOutput] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, ModelOutput]:
    """
    Runs the language model of a [`FrozenPrefixModel`] on texts, without its head.

    Args:
        model ([`FrozenPrefixModel`]): whose language model reads.
        input_ids, inputs_embeds, attention_mask (`torch.Tensor`, *optional*): the texts, padded on any side.
        mm_encoder_outputs (`dict`, *optional*):
            What was encoded of images (videos, audio), whose placeholders the text holds. Without, placeholders are skipped.
        kwargs (`bool`): `output_hidden_states`, `output_attentions`.

    Returns:
        Hidden states `(batch, sequence, text_width)`, their attention mask `(batch, sequence)` (words first), and the
        language model's output (of the distinct texts alone, unless all hidden states or attentions are asked for).
    """
    language_model = model.language_model
    skipped = model.placeholders(input_ids) if input_ids is not None and not mm_encoder_outputs else None
    input_ids, inputs_embeds, mask = pack_text(input_ids, inputs_embeds, attention_mask, skipped)
    reader = text_reader(language_model)
    wants_all = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    if reader is language_model:
        kwargs["output_hidden_states"] = True
    if not language_model.config.is_encoder_decoder:
        kwargs["use_cache"] = False
    # A frozen model that meets words alone needs no graph; idle connectors have no part in it either.
    needs_graph = bool(mm_encoder_outputs) or (inputs_embeds is not None and inputs_embeds.requires_grad)
    needs_graph = needs_graph or any(parameter.requires_grad for parameter in language_model.parameters())
    groups = None
    if not needs_graph and not wants_all and input_ids is not None and not torch.compiler.is_compiling():
        # Questions and prompts repeat within a batch: each is read once.
        first, groups = distinct_rows(input_ids.masked_fill(mask == 0, -1))
        input_ids = input_ids[first]
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
        outputs, _ = model.run(
            reader,
            input_ids=input_ids,
            attention_mask=mask if groups is None else mask[first],
            position_ids=None,
            cache=None,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            media={},
            kwargs=kwargs,
        )
    states = last_hidden_state(outputs)
    return states if groups is None else states[groups.to(states.device)], mask, outputs


def pool_text(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, pooling: str = "last") -> torch.Tensor:
    """
    One vector per text.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of any layer.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
            1 for words, 0 for padding, on either side or both. `None`: no padding.
        pooling (`"last"`, `"mean"` or `"cls"`, defaults to `"last"`):
            `"last"`: the last word, which in a causal model has read all the others. `"mean"`: the mean of all words,
            summed in fp32. `"cls"`: the first word, which in encoders such as BERT stands for the whole text.

    Returns:
        `torch.Tensor` of shape `(batch, hidden_size)`, of the dtype of `hidden_states`.

    Raises:
        ValueError: for an unknown pooling, a mask of another shape, or a text without a single word.
    """
    if pooling not in TEXT_POOLINGS:
        raise ValueError(f"`{pooling}` is no way of pooling a text: choose one of {list(TEXT_POOLINGS)}. [errors.md#choices]")
    batch, length = hidden_states.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.long, device=hidden_states.device)
    mask = attention_mask.to(hidden_states.device) != 0
    if mask.shape != (batch, length):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}, but the hidden states are of {batch} texts of {length} "
            "positions: pass the 2-D mask that the tokenizer made for them. [errors.md#shape]"
        )
    if not torch.compiler.is_compiling() and mask.device.type != "meta" and not mask.any(-1).all():
        empty = int((~mask.any(-1)).nonzero()[0])
        raise ValueError(
            f"Text {empty} of the batch is all padding, so there is no word to pool: leave such rows out. [errors.md#padding]"
        )
    if pooling == "mean":
        # Padding may hold NaN (fully masked rows of attention), which a product with zero would keep.
        words = hidden_states.float().masked_fill(~mask[..., None], 0.0)
        return (words.sum(1) / mask.sum(1, keepdim=True)).to(hidden_states.dtype)
    if pooling == "last":
        index = (torch.arange(length, device=mask.device) * mask).amax(-1)
    else:
        index = mask.int().argmax(-1)
    return hidden_states[torch.arange(batch, device=mask.device), index]


__all__ = ["TEXT_POOLINGS", "last_hidden_state", "pack_text", "pool_text", "probe_text_width", "read_text", "text_reader"]
