"""What the experiments share: tiny parents made for a task, a connector between them, scores beside blind.

A task gives texts for the language model (which is trained on words alone) and rows with pictures for the connector.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.evaluation.plots import plot_training
from modeling_frozen.shapes.parents import build_llama, train_language_model, train_tower
from modeling_frozen.shapes.scenes import Scene


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("shapes_output"), metadata={"help": "Where everything is written."})
    vision: str | None = field(default=None, metadata={"help": "A vision tower of your own: Hub id or folder."})
    text: str | None = field(default=None, metadata={"help": "A language model of your own: Hub id or folder."})
    tower_steps: int = field(default=500, metadata={"help": "Steps of training for the tiny tower."})
    language_model_steps: int = field(default=200, metadata={"help": "Steps of training for the tiny language model."})
    steps: int = field(default=600, metadata={"help": "Steps of training for the connector."})
    batch_size: int = 16
    learning_rate: float = 3e-3
    held_out: int = field(default=64, metadata={"help": "How many held-out rows are described."})
    seed: int = 0


def parse(arguments_class: type = Arguments) -> Any:
    """Arguments of the command line, and the clock started."""
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses()
    return start(args)


def start(args: Any) -> Any:
    """Makes the folder, starts the clock and seeds everything."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.begin = time.time()
    set_seed(args.seed)
    return args


def join_parents(
    args: Arguments,
    write: Callable[[random.Random, list[Scene]], str],
    words: list[str],
    build: Callable[[int], PreTrainedModel] = build_llama,
    **options: Any,
) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """
    Trains the two parents apart, where none were named, and joins them, frozen.

    Args:
        write: makes a text for the language model of scenes that nobody drew.
        words: texts that hold its words, beside those of sentences and questions.
        build: makes the tiny language model for a number of words.
        options: of `from_vision_text_pretrained`.
    """
    tower, text = args.vision or str(args.output_dir / "tower"), args.text or str(args.output_dir / "language_model")
    if args.vision is None:
        train_tower(Path(tower), args.tower_steps, args.seed)
    if args.text is None:
        train_language_model(Path(text), args.language_model_steps, args.seed, write, words, build)
    set_seed(args.seed)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, text, **options)
    return model, FrozenPrefixProcessor.from_model(model)


def train_connector(model: Any, processor: Any, rows: Any, args: Arguments, callbacks: list[Any] | None = None) -> None:
    """By plain Trainer; the parents stay as they are, and the curve goes into `training.png`. `rows` are a list or a dataset,
    `callbacks` Trainer's."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(args.output_dir / "training"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=20, logging_steps=20,
            logging_first_step=True, remove_unused_columns=False, save_strategy="no", report_to="none", seed=args.seed,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    plot_training(trainer, args.output_dir / "training.png")
    model.eval()


@torch.no_grad()
def tell(model: Any, processor: Any, rows: list[dict[str, Any]], title: str, max_new_tokens: int = 48) -> list[str]:
    """What the model says of each row's `images` or `video`, up to its end token."""
    said = []
    for at in tqdm(range(0, len(rows), 16), desc=title):
        batch = rows[at : at + 16]
        media = {"videos": [[row["video"]] for row in batch]} if "video" in batch[0] else {}
        media |= {"images": [row["images"] for row in batch]} if "images" in batch[0] else {}
        prompts = [row["prompt"] for row in batch]
        inputs = processor(**media, text=prompts, return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        said += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def blinded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each with the pictures of another row, of the same question and another answer where there is one."""
    rng, mixed = random.Random(0), []
    for row in rows:
        asked = [one for one in rows if one["prompt"] == row["prompt"]]
        other = rng.choice([one for one in asked if one["answer"] != row["answer"]] or asked)
        mixed.append({**row, **{name: other[name] for name in ("images", "video") if name in row}})
    return mixed


def first_sentence(text: str) -> str:
    """What is said up to the first full stop, as sentences of the little world end."""
    return text.split(".")[0].strip() + " ."


def exact_match(said: list[str], rows: list[dict[str, Any]]) -> float:
    return sum(text == row["answer"] for text, row in zip(said, rows, strict=True)) / len(rows)


def write_results(args: Arguments, results: dict[str, Any]) -> dict[str, Any]:
    """Adds the seconds, prints all of it and writes `results.json`."""
    results["seconds"] = round(time.time() - args.begin, 1)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:<32} {value:.3f}" if isinstance(value, float) else f"{name:<32} {value}")
    return results
