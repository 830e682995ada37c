"""A backbone that is quantised while it is loaded comes back quantised in the same way, or says that it doesn't; a connector
trains over it by the gradient of what it computes, and it is neither changed nor saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.tiny import recompute_activations, rows, same_logits, save_parents, tokenizer
from tests.helpers.training import arguments


BACKENDS = ("torchao", "bitsandbytes")
# How far the prefix's gradient may be from that of the same weights unpacked, relative to its norm: rounding of float32; but
# bitsandbytes in 8 bits (arXiv 2208.07339) rounds what flows through a layer too, to 1/127 of each row's largest value.
METHODS = {"torchao": 1e-5, "bitsandbytes": 1e-5, "bitsandbytes in 8 bits": 0.1, "gptqmodel": 1e-3}
Model = FrozenPrefixForConditionalGeneration


def quantization(backend: str) -> Any:
    pytest.importorskip(backend.split()[0], reason=f"needs {backend.split()[0]} (GPTQ and AWQ have no wheel for CPUs on PyPI)")
    if backend == "gptqmodel":
        return transformers.GPTQConfig(bits=4, dataset=["a red square ."] * 16, tokenizer=tokenizer(), group_size=32)
    if backend == "bitsandbytes in 8 bits":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def parents(tmp_path: Path) -> tuple[str, str]:
    return save_parents(tmp_path, text={"hidden_size": 64, "intermediate_size": 128})  # blocks are of 64


def join(tower: Any, words: Any, **options: Any) -> FrozenPrefixForConditionalGeneration:
    return Model.from_vision_text_pretrained(tower, words, connector_type="resampler", prefix_length=4, **options)


def is_quantized(model: FrozenPrefixForConditionalGeneration) -> bool:
    linear = model.model.language_model.model.layers[0].self_attn.q_proj
    return type(linear.weight) is not torch.nn.Parameter or type(linear) is not torch.nn.Linear


@pytest.mark.parametrize("way", ["joined", "reloaded", "loaded before"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_loaded_as_it_was_recorded(backend: str, way: str, parents: tuple[str, str], tmp_path: Path) -> None:
    tower, words = parents
    if way == "joined":
        model = join(tower, words, quantization_config=quantization(backend))
    elif way == "reloaded":
        join(tower, words).save_pretrained(tmp_path / "plain")
        model = Model.from_pretrained(tmp_path / "plain", quantization_config=quantization(backend))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(words, quantization_config=quantization(backend))
        model = join(tower, loaded)
    assert is_quantized(model)
    model.save_pretrained(tmp_path / "eyes")
    assert all(".connector." in f".{name}" for name in load_file(tmp_path / "eyes" / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "eyes" / "config.json").read_text())["text_config"]
    again = Model.from_pretrained(tmp_path / "eyes")
    assert is_quantized(again) and same_logits(model, again)
    assert again.config.text_base_model == model.config.text_base_model
    with pytest.raises(ValueError, match="language model is quantised.*include_base_models"):
        model.save_pretrained(tmp_path / "whole", include_base_models=True)
    plain = Model.from_pretrained(tmp_path / "eyes", text_base_model=words)
    assert not is_quantized(plain) and "quantization" not in plain.config.text_base_model


def test_where_it_can_not_be_a_warning_says_why(
    parents: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = join(*parents)
    model.config.text_base_model["quantization"] = {"quant_method": "gptq", "bits": 4}
    model.save_pretrained(tmp_path / "eyes")
    with caplog.at_level("WARNING"):
        assert not is_quantized(Model.from_pretrained(tmp_path / "eyes"))
    assert "quantised by gptq" in caplog.text and "loaded in float32" in caplog.text and "optimum" in caplog.text


def changes() -> dict[str, Any]:
    """Ways to change a language model that was quantised; and whether anything is lost with them."""

    def merge(model: Any) -> Any:
        tuned = get_peft_model(model, TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(1.0)
        return tuned.merge_and_unload()

    def edit(model: Any) -> Any:
        model.model.language_model.get_input_embeddings().weight.data[3, 3] += 0.5
        return model

    def use(model: Any) -> Any:
        same_logits(model, model)
        return model

    def widen(model: Any) -> Any:
        """As PEFT's `prepare_model_for_kbit_training` does with what isn't quantised."""
        model.model.language_model.model.norm.double()
        return model

    return {"merged": (merge, True), "edited": (edit, True), "used": (use, False), "widened": (widen, False)}


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_that_no_checkpoint_holds_is_said(
    backend: str, change: str, parents: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tower, words = parents
    model = join(tower, words, quantization_config=quantization(backend))
    make, is_lost = changes()[change]
    model = make(model)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "eyes")
    assert (f"loaded from `{words}` without that change" in caplog.text) is is_lost


# ------------------------------------------------------------------------------------------------- training over it


def layers_of(model: Model) -> dict[str, torch.nn.Module]:
    """The linear layers of its blocks, which are what is quantised."""
    named = model.model.language_model.model.layers.named_modules()
    return {name: module for name, module in named if name.endswith("_proj")}


def unpacked(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer multiplies by, whatever it holds it as: what it makes of an identity matrix. As in training, for
    without gradients bitsandbytes takes other kernels, which round."""
    return layer(torch.eye(layer.in_features, requires_grad=True)).T.detach().float()


def plain_twin(model: Model, tower: str, words: str) -> Model:
    """The same values in an ordinary language model, under the same connector."""
    twin = join(tower, words)
    with torch.no_grad():
        for layer, own in zip(layers_of(twin).values(), layers_of(model).values(), strict=True):
            layer.weight.copy_(unpacked(own))
    twin.model.connector.load_state_dict(model.model.connector.state_dict())
    return twin


def prefix_gradient(model: Model) -> torch.Tensor:
    """Of the loss, by the prefix that the connector writes."""
    processor, kept = FrozenPrefixProcessor.from_model(model), []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hook = model.model.connector.register_forward_hook(keep)
    model.train()
    model(**DataCollatorForFrozenPrefix(processor)(rows(4))).loss.backward()
    hook.remove()
    model.zero_grad()
    return kept[0].grad


@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_gets_the_gradient_of_the_quantised_values(method: str, parents: tuple[str, str]) -> None:
    """Also where it wrote before, for which bitsandbytes lays weights out anew, and what it computes from then on has none."""
    tower, words = parents
    loaded = AutoModelForCausalLM.from_pretrained(words, quantization_config=quantization(method))
    with torch.no_grad():
        loaded(torch.tensor([[1, 4, 5]]))
        model = join(tower, loaded)
        model.model.language_model(torch.tensor([[1, 4, 5]]))
    own, right = prefix_gradient(model), prefix_gradient(plain_twin(model, tower, words))
    assert (own - right).norm() <= METHODS[method] * right.norm(), (own - right).norm() / right.norm()
    other = join(tower, words)
    other.model.connector.load_state_dict(model.model.connector.state_dict())
    assert (prefix_gradient(other) - right).norm() > 1e-3 * right.norm(), "the values were not rounded at all"
    recompute_activations(model)
    torch.testing.assert_close(prefix_gradient(model), own)


@pytest.mark.parametrize("method", METHODS)
def test_training_neither_changes_nor_saves_it_and_resumes(method: str, parents: tuple[str, str], tmp_path: Path) -> None:
    tower, words = parents
    torch.manual_seed(0)
    model = join(tower, words, quantization_config=quantization(method))
    processor = FrozenPrefixProcessor.from_model(model)
    before = [unpacked(layer) for layer in layers_of(model).values()]
    table = model.model.language_model.get_input_embeddings().weight.clone()
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, arguments(tmp_path / "run", **options), DataCollatorForFrozenPrefix(processor), rows(16))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, unpacked(layer)) for old, layer in zip(before, layers_of(model).values(), strict=True))
    assert torch.equal(model.model.language_model.get_input_embeddings().weight, table)
    trained = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert trained and not [name for name in trained if not name.startswith("model.connector.")]
    again = Model.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert is_quantized(again) and same_logits(model, again)
    assert again.config.text_base_model["quantization"] == model.config.text_base_model["quantization"]
    resumed = Model.from_pretrained(tmp_path / "run" / "checkpoint-2")
    trainer = Trainer(resumed, arguments(tmp_path / "more", **options), DataCollatorForFrozenPrefix(processor), rows(16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    after = load_file(tmp_path / "more" / "checkpoint-4" / "model.safetensors")
    for name in trained:
        torch.testing.assert_close(trained[name], after[name], rtol=0, atol=0)
