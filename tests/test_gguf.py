"""A language model in a GGUF file is a backbone like any other: recorded, checked, and loaded again from there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.backbones import fingerprint
from tests.helpers.gguf_files import TEMPLATE, write_gguf
from tests.helpers.tiny import same_logits, save_parents


pytest.importorskip("gguf", reason="GGUF files are read and written by the package gguf")

FILE = "words.gguf"


@pytest.fixture
def parents(tmp_path: Path) -> tuple[str, str]:
    return save_parents(tmp_path)[0], write_gguf(tmp_path / "gguf" / FILE)


def join(tower: Any, words: Any, **options: Any) -> FrozenPrefixForConditionalGeneration:
    options = {"connector_type": "resampler", "prefix_length": 4, **options}
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, **options)


def load_plain(folder: str, **options: Any) -> Any:
    if hasattr(transformers, "GgufConfig"):
        options = {"quantization_config": transformers.GgufConfig(dequantize=True), **options}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, **options)


def saved_parts(folder: Path) -> set[str]:
    return {name.split(".")[1] for name in load_file(folder / "model.safetensors")}


def test_joined_saved_small_and_loaded_again(parents: tuple[str, str], tmp_path: Path) -> None:
    model = join(*parents, text_gguf_file=FILE)
    record = model.config.text_base_model
    assert record["gguf_file"] == FILE and record["name_or_path"] == parents[1]
    assert record["fingerprint"] == fingerprint(parents[1], gguf_file=FILE)
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        bare = load_plain(parents[1])(ids).logits
        assert torch.equal(model.model.language_model(ids).logits, bare)
    model.save_pretrained(tmp_path / "eyes")
    assert saved_parts(tmp_path / "eyes") == {"connector"}
    config = json.loads((tmp_path / "eyes" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"] and "quantization" not in config["text_base_model"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes")
    assert same_logits(model, again) and again.config.text_base_model == record


def test_processor_comes_from_the_same_file(parents: tuple[str, str], tmp_path: Path) -> None:
    model = join(*parents, text_gguf_file=FILE)
    processor = FrozenPrefixProcessor.from_model(model)
    assert processor.image_token_id == model.config.image_token_id
    assert TEMPLATE.split("}")[0] in processor.chat_template
    text = "that is it"
    assert processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(text)["input_ids"]).count("at") == 1
    model.save_pretrained(tmp_path / "eyes")
    by_record = AutoProcessor.from_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    by_file = AutoProcessor.from_pretrained(tmp_path / "eyes")
    for other in (by_record, by_file):
        assert other.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
        assert other.image_token_id == processor.image_token_id


def test_another_file_is_refused_unless_named(parents: tuple[str, str], tmp_path: Path) -> None:
    join(*parents, text_gguf_file=FILE).save_pretrained(tmp_path / "eyes")
    write_gguf(tmp_path / "gguf" / "other.gguf", seed=1)
    load = FrozenPrefixForConditionalGeneration.from_pretrained
    with pytest.raises(ValueError, match="fingerprint.*text_base_model="):
        load(tmp_path / "eyes", text_gguf_file="other.gguf")
    again = load(tmp_path / "eyes", text_base_model=parents[1], text_gguf_file="other.gguf")
    assert again.config.text_base_model["gguf_file"] == "other.gguf"
    shutil.copy(tmp_path / "gguf" / "other.gguf", tmp_path / "gguf" / FILE)
    with pytest.raises(ValueError, match="weights have changed"):
        load(tmp_path / "eyes")


def test_a_changed_one_is_saved(parents: tuple[str, str], tmp_path: Path) -> None:
    model = join(*parents, text_gguf_file=FILE)
    model.model.language_model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 0.5
    model.save_pretrained(tmp_path / "eyes")
    assert saved_parts(tmp_path / "eyes") == {"connector", "language_model"}
    assert same_logits(model, FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes"))


def test_a_loaded_one_is_recorded_where_transformers_remembers_the_file(parents: tuple[str, str], tmp_path: Path) -> None:
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this transformers forgets which file a model came from")
    language_model = AutoModelForCausalLM.from_pretrained(parents[1], gguf_file=FILE)
    model = join(parents[0], language_model)
    assert model.config.text_base_model["gguf_file"] == FILE
    assert getattr(model.config.text_config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "eyes")
    assert saved_parts(tmp_path / "eyes") == {"connector"}
    assert same_logits(model, FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes"))
    language_model.lm_head.weight.data[5] = 0
    model.save_pretrained(tmp_path / "changed")
    assert saved_parts(tmp_path / "changed") == {"connector", "language_model"}
    assert same_logits(model, FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "changed"))


def test_a_loaded_one_of_which_nothing_is_known_is_saved_whole_with_a_word(
    parents: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        model = join(parents[0], load_plain(parents[1]))
    assert "0.1 MB" in caplog.text and "text_gguf_file=" in caplog.text and parents[1] in caplog.text
    model.save_pretrained(tmp_path / "eyes")
    assert saved_parts(tmp_path / "eyes") == {"connector", "language_model"}
    assert "quantization_config" not in json.loads((tmp_path / "eyes" / "config.json").read_text())["text_config"]
    assert same_logits(model, FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes"))


def test_a_path_to_a_file_says_what_is_wanted(parents: tuple[str, str]) -> None:
    tower, words = parents
    for source in (f"{words}/{FILE}", f"me/words/{FILE}"):
        with pytest.raises(ValueError, match=rf'is a file.*folder.*"{source.rpartition("/")[0]}", text_gguf_file="{FILE}"'):
            join(tower, source)
    with pytest.raises(ValueError, match=rf'no config.json, but.*text_gguf_file="{FILE}"'):
        join(tower, words)
    with pytest.raises(ValueError, match="vision_gguf_file='tower.gguf'.*only language models"):
        join(tower, words, vision_gguf_file="tower.gguf", text_gguf_file=FILE)
    with pytest.raises(OSError, match="language model.*could not be loaded.*absent.gguf"):
        join(tower, words, text_gguf_file="absent.gguf")


def test_it_trains_and_goes_on(parents: tuple[str, str], tmp_path: Path) -> None:
    model = join(*parents, text_gguf_file=FILE, dtype=torch.bfloat16)
    assert model.model.language_model.dtype == torch.bfloat16
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 70, 80]])
    loss = model(ids, pixel_values=torch.randn(1, 3, 16, 16).bfloat16(), labels=ids.masked_fill(ids > 200, -100)).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "eyes")
    assert FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes").model.language_model.dtype == torch.bfloat16
