"""Finds pictures by words and words by pictures, and recommends pictures by those that somebody liked.

    python examples/search.py --output_dir search_output
    python examples/search.py --vision ID_OR_FOLDER --text ID_OR_FOLDER --dataset DATASET      (real parents, real photos)
    python examples/search.py --model ID_OR_FOLDER --dataset DATASET                              (a trained retrieval model)

DATASET is whatever `load_image_text` reads: photos with captions, in the splits train and test, or without: then a tenth of
the photos is held out. By default everything is made here: two tiny parents that never met (`shapes.py`), pictures of scenes,
and a retrieval model that learns which sentence belongs to which picture. Its gallery holds scenes that nobody met.
Embeddings go into a FAISS index through `datasets`, which is saved and loaded again. Written to `--output_dir`: the retrieval
model, the gallery with its index, `results.json`, and `sheet.png`. Needs `pip install "frozen-prefix[search]"`.
"""

import json
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset, load_from_disk
from own_data import read_splits
from PIL import ImageOps
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_frozen import DataCollatorForFrozenPrefixRetrieval, FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.evaluation.retrieval import embed_images, embed_texts, evaluate_retrieval
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import draw, split_scenes


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("search_output"), metadata={"help": "Where everything is written."})
    model: str | None = field(default=None, metadata={"help": "A trained retrieval model: Hub id or folder."})
    vision: str | None = field(default=None, metadata={"help": "A real vision tower: Hub id or folder."})
    text: str | None = field(default=None, metadata={"help": "A real text model: Hub id or folder."})
    dataset: list[str] | None = field(
        default=None, metadata={"help": "Photos with captions in any form of load_image_text, or several files of one set."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of relative image paths; default: the file's."})
    trainable: list[str] = field(default_factory=lambda: ["connector", "text"])
    tower_steps: int = field(default=1000, metadata={"help": "Steps of training for the tiny tower."})
    language_model_steps: int = field(default=110, metadata={"help": "Steps of training for the tiny language model."})
    steps: int = field(default=200, metadata={"help": "Steps of training for the retrieval model."})
    batch_size: int = 64
    learning_rate: float = 1e-3
    gallery: int = field(default=96, metadata={"help": "How many pictures are searched, at most."})
    queries: list[str] = field(default_factory=list, metadata={"help": "Words to search by; default: some captions."})
    seed: int = 0


def make_rows(args: Arguments) -> tuple[Dataset, Dataset]:
    """Pictures with their sentences: to learn from, and to search among."""
    if args.dataset is not None:
        splits = read_splits(args.dataset, ("train", "test"), args.image_root, args.seed)
        for name, rows in splits.items():
            texts = [sum(some, []) for some in rows["answers"]]
            splits[name] = rows.select_columns(["image"]).add_column("text", texts)
        return splits["train"], splits["test"].select(range(min(args.gallery, len(splits["test"]))))
    rng, (known, new) = random.Random(args.seed), split_scenes()
    chosen = [rng.choice(known) for _ in range(1500)], new[: args.gallery]
    return tuple(
        Dataset.from_dict({"image": [draw(scene, rng) for scene in scenes], "text": [scene.sentence for scene in scenes]})
        for scenes in chosen
    )


def train(args: Arguments, rows: Dataset) -> tuple[FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor]:
    out = args.output_dir
    tower, words = args.vision or str(out / "tower"), args.text or str(out / "language_model")
    if args.vision is None:
        train_tower(Path(tower), args.tower_steps, args.seed)
    if args.text is None:
        train_language_model(Path(words), args.language_model_steps, args.seed)
    set_seed(args.seed)
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        tower, words, projection_dim=128, text_pooling="mean", trainable=args.trainable
    )
    processor = FrozenPrefixProcessor.from_model(model)
    if "vision" not in args.trainable:  # a locked tower sees each picture once
        rows = cache_vision_features(rows, model, processor, cache_dir=out / "features", num_workers=0)
    arguments = TrainingArguments(
        str(out / "training"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=20, logging_steps=50,
        remove_unused_columns=False, save_strategy="no", report_to="none", seed=args.seed,
    )  # fmt: skip
    collator = DataCollatorForFrozenPrefixRetrieval(processor)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    model.eval().save_pretrained(out / "retrieval_model")
    processor.save_pretrained(out / "retrieval_model")
    return model, processor


def make_index(rows: Dataset, column: str, embeds: torch.Tensor, folder: Path) -> Dataset:
    """Rows with a FAISS index of cosines, written to a folder and read again, as another program would."""
    rows = rows.add_column("embedding", list(embeds.numpy()))
    rows.save_to_disk(folder / column)
    rows.add_faiss_index("embedding", metric_type=0)  # inner product
    rows.save_faiss_index("embedding", folder / f"{column}.faiss")
    rows = load_from_disk(folder / column)
    rows.load_faiss_index("embedding", folder / f"{column}.faiss")
    return rows


def search(index: Dataset, queries: torch.Tensor, count: int) -> list[list[int]]:
    """For each query the rows that are nearest, the nearest first."""
    return [list(rows) for rows in index.search_batch("embedding", queries.numpy(), k=count).total_indices]


def recommend(index: Dataset, embeds: torch.Tensor, liked: Sequence[int], count: int) -> list[int]:
    """Rows for somebody who liked these: the nearest to their mean, without themselves."""
    user = torch.nn.functional.normalize(embeds[list(liked)].mean(0), dim=0)
    nearest = search(index, user[None], count + len(liked))[0]
    return [row for row in nearest if row not in liked][:count]


def draw_sheet(path: Path, pictures: Dataset, lines: list[tuple[str, list[int], list[str]]]) -> None:
    """One line per question: its words, then the pictures that answer it, each with what is written beneath it."""
    width = max(len(rows) for _, rows, _ in lines)
    figure, axes = plt.subplots(len(lines), width, figsize=(1.9 * width, 2.7 * len(lines)), squeeze=False)
    for line, (title, rows, notes) in zip(axes, lines, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, row, note in zip(line, rows, notes, strict=False):
            axis.imshow(ImageOps.fit(pictures[int(row)]["image"].convert("RGB"), (160, 160)))
            axis.text(0.5, -0.04, note, transform=axis.transAxes, fontsize=8, ha="center", va="top")
        line[0].text(0, 1.06, title, transform=line[0].transAxes, fontsize=11, fontweight="bold", va="bottom")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.96, bottom=0.04, wspace=0.08, hspace=0.42)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> dict:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    known, gallery = make_rows(args)
    if args.model is None:
        model, processor = train(args, known)
    else:
        model = FrozenPrefixForImageTextRetrieval.from_pretrained(args.model)
        processor = FrozenPrefixProcessor.from_pretrained(args.model)

    each = [[one] if isinstance(one, str) else list(one) for one in gallery["text"]]
    captions = list(dict.fromkeys(text for several in each for text in several))
    seen = embed_images(model, processor, gallery["image"])
    read = embed_texts(model, processor, captions)
    pictures = make_index(gallery.select_columns(["image"]), "pictures", seen, args.output_dir)
    texts = make_index(Dataset.from_dict({"text": captions}), "texts", read, args.output_dir)

    # Pictures by words, words by pictures. The index finds what the whole square of likenesses says.
    rng = random.Random(args.seed)
    queries = args.queries or rng.sample(captions, 4)
    by_words = search(pictures, embed_texts(model, processor, queries), 8)
    chosen = rng.sample(range(len(gallery)), 8)
    by_picture = [[captions[row] for row in rows] for rows in search(texts, seen[chosen], 3)]
    results = {"gallery": len(gallery), "texts": sum(map(len, each))}
    results |= evaluate_retrieval(model, processor, gallery["image"], each)

    # Somebody likes three pictures of one kind; what is recommended is like them.
    if args.dataset is None:
        colours = [several[0].split()[2] for several in each]
        liked = [row for row, colour in enumerate(colours) if colour == "red"][:3]
    else:
        liked = search(pictures, embed_texts(model, processor, captions[:1]), 3)[0]
    offered = recommend(pictures, seen, liked, 5)
    if args.dataset is None:
        rest = [colour for row, colour in enumerate(colours) if row not in liked]
        results["recommended_of_the_liked_colour"] = float(np.mean([colours[row] == "red" for row in offered]))
        results["chance_of_that"] = rest.count("red") / len(rest)

    lines = [(f"“{textwrap.shorten(query, 90)}”", rows, [""] * 8) for query, rows in zip(queries, by_words, strict=True)]
    notes = [textwrap.fill(textwrap.shorten(rows[0], 66), 24) for rows in by_picture]
    lines += [("Captions nearest to each picture:", chosen, notes)]
    lines += [("Three that somebody liked, and five recommended:", [*liked, *offered], ["liked"] * 3 + ["offered"] * 5)]
    draw_sheet(args.output_dir / "sheet.png", gallery, lines)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"See {args.output_dir / 'sheet.png'}; the index lies in {args.output_dir / 'pictures.faiss'}.")
    return results


if __name__ == "__main__":
    main()
