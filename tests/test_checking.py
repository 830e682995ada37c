"""`frozen-prefix check`: what it finds, what it prints, its exit code, and that it opens no image unasked."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image

from modeling_frozen.cli import run_command
from modeling_frozen.data.checking import check_image_text
from tests.helpers.formats import lay_out
from tests.helpers.tiny import join


def main(arguments: list[str]) -> int:
    return run_command("check", arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "data")


def rows_of(folder: Path, rows: list[Any]) -> str:
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


def chat(answer: str = "red .", question: str = "<image> what colour ?", **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def test_a_sound_source(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder / "llava.json")]) == 0
    said = capsys.readouterr().out
    assert "llava.json: llava\nrows: 3\n  with 0 images: 1\n  with 1 images: 1\n  with 2 images: 1\n" in said
    assert "user: <image>\nwhat colour ?\nassistant: «red .»\nuser: what is that ?\nassistant: «a square .»" in said
    assert (
        main(
            [
                str(folder / "vqav2_questions.json"),
                str(folder / "vqav2_annotations.json"),
                "--image_root",
                str(folder / "images"),
            ]
        )
        == 0
    )
    assert main([str(folder / "karpathy.json"), "--image_root", str(folder / "images"), "--split", "train", "--open"]) == 0
    assert main([str(folder / "webdataset-0.tar"), "--open"]) == 0


def test_every_fault_is_counted_and_the_first_ten_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [chat(image=["gone.png", "images/red.png"], question="<image><image>", id=i) for i in range(12)]
    rows += [
        chat(image="images/red.png", question="<image><image>", id="two"),
        chat(answer=" ", image="images/red.png", id="none"),
    ]
    rows += [chat(image=3, id="kind"), chat(image="images/red.png", question="what ?")]
    assert main([rows_of(folder, rows)]) == 1
    said = capsys.readouterr().out
    assert "files that are not there: 12\n" in said and said.count("gone.png") == 10
    assert (
        "rows that can't be read: 2\n" in said
        and "(id 'two'): field 'conversations' holds 2 <image> but 'image' has 1" in said
    )
    assert "rows with nothing to learn: 1\n" in said and "(id 'none')" in said
    assert "with an image and no <image>, which the processor then puts: 1" in said
    assert said.endswith("Training on it would fail.\n")


def test_no_image_is_opened_unasked(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("red", "blue"):
        (folder / "images" / f"{name}.png").write_text("no image at all")
    assert main([str(folder / "llava.json")]) == 0
    assert main([str(folder / "llava.json"), "--open"]) == 1
    said = capsys.readouterr()
    assert "images that can't be opened: 3\n" in said.out and "an image of " in said.out and "opening images" in said.err
    held = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 3, "text": ["a"] * 3}).cast_column(
        "image", Image()
    )
    assert not check_image_text(held).fails
    assert check_image_text(held, open_images=True).broken.count == 3


def test_lengths_against_a_models_positions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, processor = join(tmp_path / "parents")  # 64 positions, which its tokenizer does not say
    model.save_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    for name in ("red", "blue", "green", "black"):
        (folder / "images" / f"{name}.png").write_text("no image at all")
    assert main([str(folder / "llava.json"), "--model", str(tmp_path / "eyes")]) == 0
    said = capsys.readouterr().out
    placeholders = f"<image>×{model.config.num_image_tokens}"
    assert "positions: 64" in said and placeholders in said and "«red . </s>»" in said and "«a square . </s>»" in said
    source = rows_of(folder, [chat(image="images/red.png"), chat(answer="red . " * 40, image="images/red.png", id="long")])
    assert main([source, "--model", str(tmp_path / "eyes")]) == 1
    said = capsys.readouterr().out
    assert "rows longer than the model's positions: 1\n" in said and "(id 'long')" in said and "pass max_length=64" in said
    processor.tokenizer.model_max_length = 64
    processor.save_pretrained(tmp_path / "eyes")
    assert main([source, "--model", str(tmp_path / "eyes")]) == 0  # the collator cuts it


def test_the_exit_code(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder / "llava.json"), "--image_root", str(folder)]) == 0
    assert main([str(folder / "gone.json")]) == 1
    assert "gone.json is not there" in capsys.readouterr().err
    assert main([rows_of(folder, [{"conversations": chat()["conversations"][1:]}])]) == 1  # no image anywhere
