"""`save_pretrained(..., include_base_models=True)`: one folder that needs no parents, no network and no package."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers import fresh_python
from tests.helpers.hub_fixtures import HIDE_PACKAGE
from tests.helpers.talking import QUESTION, TOKENS, Talking, talking, user
from tests.helpers.tiny import COLOURS, join, rows


# Code whose last line of output is what a folder says about a red square.
ASK = """
import json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
options = {{"trust_remote_code": True}}
model = AutoModelForImageTextToText.from_pretrained({folder!r}, **options)
processor = AutoProcessor.from_pretrained({folder!r}, **options)
image = Image.new("RGB", (20, 18), {colour!r})
chat = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": {question!r}}}]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
out = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(json.dumps({{
    "says": processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "trainable": sorted({{name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}}),
    "module": type(model).__module__,
}}))
{more}
"""


def elsewhere(folder: Path, home: Path, more: str = "") -> dict[str, Any]:
    """What the folder says on a machine without the package, without a network and with an empty cache."""
    code = ASK.format(folder=str(folder), colour=COLOURS["red"], question=QUESTION, tokens=TOKENS, more=more)
    home.mkdir(exist_ok=True)
    env = {**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    done = fresh_python.run("-c", HIDE_PACKAGE + code, env=env, cwd=home, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Talking, Path]:
    """A talking model, and its self-contained copy, after the parents are gone."""
    saved = talking(tmp_path / "eyes")
    saved.model.save_pretrained(tmp_path / "copy", include_base_models=True)
    shutil.rmtree(tmp_path / "eyes")
    return saved, (tmp_path / "copy").rename(tmp_path / "moved")


def test_one_call_writes_all_that_a_stranger_needs(moved: tuple[Talking, Path], tmp_path: Path) -> None:
    saved, folder = moved
    outputs = elsewhere(folder, tmp_path / "stranger")
    assert outputs["says"] == saved.says(user("red")) != saved.says(user("blue"))
    assert outputs["trainable"] == ["connector"] and outputs["module"].startswith("transformers_modules")
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_a_copy_of_the_copy_and_a_copy_with_the_package(moved: tuple[Talking, Path], tmp_path: Path) -> None:
    """Loaded from a copy the parents have no home, so every further save is whole."""
    saved, folder = moved
    again = f"model.save_pretrained({str(tmp_path / 'again')!r}, include_base_models=True)"
    elsewhere(folder, tmp_path / "stranger", more=f"{again}\nprocessor.save_pretrained({str(tmp_path / 'again')!r})")
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "again")
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    assert isinstance(processor, FrozenPrefixProcessor)
    assert Talking(model, processor, "").says(user("red")) == saved.says(user("red"))
    model.save_pretrained(tmp_path / "third")
    third = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "third")
    assert all(torch.equal(value, third.state_dict()[key]) for key, value in saved.model.state_dict().items())


@pytest.mark.parametrize("dtypes", [{"dtype": torch.bfloat16}, {"vision_dtype": torch.float32, "text_dtype": torch.bfloat16}])
def test_each_part_keeps_its_own_dtype(tmp_path: Path, dtypes: dict[str, torch.dtype]) -> None:
    model, _ = join(tmp_path, **dtypes)
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    copy = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "copy")
    results = {name: (value.dtype, value) for name, value in copy.state_dict().items()}
    for name, value in model.state_dict().items():
        assert results[name][0] == value.dtype and torch.equal(results[name][1], value), name


def test_another_dtype_is_had_by_asking(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    for asked, vision, text in (
        ({"dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"text_dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32, torch.float32),
    ):
        copy = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "copy", **asked).model
        results = {part: {p.dtype for p in getattr(copy, part).parameters()} for part in ("vision_tower", "language_model")}
        assert results == {"vision_tower": {vision}, "language_model": {text}}, asked
        assert {p.dtype for p in copy.connector.parameters()} == {torch.float32}


def test_a_processor_that_lies_there_is_left_alone(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    assert list(AutoProcessor.from_pretrained(tmp_path / "copy").image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_where_no_processor_can_be_had_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = join(tmp_path)
    shutil.rmtree(tmp_path / "words")
    logging.getLogger("modeling_frozen.hub").propagate = True
    with caplog.at_level("WARNING", logger="modeling_frozen.hub"):
        model.save_pretrained(tmp_path / "copy", include_base_models=True)
    assert "has no processor yet" in caplog.text and "processor.save_pretrained" in caplog.text
    processor.save_pretrained(tmp_path / "copy")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "copy"), FrozenPrefixProcessor)


def test_an_ordinary_checkpoint_stays_small(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    assert not list((tmp_path / "eyes").glob("*.py")) and not (tmp_path / "eyes" / "processor_config.json").exists()


def test_a_checkpoint_of_trainer_holds_what_was_learnt(tmp_path: Path) -> None:
    """And the processor, without code: only what leaves the machine carries that, as the output folder does."""
    model, processor = join(tmp_path)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, save_steps=1, remove_unused_columns=False, use_cpu=True, report_to="none"
    )
    collator = DataCollatorForFrozenPrefix(processor)
    trainer = Trainer(model, arguments, collator, rows(8), processing_class=processor)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    connector = sum(parameter.nbytes for parameter in model.model.connector.parameters())
    assert connector < 10_000 and files["model.safetensors"] < connector + 2000
    assert sum(size for name, size in files.items() if not name.startswith("tokenizer")) < 64 * 1024, files
    assert not [name for name in files if name.endswith(".py")]
    assert "auto_map" not in json.loads((folder / "processor_config.json").read_text())
    assert isinstance(AutoProcessor.from_pretrained(folder), FrozenPrefixProcessor)
    trainer.save_model()  # as `push_to_hub` does before it uploads the folder
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"modeling_frozen_prefix.py", "processing_frozen_prefix.py"} <= names
    assert not names & {"modeling_frozen_prefix_retrieval.py", "modeling_frozen_prefix_classification.py"}
