"""Saving and loading: what is written, what is refused, and that what comes back is what went."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlamaForCausalLM

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, FrozenPrefixModel
from tests.helpers.tiny import image_inputs, join, same_logits, save_parents, text_config, vision_config


Model = FrozenPrefixForConditionalGeneration


def test_a_checkpoint_is_the_connector_and_some_text(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    tensors = load_file(tmp_path / "eyes" / "model.safetensors")
    assert set(tensors) == {f"model.connector.{name}" for name in model.model.connector.state_dict()}
    written = sum(file.stat().st_size for file in (tmp_path / "eyes").rglob("*"))
    connector = sum(t.numel() * t.element_size() for t in tensors.values())
    assert written <= connector + 64 * 1024
    assert not list((tmp_path / "eyes").glob("*.bin"))
    assert same_logits(model, AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes"))


def test_a_state_dict_of_the_callers_is_filtered_as_well(tmp_path: Path) -> None:
    """As FSDP, DeepSpeed and Trainer hand it over: gathered, and whole."""
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes", state_dict=dict(model.state_dict()))
    assert all(".connector." in name for name in load_file(tmp_path / "eyes" / "model.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_self_contained_copy_needs_no_parents(tmp_path: Path, tied: bool) -> None:
    save_parents(tmp_path, text={"tie_word_embeddings": tied})
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    (tmp_path / "words").rename(tmp_path / "gone")
    (tmp_path / "tower").rename(tmp_path / "gone too")
    again = Model.from_pretrained(tmp_path / "copy")
    assert same_logits(model, again)
    # the copy knows its lineage, but a copy of the copy is whole as well
    assert again.config.text_base_model == model.config.text_base_model
    again.save_pretrained(tmp_path / "copy of copy")
    assert same_logits(model, Model.from_pretrained(tmp_path / "copy of copy"))
    # and small checkpoints of the original are not changed by it
    (tmp_path / "gone").rename(tmp_path / "words")
    (tmp_path / "gone too").rename(tmp_path / "tower")
    model.save_pretrained(tmp_path / "eyes")
    assert all(".connector." in name for name in load_file(tmp_path / "eyes" / "model.safetensors"))


def test_a_copy_stays_whole_while_its_backbones_can_be_had(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    again = type(model).from_pretrained(tmp_path / "copy")
    again.save_pretrained(tmp_path / "copy of copy")
    saved = {name.split(".")[1] for name in load_file(tmp_path / "copy of copy" / "model.safetensors")}
    assert saved == {"connector", "vision_tower", "language_model"}


def test_a_trained_parent_is_saved_whole(tmp_path: Path) -> None:
    model, _ = join(tmp_path, trainable=("connector", "vision"))
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "eyes")
    parts = {name.split(".")[1] for name in load_file(tmp_path / "eyes" / "model.safetensors")}
    assert parts == {"connector", "vision_tower"}
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))


def test_a_parent_unfrozen_by_hand_is_saved_whole(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.model.language_model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.language_model.lm_head.weight.add_(0.1)
    model.save_pretrained(tmp_path / "eyes")
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))


def test_a_parent_that_somebody_wrote_into_is_saved_whole(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    with torch.no_grad():
        model.model.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "eyes")
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))


def test_another_dtype_is_no_change(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "eyes")
    assert all(".connector." in name for name in load_file(tmp_path / "eyes" / "model.safetensors"))


def test_loaded_parents_without_a_home_are_saved_whole(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    language_model = LlamaForCausalLM(text_config())
    model = Model.from_vision_text_pretrained(tower, language_model)
    assert model.model.language_model is language_model and model.config.text_base_model is None
    model.save_pretrained(tmp_path / "eyes")
    parts = {name.split(".")[1] for name in load_file(tmp_path / "eyes" / "model.safetensors")}
    assert parts == {"connector", "language_model"}
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))


def test_a_constructed_model_comes_back_whole(tmp_path: Path) -> None:
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config())
    model = Model(config).eval()
    model.save_pretrained(tmp_path / "eyes")
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))


def test_headless_and_whole_share_a_checkpoint(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    base = AutoModel.from_pretrained(tmp_path / "eyes")
    assert isinstance(base, FrozenPrefixModel)
    inputs = image_inputs(model)
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert same_logits(model, Model.from_pretrained(tmp_path / "base"))


def test_buffers_of_the_parents_come_back(tmp_path: Path) -> None:
    """Rotary frequencies are in no checkpoint; filled wrongly they garble everything, silently."""
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(tmp_path / "eyes")
    buffers = dict(again.named_buffers())
    assert buffers and all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model.language_model": "cpu", "model": "cpu"}])
def test_device_maps_reach_the_parents(tmp_path: Path, device_map: object) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(tmp_path / "eyes", device_map=device_map)
    assert same_logits(model, again)


def test_a_connector_tensor_that_lacks_is_an_error(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors.*{name}"):
        Model.from_pretrained(tmp_path / "eyes")


def test_another_connector_is_an_error(tmp_path: Path) -> None:
    model, _ = join(tmp_path, connector_type="linear")
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "config.json"
    config = json.loads(file.read_text())
    config["connector_type"] = "mlp"
    file.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="connector"):
        Model.from_pretrained(tmp_path / "eyes")


def test_a_pickle_is_no_connector(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "eyes" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        Model.from_pretrained(tmp_path / "eyes")


def test_saving_leaves_the_parents_bits_alone(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "eyes")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
