"""Where a connector starts: at words of texts, where it can."""

from pathlib import Path

import pytest
import torch

from modeling_frozen.training.starting import start_as_words
from tests.helpers.tiny import join


TEXTS = [" a red square.", " a blue square."]


def test_the_prefix_starts_as_words(tmp_path: Path) -> None:
    model, processor = join(tmp_path, prefix_length=4, vision_feature_select_strategy="pooled")
    output = model.model.connector.output
    before = output.weight.clone()
    assert start_as_words(model, processor, TEXTS)
    words = model.get_input_embeddings().weight
    assert torch.cdist(output.bias.view(4, -1), words).min(dim=1).values.max() < 1e-5
    assert torch.equal(output.weight, before / 2) and output.weight.requires_grad
    with pytest.raises(ValueError, match="hold 1 tokens, and a prefix of 4"):
        start_as_words(model, processor, ["red"])


def test_a_connector_without_a_constant_part_stays(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="resampler", prefix_length=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not start_as_words(model, processor, TEXTS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
