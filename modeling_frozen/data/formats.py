"""Data as users have it, as `datasets` columns that the collator reads: COCO- and VQA-style JSON, and honest splits.

Image folders with a `metadata.csv` or `.jsonl`, parquet files and streamed sets need no help: `load_dataset("imagefolder",
data_dir=…)`, `load_dataset("parquet", data_files=…)`, `streaming=True`.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import columns
from .image_reading import Hashing, Images


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def load_coco_captions(annotations: str | Path, image_folder: str | Path) -> "Dataset":
    """
    Captions in COCO's JSON (Lin et al. 2014, arXiv 1405.0312; `captions_*.json`).

    Args:
        annotations: the JSON file: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.
        image_folder: where the images lie.

    Returns:
        `Dataset` with a row per image that has captions: `image`, `captions` (a list), `image_id`.

    Raises:
        ValueError: annotations of unknown images, or image files that aren't there.
    """
    content = _read(annotations, ("images", "annotations"))
    files = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[Any, list[str]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    if unknown := [index for index in captions if index not in files]:
        raise ValueError(f"{annotations} has captions of images that it does not list: {unknown[:5]}.")
    ids = [index for index in files if index in captions]
    return _with_images(
        {"image": [files[i] for i in ids], "captions": [captions[i] for i in ids], "image_id": ids}, image_folder
    )


def load_vqa(
    questions: str | Path, annotations: str | Path | None, image_folder: str | Path, file_name: str = "{image_id}.jpg"
) -> "Dataset":
    """
    Questions and answers in the JSON of VQA v2 (Goyal et al. 2017, arXiv 1612.00837).

    Args:
        questions: JSON with `questions`: `question_id`, `image_id`, `question`.
        annotations: JSON with `annotations`: `question_id`, `answers` (`{"answer": …}` of ten people) and
            `multiple_choice_answer`; `None` for a split without answers.
        image_folder: where the images lie.
        file_name: how an image's file is called, for example `"COCO_val2014_{image_id:012d}.jpg"`.

    Returns:
        `Dataset` with a row per question: `image`, `prompt`, `answers` (a list of strings), `answer` (the one that most
        gave), `question_id`, `image_id`.

    Raises:
        ValueError: questions without answers, or image files that aren't there.
    """
    asked = _read(questions, ("questions",))["questions"]
    content: dict[str, list[Any]] = {
        "image": [file_name.format(image_id=one["image_id"]) for one in asked],
        "prompt": [one["question"] for one in asked],
    }
    if annotations is not None:
        answered = {one["question_id"]: one for one in _read(annotations, ("annotations",))["annotations"]}
        if missing := [one["question_id"] for one in asked if one["question_id"] not in answered]:
            raise ValueError(f"{annotations} has no answers to {len(missing)} questions, the first {missing[:5]}.")
        entries = [answered[one["question_id"]] for one in asked]
        content["answers"] = [[answer["answer"] for answer in entry["answers"]] for entry in entries]
        content["answer"] = [entry["multiple_choice_answer"] for entry in entries]
    for name in ("question_id", "image_id"):
        content[name] = [one[name] for one in asked]
    return _with_images(content, image_folder)


def split_by_image(
    dataset: "Dataset",
    *,
    validation: float = 0.1,
    test: float = 0.1,
    image_column: str | None = None,
    key_column: str | None = None,
    seed: int = 0,
) -> "DatasetDict":
    """
    Train, validation and test splits in which no image's rows fall on two sides: five captions of one photo in five rows stay
    together, and so do copies of a photo under several names.

    Args:
        dataset: rows with an image (or a list of images, which tie their row to every other with one of them).
        validation, test (`float`): shares of the images; 0 for no such split.
        image_column (`str`, *optional*): images are told apart by their content. Defaults to `image`, else `images`.
        key_column (`str`, *optional*): a column that names the image (`image_id`), quicker than reading the images.
        seed (`int`): of the shuffle. Rows keep their order within a split.

    Returns:
        `DatasetDict` with "train" and, where their share is not 0, "validation" and "test".

    Raises:
        ValueError: shares that leave nothing to train on, or too few images for them; no image column.
    """
    from datasets import DatasetDict

    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"validation={validation} and test={test} must be at least 0, and together below 1.")
    groups = _groups(dataset, image_column, key_column)
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    sizes = {"validation": round(validation * len(names)), "test": round(test * len(names))}
    asked = {"validation": validation, "test": test}
    if empty := [name for name, size in sizes.items() if asked[name] and not size]:
        raise ValueError(f"{len(names)} different images are too few for a share of {asked[empty[0]]} ({empty[0]}).")
    side = dict.fromkeys(names, "train")
    side.update(dict.fromkeys(names[: sizes["validation"]], "validation"))
    side.update(dict.fromkeys(names[sizes["validation"] : sizes["validation"] + sizes["test"]], "test"))
    rows: dict[str, list[int]] = {"train": [], **{name: [] for name, size in sizes.items() if size}}
    for index, group in enumerate(groups):
        rows[side[group]].append(index)
    return DatasetDict({name: dataset.select(indices) for name, indices in rows.items()})


def _groups(dataset: "Dataset", image_column: str | None, key_column: str | None) -> list[int]:
    """For each row the number of its group: rows that share an image, directly or over others."""
    keys: list[Any]
    if key_column is not None:
        keys = list(dataset[key_column])
    else:
        hashing = Hashing(Images(dataset, columns.image_column(dataset.column_names, image_column)))
        keys = [one for chunk in range(len(hashing)) for one in hashing[chunk]]
    first: dict[Any, int] = {}
    group = list(range(len(keys)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for index, own in enumerate(keys):
        for key in own if isinstance(own, list) else [own]:
            if key is not None:
                group[root(index)] = root(first.setdefault(key, index))
    return [root(index) for index in range(len(keys))]


def _read(path: str | Path, needed: tuple[str, ...]) -> Mapping[str, Any]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{path} lacks {missing} (it has {sorted(content)[:8]}): is it another kind of file?")
    return content


def _with_images(content: dict[str, list[Any]], folder: str | Path) -> "Dataset":
    from datasets import Dataset, Image

    paths = [Path(folder) / name for name in content["image"]]
    if missing := sorted({str(path) for path in paths if not path.is_file()}):
        raise ValueError(f"{len(missing)} image files are not there, the first {missing[0]}: check `image_folder`.")
    return Dataset.from_dict({**content, "image": [str(path) for path in paths]}).cast_column("image", Image())


__all__ = ["load_coco_captions", "load_vqa", "split_by_image"]
