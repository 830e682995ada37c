"""Teaches a frozen language model to caption photos: any two parents, any dataset of captioned images, one connector.

    python examples/train_captioning.py --vision TOWER --text MODEL --dataset DATASET --output_dir out --seeds 0 1 2

TOWER and MODEL are Hub ids or folders; DATASET is whatever `load_image_text` reads (a Hub id, a folder, COCO's or Karpathy's
file, LLaVA's JSON, …), with the splits train, validation and test, or without: then a tenth of its images each is held out.
Rows have one image, and one or several captions. The tower runs once per photo and crop, then
the connector trains from its features with `Trainer`, and the epoch of the lowest validation loss is kept. The test split
is captioned from the photos themselves by `generate()` and scored four times: *sighted*; *blind*, where the photos are
shuffled so that none keeps its own; with a *random connector*, which never trained; and by the *language model* alone.

Into `--output_dir` go `results.json` (with all arguments), `training.png`, the store of features, and for each seed a
checkpoint with its `predictions.jsonl`. With `--show`, a dataset whose photos may be shown, there are also a sheet of them
(`sheet.png`) and what each word owes to the photo (`sightedness.png`). All of `TrainingArguments` are arguments too: a stopped
run goes on with `--resume_from_checkpoint out`. On several devices `torchrun`, `accelerate launch`, `deepspeed` or, by
`on_ray.py`, Ray start the script as it is (docs/several_devices.md).
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from own_data import read_splits
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.evaluation import Evaluation, evaluate, over_seeds, table_over_seeds
from modeling_frozen.evaluation.plots import plot_sheet, plot_training
from modeling_frozen.interpretation import sightedness
from modeling_frozen.metrics import caption_scores
from modeling_frozen.training.checkpoints import DeepSpeedCheckpointCallback, last_whole_checkpoint


SCORES = ("cider", "bleu_4", "rouge_l")


@dataclass
class Arguments:
    vision: str = field(metadata={"help": "Vision tower: Hub id or folder."})
    text: str = field(metadata={"help": "Language model: Hub id or folder."})
    dataset: list[str] = field(
        metadata={"help": "Captioned images in any form of load_image_text, or several files of one set."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of relative image paths; default: the file's."})
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
    show: str | None = field(default=None, metadata={"help": "Dataset whose test photos may be shown: best, middle, worst."})


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
    logging_first_step: bool = True
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


def read(source: list[str], args: Arguments, *splits: str) -> dict[str, tuple[Any, list[list[str]]]]:
    """Of each split rows with a photo, and the captions of each, a list."""
    rows = read_splits(source, splits, args.image_root)
    captions = {split: [sum(some, []) for some in rows[split]["answers"]] for split in splits}
    return {split: (rows[split].select_columns(["image"]), captions[split]) for split in splits}


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


def caption(model: Any, processor: Any, photos: Any, people: list[list[str]], args: Arguments, **options: Any) -> Evaluation:
    """Captions photos by `generate()` and scores them beside blind ones."""
    return evaluate(
        model,
        processor,
        photos.add_column("captions", people),
        prompt=args.prompt,
        batch_size=25,
        num_beams=args.num_beams,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        length_penalty=args.length_penalty,
        max_new_tokens=args.max_new_tokens,
        **{"distributed": True, **options},
    )


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


def checkpoint_of(training: CaptioningTrainingArguments) -> str | None:
    """Where a seed goes on: at the checkpoint that was named, if it is its own, or at its last where all seeds' folder was."""
    named, own = training.resume_from_checkpoint, Path(training.output_dir).resolve()
    if named is not None and Path(named).resolve() == own.parent and own.is_dir():
        return last_whole_checkpoint(own)
    return named if named is not None and Path(named).resolve().parent == own else None


def run_seed(args: Arguments, training: CaptioningTrainingArguments, data: dict[str, Any]) -> tuple[Evaluation, Trainer]:
    """Trains one connector and captions the test photos under each condition."""
    set_seed(training.seed)
    model, processor = build(args)
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
    trainer.add_callback(DeepSpeedCheckpointCallback(trainer))
    trainer.train(resume_from_checkpoint=checkpoint_of(training))
    trainer.save_model()
    evaluation = caption(model, processor, *data["test"], args, seed=training.seed, output_dir=Path(training.output_dir))
    return evaluation, trainer


def show(folder: Path, model: Any, processor: Any, args: Arguments) -> None:
    """The best, the middle and the worst caption of a test split, by CIDEr, as they came out, and what words owe to photos."""
    photos, people = read([args.show], args, "train", "test")["test"]
    options: dict[str, Any] = {"kinds": ("sighted",), "num_resamples": 0, "distributed": False}
    written = caption(model, processor, photos, people, args, **options).predictions["sighted"]
    images, score = photos["image"][:], caption_scores(written, people)["cider"]
    plot_sheet(images, written, people, score, folder / "sheet.png", score_name="CIDEr")
    order = sorted(range(len(images)), key=score.__getitem__, reverse=True)
    with open(folder / "sheet.jsonl", "w", encoding="utf-8") as file:
        for index in order:
            row = {"photo": index, "caption": written[index], "people": people[index], "cider": score[index]}
            file.write(json.dumps(row) + "\n")
    texts = [tidy(some[0]) for some in people]
    options = {"prompts": args.prompt} if args.prompt else {}
    sightedness(model, processor, images, texts, **options).plot(folder / "sightedness.png")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, training = HfArgumentParser((Arguments, CaptioningTrainingArguments)).parse_args_into_dataclasses(arguments)
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = read(args.dataset, args, "train", "validation", "test")
    model, processor = build(args)
    data["features"] = {
        split: store_features(model, processor, photos, output_dir / "features", args.views if split == "train" else 0)
        for split, (photos, _) in data.items()
    }

    each = [replace(training, seed=seed, output_dir=str(output_dir / f"seed-{seed}")) for seed in args.seeds]
    if training.resume_from_checkpoint is not None and not any(map(checkpoint_of, each)):
        raise ValueError(
            f"--resume_from_checkpoint {training.resume_from_checkpoint} is no checkpoint of this run: name one below "
            f"{output_dir}, or that folder for the last of each seed."
        )
    results = []
    for seed, of_seed in zip(args.seeds, each, strict=True):
        evaluation, trainer = run_seed(args, of_seed, data)
        results.append(evaluation)
        if seed == args.seeds[0] and trainer.is_world_process_zero():
            plot_training(trainer, output_dir / "training.png")
            if args.show:
                show(output_dir, trainer.model, trainer.processing_class, args)
    how = {"arguments": vars(args), "training_arguments": json.loads(training.to_json_string())}  # without tokens
    summary = {**how, **over_seeds(results, args.seeds)}
    if not training.should_save:
        return summary  # the first process writes
    (output_dir / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(table_over_seeds(summary, SCORES))
    return summary


if __name__ == "__main__":
    main()
