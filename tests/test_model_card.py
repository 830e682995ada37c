"""The model card: all of it against a pattern, its metadata by the Hub's own parser, what becomes of older cards."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixHubCallback, FrozenPrefixModel
from modeling_frozen.model_card.card import write_model_card
from modeling_frozen.model_card.edits import is_edited
from tests.helpers import tiny


ROOT = Path(__file__).parents[1]
METRICS = {
    "sighted": {"cider": 0.612345, "accuracy": [0.5, 0.6]},
    "blind": {"cider": 0.12, "accuracy": 0.4},
    "random_connector": {"cider": 0.05},
    "dataset": {"id": "me/squares", "name": "Squares", "split": "test"},
    "images": 200,
}
TRAINING = {"learning_rate": 0.001, "num_epochs": 3}
LICENCES = {"tower": "license: mit", "words": "license: apache-2.0"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved model and its processor in a folder `eyes`, whose parents say their licences."""
    folder = tmp_path_factory.mktemp("home-of-someone")
    torch.manual_seed(0)
    model, processor = tiny.join(folder)
    for parent, licence in LICENCES.items():
        (folder / parent / "README.md").write_text(f"---\n{licence}\n---\n# {parent}\n")
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    return folder / "eyes", model


@pytest.fixture
def saved(made: tuple[Path, Any]) -> tuple[Path, Any]:
    """The same with no card yet."""
    (made[0] / "README.md").unlink(missing_ok=True)
    return made


def full_card(saved: tuple[Path, Any], **options: Any) -> str:
    facts = {"repo_id": "me/eyes", "training": TRAINING, "metrics": METRICS, "dataset": "me/squares", **options}
    return write_model_card(*saved, **facts).read_text(encoding="utf-8")


def with_records(model: Any, **records: dict[str, Any] | None) -> Any:
    """A copy that says it has other parents."""
    other = FrozenPrefixModel.__new__(type(model))
    other.__dict__.update(model.__dict__)
    other.config = type(model.config).from_dict(model.config.to_dict())
    for name, record in records.items():
        setattr(other.config, name, record)
    return other


# --- The whole card --------------------------------------------------------------------------------------------------


def test_whole_card(saved: tuple[Path, Any]) -> None:
    golden = (ROOT / "tests" / "data" / "model_card.golden.md").read_text(encoding="utf-8")
    # What changes from release to release stands in it as a regular expression between ⟨ and ⟩.
    parts = re.split("⟨(.*?)⟩", golden)
    pattern = "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))
    card = full_card(saved)
    assert re.fullmatch(pattern, card), card


def test_metadata_as_the_hub_reads_it(saved: tuple[Path, Any]) -> None:
    card = ModelCard(full_card(saved))
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["tags"] == ["frozen-prefix", "visual-prefix"]
    assert data["datasets"] == ["me/squares"] and data["metrics"] == ["cider", "accuracy"]
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "cider": 0.612345,
        "cider, blind (image replaced)": 0.12,
        "cider, random connector": 0.05,
        "accuracy": "0.55 ± 0.071",
        "accuracy, blind (image replaced)": 0.4,
    }
    assert [results["cider"].metric_type, results["cider, random connector"].metric_type] == ["cider", "cider"]
    assert results["cider"].dataset_type == "me/squares" and results["cider"].dataset_split == "test"
    assert ModelCard(str(card)).data.to_dict() == data  # a round trip loses nothing


def test_parents_on_the_hub_are_named_and_folders_are_not(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    commit = "0123456789abcdef0123456789abcdef01234567"
    record = {"name_or_path": "google/tower", "revision": commit, "dtype": "bfloat16", "fingerprint": None}
    one = with_records(model, vision_base_model=record)
    text = full_card((folder, one))
    data = ModelCard(text).data
    assert data.base_model == ["google/tower"] and data["base_model_relation"] == "adapter"
    assert f"[`0123456`](https://huggingface.co/google/tower/tree/{commit})" in text
    assert "words (local)" in text and 'text_base_model="folder or id"' in text
    assert 'vision_base_model="folder or id"' not in text
    assert data.license == "unknown" and "No licence is known of the vision tower" in text
    assert "base_model" not in ModelCard(full_card(saved)).data.to_dict()


def test_no_path_of_this_machine(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = saved
    training = {"learning_rate": 0.1, "config_file": str(tmp_path / "zero.json"), "other": "C:\\Users\\me\\x.json"}
    metrics = {**METRICS, "file": str(tmp_path)}
    text = full_card(saved, repo_id=None, training=training, dataset=str(tmp_path), metrics=metrics)
    for private in (str(tmp_path), str(folder.parent), folder.parent.name, str(Path.home()) + os.sep, "Users"):
        assert private not in text
    assert "config_file: zero.json" in text and "other: x.json" in text


@pytest.mark.parametrize(
    ("tower", "words", "expected"),
    [
        ("license: mit", "license: mit", {"license": "mit"}),
        ("license: apache-2.0", "license: mit", {"license": "apache-2.0"}),
        ("license: mit", "license: cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("license: gemma", "license: llama3.2", {"license": "other", "license_name": "both-parents"}),
        ("license: mit", "title: none", {"license": "unknown"}),
        ("license: [mit", "license: mit", {"license": "unknown"}),
        ("license: [mit, gpl-3.0]", "license: mit", {"license": "other", "license_name": "both-parents"}),
        (
            "license: other\nlicense_name: eyes-only\nlicense_link: https://example.com/eyes",
            "license: mit",
            {"license": "other", "license_name": "eyes-only", "license_link": "https://example.com/eyes"},
        ),
    ],
)
def test_licence_of_two_parents(saved: tuple[Path, Any], tower: str, words: str, expected: dict[str, str]) -> None:
    parents = saved[0].parent
    try:
        for parent, licence in {"tower": tower, "words": words}.items():
            (parents / parent / "README.md").write_text(f"---\n{licence}\n---\n")
        data = ModelCard(full_card(saved)).data.to_dict()
    finally:
        for parent, licence in LICENCES.items():
            (parents / parent / "README.md").write_text(f"---\n{licence}\n---\n# {parent}\n")
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_numbers_are_those_of_the_model(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    text = full_card(saved)
    trainable = sum(p.numel() for p in model.model.connector.parameters())
    size = (folder / "model.safetensors").stat().st_size
    assert f"| trained parameters | {trainable:,} |" in text and f"| checkpoint | {size:,} bytes (" in text
    fresh = folder.parent / "not-saved"
    fresh.mkdir(exist_ok=True)
    assert f"| checkpoint | about {4 * trainable:,} bytes (" in full_card((fresh, model))


def test_scores_in_other_forms(saved: tuple[Path, Any]) -> None:
    text = full_card(saved, metrics={"accuracy": torch.tensor(0.5), "note": "three shots", "broken": float("nan")})
    assert "| accuracy | 0.5 | – | – |" in text and "broken" not in text
    assert "The blind baseline was not measured" in text
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.5]
    metrics = {
        "sighted": {"f1": {"mean": 0.5, "std": 0.01}},
        "text_only": {"f1": 0.25},
        "blind": {"f1": 0.3},
        "config": {"beams": 3},
    }
    text = full_card(saved, metrics=metrics)
    assert "| metric | this model | blind (image replaced) | random connector | text only |" in text
    assert "| f1 | 0.5 ± 0.01 | 0.3 | – | 0.25 |" in text and "beams" not in text
    runs = [{"seed": seed, "sighted": {"f1": 0.4 + seed / 10}, "blind": {"f1": 0.1}} for seed in range(2)]
    text = full_card(saved, metrics={"arguments": {"file": "/home/me/x"}, "seeds": runs})
    assert "- seeds: 0, 1\n" in text and "| f1 | 0.45 ± 0.071 | 0.1 ± 0 | – |" in text and "/home" not in text
    text = full_card(saved, metrics={})
    assert ModelCard(text).data.eval_results is None and "No scores were recorded." in text


@pytest.mark.parametrize(
    ("options", "paper"),
    [
        ({"connector_type": "linear"}, "2209.15162"),
        ({"connector_type": "mlp"}, "2310.03744"),
        ({"connector_type": "transformer", "prefix_length": 2}, "2111.09734"),
        ({"connector_type": "resampler", "prefix_length": 1}, "2204.14198"),
        ({"connector_type": "qformer", "prefix_length": 2}, "2301.12597"),
    ],
)
def test_connector_and_its_paper(made: tuple[Path, Any], tmp_path: Path, options: dict[str, Any], paper: str) -> None:
    small = {"hidden_size": 16, "num_heads": 2, "num_layers": 1} if "prefix_length" in options else {}
    folder = made[0].parent
    model, _ = tiny.join(folder, connector_config=small, **options)
    text = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    assert f"(https://arxiv.org/abs/{paper})" in text and f"| type | `{options['connector_type']}` |" in text
    assert all(f"`{key}={value!r}`" in text for key, value in small.items())
    count = options.get("prefix_length", 4)
    assert f"| writes | {count} prefix vector{'s' * (count > 1)} of width 32 |" in text


def test_what_trained_is_stated(made: tuple[Path, Any], tmp_path: Path) -> None:
    model, _ = tiny.join(made[0].parent, trainable=("connector", "vision"))
    record = {"name_or_path": "google/tower", "revision": None, "dtype": "float32", "fingerprint": None}
    model.config.vision_base_model = record
    model.save_pretrained(tmp_path)
    text = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    assert ModelCard(text).data["base_model_relation"] == "finetune"
    assert "bit for bit" not in text and "Trained parts: connector, vision tower" in text
    assert ". Loading fetches the language model from a repository of its own." in text


def test_gated_blocks_and_idle_connectors(made: tuple[Path, Any], tmp_path: Path) -> None:
    options = {"num_heads": 2, "head_dim": 8}
    model, _ = tiny.join(made[0].parent, fusion="cross_attention", cross_attention_config=options)
    text = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    assert "4 vectors that the language model reads through gated blocks" in text
    assert "| read through | gated cross-attention" in text and "`num_heads=2`, `head_dim=8`" in text
    model, _ = tiny.join(made[0].parent)
    alone = write_model_card(tmp_path, model).read_text(encoding="utf-8")
    model.load_connector(str(made[0]), "other")
    assert write_model_card(tmp_path, model).read_text(encoding="utf-8") == alone


def test_peft_and_headless_models(made: tuple[Path, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = tiny.join(made[0].parent)
    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["connector"], r=2)
    wrapped = peft.get_peft_model(model, lora)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    text = write_model_card(tmp_path, wrapped).read_text(encoding="utf-8")
    assert f"| trained parameters | {trainable:,} |" in text and "AutoModelForImageTextToText" in text
    headless = FrozenPrefixModel.from_pretrained(made[0])
    text = write_model_card(tmp_path, headless).read_text(encoding="utf-8")
    assert "from transformers import AutoModel, AutoProcessor" in text and ".generate(" not in text
    assert "pipeline_tag" not in ModelCard(text).data.to_dict()
    with pytest.raises(TypeError, match="not for a Linear"):
        write_model_card(tmp_path, torch.nn.Linear(1, 1))


def test_how_to_use_runs(
    saved: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", full_card(saved), re.DOTALL)
    assert len(blocks) == 2
    added = blocks[1].replace(", trust_remote_code=True", "")
    assert added == blocks[0].replace("import modeling_frozen  # makes the model type known to transformers\n\n", "")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(blocks[0].replace("me/eyes", str(saved[0])), {})  # the second runs in test_hub_callback.py
    assert capsys.readouterr().out.strip()


# --- Older cards -----------------------------------------------------------------------------------------------------


def test_same_facts_same_card(saved: tuple[Path, Any]) -> None:
    first = full_card(saved)
    assert not is_edited(first) and full_card(saved) == first


def test_training_and_scores_outlive_a_push_that_knows_nothing_of_them(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = saved
    first = full_card(saved)
    assert write_model_card(folder, model, repo_id="me/eyes").read_text(encoding="utf-8") == first
    # Not so for other weights: they were not measured.
    other, _ = tiny.join(folder.parent)
    torch.nn.init.ones_(other.model.connector.output.weight)
    other.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(first, encoding="utf-8")
    text = write_model_card(tmp_path, other, repo_id="me/eyes").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert "| cider |" not in text and data.eval_results is None and data.datasets is None
    assert "No scores were recorded." in text and "How it was trained was not recorded." in text


def test_text_that_a_person_edited_is_kept(saved: tuple[Path, Any]) -> None:
    path = saved[0] / "README.md"
    edited = full_card(saved).replace("## Limits\n", "## Limits\n\nIt has only ever seen squares.\n")
    path.write_text(edited, encoding="utf-8")
    assert is_edited(edited)
    assert full_card(saved, metrics={"sighted": {"cider": 9.0}}) == edited


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_persons_own_card_only_gets_missing_keys(saved: tuple[Path, Any], newline: str) -> None:
    folder, model = saved
    record = {"name_or_path": "google/tower", "revision": None, "dtype": "float32", "fingerprint": None}
    model = with_records(model, vision_base_model=record)
    own = "---\n# mine\nlicense: cc-by-4.0   # with care\npipeline_tag: visual-question-answering\n---\nMy *eyes*.\n"
    own = own.replace("\n", newline).encode()
    (folder / "README.md").write_bytes(own)
    full_card((folder, model))
    added = ["base_model:", "- google/tower", "base_model_relation: adapter", "library_name: transformers", ""]
    at = own.rindex(b"---")
    assert (folder / "README.md").read_bytes() == own[:at] + newline.join(added).encode() + own[at:]
    full_card((folder, model))
    assert (folder / "README.md").read_bytes().count(b"base_model:") == 1


def test_a_persons_card_without_metadata_and_one_that_cannot_be_read(saved: tuple[Path, Any]) -> None:
    path = saved[0] / "README.md"
    path.write_text("# Mine\n\nNo metadata.\n")
    card = ModelCard(full_card(saved))
    assert card.text == "# Mine\n\nNo metadata.\n"
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    for content in (b"---\nlicense: [mit\n---\n# Mine\n", b"---\n- a\n- list\n---\n# Mine\n", b"\xff\xfe\x80"):
        path.write_bytes(content)
        write_model_card(*saved)
        assert path.read_bytes() == content


def test_metadata_that_a_person_edited_is_kept(saved: tuple[Path, Any]) -> None:
    path = saved[0] / "README.md"
    card = ModelCard(full_card(saved))
    card.data.license = "cc-by-4.0"
    card.data.language = "en"
    card.data.tags = ["frozen-prefix", "squares"]
    card.data.datasets = None
    card.save(path)
    assert not is_edited(path.read_text(encoding="utf-8"))  # its text may be written anew
    for cider in (0.7, 0.8):
        text = full_card(saved, metrics={"sighted": {"cider": cider}})
        data = ModelCard(text).data
        assert data.license == "cc-by-4.0" and "under `cc-by-4.0`" in text
        assert data.language == "en" and data.tags == ["frozen-prefix", "squares"] and data.datasets is None
        assert data.eval_results[0].metric_value == cider and f"| cider | {cider} |" in text


def test_metadata_chosen_by_the_caller_stays(saved: tuple[Path, Any]) -> None:
    full_card(saved)
    text = full_card(saved, metadata={"license": "cc-by-nc-4.0", "tags": ["mine"], "language": ["de"]})
    data = ModelCard(text).data
    assert data.license == "cc-by-nc-4.0" and data.tags == ["frozen-prefix", "visual-prefix", "mine"]
    again = ModelCard(full_card(saved)).data
    assert again.to_dict() == data.to_dict() and again.language == ["de"]


def test_cards_that_trainer_writes_are_replaced(saved: tuple[Path, Any]) -> None:
    words = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    data = ModelCardData(tags=["mine"], library_name="transformers")
    automatic = ModelCard.from_template(data, model_description=words)
    automatic.save(saved[0] / "README.md")
    card = ModelCard(full_card(saved))
    assert "# eyes" in card.text and words not in card.text
    assert card.data.tags == ["frozen-prefix", "visual-prefix", "mine"] and card.data.license == "apache-2.0"
    # The same card, filled in by a person, is a person's.
    filled = str(automatic).replace("[More Information Needed]", "I made it.", 1)
    (saved[0] / "README.md").write_text(filled, encoding="utf-8")
    kept = ModelCard(full_card(saved))
    assert "I made it." in kept.text and kept.data.pipeline_tag == "image-text-to-text"


def trained(folder: Path, output: Path, **options: Any) -> Trainer:
    model, processor = tiny.join(folder)
    options = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, **options}
    args = TrainingArguments(
        str(output), learning_rate=0.01, per_device_train_batch_size=2, remove_unused_columns=False,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, prediction_loss_only=True, **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=args, train_dataset=tiny.rows(8), eval_dataset=tiny.rows(4),
        data_collator=DataCollatorForFrozenPrefix(processor), processing_class=processor,
    )  # fmt: skip


def test_trainers_card_is_replaced_and_its_tables_are_kept(made: tuple[Path, Any], tmp_path: Path) -> None:
    trainer = trained(made[0].parent, tmp_path / "eyes")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="cc-by-4.0", language="en")
    path = tmp_path / "eyes" / "README.md"
    theirs = path.read_text(encoding="utf-8")
    assert "pipeline_tag" not in theirs and not is_edited(theirs)
    text = write_model_card(path.parent, trainer.model, repo_id="me/eyes").read_text(encoding="utf-8")
    assert "the Trainer had access to" not in text and "- learning_rate: 0.01" in text
    assert re.search(r"### Training results\n\n\| Training Loss \|.*\n.*\n\| [\d.]+ +\| [\d.]+ +\| 2 ", text)
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-text-to-text" and data.license == "cc-by-4.0" and data.language == ["en"]
    assert data.tags == ["frozen-prefix", "visual-prefix", "generated_from_trainer"]
    # Trainer's card asks to be filled in: then it is a person's.
    blank = "## Model description\n\nMore information needed"
    path.write_text(theirs.replace(blank, "## Model description\n\nIt names squares."), encoding="utf-8")
    write_model_card(path.parent, trainer.model)
    assert "It names squares." in path.read_text(encoding="utf-8") and is_edited(path.read_text(encoding="utf-8"))


def test_the_callback_makes_trainers_card_ours(made: tuple[Path, Any], tmp_path: Path) -> None:
    trainer = trained(made[0].parent, tmp_path / "eyes")
    callback = FrozenPrefixHubCallback(trainer, dataset={"id": "me/squares", "split": "train"})
    trainer.add_callback(callback)
    trainer.train()
    assert not (tmp_path / "eyes" / "README.md").exists()  # this trainer does not push
    trainer.save_model()
    callback.metrics = METRICS
    trainer.create_model_card(license="mit", tags="mine", model_name="eyes")
    text = (tmp_path / "eyes" / "README.md").read_text(encoding="utf-8")
    assert "- data: [me/squares](https://huggingface.co/datasets/me/squares), split `train`, 8 rows" in text
    assert "- learning_rate: 0.01" in text and "- training_steps: 4" in text and "- weight_decay: 0.0" in text
    table = text.partition("### Training results\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[0] == "| step | epoch | training loss | validation loss |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 1", "| 2", "| 3", "| 4"]
    assert table[2].endswith("| – |") and re.search(r"\| [\d.]+ \| [\d.]+ \|$", table[3])
    assert "| cider | 0.6123 | 0.12 | 0.05 |" in text and ModelCard(text).data.license == "mit"
    assert "mine" in ModelCard(text).data.tags and str(tmp_path) not in text
    with pytest.raises(TypeError, match="frozen-prefix model"):
        FrozenPrefixHubCallback(Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True)))


def test_each_push_begins_with_a_whole_folder(made: tuple[Path, Any], tmp_path: Path) -> None:
    trainer = trained(made[0].parent, tmp_path / "eyes")
    trainer.add_callback(FrozenPrefixHubCallback(trainer))
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    written = {file.name for file in (tmp_path / "eyes").iterdir()}
    assert {"README.md", "configuration_frozen_prefix.py", "modeling_frozen_prefix.py"} <= written
    assert (tmp_path / "eyes" / ".gitignore").read_text() == "training_args.bin\n"
    own = tmp_path / "eyes" / ".gitignore"
    own.write_text("*.log\n")
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert own.read_text() == "*.log\ntraining_args.bin\n"  # which may hold a token


def test_long_histories_are_thinned(saved: tuple[Path, Any], made: tuple[Path, Any], tmp_path: Path) -> None:
    trainer = trained(made[0].parent, tmp_path)
    trainer.state.log_history = [{"loss": 1 / step, "epoch": step / 100, "step": step} for step in range(1, 1001)]
    text = full_card(saved, training=trainer)
    steps = [int(step) for step in re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.e-]+ \|$", text, re.MULTILINE)]
    assert len(steps) == 20 and (steps[0], steps[-1]) == (1, 1000)


# --- The package -----------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_template_and_one_processor(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="the wheel is built by setuptools, which not every environment has")
    if not any(map(importlib.util.find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        pytest.skip("setuptools before 70.1 builds wheels by the package wheel, which is not here")
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("# Only for the description\n")
    for name in ("setup.py", "pyproject.toml", "model_card.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("modeling_frozen", "processors"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / done.stdout.splitlines()[-1]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert len(names) == len(set(names)) and all(name.startswith("modeling_frozen/") for name in names)
        top = {ROOT / "model_card.md", *(ROOT / "processors").glob("*.py")}
        for path in top:
            assert wheel.read(f"modeling_frozen/{path.relative_to(ROOT).as_posix()}") == path.read_bytes()
