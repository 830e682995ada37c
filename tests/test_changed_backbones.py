"""A backbone is what its every value is: whoever changes one, in whatever way, has it saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.lora import lora_config
from tests.helpers.tiny import join, skip_where_peft_is_too_old


def saved_parts(folder: Path) -> set[str]:
    return {name.split(".")[1] for name in load_file(folder / "model.safetensors")}


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 16, 16).to(model.model.vision_tower.dtype)
    ids = torch.tensor([[1, *[model.config.image_token_id] * model.config.num_image_tokens, 4, 5]])
    with torch.no_grad():
        return model(ids, pixel_values=pixels).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_and_a_cast_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    tuned = get_peft_model(model, lora_config(model, r=4))
    fill_adapter(tuned)
    merged = tuned.merge_and_unload().to(dtype)
    merged.save_pretrained(tmp_path / "merged")
    assert saved_parts(tmp_path / "merged") == {"connector", "language_model"}
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert again.model.language_model.dtype == dtype and again.model.vision_tower.dtype == torch.float32
    own, other = (m.model.language_model.state_dict() for m in (merged, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_merged_tokens_are_saved(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    config = TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"])
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_alone_saves_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.to(dtype).save_pretrained(tmp_path / "cast")
    assert saved_parts(tmp_path / "cast") == {"connector"}


def test_what_a_cast_took_away_is_a_change(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.model.language_model.half().float()
    model.save_pretrained(tmp_path / "rounded")
    assert saved_parts(tmp_path / "rounded") == {"connector", "language_model"}


def changes() -> dict[str, Callable[[torch.Tensor, torch.Generator], None]]:
    def place(tensor: torch.Tensor, generator: torch.Generator) -> tuple[int, ...]:
        return tuple(int(torch.randint(size, (), generator=generator)) for size in tensor.shape)

    def value(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor[place(tensor, generator)] += 0.5

    def bit(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.view(torch.int32)[place(tensor, generator)] ^= 1

    def row(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor[place(tensor, generator)[0]] = 0

    def neuron(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor[..., place(tensor, generator)[-1]] = 0

    def rows_swapped(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor[[0, 1]] = tensor[[1, 0]]

    return {"value": value, "bit": bit, "row": row, "neuron": neuron, "rows swapped": rows_swapped}


@pytest.mark.parametrize("how", ["in place", "through data", "another tensor"])
@pytest.mark.parametrize("kind", changes())
def test_no_change_is_lost(kind: str, how: str, tmp_path: Path) -> None:
    """Of both backbones, four times each: 120 changes, one at a time."""
    model, _ = join(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for part, module in model.backbones.items():
        tensors = [parameter for parameter in module.parameters() if parameter.ndim == 2]
        for index in torch.randperm(len(tensors), generator=generator)[:4].tolist():
            before = tensors[index].detach().clone()
            if how == "another tensor":
                tensors[index].data = before.clone()
            with torch.no_grad():
                changes()[kind](tensors[index].data if how == "through data" else tensors[index], generator)
            assert not torch.equal(tensors[index], before)
            assert model.changed_parts() == {"connector", part}
            tensors[index].data.copy_(before)
            assert model.changed_parts() == {"connector"}


@pytest.mark.parametrize("place", ["", "model.layers.0"])
def test_weights_that_accelerate_holds_elsewhere_are_compared_too(place: str, tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    language_model = model.model.language_model
    offloaded = language_model.get_submodule(place)
    weights = {name: tensor.detach().clone() for name, tensor in offloaded.state_dict().items()}
    cpu_offload(offloaded, torch.device("cpu"), state_dict=weights)
    assert any(parameter.is_meta for parameter in language_model.parameters())
    assert model.changed_parts() == {"connector"}
    weights[next(name for name in weights if "q_proj" in name)][0, 0] += 0.5
    assert model.changed_parts() == {"connector", "text"}


def test_another_module_in_a_backbone_is_a_change(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.model.language_model.lm_head = torch.nn.Linear(32, model.config.text_config.vocab_size, bias=False)
    assert model.changed_parts() == {"connector", "text"}


def test_buffers_count(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path / "resnet")
    join(tmp_path)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "resnet"), str(tmp_path / "words"), connector_type="mlp", vision_feature_select_strategy="pooled"
    )
    assert model.changed_parts() == {"connector"}
    next(buffer for name, buffer in model.model.vision_tower.named_buffers() if name.endswith("running_mean")).add_(1.0)
    assert model.changed_parts() == {"connector", "vision"}


def test_where_a_backbone_can_not_be_read_any_more_it_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = join(tmp_path)
    (tmp_path / "words").rename(tmp_path / "gone")
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "eyes")
    assert saved_parts(tmp_path / "eyes") == {"connector", "language_model"}
    assert "language model" in caplog.text and "saved whole" in caplog.text


def with_adapter(folder: Path) -> Any:
    """A model saved as `eyes`, with an adapter that changes its answers."""
    model, _ = join(folder)
    model.save_pretrained(folder / "eyes")
    model = FrozenPrefixForConditionalGeneration.from_pretrained(folder / "eyes")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    fill_adapter(model)
    return model


@torch.no_grad()
def fill_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)


def test_an_adapter_in_its_models_own_folder(tmp_path: Path) -> None:
    skip_where_peft_is_too_old()
    model = with_adapter(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    assert torch.equal(logits(model), logits(again))


def test_what_a_checkpoint_lacks_is_refused_beside_an_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    skip_where_peft_is_too_old()
    model, _ = join(tmp_path)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "eyes")
    plain, _ = join(tmp_path)
    plain.save_pretrained(tmp_path / "eyes")
    tensors = load_file(tmp_path / "eyes" / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "eyes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")


@pytest.mark.parametrize("loader", ["AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"])
def test_the_auto_classes_load_an_adapter(loader: str, tmp_path: Path) -> None:
    import transformers

    skip_where_peft_is_too_old()
    model = with_adapter(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    again = getattr(transformers, loader).from_pretrained(tmp_path / "adapter")
    own, other = (dict(m.base_model.named_parameters()) for m in (model, again))
    assert own.keys() == other.keys() and any("lora_" in name for name in own)
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
