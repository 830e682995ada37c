"""JSON of COCO and VQA, folders, parquet and streams as columns; splits that no picture is on two sides of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.data.formats import load_coco_captions, load_vqa, split_by_image
from tests.helpers.tiny import COLOURS, join


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for index, colour in enumerate(COLOURS.values()):
        PILImage.new("RGB", (20, 18), colour).save(images / f"{index:04}.png")
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_captions_of_coco(folder: Path) -> None:
    results = {
        "images": [{"id": 7, "file_name": "0000.png"}, {"id": 3, "file_name": "0001.png"}, {"id": 5, "file_name": "0002.png"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "a green square ."},
            {"image_id": 7, "id": 2, "caption": "a red square ."},
            {"image_id": 3, "id": 3, "caption": "that is green ."},
        ],
    }
    rows = load_coco_captions(write(folder / "captions.json", results), folder / "images")
    assert rows["captions"] == [["a red square ."], ["a green square .", "that is green ."]]
    assert [one.convert("RGB").getpixel((0, 0)) for one in rows["image"]] == [COLOURS["red"], COLOURS["green"]]
    with pytest.raises(ValueError, match=r"does not list.*99"):
        load_coco_captions(
            write(folder / "b.json", {**results, "annotations": [{"image_id": 99, "caption": "x"}]}), folder / "images"
        )
    with pytest.raises(ValueError, match="not there"):
        load_coco_captions(folder / "captions.json", folder)
    with pytest.raises(ValueError, match="lacks"):
        load_coco_captions(write(folder / "c.json", {"questions": []}), folder / "images")


def test_questions_of_vqa(folder: Path) -> None:
    asked = {"questions": [{"question_id": 10 + i, "image_id": i, "question": "what colour ?"} for i in (2, 0)]}
    people = [{"answer": "red"}] * 9 + [{"answer": "dark red"}]
    answers = {
        "annotations": [
            {"question_id": 10, "answers": people, "multiple_choice_answer": "red"},
            {"question_id": 12, "answers": [{"answer": "blue"}] * 10, "multiple_choice_answer": "blue"},
        ]
    }
    files = write(folder / "q.json", asked), write(folder / "a.json", answers)
    rows = load_vqa(*files, folder / "images", file_name="{image_id:04d}.png")
    assert rows["answer"] == ["blue", "red"] and rows["answers"][1] == ["red"] * 9 + ["dark red"]
    assert rows["prompt"] == ["what colour ?"] * 2 and rows["question_id"] == [12, 10]
    assert rows[0]["image"].convert("RGB").getpixel((0, 0)) == COLOURS["blue"]
    without = load_vqa(files[0], None, folder / "images", file_name="{image_id:04d}.png")
    assert "answers" not in without.column_names
    with pytest.raises(ValueError, match="no answers"):
        load_vqa(files[0], write(folder / "n.json", {"annotations": []}), folder / "images", file_name="{image_id:04d}.png")


def test_everything_that_datasets_reads_is_collated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, processor = join(tmp_path_factory.mktemp("parents"))
    collator = DataCollatorForFrozenPrefix(processor)
    lines = [{"file_name": f"{i:04}.png", "text": f"a {name} square ."} for i, name in enumerate(COLOURS)]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")
    expected = collator(list(rows))
    assert expected["pixel_values"].shape[0] == len(COLOURS)
    rows.to_parquet(folder / "rows.parquet")
    parquet = load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train")
    stream = load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train", streaming=True)
    csv = "file_name,text\n" + "".join(f"{line['file_name']},{line['text']}\n" for line in lines)
    (folder / "images" / "metadata.jsonl").unlink()
    (folder / "images" / "metadata.csv").write_text(csv)
    from_csv = load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")
    for other in (parquet, stream, from_csv):
        result = collator(list(other))
        assert all(torch.equal(result[name], expected[name]) for name in expected)


def captioned(folder: Path, pictures: int = 20, captions: int = 5) -> Dataset:
    paths = []
    for index in range(pictures):
        paths.append(str(folder / f"{index}.png"))
        PILImage.new("RGB", (4, 4), (index, 0, 0)).save(paths[-1])
    rows = {
        "image": [path for path in paths for _ in range(captions)],
        "image_id": [path for path in paths for _ in range(captions)],
        "text": [f"{i} {j}" for i in range(pictures) for j in range(captions)],
    }
    return Dataset.from_dict(rows).cast_column("image", Image()).shuffle(seed=3)


@pytest.mark.parametrize("key_column", [None, "image_id"])
def test_no_picture_falls_on_two_sides(tmp_path: Path, key_column: str | None) -> None:
    data = captioned(tmp_path)
    parts = split_by_image(data, validation=0.2, test=0.1, key_column=key_column, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "validation": 20, "test": 10}
    sides = [{text.split()[0] for text in part["text"]} for part in parts.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    again = split_by_image(data, validation=0.2, test=0.1, key_column=key_column, seed=1)
    assert again["test"]["text"] == parts["test"]["text"]
    other = split_by_image(data, validation=0.2, test=0.1, key_column=key_column, seed=2)
    assert other["test"]["text"] != parts["test"]["text"]
    assert set(split_by_image(data, validation=0, test=0.5, key_column=key_column)) == {"train", "test"}


def test_copies_under_another_name_and_rows_that_share_a_picture_stay_together(tmp_path: Path) -> None:
    data = captioned(tmp_path, pictures=4, captions=1).sort("text")
    copies = Dataset.from_dict({"image": [str(tmp_path / "copy.png")], "image_id": ["copy"], "text": ["0 copy"]})
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    from datasets import concatenate_datasets

    both = concatenate_datasets([data, copies.cast_column("image", Image())])
    for seed in range(8):
        parts = split_by_image(both, validation=0, test=0.25, seed=seed)
        sides = [{text.split()[0] for text in part["text"]} for part in parts.values()]
        assert not sides[0] & sides[1]
    paths = [[str(tmp_path / f"{i}.png") for i in some] for some in ((0, 1), (1, 2), (3,), (2, 0))]
    lists = Dataset.from_dict({"image": paths, "text": ["a", "a", "b", "a"]}).cast_column("image", [Image()])
    parts = split_by_image(lists, validation=0, test=0.5)
    assert sorted(len(set(part["text"])) for part in parts.values()) == [1, 1]


def test_shares_that_can_not_be_had_are_named(tmp_path: Path) -> None:
    data = captioned(tmp_path, pictures=3, captions=2)
    with pytest.raises(ValueError, match="too few"):
        split_by_image(data, validation=0.1, test=0)
    with pytest.raises(ValueError, match="below 1"):
        split_by_image(data, validation=0.5, test=0.5)
