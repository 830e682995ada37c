"""Teaches two frozen parents to tell classes by picture and text together: any tower, any language model, one small head.

    python examples/classify.py --output_dir classifier
    python examples/classify.py --vision ID_OR_FOLDER --text ID_OR_FOLDER --dataset DATASET        (your own data)

Without arguments everything is made here: two tiny parents that never met (`shapes.py`), pictures of scenes, a question to
each as its text ("what colour ?"), and the answer as its class. Neither the picture nor the question alone tells it:
`--fused_inputs image` and `--fused_inputs text` show how far each gets. DATASET has the splits train and test, and columns of
images, texts and labels (numbers, names, or `ClassLabel`); or it is whatever `load_image_text` reads: the answer to a question
is its class then.

Accuracy and macro F1 on the test rows stand beside those of the same model *blind* (pictures shuffled, so that none keeps its
own) and before training (*random connector*, and a random head). Into `--output_dir` go the checkpoint, its card and
`results.json`. All of `TrainingArguments` are arguments too.
"""

import contextlib
import json
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from own_data import ExampleTrainingArguments, read_splits
from transformers import HfArgumentParser, Trainer, set_seed

from modeling_frozen import (
    DataCollatorForFrozenPrefixClassification,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.evaluation.plots import plot_training
from modeling_frozen.metrics import classification_compute_metrics
from modeling_frozen.model_card import write_model_card
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import QUESTIONS, draw, split_scenes


@dataclass
class Arguments:
    vision: str | None = field(default=None, metadata={"help": "A real vision tower: Hub id or folder."})
    text: str | None = field(default=None, metadata={"help": "A real language model: Hub id or folder."})
    dataset: list[str] | None = field(
        default=None, metadata={"help": "Rows with labels, or any form of load_image_text, or several files of one set."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of relative image paths, if not the dataset's own."}
    )
    image_column: str = "image"
    text_column: str = "text"
    label_column: str = "label"
    fused_inputs: list[str] = field(default_factory=lambda: ["image", "text"], metadata={"help": "What the head reads."})
    connector_type: str = "resampler"
    connector_config: str = field(
        default='{"num_layers": 1, "num_heads": 4, "hidden_size": 96, "position_embedding": true}',
        metadata={"help": "Options of the connector, as JSON."},
    )
    prefix_length: int = 8
    balanced: bool = field(default=False, metadata={"help": "Weigh classes by how rare they are."})
    train_rows: int = field(default=4000, metadata={"help": "How many pictures are drawn to train."})
    test_rows: int = field(default=400, metadata={"help": "How many pictures of held-out scenes are drawn to test."})
    tower_steps: int = field(default=400, metadata={"help": "Steps of training for the tiny tower."})
    language_model_steps: int = field(default=60, metadata={"help": "Steps of training for the tiny language model."})


@dataclass
class ClassificationTrainingArguments(ExampleTrainingArguments):
    output_dir: str = "classifier"
    learning_rate: float = 2e-3
    num_train_epochs: float = 3
    per_device_eval_batch_size: int = 64
    warmup_steps: float = 0.05
    logging_steps: float = 25


def draw_rows(count: int, held_out: bool, seed: int) -> Dataset:
    """Pictures, each with a question and, as its class, the answer."""
    scenes, rng = split_scenes()[held_out], random.Random(seed)
    names = sorted({scene.answer(question).rstrip(" .") for scene in scenes for question in QUESTIONS})
    rows: dict[str, list[Any]] = {"image": [], "text": [], "label": []}
    for _ in range(count):
        scene, question = rng.choice(scenes), rng.choice(list(QUESTIONS))
        for column, value in zip(rows, (draw(scene, rng), question, scene.answer(question).rstrip(" .")), strict=True):
            rows[column].append(value)
    return Dataset.from_dict(rows, Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=names)}))


def own_rows(args: Arguments, seed: int) -> dict[str, Dataset]:
    """The splits of a dataset that has labels; of any other, questions as texts and answers as labels."""
    if len(args.dataset) == 1 and not Path(args.dataset[0]).is_file():
        with contextlib.suppress(DatasetsError, FileNotFoundError, ValueError):  # what `datasets` alone can't read
            rows = load_dataset(args.dataset[0])
            if args.label_column in rows["train"].column_names:
                return rows
    splits = read_splits(args.dataset, ("train", "test"), args.image_root, seed)
    return {name: rows.map(partial(_asked, args), batched=True, batch_size=64, remove_columns=rows.column_names)
            for name, rows in splits.items()}  # fmt: skip


def _asked(args: Arguments, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    asked = [
        (image, question, answers[0])
        for image, questions, said in zip(rows["image"], rows["questions"], rows["answers"], strict=True)
        for question, answers in zip(questions, said, strict=True)
    ]
    columns = (args.image_column, args.text_column, args.label_column)
    return dict(zip(columns, map(list, zip(*asked, strict=True)), strict=True)) if asked else {name: [] for name in columns}


def read_rows(args: Arguments, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """Rows to train and to test, and the names of the classes."""
    if args.dataset is None:
        rows = {"train": draw_rows(args.train_rows, False, seed), "test": draw_rows(args.test_rows, True, seed + 1)}
    else:
        rows = own_rows(args, seed)
    kind = rows["train"].features[args.label_column]
    if isinstance(kind, ClassLabel):
        return rows["train"], rows["test"], list(kind.names)
    values = sorted(set(rows["train"][args.label_column]))
    place = {value: index for index, value in enumerate(values)}
    if unknown := set(rows["test"][args.label_column]) - set(values):
        raise ValueError(f"{min(unknown, key=str)!r} is a class of the test rows, but of no row to train on.")
    labelled = (rows[split].map(lambda row: {args.label_column: place[row[args.label_column]]}) for split in ("train", "test"))
    return *labelled, [str(value) for value in values]


def blind(rows: Dataset, image_column: str, seed: int) -> list[dict[str, Any]]:
    """The same rows, each with the picture of another: one cycle through all."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [{**rows[index], image_column: rows[other[index]][image_column]} for index in range(len(rows))]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser((Arguments, ClassificationTrainingArguments))
    args, training = parser.parse_args_into_dataclasses(arguments)
    out = Path(training.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(training.seed)
    tower, words = args.vision or str(out / "tower"), args.text or str(out / "language_model")
    if args.vision is None:
        train_tower(Path(tower), args.tower_steps, training.seed)
    if args.text is None:
        train_language_model(Path(words), args.language_model_steps, training.seed)
    train_rows, test_rows, names = read_rows(args, training.seed)

    weights = None
    if args.balanced:
        counts = [max(1, train_rows[args.label_column].count(index)) for index in range(len(names))]
        weights = [len(train_rows) / len(names) / count for count in counts]
    set_seed(training.seed)
    model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
        tower,
        words,
        id2label=dict(enumerate(names)),
        fused_inputs=args.fused_inputs,
        class_weights=weights,
        connector_type=args.connector_type,
        connector_config=json.loads(args.connector_config),
        prefix_length=args.prefix_length,
    )
    processor = FrozenPrefixProcessor.from_model(model)
    columns = {name: getattr(args, name) for name in ("image_column", "text_column", "label_column")}
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        data_collator=DataCollatorForFrozenPrefixClassification(processor, **columns),
        compute_metrics=classification_compute_metrics,
        processing_class=processor,
    )

    def score(rows: Any) -> dict[str, float]:
        measured = trainer.evaluate(rows)
        return {name: measured[f"eval_{name}"] for name in ("accuracy", "f1", "loss")}

    results = {"random_connector": score(test_rows)}
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    plot_training(trainer, out / "training.png")
    results |= {"sighted": score(test_rows), "blind": score(blind(test_rows, args.image_column, training.seed))}
    trainer.save_model()
    processor.save_pretrained(out)
    write_model_card(out, model, training=trainer, metrics=results, dataset=" ".join(args.dataset or ["shapes, drawn here"]))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name in ("sighted", "blind", "random_connector"):
        print(f"{name:18}" + "".join(f"{key} {value:.3f}   " for key, value in results[name].items()))
    return results


if __name__ == "__main__":
    main()
