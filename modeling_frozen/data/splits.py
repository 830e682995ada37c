"""The splits of a source, by name; those that it does not have are held out of what it is trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .formats import SplitError, load_image_text, split_by_image


if TYPE_CHECKING:
    from datasets import Dataset


# What a split is called elsewhere: Karpathy's file has "val".
_ALSO = {"validation": ("validation", "val", "dev"), "test": ("test",), "train": ("train",)}


def load_splits(
    source: Any, names: Sequence[str], *, share: float | dict[str, float] = 0.1, seed: int = 0, **options: Any
) -> "dict[str, Dataset]":
    """
    Splits of a source, as [`load_image_text`] reads them.

    Args:
        source: as [`load_image_text`] takes it; a list of one is that one.
        names: of the splits: "train", and of "validation" and "test" those that are wanted.
        share: of the images, held out of "train" for each of the others that the source does not have.
        seed (`int`): of what is held out.
        options: of [`load_image_text`].

    Returns:
        `dict` of a `Dataset` for each name. No image stands in two that were made here.

    Raises:
        ValueError: as [`load_image_text`]; a source with splits, none of them "train"; too few images for a share.
    """
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    shares = dict.fromkeys(names, share) if isinstance(share, float | int) else share
    try:
        loaded = {"train": load_image_text(source, **options)}
    except SplitError as error:
        there = {name: next((one for one in _ALSO.get(name, (name,)) if one in error.splits), None) for name in names}
        if there.get("train", "") is None:
            raise
        loaded = {name: load_image_text(source, split=split, **options) for name, split in there.items() if split}
    held_out = {
        name: shares.get(name, 0.0) if name in names and name not in loaded else 0.0 for name in ("validation", "test")
    }
    if any(held_out.values()):
        validation, test = held_out.values()
        loaded |= split_by_image(loaded["train"], validation=validation, test=test, seed=seed)
    return {name: loaded[name] for name in names if name in loaded}


def load_questions(
    source: Any,
    names: Sequence[str],
    *,
    flat: bool = False,
    share: float | dict[str, float] = 0.1,
    seed: int = 0,
    **options: Any,
) -> "dict[str, Dataset]":
    """
    Splits of a source, one image a row with all that is asked and said of it: captions, questions and answers, and the turns
    of chats all look the same.

    Args:
        source, names, share, seed, options: of [`load_splits`]; rows that can't be read are left out, which is logged
            (`on_error="raise"` stops at them).
        flat (`bool`): a row for each question, and for each answer to it, in place of one for each image.

    Returns:
        `dict` of a `Dataset` for each name, with the columns `image`, `questions` (a list; an empty string for a caption) and
        `answers` (for each question a list); with `flat`, `image`, `question` and `answer`. Rows of no image or of several are
        left out.

    Example:

    ```python
    >>> photos = load_questions("captions.jsonl", ["train", "test"])["test"]
    >>> captions = [sum(answers, []) for answers in photos["answers"]]
    ```"""
    splits = load_splits(source, names, share=share, seed=seed, **{"on_error": "skip", **options})
    asked = {name: _asked(rows) for name, rows in splits.items()}
    return {name: _one_a_row(rows) for name, rows in asked.items()} if flat else asked


def _asked(rows: Any) -> "Dataset":
    from datasets import Dataset, Image

    column = "image" if "image" in rows.column_names else "images"
    images, questions, answers = [], [], []
    for row in rows:
        shown = row[column] if isinstance(row[column], list) else [row[column]]
        if len(shown) == 1 and shown[0] is not None:
            asked = _pairs(row)
            images.append(shown[0])
            questions.append([question.replace("<image>", "").strip() for question, _ in asked])
            answers.append([said for _, said in asked])
    table = Dataset.from_dict({"image": images, "questions": questions, "answers": answers})
    return table.cast_column("image", Image())


def _one_a_row(rows: "Dataset") -> "Dataset":
    flat = [
        (number, question, answer)
        for number, (questions, answers) in enumerate(zip(rows["questions"], rows["answers"], strict=True))
        for question, some in zip(questions, answers, strict=True)
        for answer in some
    ]
    images = rows.select([number for number, _, _ in flat]).select_columns(["image"])
    return images.add_column("question", [one for _, one, _ in flat]).add_column("answer", [one for _, _, one in flat])


def _pairs(row: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of a row each question and its answers."""
    if "messages" not in row:
        said = row["text"] if "text" in row else row["completion"]
        return [(row.get("prompt", ""), [said] if isinstance(said, str) else said)]
    pairs, question = [], ""
    for turn in row["messages"]:
        text = "".join(item["text"] or "" for item in turn["content"]).strip()
        if turn["role"] == "assistant":
            pairs.append((question, [text]))
        else:
            question = text if turn["role"] == "user" else question
    return pairs


__all__ = ["load_questions", "load_splits"]
