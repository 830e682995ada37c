"""Tower and connector alone: prefixes for a server that has the language model."""

import base64
import io
from pathlib import Path

import pytest
import torch

from modeling_frozen import FrozenPrefixModel, FrozenPrefixProcessor
from modeling_frozen.serving.prompt_embeds import prompt_embeds
from tests.helpers.talking import QUESTION, Talking, picture, talking
from tests.helpers.tiny import join


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Talking:
    return talking(tmp_path_factory.mktemp("saved"))


def test_an_encoder_alone(saved: Talking, tmp_path: Path) -> None:
    whole, processor = saved.model, saved.processor
    encoder = FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False)
    pixels = processor(images=picture("red"), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.get_image_features(pixels).pooler_output[0], whole.get_image_features(pixels).pooler_output[0])
    encoder.save_pretrained(tmp_path / "again")
    again = type(whole).from_pretrained(tmp_path / "again")
    assert torch.equal(again.get_image_features(pixels).pooler_output[0], whole.get_image_features(pixels).pooler_output[0])
    whole.save_pretrained(tmp_path / "whole", include_base_models=True)
    encoder = FrozenPrefixModel.from_pretrained(tmp_path / "whole", load_language_model=False)
    with pytest.raises(ValueError, match="load_language_model=False"):
        encoder.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="language model is not loaded"):
        encoder(**processor(text=QUESTION, return_tensors="pt"))
    with pytest.raises(ValueError, match="contradict"):
        FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False, text_base_model="x")
    assert isinstance(FrozenPrefixProcessor.from_model(encoder), FrozenPrefixProcessor)


def test_a_part_holds_the_prefix_of_each_image(saved: Talking) -> None:
    encoder = FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False)
    images = [picture("red"), picture("blue")]
    parts = prompt_embeds(encoder, saved.processor, images)
    assert [part["type"] for part in parts] == ["prompt_embeds"] * 2
    held = [torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True) for part in parts]
    pixels = saved.processor(images=images, return_tensors="pt")["pixel_values"]
    for one, prefix in zip(held, saved.model.get_image_features(pixels).pooler_output, strict=True):
        assert torch.equal(one, prefix)
    assert not torch.equal(*held)
    tiled = prompt_embeds(encoder, FrozenPrefixProcessor.from_model(encoder, crop_to_patches=True), images[0].resize((32, 16)))
    tiles = torch.load(io.BytesIO(base64.b64decode(tiled[0]["data"])), weights_only=True)
    assert len(tiles) > len(held[0]) and len(tiles) % len(held[0]) == 0


def test_what_reads_no_prefix_among_words_is_refused(tmp_path: Path) -> None:
    model, processor = join(tmp_path, fusion="cross_attention", connector_type="resampler", prefix_length=2)
    with pytest.raises(ValueError, match="cross_attention.*frozen-prefix serve"):
        prompt_embeds(model, processor, picture("red"))
