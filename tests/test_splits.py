"""The splits of a source: those that it has, by whatever name, and others held out of what is trained on."""

import json
from pathlib import Path

import pytest
from PIL import Image

from modeling_frozen.data.formats import SplitError
from modeling_frozen.data.splits import load_questions, load_splits
from tests.helpers.formats import lay_out
from tests.helpers.tiny import rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty photos, two captions each, and no split."""
    lines = []
    for index, row in enumerate(rows(20)):
        row["image"].resize((20 + index, 18)).save(tmp_path / f"{index}.png")
        lines += [json.dumps({"image": f"{index}.png", "text": text}) for text in (row["text"], "a square .")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def images(split: object) -> set[str]:
    return {row["images"][0]["path"] for row in split}  # type: ignore[attr-defined]


def test_what_is_not_there_is_held_out(source: Path) -> None:
    splits = load_splits([str(source)], ("train", "validation", "test"), share={"validation": 0.1, "test": 0.2})
    assert {name: len(split) for name, split in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    apart = [images(split) for split in splits.values()]
    assert sum(map(len, apart)) == len(set.union(*apart)) == 20
    again = load_splits(source, ("train", "validation", "test"), share={"validation": 0.1, "test": 0.2})
    assert images(again["test"]) == images(splits["test"])
    assert len(load_splits(source, ("train", "test"))["test"]) == 4
    assert list(load_splits(source, ("train", "validation"), share=0)) == ["train"]
    with pytest.raises(ValueError, match="too few for a share of 0.01"):
        load_splits(source, ("train", "validation"), share=0.01)


def test_what_is_there_is_taken_and_the_rest_held_out_of_train(tmp_path: Path) -> None:
    folder = lay_out(tmp_path)
    source, root = folder / "karpathy.json", {"image_root": folder / "images"}
    assert {name: len(split) for name, split in load_splits(source, ("train", "test"), **root).items()} == {
        "train": 2,
        "test": 1,
    }
    splits = load_splits(source, ("train", "validation"), share=0.5, **root)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "validation": 1}
    source.write_text(source.read_text().replace('"split": "train"', '"split": "val"').replace("restval", "val"))
    assert len(load_splits(source, ("validation",), **root)["validation"]) == 2  # by another name
    with pytest.raises(SplitError, match="has the splits"):
        load_splits(source, ("train", "validation"), **root)


def test_one_image_a_row_with_all_that_is_asked_of_it(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "data")
    told = json.loads((folder / "llava.json").read_text())
    chat = {**told[0], "image": "images/a.png"}
    lines = [{**chat, "id": number, "image": f"images/{number}.png"} for number in range(20)]
    for number, row in enumerate(rows(20)):
        row["image"].resize((20 + number, 18)).save(folder / "images" / f"{number}.png")
    (folder / "chats.json").write_text(json.dumps([*lines, {**chat, "image": "images/gone.png"}]))
    asked = load_questions(folder / "chats.json", ("train", "test"), share=0.2)
    assert {split: len(some) for split, some in asked.items()} == {"train": 16, "test": 4}  # none of the lost image
    row = asked["test"][0]
    assert list(row) == ["image", "questions", "answers"] and row["image"].size[1] == 18
    assert all("<image>" not in question for question in row["questions"])
    assert row["answers"] == [["red ."], ["a square ."]]
    flat = load_questions(folder / "chats.json", ("train", "test"), share=0.2, flat=True)["test"]
    assert len(flat) == 8 and flat[1]["answer"] == "a square ." and flat[1]["question"] == row["questions"][1]
    assert flat[0]["image"].tobytes() == flat[1]["image"].tobytes() == row["image"].tobytes()


def test_a_folder_of_captions_is_asked_nothing(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (20, 18), (20 * number, 90, 30)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,that is {number} ." for number in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    splits = load_questions([str(tmp_path)], ("train", "validation", "test"))
    assert [len(split) for split in splits.values()] == [10, 1, 1]
    said = [row for split in splits.values() for row in zip(split["image"], split["questions"], split["answers"], strict=True)]
    assert all(questions == [""] for _, questions, _ in said)
    assert all(image.getpixel((0, 0))[0] == 20 * int(text.split()[2]) for image, _, ((text,),) in said)
    assert sorted(text for _, _, ((text,),) in said) == sorted(line.partition(",")[2] for line in lines)
