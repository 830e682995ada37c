"""What connectors, tiles, towers, layers, lengths and stores bring a frozen language model, each beside its blind twin.

    python -m benchmarks.connectors assets --further efficientnet-lite2 --output connectors.json

`assets` is a folder with the photos, questions, story model and MobileNetV2 that `python -m benchmarks.results` calls so;
`--further` is a second tower (`python -m benchmarks.real_parents` makes it). Both parents are frozen and the connector alone
learns, from stored features, as many steps at the same rate in every run. Three tasks:

- *captions*: Flickr8k photos. Nats a token of the photo's own captions, and CIDEr of what the model writes;
- *questions*: easy-VQA, coloured shapes. The share of answers that the model would write word for word;
- *small text*: one of eight words, 28 pixels high, somewhere on a photo of 672 x 672. The share of words that are right.

Candidates are trained again *blind*: on images that were exchanged among the rows, so at equal length and equal parameters,
and asked about exchanged images too. What a blind twin reaches is had without seeing. Of those that see it is printed as
well what exchanged images do to them. Runs are written to `--output` one by one; those that stand there are not made again.
"""

import argparse
import io
import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset
from PIL import Image as Pictures
from PIL import ImageDraw, ImageFont
from torch import nn
from transformers import AutoImageProcessor, AutoModel, set_seed

from benchmarks.timing import kept_runs
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.metrics import caption_metrics


WORDS = ("open", "sale", "taxi", "hotel", "cafe", "school", "bus", "exit")
TASKS = ("captions", "questions", "small text")
TEXTS = {"captions": 1, "questions": 3, "small text": 1}  # of an image in a step
POOLED = {"vision_feature_select_strategy": "pooled"}
# With these widths each has about 0.36 million parameters.
AVG_POOL = {"connector_type": "avg_pool", "connector_config": {"hidden_size": 256}}
RESAMPLER = {"connector_type": "resampler", "connector_config": {"hidden_size": 128, "num_layers": 1}}


@dataclass(frozen=True)
class Candidate:
    """
    Args:
        table: the table in which it stands.
        name: its row.
        options: of `from_vision_text_pretrained`.
        tasks: what it is trained on.
        towers: the first, the second, or both.
        tiles: of the processor.
        dtype: of the store.
        at: of a model with several lengths, those that it is asked at.
        twin: whether it is trained blind as well.
    """

    table: str
    name: str
    options: dict[str, Any]
    tasks: tuple[str, ...] = TASKS[:2]
    towers: tuple[int, ...] = (0,)
    tiles: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    at: tuple[int | None, ...] = (None,)
    twin: bool = True

    @property
    def key(self) -> str:
        return f"{self.table}: {self.name}"


BASE = "connectors: avg_pool"
COMPARED = ("towers", "stores")  # tables of what is changed in it


def _candidates() -> Iterator[Candidate]:
    table = "connectors"
    mlp = {"connector_type": "mlp", "connector_config": {"hidden_size": 148}}
    yield Candidate(table, "mlp, of the pooled vector", {**POOLED, **mlp, "prefix_length": 9})
    yield Candidate(table, "resampler", {**RESAMPLER, "prefix_length": 9})
    yield Candidate(table, "avg_pool", {**AVG_POOL, "prefix_length": 9})
    placed = {**AVG_POOL["connector_config"], "position_embedding": True}
    yield Candidate(table, "avg_pool, position_embedding", {**AVG_POOL, "connector_config": placed, "prefix_length": 9})
    shuffle = {"connector_type": "pixel_shuffle", "connector_config": {"hidden_size": 68}}
    yield Candidate(table, "pixel_shuffle", shuffle)
    convolutions = {"hidden_size": 160, "num_layers": 1}
    yield Candidate(
        table, "c_abstractor", {"connector_type": "c_abstractor", "connector_config": convolutions, "prefix_length": 9}
    )
    gates = {"connector_type": "avg_pool", "connector_config": {"hidden_size": 64}, "fusion": "cross_attention"}
    yield Candidate(table, "avg_pool, gated cross-attention", {**gates, "prefix_length": 9})

    table, text = "tiles", TASKS[2:]
    four = {"crop_to_patches": True, "min_patches": 4, "max_patches": 4}  # two by two, and the whole
    yield Candidate(table, "avg_pool, the whole image", {**AVG_POOL, "prefix_length": 16}, text)
    yield Candidate(table, "avg_pool, 4 tiles and the whole", {**AVG_POOL, "prefix_length": 4}, text, tiles=four)
    yield Candidate(table, "resampler, the whole image", {**RESAMPLER, "prefix_length": 20}, text)
    yield Candidate(table, "resampler, 4 tiles and the whole", {**RESAMPLER, "prefix_length": 4}, text, tiles=four)

    table, captions = "lengths", TASKS[:1]
    for name, kind in (("resampler", RESAMPLER), ("avg_pool", AVG_POOL)):
        several = {**kind, "prefix_length": 9, "prefix_lengths": [1, 4, 9]}
        yield Candidate(table, f"{name}, one checkpoint", several, captions, at=(1, 4, 9), twin=False)
        for length in (1, 4):
            yield Candidate(table, f"{name}, {length} alone", {**kind, "prefix_length": length}, captions, twin=False)

    table, pooling = "towers", {**AVG_POOL, "prefix_length": 9}
    yield Candidate(table, "the second tower alone", pooling, towers=(1,))
    both = {**pooling, "connector_config": {"hidden_size": 128}}  # of twice the width: as many parameters
    yield Candidate(table, "both towers", both, towers=(0, 1))
    yield Candidate(table, "layer 14 beside the last", {**pooling, "vision_feature_layer": [14, -1]})

    for dtype in ("float32", "int8"):
        yield Candidate("stores", f"avg_pool, {dtype}", pooling, captions, dtype=dtype, twin=False)


CANDIDATES = {candidate.key: candidate for candidate in _candidates()}


# ------------------------------------------------------------------------------------------------------------------ data
def square_tower(folder: str, side: int, to: Path) -> str:
    """The tower, with an image processor that squeezes the whole image into a square, so that towers have the same grid."""
    if not (to / "preprocessor_config.json").is_file():
        tower = AutoModel.from_pretrained(folder)
        tower.config.image_size = side
        tower.save_pretrained(to)
        processor = AutoImageProcessor.from_pretrained(folder)
        processor.do_center_crop, processor.size = False, {"height": side, "width": side}
        processor.save_pretrained(to)
    return str(to)


def with_a_word(photo: Pictures.Image, word: str, side: int, height: int, generator: torch.Generator) -> bytes:
    """The middle of a photo as a square, with a word somewhere on it."""
    short = min(photo.size)
    left, top = (photo.width - short) // 2, (photo.height - short) // 2
    image = photo.convert("RGB").crop((left, top, left + short, top + short)).resize((side, side))
    font = ImageFont.load_default(height)
    pen = ImageDraw.Draw(image)
    box = pen.textbbox((0, 0), word, font=font, stroke_width=2)
    place = [int(torch.randint(max(1, side - round(end)), (1,), generator=generator)) for end in box[2:]]
    pen.text(tuple(place), word, fill="white", stroke_fill="black", stroke_width=2, font=font)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def small_text(photos: Dataset, side: int, height: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photos), generator=generator).tolist()
    words = [WORDS[place % len(WORDS)] for place in order]
    images = [
        {"bytes": with_a_word(row["image"], word, side, height, generator), "path": None}
        for row, word in zip(photos, words, strict=True)
    ]
    columns = {"image": images, "prompt": [["The word is"]] * len(words), "answer": [[word] for word in words]}
    return Dataset.from_dict(
        columns, Features({"image": Image(), "prompt": List(Value("string")), "answer": List(Value("string"))})
    )


def read_tasks(args: argparse.Namespace) -> dict[str, dict[str, Dataset]]:
    """Rows to train on and to test on, each with all its texts in lists."""
    photos = load_dataset(os.path.join(args.assets, "captions", "flickr8k_1k"))
    photos = {"train": photos["train"], "test": concatenate_datasets([photos["validation"], photos["test"]])}
    questions = load_dataset(os.path.join(args.assets, "vqa", "easy_vqa"))
    questions = {split: questions[split].shuffle(seed=0) for split in ("train", "test")}
    tasks: dict[str, dict[str, Dataset]] = {task: {} for task in args.tasks}
    for split, count in (("train", args.images), ("test", args.test_images)):
        some = photos[split].select(range(min(count, len(photos[split]))))
        if "captions" in tasks:
            tasks["captions"][split] = some.select_columns(["image", "captions"]).rename_column("captions", "text")
        if "questions" in tasks:
            asked = questions[split].select(range(min(count, len(questions[split]))))
            asked = asked.select_columns(["image", "questions", "answers"])
            tasks["questions"][split] = asked.rename_columns({"questions": "prompt", "answers": "answer"})
        if "small text" in tasks:
            tasks["small text"][split] = small_text(some, args.side, args.height, seed=len(tasks["small text"]))
    if args.held_out:
        for task, splits in tasks.items():
            count = len(splits["train"]) - args.held_out
            tasks[task] = {
                "train": splits["train"].select(range(count)),
                "test": splits["train"].select(range(count, count + args.held_out)),
            }
    return tasks


def shuffled(count: int, seed: int) -> list[int]:
    """For each row another one: a cycle through all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [other for _, other in sorted(zip(order, order[1:] + order[:1], strict=True))]


class Rows:
    """Rows whose texts and stored images are read by number, so that images can be exchanged."""

    def __init__(self, stored: Dataset):
        self.texts = [{name: row[name] for name in row if name != "image"} for row in stored.remove_columns("image")]
        self.images = list(stored["image"])

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, index: int, image: int, texts: int, draw: random.Random) -> dict[str, Any]:
        """A row with the image of row `image`, and some of its texts."""
        count = min(map(len, self.texts[index].values()))
        chosen = draw.sample(range(count), min(texts, count))
        return {
            **{name: [several[one] for one in chosen] for name, several in self.texts[index].items()},
            "image": self.images[image],
        }


# ------------------------------------------------------------------------------------------------------------------ runs
def train(model: Any, processor: Any, rows: Rows, blind: bool, seed: int, texts: int, args: argparse.Namespace) -> None:
    collator = DataCollatorForFrozenPrefix(processor, all_texts=True)
    images = shuffled(len(rows), seed) if blind else list(range(len(rows)))
    draw = random.Random(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    warm = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.5 * (1 + math.cos(math.pi * n / args.steps)))
    )
    order: list[int] = []
    model.train()
    for _ in range(args.steps):
        if len(order) < args.batch_size:
            order = draw.sample(range(len(rows)), len(rows))
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        batch = [rows.row(index, images[index], texts, draw) for index in chosen]
        model(**collator(batch)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def scores(model: Any, processor: Any, rows: Rows, images: list[int], length: int | None) -> dict[str, float]:
    """Nats a token of the texts, and the share of texts of which each token is the likeliest after those before it, so that
    the model would write them."""
    collator = DataCollatorForFrozenPrefix(processor, all_texts=True, prefix_length=length)
    loss, tokens, right, draw = 0.0, 0, [], random.Random(0)
    texts = 1 if "text" in rows.texts[0] else 4  # questions are short
    for start in range(0, len(rows), 32):
        batch = collator([rows.row(i, images[i], texts, draw) for i in range(start, min(start + 32, len(rows)))])
        labels = batch.pop("labels")[:, 1:]
        learnt = labels != -100
        logits = model(**batch).logits[:, :-1]
        loss += nn.functional.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum").item()
        tokens += int(learnt.sum())
        right += ((logits.argmax(-1) == labels) | ~learnt).all(-1).tolist()
    return {"nats": loss / tokens, "accuracy": statistics.mean(right)}


@torch.no_grad()
def cider(model: Any, processor: Any, rows: Rows, images: list[int], length: int | None) -> float:
    collator = DataCollatorForFrozenPrefix(processor, prefix_length=length)
    said = []
    for start in range(0, len(rows), 64):
        stored = [rows.images[i] for i in images[start : start + 64]]
        prompt = torch.full((len(stored), length or model.config.num_image_tokens), model.config.image_token_id)
        ids = model.generate(input_ids=prompt, **collator.process_images(stored), max_new_tokens=20, do_sample=False)
        said += processor.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    return caption_metrics(said, [row["text"] for row in rows.texts])["cider"]


def run(candidate: Candidate, task: str, seed: int, blind: bool, data: "Data", args: argparse.Namespace) -> dict[str, Any]:
    """Trains a candidate and asks it, at each of its lengths, about the images and about exchanged ones."""
    model, processor = data.model(candidate, seed)
    rows = data.stored(candidate, task, model, processor)
    start = time.process_time()
    train(model, processor, rows["train"], blind, seed, TEXTS[task], args)
    seconds = time.process_time() - start
    test = rows["test"]
    own, others = list(range(len(test))), shuffled(len(test), 7)
    result: dict[str, Any] = {}
    for length in candidate.at:
        asked = {"own": scores(model, processor, test, own, length), "other": scores(model, processor, test, others, length)}
        if task == "captions":
            asked["other" if blind else "own"]["cider"] = cider(model, processor, test, others if blind else own, length)
        result[str(length or model.config.prefix_length)] = asked
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tiles = 1 + candidate.tiles["max_patches"] if candidate.tiles else 1
    return {"lengths": result, "parameters": parameters, "tiles": tiles, "seconds": round(seconds, 1)}


class Data:
    """Towers, rows, and their stores, each made once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.store)
        first = args.vision or os.path.join(args.assets, "vision", "mobilenet_v2_1.0_224")
        named = [first, *([args.further] if args.further else [])]
        self.towers = [square_tower(one, args.tower_side, self.folder / f"tower_{number}") for number, one in enumerate(named)]
        self.words = args.text or os.path.join(args.assets, "lm", "tinystories_instruct_3m_chat")
        self.tasks = read_tasks(args)
        self.read: dict[Any, dict[str, Rows]] = {}

    def model(self, candidate: Candidate, seed: int) -> tuple[Any, Any]:
        set_seed(seed)
        towers = [self.towers[number] for number in candidate.towers]
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            towers if len(towers) > 1 else towers[0], self.words, **candidate.options
        )
        return model, FrozenPrefixProcessor.from_model(model, **candidate.tiles)

    def stored(self, candidate: Candidate, task: str, model: Any, processor: Any) -> dict[str, Rows]:
        layer, pooled = candidate.options.get("vision_feature_layer"), candidate.options.get("vision_feature_select_strategy")
        key = (task, candidate.towers, str(candidate.tiles), candidate.dtype, str(layer), pooled)
        if key not in self.read:
            options = {"cache_dir": self.folder, "dtype": candidate.dtype, "num_workers": 0, "image_column": "image"}
            self.read[key] = {
                split: Rows(cache_vision_features(rows, model, processor, **options))
                for split, rows in self.tasks[task].items()
            }
        return self.read[key]


# ---------------------------------------------------------------------------------------------------------------- tables
SCORES = {
    "captions": (("nats a token", "nats"), ("CIDEr", "cider")),
    "questions": (("right", "accuracy"),),
    "small text": (("right", "accuracy"),),
}


def cell(values: list[float]) -> str:
    """Mean, and standard deviation of several."""
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(results: dict[str, Any]) -> str:
    """A Markdown table for each subject and task: what every candidate reaches, what exchanged images do to it, and what its
    blind twin reaches."""
    runs, pieces = results["runs"], []
    for title, task in ((table, task) for table in dict.fromkeys(one.table for one in CANDIDATES.values()) for task in TASKS):
        lines = []
        for key, candidate in CANDIDATES.items():
            # The tables of towers and stores begin with the row that they change.
            changed = title in COMPARED and any(task in one.tasks for one in CANDIDATES.values() if one.table == title)
            of_table = candidate.table == title or (key == BASE and changed)
            found = runs.get(f"{key}, {task}", {})
            sighted = list(found.get("sighted", {}).values())
            if not of_table or not sighted:
                continue
            blind = list(found.get("blind", {}).values())
            for length in sighted[0]["lengths"]:
                vectors = int(length) * sighted[0]["tiles"]
                cells = [candidate.name, str(vectors), f"{sighted[0]['parameters'] / 1e6:.2f}", str(len(sighted))]
                for _, name in SCORES[task]:
                    cells.append(cell([one["lengths"][length]["own"][name] for one in sighted]))
                first = SCORES[task][0][1]
                pairs = [[one["lengths"][length][seen][first] for seen in ("own", "other")] for one in sighted]
                cells.append(cell([other for _, other in pairs]))
                for _, name in SCORES[task]:
                    cells.append(cell([one["lengths"][length]["other"][name] for one in blind]))
                lines.append(f"| {' | '.join(cells)} |")
        if lines:
            heads = [title, "vectors", "M parameters", "seeds", *(head for head, _ in SCORES[task])]
            heads += ["with exchanged images", *(f"blind: {head}" for head, _ in SCORES[task])]
            pieces.append("\n".join([f"*{task}*", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]))
    return "\n\n".join(pieces)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", help="folder with captions/flickr8k_1k, vqa/easy_vqa, vision and lm")
    parser.add_argument("--further", help="a second tower, folder or id; without it what needs one is left out")
    parser.add_argument("--vision", help="another first tower, folder or id")
    parser.add_argument("--text", help="another language model, folder or id")
    parser.add_argument("--only", nargs="+", help="tables, or candidates")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blind_seeds", type=int, nargs="*", default=[0, 1, 2], help="of the blind twins")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4, help="images a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--images", type=int, default=600, help="to train on, of each task")
    parser.add_argument("--test_images", type=int, default=200)
    parser.add_argument("--held_out", type=int, default=0, help="test on so many of the images to train on, and on no others")
    parser.add_argument("--tower_side", type=int, default=192, help="of the images that the towers see")
    parser.add_argument("--side", type=int, default=672, help="of the images of small text")
    parser.add_argument("--height", type=int, default=28, help="of its words, in pixels")
    parser.add_argument(
        "--store", default="build/connectors", help="folder of towers and features, which a second run finds there"
    )
    parser.add_argument("--output", type=Path, default=Path("connectors.json"))
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the tables too")
    args = parser.parse_args(arguments)

    said = ("only", "tasks", "seeds", "blind_seeds", "store", "output", "table")
    settings = {name: value for name, value in vars(args).items() if name not in said}
    results = kept_runs(args.output, settings)
    data = Data(args)
    wanted = [
        (key, candidate, task, seed, twin)
        for seed in args.seeds
        for twin in ("sighted", "blind")
        for key, candidate in CANDIDATES.items()
        for task in candidate.tasks
        if task in args.tasks and (not args.only or candidate.table in args.only or candidate.name in args.only)
        if max(candidate.towers) < len(data.towers) and (twin == "sighted" or (candidate.twin and seed in args.blind_seeds))
    ]
    begin = time.monotonic()
    for number, (key, candidate, task, seed, twin) in enumerate(wanted, 1):
        known = results["runs"].setdefault(f"{key}, {task}", {}).setdefault(twin, {})
        if str(seed) in known:
            continue
        known[str(seed)] = run(candidate, task, seed, twin == "blind", data, args)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(
            f"{number} of {len(wanted)}, {time.monotonic() - begin:.0f} s: {key}, {task}, {twin}, {seed}: {known[str(seed)]}",
            flush=True,
        )
    if args.table is not None:
        args.table.write_text(tables(results) + "\n", encoding="utf-8")
    print(tables(results))
    return results


if __name__ == "__main__":
    main()
