"""Rows of a training batch that begin alike are read once: the same loss and gradients as row by row, fewer positions read."""

import copy
from typing import Any

import pytest
import torch

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from modeling_frozen.shared_reading import best_lead, mark_images
from tests import test_vision_features, tiny
from tests.families_text import DECODERS, FAMILIES, VOCAB_SIZE


LENGTH, IMAGE = 8, VOCAB_SIZE
# Read row by row: those with a state in place of keys and values, and those that shift the labels themselves.
ROW_BY_ROW = {"mamba", "mamba2", "rwkv", "blenderbot-small", "m2m_100"}


def build(family: str = "llama", **options: Any) -> FrozenPrefixForConditionalGeneration:
    return test_vision_features.build(family, "transformer", prefix_length=LENGTH, **options)


def batch(family: str = "llama", words: tuple[int, ...] = (3, 1, 2, 3, 2)) -> dict[str, Any]:
    """Five captions of two pictures, of several lengths, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCAB_SIZE - 8, (count,), generator=generator).tolist() for count in words]
    decodes = family in DECODERS
    ids = [[5] + [IMAGE] * LENGTH + (text if decodes else []) for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([one + [0] * (width - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    longest = max(words)
    written = torch.tensor([text + [-100] * (longest - len(text)) for text in texts])
    labels = torch.cat([torch.full((5, width - longest), -100), written], 1) if decodes else written
    if decodes:
        labels = padded.masked_fill((mask == 0) | (padded == IMAGE) | (padded == 5), -100)
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": test_vision_features.pictures(),
        "image_index": torch.tensor([0, 1, 0, 0, 1]),
    }


def positions_read(model: FrozenPrefixForConditionalGeneration, inputs: dict[str, Any]) -> tuple[int, Any]:
    """How many positions the language model's first attention (or MLP) read, and the model's output."""
    read = []
    language_model = model.model.language_model
    body = language_model.get_encoder() if model.config.is_encoder_decoder else language_model.get_decoder()
    layers = next(part for part in body.modules() if isinstance(part, torch.nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[:2]), with_kwargs=True
    )
    output = model(**inputs)
    handle.remove()
    return sum(rows * length for rows, length in read), output


def gradients(model: FrozenPrefixForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_reading_each_row(family: str) -> None:
    model, given = build(family).train(), batch(family)
    model(**given)  # whether it may read in parts is tried at the first batch
    read, output = positions_read(model, given)
    output.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    # The same pictures, said to be different ones, are read row by row.
    apart = {**given, "pixel_values": given["pixel_values"][given["image_index"]], "image_index": torch.arange(5)}
    read_apart, plain = positions_read(model, apart)
    plain.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    plain_gradients = gradients(model)
    assert ours.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-4, atol=2e-4 * float(gradient.abs().max()), msg=name)
    assert output.past_key_values is None
    if family in ROW_BY_ROW:
        assert read == read_apart
    else:
        assert read <= 0.8 * read_apart, (read, read_apart)
