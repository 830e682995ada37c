"""`frozen-prefix evaluate`: one checkpoint, several, and the card that is made of what it writes."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Image

from modeling_frozen.cli import main
from modeling_frozen.data.asking import Asking
from tests.helpers import fresh_python
from tests.helpers.processors import saved
from tests.helpers.tiny import captioned_rows, join


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a recipe, captions, and questions with answers."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, processor = join(folder)
    for seed in (0, 1):
        model._reset_connector(model.model.connector)
        model.save_pretrained(folder / f"seed-{seed}")
        processor.save_pretrained(folder / f"seed-{seed}")
    for name in ("captions", "questions"):
        (folder / name).mkdir()
        rows = [{**row, "image": {"bytes": saved(row["image"], "PNG"), "path": None}} for row in captioned_rows(6)]
        rows = [{"image": row["image"], "captions": row["captions"]} for row in rows]
        if name == "questions":
            rows = [{"image": row["image"], "question": "what colour ?", "answer": row["captions"][0]} for row in rows]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / name / "test.parquet")
    return folder


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_one_checkpoint_several_and_the_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--dataset", str(folder / "captions"), "--max_new_tokens", "4", "--device", "cpu"]
    common += ["--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(folder / "seed-0"), *common, "--write_card"]) == 0
    said, one = capsys.readouterr().out, results(tmp_path / "out")
    assert one["rows"] == 6 and one["task"] == "captioning" and set(one["sighted"]) >= {"cider", "bleu_4", "rouge_l"}
    assert "sighted - blind" in said and {"blind", "random_connector", "language_model"} <= set(one)
    card = (folder / "seed-0" / "README.md").read_text()
    assert f"{one['sighted']['rouge_l']:.4g}" in card and "blind" in card
    assert main(["evaluate", "--model", str(folder / "seed-0"), str(folder / "seed-1"), *common]) == 0
    both = results(tmp_path / "out")
    assert both["seeds"][0]["sighted"] == pytest.approx(one["sighted"])
    assert "mean ± standard deviation over 2 checkpoints" in capsys.readouterr().out


def test_questions_are_asked_as_they_were_trained(folder: Path, tmp_path: Path) -> None:
    few = ["--model", str(folder / "seed-0"), "--rows", "4", "--kinds", "sighted", "blind", "--max_new_tokens", "2"]
    few += ["--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(["evaluate", *few, "--dataset", str(folder / "questions")]) == 0
    one = results(tmp_path)
    assert one["task"] == "vqa" and one["rows"] == 4 and set(one["sighted"]) == {"exact_match", "token_f1"}
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "what colour ?"
    assert main(["evaluate", *few, "--dataset", str(folder / "captions"), "--question", "what is"]) == 0
    assert results(tmp_path)["settings"]["prompt"] == "what is"


def test_mistakes_are_sentences(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = ["--model", str(folder / "seed-0")]
    for arguments, said in (
        ([*model, "--dataset", "gone.json"], "gone.json is not there"),
        ([*model, "--dataset", str(folder / "captions"), "--kinds", "blind"], "lack 'sighted'"),
        (["--model", "me/eyes", "--dataset", "gone.json", "--write_card"], "name one that lies here"),
        (["--model", str(tmp_path / "gone"), "--dataset", str(folder / "captions")], "gone"),
    ):
        assert main(["evaluate", *arguments, "--output_dir", str(tmp_path)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("frozen-prefix evaluate: ") and said in error


def test_it_runs_as_a_process(folder: Path, tmp_path: Path) -> None:
    few = ["--rows", "3", "--kinds", "sighted", "--max_new_tokens", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    arguments = ["evaluate", "--model", str(folder / "seed-0"), "--dataset", str(folder / "captions"), *few]
    done = fresh_python.run("-m", "modeling_frozen.cli", *arguments, env=fresh_python.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("3 rows")


def test_chats_have_their_turns(folder: Path) -> None:
    _, processor = join(folder)
    assert Asking(processor, chat=True).prompt("what is") == "User: <image>what is\nAssistant:"
