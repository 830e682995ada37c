"""LoRA on the language model, the connector trained beside it; and parents in 8 bits, where a backend is installed."""

from pathlib import Path

import pytest
import torch

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import join, save_parents


peft = pytest.importorskip("peft")
Model = FrozenPrefixForConditionalGeneration


def batch(model) -> dict[str, torch.Tensor]:
    ids = torch.full((1, model.config.prefix_length + 3), 5)
    ids[:, 1:-2] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def tuned(folder: Path, **options: object):
    from modeling_frozen.training.lora import lora_config

    model, _ = join(folder)
    model.save_pretrained(folder / "eyes")
    return peft.get_peft_model(model, lora_config(model, r=2, **options))


def step(model) -> None:
    inputs = batch(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):  # LoRA's second matrix starts at zero, so its first moves from the second step on
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] != 5, -100)).loss.backward()
        optimizer.step()
    model.eval()


def test_lora_and_the_connector_train_and_nothing_else(tmp_path: Path) -> None:
    model = tuned(tmp_path)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or "connector.modules_to_save" in name for name in trainable)
    assert any("connector" in name for name in trainable)
    assert all("language_model" in name for name in trainable if "lora_" in name)
    assert not any("lm_head" in name for name in trainable)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == trainable


def test_frozen_modules_stay_in_eval_mode_and_lora_does_not(tmp_path: Path) -> None:
    model = tuned(tmp_path, lora_dropout=0.5).train()
    inner = model.base_model.model.model
    layer = inner.language_model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].training and not layer.base_layer.training
    assert not inner.vision_tower.training


def test_saved_and_reloaded(tmp_path: Path) -> None:
    model = tuned(tmp_path)
    step(model)
    model.save_pretrained(tmp_path / "tuned")
    weights = sum(file.stat().st_size for file in (tmp_path / "tuned").glob("*.safetensors"))
    assert weights < (tmp_path / "words" / "model.safetensors").stat().st_size
    again = peft.PeftModel.from_pretrained(Model.from_pretrained(tmp_path / "eyes"), tmp_path / "tuned").eval()
    with torch.no_grad():
        assert torch.equal(model(**batch(model)).logits, again(**batch(model)).logits)
    assert torch.equal(
        model.generate(**batch(model), max_new_tokens=4, do_sample=False),
        again.generate(**batch(model), max_new_tokens=4, do_sample=False),
    )


def test_merged_it_is_saved_whole(tmp_path: Path) -> None:
    """A language model that LoRA was merged into is not the parent any more: left out, it would be lost."""
    model = tuned(tmp_path)
    step(model)
    with torch.no_grad():
        expected = model(**batch(model)).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = Model.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch(again)).logits, expected)


QUANTIZED = {"torchao": "TorchAoConfig", "bitsandbytes": "BitsAndBytesConfig"}


@pytest.mark.parametrize("backend", QUANTIZED)
def test_a_quantized_parent_is_never_saved(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    import transformers

    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    save_parents(tmp_path, text={"hidden_size": 64, "intermediate_size": 128})  # blocks are of 64
    plain, _ = join(tmp_path)
    plain.save_pretrained(tmp_path / "eyes")
    model = Model.from_pretrained(tmp_path / "eyes", quantization_config=quantization)
    linear = model.model.language_model.model.layers[0].self_attn.q_proj
    assert type(linear.weight) is not torch.nn.Parameter or type(linear) is not torch.nn.Linear
    assert type(model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight) is torch.nn.Parameter
    with torch.no_grad():
        expected = plain(**batch(plain)).logits
        drift = (model(**batch(model)).logits - expected).norm() / expected.norm()
    assert 0 < drift < 1  # an unrelated model would be 1.4 away
    step(model)
    model.save_pretrained(tmp_path / "trained")
    assert sorted(file.name for file in (tmp_path / "trained").glob("*.safetensors")) == ["model.safetensors"]
    again = Model.from_pretrained(tmp_path / "trained")
    assert again.model.language_model.dtype == torch.float32
    assert torch.equal(again.model.connector.output.weight, model.model.connector.output.weight)


@pytest.mark.parametrize("wrap", ["wrapped", "injected", "wrapped with its head saved"])
def test_a_model_that_has_an_adapter_already_takes_a_second_of_the_same_layers(tmp_path: Path, wrap: str) -> None:
    from modeling_frozen.training.lora import lora_config

    model, _ = join(tmp_path)
    plain = lora_config(model, r=2)
    if wrap == "injected":
        peft.inject_adapter_in_model(plain, model)
        again = lora_config(model, r=2)
    else:
        first = plain if wrap == "wrapped" else lora_config(model, r=2, modules_to_save=["connector", "lm_head"])
        tuned = peft.get_peft_model(model, first)
        again = lora_config(tuned, r=2)
        tuned.add_adapter("second", again)
        names = [name for name, _ in tuned.named_parameters() if ".lora_A." in name]
        first, second = ({n.partition(".lora_A.")[0] for n in names if f".{a}." in n} for a in ("default", "second"))
        assert first == second
    assert again.target_modules == plain.target_modules
    assert set(again.modules_to_save) == set(plain.modules_to_save) == {"connector"}
