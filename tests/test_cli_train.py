"""`frozen-prefix train`: from flags or a file to a saved model with its card; what it chooses, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from modeling_frozen import load_image_text
from modeling_frozen.cli import main
from tests.helpers import fresh_python
from tests.helpers.tiny import rows, save_parents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parents, and a file of 40 captioned photos of 20 kinds."""
    folder = tmp_path_factory.mktemp("train")
    save_parents(folder)
    (folder / "images").mkdir()
    lines = []
    for index, row in enumerate(rows(20)):
        row["image"].resize((20 + index, 18)).save(folder / "images" / f"{index}.png")
        lines += [json.dumps({"image": f"images/{index}.png", "text": text}) for text in (row["text"], "a square .")]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def parents(folder: Path) -> list[str]:
    return ["--vision", str(folder / "tower"), "--text", str(folder / "words"), "--dataset", str(folder / "rows.jsonl")]


FEW = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]


def test_from_flags_to_a_model_with_its_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "eyes"
    more = ["--connector", "resampler", "--prefix_length", "3", "--held_out", "0.2", "--learning_rate", "0.5"]
    assert main(["train", *parents(folder), "--output_dir", str(out), *FEW, *more]) == 0
    said = capsys.readouterr().out
    assert "learning_rate                0.5 (yours; else 0.003)" in said and "32 rows" in said
    assert "gradient_accumulation_steps  8 " in said
    assert f"frozen-prefix evaluate --model {out} --dataset {out / 'held_out'}\n" in said
    assert "Another image adds" in said
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.connector_type == "resampler" and model.config.prefix_length == 3
    assert AutoProcessor.from_pretrained(out).prefix_length == 3
    card = (out / "README.md").read_text()
    assert "rows.jsonl" in card and "frozen-prefix" in card
    held_out = load_image_text(out / "held_out")
    assert len(held_out) == 8 and all(row["images"][0]["bytes"] for row in held_out)
    assert (out / "training.png").is_file() and json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())


def test_a_file_of_settings_and_flags_that_win(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"vision": "tower", "text": "words", "dataset": "rows.jsonl", "connector_config": {"hidden_size": 24}}
    settings = {name: str(folder / one) if isinstance(one, str) else one for name, one in settings.items()}
    settings |= {"output_dir": str(tmp_path / "eyes"), "held_out": 0, "max_steps": 1, "use_cpu": True}
    (tmp_path / "eyes.yaml").write_text(yaml.safe_dump(settings) + "learning_rate: 1e-3\nper_device_train_batch_size: 4\n")
    assert main(["train", "--config", str(tmp_path / "eyes.yaml"), "--learning_rate", "2e-3", "--question", "what is"]) == 0
    said = capsys.readouterr().out
    assert "0.002 (yours" in said and "4 (yours; else 32)" in said and '--question "what is"' in said
    state = json.loads((tmp_path / "eyes" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["max_steps"] == 1 and state["train_batch_size"] == 4
    assert not (tmp_path / "eyes" / "held_out").exists()
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes").config
    assert config.connector_config["hidden_size"] == 24
    (tmp_path / "eyes.yaml").write_text("visoin: here\n")
    assert main(["train", "--config", str(tmp_path / "eyes.yaml")]) == 1
    assert "eyes.yaml: 'visoin' is unknown. Did you mean `vision`?" in capsys.readouterr().err


def test_it_goes_on_where_it_stopped_and_from_a_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connector(out: Path) -> torch.Tensor:
        return torch.cat([p.flatten() for p in AutoModelForImageTextToText.from_pretrained(out).model.connector.parameters()])

    few = [*parents(folder), "--per_device_train_batch_size", "4", "--use_cpu", "--max_steps", "4", "--held_out", "0.2"]
    few += ["--gradient_accumulation_steps", "1", "--save_steps", "2"]
    assert main(["train", *few, "--output_dir", str(tmp_path / "whole")]) == 0

    class Pulled(RuntimeError):
        """The plug."""

    inner, steps = Trainer.training_step, []

    def training_step(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 4:
            raise Pulled
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(Pulled):
        main(["train", *few, "--output_dir", str(tmp_path / "eyes")])
    assert main(["train", *few, "--output_dir", str(tmp_path / "eyes"), "--resume"]) == 0
    assert len(steps) == 4 + 2
    assert torch.equal(connector(tmp_path / "eyes"), connector(tmp_path / "whole"))
    capsys.readouterr()
    once = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "more"), *FEW, "--cache_features"]
    assert main(["train", "--model", str(tmp_path / "whole"), *once]) == 0
    assert "learning_rate                0.0002 " in capsys.readouterr().out
    assert not torch.equal(connector(tmp_path / "more"), connector(tmp_path / "whole"))


def test_a_second_stage_with_lora_beside_the_connector(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter alone is saved, on the first stage's checkpoint; it loads, resumes and is scored as any."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *parents(folder), "--output_dir", "align", *FEW]) == 0
    capsys.readouterr()
    second = ["train", "--model", "align", "--lora", "4", "--dataset", str(folder / "rows.jsonl"), "--held_out", "0.2"]
    second += ["--use_cpu", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "1"]
    assert main([*second, "--output_dir", "once", "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 4" in said and "Another image adds" in said
    assert main([*second, "--output_dir", "twice", "--max_steps", "2"]) == 0
    shutil.rmtree("twice/checkpoint-2")
    assert main([*second, "--output_dir", "twice", "--max_steps", "2", "--resume"]) == 0
    assert not Path("once/model.safetensors").exists()
    weights = load_file("once/adapter_model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file("twice/adapter_model.safetensors").items())
    assert any(".connector." in name for name in weights) and any("language_model" in name for name in weights)
    assert not any(".vision_tower." in name for name in weights)

    processor = AutoProcessor.from_pretrained("once")
    inputs = processor(images=rows(1)[0]["image"], text="<image>a", return_tensors="pt")
    with torch.no_grad():
        first, then = (AutoModelForImageTextToText.from_pretrained(name).eval()(**inputs).logits for name in ("align", "once"))
    assert not torch.equal(first, then)
    few = ["--kinds", "sighted", "--max_new_tokens", "2"]
    assert main(["evaluate", "--model", "once", "--dataset", "once/held_out", *few]) == 0
    assert main(["caption", str(folder / "images" / "0.png"), "--model", "once"]) == 0
    assert "align" in Path("once/README.md").read_text()


def test_streams_are_trained_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["train", *parents(folder), "--streaming", "--output_dir", str(tmp_path / "eyes"), *FEW]
    assert main(arguments) == 1  # 256 rows a step, and Trainer would look for the 65th batch for ever
    assert "The stream ended after 10 batches, before the 64 of one step" in capsys.readouterr().err
    assert main([*arguments, "--gradient_accumulation_steps", "2"]) == 0
    assert (tmp_path / "eyes" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--vision", "tower"], "--text ID is missing"),
        (["--vision", "t", "--text", "w", "--model", "eyes", "--dataset", "rows.jsonl"], "or --model CHECKPOINT to go on"),
        ([], "--vision ID --text ID, or --model CHECKPOINT"),
        (["--vision", "t", "--text", "w"], "--dataset FILE, FOLDER or ID"),
        (["--vision", "t", "--text", "w", "--dataset", "d", "--lora", "8"], "train one first without --lora"),
        (["--model", "m", "--dataset", "d", "--lora", "0"], "--lora 0 must be a rank"),
        (["--model", "m", "--dataset", "d", "--held_out", "1"], "--held_out 1.0 must be a share"),
        (["--model", "m", "--dataset", "d", "--streaming", "--cache_features"], "leave one out"),
        (["--model", "m", "--dataset", "d", "--learning_rat", "1"], "'learning_rat' is unknown. Did you mean `learning_rate`"),
        (["--model", "m", "--dataset", "gone.json"], "gone.json is not there"),
        (["--config", "gone.yaml"], "gone.yaml"),
    ],
)
def test_mistakes_are_sentences(change: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", *change]) == 1
    error = capsys.readouterr().err
    assert error.startswith("frozen-prefix train: ") and said in error


def test_more_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", *parents(folder), "--connector_config", "{", "--output_dir", str(tmp_path)]) == 1
    assert "--connector_config '{' is no JSON" in capsys.readouterr().err
    assert main(["train", *parents(folder), "--held_out", "0.001", "--output_dir", str(tmp_path)]) == 1
    assert "Pass --held_out 0, or a larger share." in capsys.readouterr().err
    assert main(["train", *parents(folder), "--connector", "nonsense", "--output_dir", str(tmp_path)]) == 1
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["train", *parents(folder), "--learning_rate", "fast"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "invalid float value: 'fast'" in error and len(error) < 400
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main(["train", "--config", str(tmp_path / "list.yaml")]) == 1
    assert "write `name: value` on each line" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [")
    assert main(["train", "--config", str(tmp_path / "broken.yaml")]) == 1
    assert "is no YAML" in capsys.readouterr().err


def test_as_a_process_it_ends_with_a_model(folder: Path, tmp_path: Path) -> None:
    arguments = ["train", *parents(folder), "--output_dir", str(tmp_path / "eyes"), *FEW, "--held_out", "0.2"]
    done = fresh_python.run("-m", "modeling_frozen.cli", *arguments, env=fresh_python.environment())
    assert done.returncode == 0, done.stderr
    assert f"Saved to {tmp_path / 'eyes'}." in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "eyes" / "model.safetensors").is_file()
    done = fresh_python.run("-m", "modeling_frozen.cli", "train", "--model", "gone", env=fresh_python.environment())
    assert done.returncode == 1 and done.stderr.startswith("frozen-prefix train: ") and not done.stdout
