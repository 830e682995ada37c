"""A backbone that is quantised while it is loaded comes back quantised in the same way, or says that it doesn't."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import same_logits, save_parents


BACKENDS = ("torchao", "bitsandbytes")
Model = FrozenPrefixForConditionalGeneration


def quantization(backend: str) -> Any:
    pytest.importorskip(backend)
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
