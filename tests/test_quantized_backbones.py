"""A backbone that is quantised while it is loaded comes back quantised in the same way, or says that it doesn't; a connector
trains over it by the gradient of what it computes, and it is neither changed nor saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.cli.info import as_text, describe
from tests.helpers.tiny import recompute_activations, rows, same_logits, save_parents
from tests.helpers.training import arguments


BACKENDS = ("torchao", "bitsandbytes")
# How far the prefix's gradient may be from that of the same weights unpacked, relative to its norm: rounding of float32; but
# bitsandbytes in 8 bits (arXiv 2208.07339) rounds what flows through a layer too, to 1/127 of each row's largest value.
METHODS = {"torchao": 1e-5, "bitsandbytes": 1e-5, "bitsandbytes in 8 bits": 0.1, "GPTQ": 1e-5, "AWQ": 1e-5}
BUILT = ("GPTQ", "AWQ")
BUILD = "BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel optimum"
Model = FrozenPrefixForConditionalGeneration


def quantization(backend: str) -> Any:
    if backend in BUILT:
        for package in ("gptqmodel", "optimum"):
            pytest.importorskip(package, reason=f"PyPI has the source of gptqmodel alone; it takes long to build: {BUILD}")
    else:
        pytest.importorskip(backend.split()[0], reason="needs the extra `quantized`")
    if backend == "AWQ":
        return transformers.AwqConfig(backend="auto_trainable")
    if backend == "GPTQ":
        texts = ["a red square .", "what colour is that ?"] * 8
        return transformers.GPTQConfig(bits=4, dataset=texts, group_size=32, backend="auto_trainable")
    if backend == "bitsandbytes in 8 bits":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def parents(tmp_path: Path) -> tuple[str, str]:
    return save_parents(tmp_path, text={"hidden_size": 64, "intermediate_size": 128})  # blocks are of 64


def prepared(method: str, words: str) -> tuple[str, dict[str, Any]]:
    """The folder of a language model, and the options by which it is quantised as it is loaded; AWQ's holds such weights."""
    config = quantization(method)
    return save_as_awq(words) if method == "AWQ" else words, {"quantization_config": config}


def save_as_awq(words: str, bits: int = 4, group: int = 32) -> str:
    """The weights of its blocks rounded to the nearest, as AWQ's files hold them (arXiv 2306.00978; the layout "gemm")."""
    folder, places = Path(f"{words}-awq"), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        parts = numbers.view(len(numbers), -1, len(places))[:, :, places].long() << (bits * torch.arange(len(places)))
        return (parts.sum(-1) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)

    shutil.copytree(words, folder)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = weight
            continue
        columns = weight.T.reshape(-1, group, len(weight))  # (groups, inputs, outputs)
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        scales = (high - low) / (2**bits - 1)
        zeros = (-low / scales).round()
        numbers = ((columns / scales[:, None]).round() + zeros[:, None]).clamp(0, 2**bits - 1).view(-1, len(weight))
        base = name.removesuffix("weight")
        parts = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales.half()}
        weights |= {base + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save_quantized(words: str, config: Any) -> str:
    """A folder of a language model whose weights are quantised there, with its tokenizer."""
    folder = f"{words}-quantized"
    AutoModelForCausalLM.from_pretrained(words, quantization_config=config).save_pretrained(folder)
    for path in Path(words).glob("token*"):
        shutil.copy(path, folder)
    return folder


def join(tower: Any, words: Any, **options: Any) -> FrozenPrefixForConditionalGeneration:
    return Model.from_vision_text_pretrained(tower, words, connector_type="resampler", prefix_length=4, **options)


def is_quantized(model: FrozenPrefixForConditionalGeneration) -> bool:
    linear = model.model.language_model.model.layers[0].self_attn.q_proj
    return type(linear) is not torch.nn.Linear or type(linear.weight) is not torch.nn.Parameter


def kinds_of(model: FrozenPrefixForConditionalGeneration) -> list[type]:
    """The classes of its layers, by which they are computed, and of what they hold their weights as."""
    return [type(one) for layer in layers_of(model).values() for one in (layer, getattr(layer, "weight", None))]


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


@pytest.mark.parametrize("backend", METHODS)
def test_weights_that_are_quantised_already(backend: str, parents: tuple[str, str], tmp_path: Path) -> None:
    """The language model's own config says so, and not that tower and connector are."""
    tower, words = parents
    config = quantization(backend)
    already = save_as_awq(words) if backend == "AWQ" else save_quantized(words, config)
    model = join(tower, already, **({"quantization_config": config} if backend in BUILT else {}))  # which chooses a kernel
    model.save_pretrained(tmp_path / "eyes")
    assert "quantization" not in model.config.text_base_model
    assert not [type(one) for one in model.model.connector.modules() if "4bit" in type(one).__name__]
    for again in (Model.from_pretrained(tmp_path / "eyes"), Model.from_pretrained(tmp_path / "eyes", load_vision_tower=False)):
        assert kinds_of(again) == kinds_of(model) and again.config.text_base_model == model.config.text_base_model
        assert not getattr(again, "is_quantized", False)
        weights = model.model.connector.state_dict()
        for name, weight in again.model.connector.state_dict().items():
            assert torch.equal(weight, weights[name])
    assert same_logits(model, Model.from_pretrained(tmp_path / "eyes"))
    assert ", quantised)" in as_text(describe(str(tmp_path / "eyes")))
    plain = Model.from_pretrained(tmp_path / "eyes", text_base_model=words)
    assert not is_quantized(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert not is_quantized(Model.from_pretrained(tmp_path / "plain"))


def test_where_it_can_not_be_a_warning_says_why(
    parents: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = join(*parents)
    model.config.text_base_model["quantization"] = {"quant_method": "quanto", "weights": "int8"}
    model.save_pretrained(tmp_path / "eyes")
    with caplog.at_level("WARNING"):
        assert not is_quantized(Model.from_pretrained(tmp_path / "eyes"))
    assert "quantised by quanto" in caplog.text and "loaded in float32" in caplog.text and "optimum" in caplog.text


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


def plain_twin(model: Model, tower: str, words: str, **options: Any) -> Model:
    """The same values in an ordinary language model, under the same connector."""
    twin = join(tower, words, **options)
    with torch.no_grad():
        for name, own in layers_of(model).items():
            layers_of(twin)[name].weight.copy_(unpacked(own))
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
    its_words, options = prepared(method, words)
    loaded = AutoModelForCausalLM.from_pretrained(its_words, **options)
    with torch.no_grad():
        loaded(torch.tensor([[1, 4, 5]]))
        model = join(tower, loaded)
        model.model.language_model(torch.tensor([[1, 4, 5]]))
    own, right = prefix_gradient(model), prefix_gradient(plain_twin(model, tower, words))
    assert (own - right).norm() <= METHODS[method] * right.norm(), (own - right).norm() / right.norm()
    other = join(tower, words)
    other.model.connector.load_state_dict(model.model.connector.state_dict())
    for name, layer in layers_of(other).items():
        rounding = (unpacked(layers_of(model)[name]) - layer.weight).norm() / layer.weight.norm()
        assert 1e-3 < rounding < 0.3, f"not the values of that language model, rounded: {rounding}"
    recompute_activations(model)
    torch.testing.assert_close(prefix_gradient(model), own)


@pytest.mark.parametrize("method", BUILT)
def test_layers_that_are_packed_for_writing_have_no_gradient(method: str, parents: tuple[str, str]) -> None:
    """gptqmodel packs a layer in bfloat16 for good that is called without gradients: after joining it is kept from that."""
    tower, words = parents
    its_words, options = prepared(method, words)
    options |= {"dtype": torch.bfloat16}
    model = join(tower, its_words, **options)
    with torch.no_grad():
        model.model.language_model(torch.tensor([[1, 4, 5]]))
    own, right = prefix_gradient(model), prefix_gradient(plain_twin(model, tower, words, dtype=torch.bfloat16))
    assert (own - right).norm() <= 0.01 * right.norm(), (own - right).norm() / right.norm()  # rounding of bfloat16


@pytest.mark.parametrize("method", BUILT)
def test_layers_that_were_packed_before_joining_are_refused(method: str, parents: tuple[str, str]) -> None:
    tower, words = parents
    its_words, options = prepared(method, words)
    loaded = AutoModelForCausalLM.from_pretrained(its_words, dtype=torch.bfloat16, **options)
    linear = loaded.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        loaded(torch.tensor([[1, 4, 5]]))
    if linear.linear_mode != "inference":
        pytest.skip(f"this CPU has no kernel for which {type(linear).__name__} is packed")
    late = join(tower, loaded)
    with pytest.raises(ValueError, match="called before the language model was joined"):
        late.train()


@pytest.mark.parametrize("method", BUILT)
def test_a_kernel_without_a_gradient_is_refused(method: str, parents: tuple[str, str]) -> None:
    tower, words = parents
    its_words, options = prepared(method, words)
    options["quantization_config"].backend = "auto"
    model = join(tower, its_words, **options)
    if next(iter(layers_of(model).values())).SUPPORTS_TRAINING:
        pytest.skip("the kernel that gptqmodel takes on this CPU has a gradient")
    with pytest.raises(ValueError, match='has no gradient.*backend="auto_trainable"'):
        model.train()


@pytest.mark.parametrize("method", METHODS)
def test_training_neither_changes_nor_saves_it_and_resumes(method: str, parents: tuple[str, str], tmp_path: Path) -> None:
    tower, words = parents
    torch.manual_seed(0)
    words, options = prepared(method, words)
    model = join(tower, words, **options)
    processor = FrozenPrefixProcessor.from_model(model)
    before = [unpacked(layer) for layer in layers_of(model).values()]
    table = model.model.language_model.get_input_embeddings().weight.clone()
    saves = {"save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, arguments(tmp_path / "run", **saves), DataCollatorForFrozenPrefix(processor), rows(16))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, unpacked(layer)) for old, layer in zip(before, layers_of(model).values(), strict=True))
    assert torch.equal(model.model.language_model.get_input_embeddings().weight, table)
    trained = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert trained and not [name for name in trained if not name.startswith("model.connector.")]
    again = Model.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert kinds_of(again) == kinds_of(model) and same_logits(model, again)
    record = again.config.text_base_model
    assert record == model.config.text_base_model and ("quantization" in record) is (method != "AWQ")
    resumed = Model.from_pretrained(tmp_path / "run" / "checkpoint-2")
    trainer = Trainer(resumed, arguments(tmp_path / "more", **saves), DataCollatorForFrozenPrefix(processor), rows(16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    after = load_file(tmp_path / "more" / "checkpoint-4" / "model.safetensors")
    for name in trained:
        torch.testing.assert_close(trained[name], after[name], rtol=0, atol=0)
