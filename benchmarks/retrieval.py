"""Recall on real photos with human captions: one image side locked, none, or both, beside chance and transformers' own.

    python -m benchmarks.retrieval DATASET TOWER TEXT_MODEL --output retrieval.json

With `python -m benchmarks.real_parents --output_dir parents --assets DIR --serve --` in front, the three are ids on the Hub,
also where there is none: `jxie/flickr8k google/mobilenet_v2_1.0_224 sentence-transformers/all-MiniLM-L6-v2`.

All candidates have the same parents, pictures, captions, batches, steps, width of the shared space, start of its temperature
and learning rates (one for new parts, a smaller one for parents), three seeds each:

- `both frozen`: the projections learn, from stored features;
- `both frozen, by a prefix`: the same with a linear connector between tower and projection;
- `locked image`: LiT; the text model learns as well, from stored features;
- `nothing locked`: the tower too, from pixels;
- `transformers, nothing locked` and `transformers, locked image`: `VisionTextDualEncoderModel`, the latter from stored
  features too. It takes towers whose config has a `hidden_size` and text models that pool for themselves; where a parent lacks
  one of the two, it is added here, the pooling being ours (the mean over words).

The gallery is the validation and test split together, with all captions. A run adds to the figures that are in `--output`
already, so that long comparisons can be made piece by piece (`--candidates`, `--seeds`).
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets, load_dataset
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import timing
from modeling_frozen import FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor
from modeling_frozen.backbones import load_base_model
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.data.feature_store import StoredImage
from modeling_frozen.metrics import recall_at_k
from modeling_frozen.text_reading import pool_text


CANDIDATES = {
    "both frozen": ("connector",),
    "both frozen, by a prefix": ("connector",),
    "locked image": ("connector", "text"),
    "nothing locked": ("connector", "vision", "text"),
    "transformers, locked image": ("text",),
    "transformers, nothing locked": ("vision", "text"),
}
KS = (1, 5, 10)


class Pooling(PreTrainedModel):
    """A text model that pools: what `VisionTextDualEncoderModel` asks of one."""

    _supports_sdpa = True  # the model inside says so for itself

    def __init__(self, text_model: PreTrainedModel):
        super().__init__(text_model.config)
        self.text_model = text_model

    def forward(self, input_ids, attention_mask=None, **unused) -> BaseModelOutputWithPooling:
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pool_text(states, attention_mask, "mean"))


class Stored(PreTrainedModel):
    """A locked tower whose features are stored: what comes as pixels is its pooled output already."""

    def __init__(self, tower: PreTrainedModel):
        super().__init__(tower.config)

    def forward(self, pixel_values, **unused) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values[:, None], pooler_output=pixel_values)


def dual_encoder(tower: str, words: str, dim: int, scale: float, stored: bool) -> VisionTextDualEncoderModel:
    vision, text = AutoModel.from_pretrained(tower), load_base_model("text", words, headless=True)[0]
    if not hasattr(vision.config, "hidden_size"):
        pixels = AutoImageProcessor.from_pretrained(tower)(Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            vision.config.hidden_size = vision.eval()(pixels).pooler_output.flatten(1).shape[1]
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=dim, logit_scale_init_value=scale
    )
    return VisionTextDualEncoderModel(config, Stored(vision) if stored else vision, Pooling(text))


def captions_of(rows: Any) -> list[list[str]]:
    """All captions of each picture: the column `captions`, or as many columns `caption_0`, `caption_1` … as there are."""
    if "captions" in rows.column_names:
        return [list(captions) for captions in rows["captions"]]
    columns = [rows[name] for name in rows.column_names if name.startswith("caption_")]
    return [list(several) for several in zip(*columns, strict=True)]


class Data:
    """Pixels, captions and ids of a split, made once."""

    def __init__(self, rows: Any, processor: FrozenPrefixProcessor):
        self.captions = captions_of(rows)
        pixels = []
        for start in range(0, len(rows), 64):
            pixels.append(processor(images=rows[start : start + 64]["image"], return_tensors="pt")["pixel_values"].half())
        self.pixels = torch.cat(pixels)
        self.features: torch.Tensor | None = None

    def images(self, index: torch.Tensor, stored: str | None) -> dict[str, torch.Tensor]:
        """`stored`: the input that takes stored features; `None`: the pixels."""
        if stored is not None:
            features = self.features[index].float()
            return {stored: features if stored == "vision_features" else features.flatten(1)}
        return {"pixel_values": self.pixels[index].float()}


def groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """New parts learn at one rate, parents at another."""
    parents, new = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            old = any(part in name for part in ("vision_tower.", "language_model.", "vision_model.", "text_model."))
            (parents if old else new).append(parameter)
    rates = ((new, args.learning_rate), (parents, args.parents_learning_rate))
    return [{"params": params, "lr": rate} for params, rate in rates if params]


def train(model: nn.Module, args: argparse.Namespace, batches: Callable[[int], dict[str, Any]]) -> float:
    optimizer = torch.optim.AdamW(groups(model, args), weight_decay=0.05)
    warm, steps = max(1, args.steps // 10), args.steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.5 * (1 + math.cos(math.pi * n / steps)))
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        loss = model(**batches(step), return_loss=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def recall(model: nn.Module, data: Data, tokenizer: Any, stored: str | None) -> dict[str, float]:
    model.eval()
    seen = [
        model.get_image_features(**data.images(index, stored)).pooler_output.flatten(1)
        for index in torch.arange(len(data.captions)).split(64)
    ]
    texts = [text for several in data.captions for text in several]
    read = []
    for start in range(0, len(texts), 128):
        inputs = tokenizer(texts[start : start + 128], padding=True, padding_side="right", return_tensors="pt")
        read.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output)
    seen, read = (nn.functional.normalize(torch.cat(one).float(), dim=-1) for one in (seen, read))
    owner = [index for index, several in enumerate(data.captions) for _ in several]
    return recall_at_k(seen @ read.T, owner, KS)


def run(name: str, seed: int, args: argparse.Namespace, parts: dict[str, Any]) -> dict[str, float]:
    trainable, theirs = CANDIDATES[name], name.startswith("transformers")
    stored = None if "vision" in trainable else "pixel_values" if theirs else "vision_features"
    torch.manual_seed(seed)
    if theirs:
        model: Any = dual_encoder(args.tower, args.text_model, args.projection_dim, args.logit_scale, stored is not None)
    else:
        model = parts["make"](trainable, by_prefix=name.endswith("by a prefix"))
    tokenizer, learn = parts["processor"].tokenizer, parts["train"]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []

    def batch(_: int) -> dict[str, Any]:
        nonlocal order
        if len(order) < args.batch_size:  # whole epochs: no picture stands twice in a batch
            order = torch.randperm(len(learn.captions), generator=generator).tolist()
        index, order = torch.tensor(order[: args.batch_size]), order[args.batch_size :]
        drawn = torch.randint(1000, (len(index),), generator=generator).tolist()
        texts = [learn.captions[i][n % len(learn.captions[i])] for i, n in zip(index.tolist(), drawn, strict=True)]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            **learn.images(index, stored),
        }

    seconds = train(model, args, batch)
    return {**recall(model, parts["test"], tokenizer, stored), "seconds_per_step": seconds}


def chance(data: Data) -> dict[str, float]:
    """Of an order drawn at random."""
    images, texts = len(data.captions), sum(map(len, data.captions))
    scores = {}
    for k in KS:
        missed = [math.comb(texts - len(several), k) / math.comb(texts, k) for several in data.captions]
        scores[f"image_to_text_recall_at_{k}"] = 1 - statistics.mean(missed)
        scores[f"text_to_image_recall_at_{k}"] = k / images
    return scores


def table(results: dict[str, Any]) -> str:
    columns = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in KS]
    heads = [f"{way} R@{k}" for way in ("i→t", "t→i") for k in KS]
    lines = ["| | seeds | " + " | ".join(heads) + " | s/step |", "|---" * (len(heads) + 3) + "|"]
    lines.append("| chance | | " + " | ".join(f"{100 * results['chance'][one]:.1f}" for one in columns) + " | |")
    for name in CANDIDATES:
        runs = list(results["runs"].get(name, {}).values())
        if not runs:
            continue
        cells = []
        for column in columns:
            values = [100 * one[column] for one in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        step = statistics.median(one["seconds_per_step"] for one in runs)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {step:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dataset", help="id or folder, splits train, validation, test, columns image and captions or caption_0 …"
    )
    parser.add_argument("tower")
    parser.add_argument("text_model")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--parents-learning-rate", type=float, default=2e-4)
    parser.add_argument("--projection-dim", type=int, default=512)
    parser.add_argument("--projection-dropout", type=float, default=0.0, help="ours alone: transformers' has none")
    parser.add_argument("--logit-scale", type=float, default=2.0, help="logarithm of the inverse temperature at the start")
    parser.add_argument("--output", default="retrieval.json")
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the table too")
    args = parser.parse_args(arguments)

    def make(trainable: tuple[str, ...], by_prefix: bool = False) -> FrozenPrefixForImageTextRetrieval:
        return FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
            args.tower, args.text_model, trainable=trainable, vision_feature_select_strategy="pooled",
            connector_type="linear", prefix_length=1, image_embedding="prefix" if by_prefix else "tower",
            text_pooling="mean", projection_dim=args.projection_dim, projection_dropout=args.projection_dropout,
            logit_scale_init_value=args.logit_scale,
        )  # fmt: skip

    model = make(("connector",))
    processor = FrozenPrefixProcessor.from_model(model)
    splits = load_dataset(args.dataset)
    rows = {"train": splits["train"], "test": concatenate_datasets([splits["validation"], splits["test"]])}
    parts: dict[str, Any] = {"make": make, "processor": processor}
    for name, split in rows.items():
        parts[name] = Data(split, processor)
        with tempfile.TemporaryDirectory() as folder:
            stored = cache_vision_features(split, model, processor, cache_dir=folder, num_workers=0)
            parts[name].features = StoredImage.stack(list(stored["image"]))["vision_features"]

    output = Path(args.output)
    settings = {key: value for key, value in vars(args).items() if key not in ("candidates", "seeds", "output", "table")}
    results = timing.kept_runs(output, settings)
    results |= {"gallery": len(rows["test"]), "chance": chance(parts["test"])}
    for seed in args.seeds:
        for name in args.candidates:
            results["runs"].setdefault(name, {})[str(seed)] = run(name, seed, args, parts)
            output.write_text(json.dumps(results, indent=2) + "\n")
            print(name, seed, {key: round(value, 4) for key, value in results["runs"][name][str(seed)].items()}, flush=True)
    if args.table is not None:
        args.table.write_text(table(results) + "\n")
    print(f"\n{len(rows['train'])} photos to learn from, {len(rows['test'])} to find\n{table(results)}")
    return results


if __name__ == "__main__":
    main()
