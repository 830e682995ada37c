"""The splits of a source: those that it has, by whatever name, and others held out of what is trained on."""

import json
from pathlib import Path

import pytest

from modeling_frozen.data.formats import SplitError
from modeling_frozen.data.splits import load_splits
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
