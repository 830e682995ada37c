"""Teaches a frozen language model to caption photos: any two parents, any dataset of captioned images, one connector.

    python examples/train_captioning.py --vision TOWER --text MODEL --dataset DATASET --output_dir out --seeds 0 1 2

TOWER, MODEL and DATASET are Hub ids or folders. The dataset has the splits train, validation and test, an image column
and a column with one or several captions; rows without a caption are left out. The tower runs once per photo and crop, then
the connector trains from its features with `Trainer`, and the epoch of the lowest validation loss is kept. The test split
is captioned from the photos themselves by `generate()` and scored three times: *sighted*; *blind*, where the photos are
shuffled so that none keeps its own; and with a *random connector*, which never trained.

Into `--output_dir` go `results.json` (with all arguments), `predictions.jsonl`, the store of features, a checkpoint per seed
and, with `--show`, a sheet of photos from a dataset that may be shown. All of `TrainingArguments` are arguments too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.metrics import caption_metrics, caption_scores
from modeling_frozen.plots import plot_sheet


KINDS = ("sighted", "blind", "random_connector")
SCORES = ("cider", "bleu_4", "rouge_l", "loss")


@dataclass
class Arguments:
    vision: str = field(metadata={"help": "Vision tower: Hub id or folder."})
    text: str = field(metadata={"help": "Language model: Hub id or folder."})
    dataset: str = field(metadata={"help": "Captioned images: Hub id or folder, for load_dataset."})
    image_column: str = "image"
    captions_column: str = "captions"
    connector: str = "mlp"
    connector_config: str = field(
        default='{"hidden_size": 64, "input_dropout": 0.5, "dropout": 0.3}',
        metadata={"help": "Options of the connector, as JSON."},
    )
    prefix_length: int = 48
    vision_features: str = field(
        default="pooled", metadata={"help": "'pooled' (one vector), 'default' (every position) or 'full'."}
    )
    prompt: str = field(default="", metadata={"help": "Words between the image and the caption, not learnt."})
    start_as_words: bool = field(
        default=True, metadata={"help": "Start the prefix's constant part as words of training captions."}
    )
    views: int = field(default=3, metadata={"help": "Random crops of each training photo, beside the photo itself."})
    seeds: list[int] = field(default_factory=lambda: [0])
    num_beams: int = 5
    no_repeat_ngram_size: int = 3
    length_penalty: float = 1.0
    max_new_tokens: int = 30
    show: str | None = field(
        default=None, metadata={"help": "Dataset whose test photos may be shown: best, middle, worst."}
    )


@dataclass
class CaptioningTrainingArguments(TrainingArguments):
    output_dir: str = "captioning"
    learning_rate: float = 4e-3
    num_train_epochs: float = 5
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    load_best_model_at_end: bool = True
    logging_steps: float = 20
    remove_unused_columns: bool = False  # the collator reads the features


class CaptionedViews(torch.utils.data.Dataset):
    """One row per caption; each time it is read, with another view of its photo (the first alone, where there is one)."""

    def __init__(self, photos: Any, captions: list[list[str]], prompt: str):
        self.photos, self.prompt = photos, prompt  # rows of `store_features`
        self.rows = [(photo, tidy(one)) for photo, some in enumerate(captions) for one in some]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, caption = self.rows[index]
        return {"image": self.photos[photo]["image"], "prompt": self.prompt, "answer": caption}


def random_crop(image: Any) -> Any:
    """Half to all of a photo, nearly in its own shape. Never mirrored: captions say left and right."""
    width, height = image.size
    area, shape = (torch.rand(2) * torch.tensor([0.5, 0.4]) + torch.tensor([0.5, -0.2])).tolist()
    wide, high = (min(1.0, (area * torch.e**turn) ** 0.5) for turn in (shape, -shape))
    left, top = (torch.rand(2) * torch.tensor([1 - wide, 1 - high])).tolist()
    return image.crop((left * width, top * height, (left + wide) * width, (top + high) * height))


def tidy(caption: str) -> str:
    """A caption as a sentence that continues a text: " a dog runs." Language models know those best."""
    words = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.lower().split()))
    return f" {words.rstrip(' .')}."


def read_split(dataset: Any, split: str, args: Arguments) -> tuple[Any, list[list[str]]]:
    """Rows with a photo, and the captions of each, a list."""
    rows = dataset[split]
    captions = [[one] if isinstance(one, str) else list(one or []) for one in rows[args.captions_column]]
    kept = [index for index, some in enumerate(captions) if some]
    photos = rows.select(kept).select_columns([args.image_column]).rename_columns({args.image_column: "image"})
    return photos, [captions[index] for index in kept]


def in_batches(items: Sequence[Any], size: int, title: str) -> Any:
    return tqdm([items[start : start + size] for start in range(0, len(items), size)], title)


def store_features(model: Any, processor: Any, photos: Any, folder: Path, crops: int = 0) -> Any:
    """Rows whose photo is what the frozen tower gives the connector, which would only repeat itself, epoch by epoch and
    caption by caption; with crops, each read draws one of them or the photo itself."""
    views = {"views": crops + 1, "augment": random_crop, "plain_view": True} if crops else {}
    return cache_vision_features(photos, model, processor, cache_dir=folder, dtype="float32", **views)


@torch.no_grad()
def start_as_words(model: Any, processor: Any, captions: list[list[str]]) -> None:
    """Prompt tuning that starts at words learns faster than from noise (Lester et al. 2021, arXiv 2104.08691).

    Connectors that write the whole prefix at once hold its constant part in their output's bias; others stay as
    they are.
    """
    bias, length = model.model.connector.output.bias, model.config.prefix_length
    if bias.numel() == length * model.config.embedding_dim:
        order = torch.randperm(len(captions)).tolist()
        text = "".join(tidy(captions[index][0]) for index in order[:length])
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :length]
        bias.copy_(model.model.embed_words(ids.to(bias.device)).flatten())
        model.model.connector.output.weight.mul_(0.5)  # the photo then moves the words, and does not drown them


@torch.no_grad()
def write_captions(model: Any, processor: Any, images: list[Any], args: Arguments, title: str) -> list[str]:
    model.eval()
    captions: list[str] = []
    for batch in in_batches(images, 25, title):
        text = [processor.image_token + args.prompt] * len(batch)
        inputs = processor(images=batch, text=text, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs,
            do_sample=False,
            num_beams=args.num_beams,
            no_repeat_ngram_size=args.no_repeat_ngram_size,
            length_penalty=args.length_penalty,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        captions += [one.strip() for one in processor.batch_decode(output[:, start:], skip_special_tokens=True)]
    return captions


def shuffled(count: int, seed: int) -> list[int]:
    """A shuffle in which nothing keeps its place: one cycle through all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    place = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        place[here] = there
    return place


def build(args: Arguments) -> tuple[Any, Any]:
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision,
        args.text,
        connector_type=args.connector,
        connector_config=json.loads(args.connector_config),
        prefix_length=args.prefix_length,
        vision_feature_select_strategy=args.vision_features,
    )
    return model, FrozenPrefixProcessor.from_model(model)


def run_seed(args: Arguments, training: CaptioningTrainingArguments, data: dict[str, Any]) -> dict[str, Any]:
    """Trains one connector and captions the test photos three times.

    Returns: for each kind `captions` and `scores`; and the trained `model` and `processor`.
    """
    set_seed(training.seed)
    model, processor = build(args)
    images, people = data["test"][0]["image"][:], data["test"][1]
    blind = shuffled(len(images), training.seed)
    written = {"random_connector": write_captions(model, processor, images, args, "random connector")}

    if args.start_as_words:
        start_as_words(model, processor, data["train"][1])
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=CaptionedViews(data["features"]["train"], data["train"][1], args.prompt),
        eval_dataset=CaptionedViews(data["features"]["validation"], data["validation"][1], args.prompt),
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()

    written["sighted"] = write_captions(model, processor, images, args, "sighted")
    written["blind"] = [written["sighted"][other] for other in blind]
    scores = {kind: caption_metrics(written[kind], people) for kind in KINDS}
    for kind, order in (("sighted", list(range(len(images)))), ("blind", blind)):
        rows = CaptionedViews(data["features"]["test"].select(order), people, args.prompt)
        scores[kind]["loss"] = trainer.evaluate(rows, metric_key_prefix=kind)[f"{kind}_loss"]
    return {"captions": written, "scores": scores, "model": model, "processor": processor}


def table(results: list[dict[str, Any]]) -> str:
    """One line per kind: mean over seeds, and the spread (standard deviation) where there are several."""
    lines = [f"{'':18}" + "".join(f"{name:>16}" for name in SCORES)]
    for kind in KINDS:
        cells = []
        for name in SCORES:
            values = [one["scores"][kind][name] for one in results if name in one["scores"][kind]]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}" if values else "-")
        lines.append(f"{kind:18}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def show_sheet(path: Path, model: Any, processor: Any, args: Arguments) -> None:
    """The best, the middle and the worst caption of a test split, by CIDEr, as they came out."""
    dataset = load_dataset(args.show)
    photos, people = read_split(dataset, "test", args)
    images = photos["image"][:]
    written = write_captions(model, processor, images, args, "to be shown")
    score = caption_scores(written, people)["cider"]
    order = sorted(range(len(images)), key=score.__getitem__, reverse=True)
    plot_sheet(images, written, people, score, path, score_name="CIDEr")
    with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        for index in order:
            row = {"photo": index, "caption": written[index], "people": people[index], "cider": score[index]}
            file.write(json.dumps(row) + "\n")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, training = HfArgumentParser((Arguments, CaptioningTrainingArguments)).parse_args_into_dataclasses(arguments)
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(args.dataset)
    data: dict[str, Any] = {split: read_split(dataset, split, args) for split in ("train", "validation", "test")}
    model, processor = build(args)
    data["features"] = {
        split: store_features(model, processor, photos, output_dir / "features", args.views if split == "train" else 0)
        for split, (photos, _) in data.items()
    }

    results = []
    for seed in args.seeds:
        of_seed = replace(training, seed=seed, output_dir=str(output_dir / f"seed-{seed}"))
        results.append({"seed": seed, **run_seed(args, of_seed, data)})
    with open(output_dir / "predictions.jsonl", "w", encoding="utf-8") as file:
        for one in results:
            for index, people in enumerate(data["test"][1]):
                said = {kind: one["captions"][kind][index] for kind in KINDS}
                file.write(json.dumps({"seed": one["seed"], "photo": index, **said, "people": people}) + "\n")
    if args.show:
        show_sheet(output_dir / "sheet.png", results[0]["model"], results[0]["processor"], args)
    how = {"arguments": vars(args), "training_arguments": json.loads(training.to_json_string())}  # without tokens
    summary = {**how, "seeds": [{"seed": one["seed"], **one["scores"]} for one in results]}
    (output_dir / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(table(results))
    return summary


if __name__ == "__main__":
    main()
