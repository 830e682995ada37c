"""Rows of your own, in any form that `load_image_text` reads, for the examples that take `--dataset`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image
from transformers import TrainingArguments

from modeling_frozen.data.splits import load_splits


def read_splits(
    source: Sequence[str], names: Sequence[str], image_root: str | None = None, seed: int = 0
) -> dict[str, Dataset]:
    """
    Splits of a source, by `load_image_text`; where it has none, a tenth of its images each (`split_by_image`).

    Args:
        source: Hub id, folder, file, or files that belong together.
        names: of the splits, "train" among them.
        image_root: folder of relative image paths; default: the file's own.

    Returns:
        For each split its rows with one image: `image`, `questions` (an empty one for a caption), and `answers`, of each
        question a list. Others, and those that can't be read, are left out, which is logged.
    """
    splits = load_splits(source, names, image_root=image_root, on_error="skip", seed=seed)
    return {name: _asked(rows) for name, rows in splits.items()}


def _asked(rows: Any) -> Dataset:
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


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """Defaults of the examples that take all of Trainer's arguments."""

    learning_rate: float = 3e-3
    num_train_epochs: float = 4
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.02
    logging_steps: float = 20
    logging_first_step: bool = True
    save_strategy: str = "no"
    report_to: str = "none"
    remove_unused_columns: bool = False  # the collator reads the columns


def first_sentence(text: str) -> str:
    """What is said up to the first full stop, as sentences of the little world end."""
    return text.split(".")[0].strip() + " ."
