"""Checkpoints and backbones that are not what they should be are refused, by name and with the way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from modeling_frozen.backbones import fingerprint
from tests.helpers.tiny import join, save_parents


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    join(tmp_path)[0].save_pretrained(tmp_path / "eyes")
    return tmp_path / "eyes"


load = FrozenPrefixForConditionalGeneration.from_pretrained


@pytest.mark.parametrize("record", [{}, {"name_or_path": "me/words"}])
def test_a_record_that_is_none(record: dict[str, Any], checkpoint: Path) -> None:
    edit_config(checkpoint, text_base_model=record)
    with pytest.raises(ValueError, match="(?s)text_base_model.*lacks.*fingerprint.*language model"):
        load(checkpoint)


def test_a_record_without_a_fingerprint_lets_no_backbone_pass(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())["text_base_model"]
    edit_config(checkpoint, text_base_model={**record, "fingerprint": None})
    with pytest.raises(ValueError, match="fingerprint.*trained with None.*text_base_model="):
        load(checkpoint)
    load(checkpoint, text_base_model=record["name_or_path"])


def test_a_connector_of_a_million_layers(checkpoint: Path) -> None:
    edit_config(checkpoint, connector_type="resampler", prefix_length=3, connector_config={"num_layers": 10**6})
    with pytest.raises(ValueError, match="num_layers=1000000 must be at most"):
        load(checkpoint)


def test_an_index_that_names_a_pickle(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*no safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_file_that_is_cut_off_is_named(size: int, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors.*damaged"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "two words"])
def test_names_that_no_connector_can_have(name: str, tmp_path: Path, checkpoint: Path) -> None:
    model = load(checkpoint)
    with pytest.raises(ValueError, match="can't be named"):
        model.load_connector(str(checkpoint), name)


def test_a_cut_off_connector_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"model.safetensors.*damaged"):
        model.load_connector(str(checkpoint), "other")


def test_a_file_is_no_backbone(tmp_path: Path) -> None:
    join(tmp_path)
    file = tmp_path / "words" / "model.safetensors"
    with pytest.raises(ValueError, match="is a file.*folder.*language model"):
        FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "tower"), str(file))
    with pytest.raises(ValueError, match="text_model_name_or_path=None"):
        FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "tower"), None)


def test_a_full_fingerprint_sees_every_value(tmp_path: Path) -> None:
    """One changed value of a large matrix lies between the windows of the sample."""
    save_parents(tmp_path, text={"intermediate_size": 512})
    model, _ = join(tmp_path, full_fingerprint=True)
    model.save_pretrained(tmp_path / "eyes")
    assert all(getattr(model.config, f"{part}_base_model")["fingerprint"].startswith("full:") for part in ("vision", "text"))
    load(tmp_path / "eyes")
    file = tmp_path / "words" / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    sampled = fingerprint(str(tmp_path / "words"))
    tensors[name].view(-1)[500] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(str(tmp_path / "words")) == sampled, "the sample misses it: that is what this test is about"
    with pytest.raises(ValueError, match="full:"):
        load(tmp_path / "eyes")


def test_a_quantised_backbone_that_comes_back_in_full_precision_warns(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((checkpoint / "config.json").read_text())["text_base_model"]
    edit_config(checkpoint, text_base_model={**record, "quantization": "torchao"})
    with caplog.at_level("WARNING"):
        load(checkpoint)
    assert "quantised by torchao" in caplog.text and "quantization_config" in caplog.text


def test_none_is_the_default_of_use_safetensors(checkpoint: Path) -> None:
    load(checkpoint, use_safetensors=None)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        load(checkpoint, use_safetensors=False)


def test_a_config_alone_keeps_its_checks() -> None:
    with pytest.raises(ValueError, match="vision_base_model"):
        FrozenPrefixConfig(vision_base_model={"name_or_path": "me/tower"})
