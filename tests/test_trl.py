"""TRL's SFTTrainer as it is: every form of vision dataset, its own collator and ours, with LoRA, from a path.

It reads no logits (it runs our headless model and the head's weights), so `skip_logits` has no part in it.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import WORDS, join, rows, save_parents


pytestmark = pytest.mark.slow  # trl is an extra
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ASKED = {"role": "user", "content": "what colour ?"}


def dataset(form: str) -> Any:
    """Vision datasets as TRL names them."""
    made = []
    for row in rows(16):
        answer = {"role": "assistant", "content": row["text"]}
        made.append(
            {
                "text": {"image": row["image"], "text": f"{row['text']} </s>"},
                "prompt-completion": {"image": row["image"], "prompt": "what colour ?", "completion": f" {row['text']}"},
                "messages": {"images": [row["image"]], "messages": [ASKED, answer]},
                "conversational prompt-completion": {"images": [row["image"]], "prompt": [ASKED], "completion": [answer]},
            }[form]
        )
    return datasets.Dataset.from_list(made)


def trainer(folder: Path, model: Any, data: Any, processor: Any = None, collator: Any = None, **options: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 3e-2, "max_steps": 40, "logging_steps": 5, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 3,
    }  # fmt: skip
    peft_config = options.pop("peft_config", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(folder), **{**defaults, **options}),
            train_dataset=data,
            eval_dataset=data,
            processing_class=processor,
            data_collator=collator,
            peft_config=peft_config,
        )


def seen(model: Any, processor: Any) -> float:
    """How much worse the loss is under the pictures of others."""
    batch = DataCollatorForFrozenPrefix(processor)(
        [{"image": row["image"], "prompt": "what colour ?", "answer": row["text"]} for row in rows(4)]
    )
    model.eval()
    with torch.no_grad():
        right = model(**batch).loss
        wrong = model(**{**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}).loss
    return float(wrong - right)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("text", {"remove_unused_columns": False}),  # TRL's own list of columns to keep lacks "text" for images
        ("prompt-completion", {}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("conversational prompt-completion", {}),
        ("messages", {"gradient_checkpointing": False, "gradient_accumulation_steps": 2}),
    ],
)
def test_its_own_collator(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, processor = join(tmp_path, connector_type="linear")
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path / "run", model, dataset(form), processor, **options)
    assert type(run.data_collator).__name__ == "DataCollatorForVisionLanguageModeling"
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert logs[-1]["mean_token_accuracy"] > logs[0]["mean_token_accuracy"]
    assert run.evaluate()["eval_loss"] < logs[0]["loss"]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}
    assert seen(model, processor) > 0.2


@pytest.mark.parametrize("form", ["text", "messages"])
def test_our_collator(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    model, processor = join(tmp_path, connector_type="linear")
    collator = DataCollatorForFrozenPrefix(processor)
    run = trainer(tmp_path / "run", model, dataset(form), processor, collator, remove_unused_columns=False)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    batch = collator(list(dataset(form))[:4])
    model.eval()
    with torch.no_grad():
        assert abs(float(model(**batch).loss) - run.evaluate()["eval_loss"]) < 0.3


def test_its_loss_is_ours(tmp_path: Path) -> None:
    """The way around our forward gives the same number."""
    model, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    run = trainer(tmp_path / "run", model, dataset("messages"), processor, collator, remove_unused_columns=False)
    batch = collator(list(dataset("messages"))[:4])
    with torch.no_grad():
        ours, theirs = model(**batch).loss, model(**batch, fused_lm_head=True).loss
    torch.testing.assert_close(ours, theirs)
    assert run.model is model


def test_with_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config

    model, processor = join(tmp_path, connector_type="linear")
    data = dataset("prompt-completion")
    options = {"save_strategy": "steps", "save_steps": 40, "peft_config": lora_config(model, r=2)}
    run = trainer(tmp_path / "run", model, data, processor, **options)
    run.train()
    names = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert any("connector" in name for name in names) and any("lora_" in name for name in names)
    assert all(("connector" in name) != ("lora_" in name) for name in names)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "run" / "checkpoint-40" / "adapter_model.safetensors").stat().st_size < 200_000


def test_from_a_path_and_its_checkpoints(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="linear")
    model.save_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    run = trainer(
        tmp_path / "run", str(tmp_path / "eyes"), dataset("messages"), save_strategy="steps", save_steps=4, max_steps=4
    )
    assert type(run.model) is FrozenPrefixForConditionalGeneration
    run.train()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in run.model.state_dict().items())


def test_a_placeholder_past_the_vocabulary(tmp_path: Path) -> None:
    """Where the head has no row for `<image>`, data that names what is learnt trains as well."""
    save_parents(tmp_path, text={"vocab_size": len(WORDS)})
    model, processor = join(tmp_path, connector_type="linear")
    assert model.config.image_token_id == len(WORDS)
    run = trainer(tmp_path / "run", model, dataset("prompt-completion"), processor)
    run.train()
    assert seen(model, processor) > 0.2


def test_assistant_turns_alone_by_our_collator(tmp_path: Path) -> None:
    """Where TRL refuses assistant-only loss beside images, or trains on the questions too: several turns with an image, of
    which the answers and their ends are learnt and nothing else."""
    from modeling_frozen import load_image_text

    torch.manual_seed(0)
    model, processor = join(tmp_path, connector_type="linear")
    chats = [
        {"images": [row["image"]], "messages": [ASKED, {"role": "assistant", "content": row["text"]}] * 2} for row in rows(16)
    ]
    data = load_image_text(chats)
    collator = DataCollatorForFrozenPrefix(processor)
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    run = trainer(tmp_path / "run", model, data, processor, collator, **options)
    assert run.data_collator is collator
    batch = next(iter(run.get_train_dataloader()))
    for labels in batch["labels"]:
        said = processor.tokenizer.decode(labels[labels != -100])
        assert "what" not in said and said.replace(" ", "").count("square.</s>") == 2
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert seen(model, processor) > 0.2
