"""PEFT beside LoRA (test_lora.py): other methods on the language model, prompts before the whole input, and transformers' own
`add_adapter`, all as they come."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from tests.helpers.families_vision import TOWERS, tiny_tower
from tests.helpers.tiny import is_peft_too_old, join, rows, save_parents, skip_where_peft_is_too_old


peft = pytest.importorskip("peft")
Model = FrozenPrefixForConditionalGeneration

LINEAR = r".*language_model\..*\.(k_proj|v_proj|down_proj)"
METHODS = {
    "dora": lambda: {"use_dora": True, "r": 2},
    "ia3": lambda: peft.IA3Config(
        target_modules=LINEAR, feedforward_modules=r".*language_model\..*\.down_proj", modules_to_save=["connector"]
    ),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=r".*language_model\..*\.v_proj", modules_to_save=["connector"]),
}


def train(model: Any, processor: Any, steps: int = 20) -> tuple[float, float]:
    batch = DataCollatorForFrozenPrefix(processor)(rows(8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    model.eval()
    return losses[0], losses[-1]


def asked(processor: Any) -> Any:
    texts = ["a", "a picture that"]
    return processor(images=[row["image"] for row in rows(2)], text=texts, return_tensors="pt", padding=True)


@torch.no_grad()
def same(first: Any, second: Any, processor: Any) -> bool:
    logits = torch.equal(first(**asked(processor)).logits, second(**asked(processor)).logits)
    prompts = isinstance(first, peft.PeftModel) and first.active_peft_config.is_prompt_learning
    if prompts and is_peft_too_old():
        return logits
    outputs = [model.generate(**asked(processor), max_new_tokens=4, do_sample=False) for model in (first, second)]
    return logits and torch.equal(*outputs)


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_the_language_model(tmp_path: Path, method: str) -> None:
    from modeling_frozen.training.lora import lora_config

    model, processor = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    config = METHODS[method]()
    config = lora_config(model, **config) if isinstance(config, dict) else config
    tuned = peft.get_peft_model(model, config)
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    first, last = train(tuned, processor)
    assert last < 0.7 * first
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)
    tuned.save_pretrained(tmp_path / "tuned")
    again = peft.PeftModel.from_pretrained(Model.from_pretrained(tmp_path / "eyes"), tmp_path / "tuned").eval()
    assert same(tuned, again, processor)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompts_before_pictures_and_words(tmp_path: Path, kind: str) -> None:
    """The connector is frozen by PEFT then; one call trains it beside the prompts."""
    model, processor = join(tmp_path)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    names = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert names and all("prompt_encoder" in name for name in names)
    tuned.base_model.freeze_base_models()
    added = {name for name, p in tuned.named_parameters() if p.requires_grad} - names
    assert added and all(".connector." in name for name in added)
    first, last = train(tuned, processor, 40)
    assert last < 0.5 * first
    batch = DataCollatorForFrozenPrefix(processor)(rows(4))
    with torch.no_grad():
        assert tuned(**{**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}).loss > tuned(**batch).loss + 0.3
    model.save_pretrained(tmp_path / "eyes")
    tuned.save_pretrained(tmp_path / "prompts")
    again = peft.PeftModel.from_pretrained(Model.from_pretrained(tmp_path / "eyes"), tmp_path / "prompts").eval()
    assert same(tuned, again, processor)


def test_prompts_generate_as_step_by_step(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    model.generation_config.eos_token_id = None
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config).eval()
    inputs = asked(processor)
    if is_peft_too_old():
        with pytest.raises(ValueError, match="would put its prompts before every token. Use PEFT"):
            tuned.generate(**inputs, max_new_tokens=4)
        return
    image = model.config.image_token_id  # a random model may write it
    outputs = tuned.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[image])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            logits = tuned(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            logits[..., image] = -torch.inf
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(outputs, ids)


def test_gated_blocks_refuse_prompts_by_name(tmp_path: Path) -> None:
    """PEFT puts prompts before embeddings, which show no placeholder."""
    model, processor = join(tmp_path, fusion="cross_attention")
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="placeholder: pass `input_ids`"):
        train(tuned, processor, 1)


def test_transformers_own_adapters(tmp_path: Path) -> None:
    from modeling_frozen.training.lora import lora_config

    skip_where_peft_is_too_old()
    model, processor = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    model = Model.from_pretrained(tmp_path / "eyes")
    model.add_adapter(lora_config(model, r=2))
    first, last = train(model, processor)
    assert last < 0.5 * first
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert same(model, Model.from_pretrained(tmp_path / "adapter"), processor)
    later = Model.from_pretrained(tmp_path / "eyes")
    later.load_adapter(tmp_path / "adapter")
    assert same(model, later, processor)
    plain = Model.from_pretrained(tmp_path / "eyes")
    model.disable_adapters()
    with torch.no_grad():
        assert torch.equal(model(**asked(processor)).logits, plain(**asked(processor)).logits)


@pytest.mark.parametrize("family", ["clip", "resnet"])
def test_each_tensor_of_an_adapter_comes_back(tmp_path: Path, family: str) -> None:
    """transformers has rules for the names of a CLIP tower's tensors, and none for those of a ResNet's and a Llama's."""
    from modeling_frozen.training.lora import lora_config

    save_parents(tmp_path)
    if family != "clip":
        tiny_tower(TOWERS[family]).save_pretrained(tmp_path / "tower")
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    tuned = peft.get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    expected = {name: p for name, p in tuned.get_base_model().named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in expected) and any(".connector." in name for name in expected)
    again = Model.from_pretrained(tmp_path / "eyes")
    again.load_adapter(tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter", "other")
    values = dict(again.named_parameters())
    for name, parameter in expected.items():
        assert torch.equal(values[name], parameter), name
        assert torch.equal(values[name.replace(".default.", ".other.")], parameter), name


def test_a_wrapped_language_model_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    join(tmp_path)
    words = AutoModelForCausalLM.from_pretrained(tmp_path / "words")
    wrapped = peft.get_peft_model(words, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(ValueError, match="PeftModelForCausalLM.*merge_and_unload"):
        Model.from_vision_text_pretrained(tmp_path / "tower", wrapped)
    Model.from_vision_text_pretrained(tmp_path / "tower", wrapped.merge_and_unload())
