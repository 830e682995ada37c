"""Finds images by words and words by images, and recommends images by those that somebody liked.

    python examples/search.py --output_dir search_output
    python examples/search.py --vision ID_OR_FOLDER --text ID_OR_FOLDER --dataset DATASET
    python examples/search.py --model ID_OR_FOLDER --dataset DATASET                        (a trained retrieval model)

DATASET is whatever `load_image_text` reads: photos with captions, in the splits train and test, or without: then a tenth of
the photos is held out. A retrieval model learns from the first which caption belongs to which photo, the image tower locked
(LiT); the others are the gallery. Embeddings go into a FAISS index through `datasets`, which is saved and read again. Written
to `--output_dir`: the retrieval model, the gallery with its index, `results.json`, `sheet.png`. Every field of
`TrainingArguments` is a flag too. Needs `pip install "frozen-prefix[search]"`. Without a network, on parents made here:

    python -m modeling_frozen.shapes --output_dir shapes
    python examples/search.py --vision shapes/tower --text shapes/language_model --dataset shapes/captions --learning_rate 1e-3
"""

import argparse
import json
import random
import textwrap
from pathlib import Path
from typing import Any


RECIPE = {
    "max_steps": 200, "per_device_train_batch_size": 64, "learning_rate": 5e-5, "lr_scheduler_type": "cosine",
    "warmup_steps": 20, "logging_steps": 50, "remove_unused_columns": False, "save_strategy": "no",
}  # fmt: skip


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--vision", default="google/mobilenet_v2_1.0_224", help="vision tower: Hub id or folder")
    add("--text", default="sentence-transformers/all-MiniLM-L6-v2", help="text model: Hub id or folder")
    add("--model", help="a trained retrieval model, in their place: Hub id or folder")
    add("--dataset", nargs="+", default=["jxie/flickr8k"], help="any form of load_image_text, or several files of one set")
    add("--image_root", help="folder of relative image paths (default: the file's own)")
    add("--output_dir", type=Path, default=Path("search_output"))
    add("--gallery", type=int, default=1000, help="how many images are searched, at most")
    add("--queries", nargs="+", help="words to search by (default: some captions)")
    return parser.parse_known_args(arguments)


def make_index(rows: Any, embeds: Any, folder: Path) -> Any:
    """Rows with a FAISS index of cosines, written to a folder and read again, as another program would."""
    from datasets import load_from_disk

    rows = rows.add_column("embedding", list(embeds.numpy()))
    rows.save_to_disk(folder)
    rows.add_faiss_index("embedding", metric_type=0)  # inner product
    rows.save_faiss_index("embedding", folder.with_suffix(".faiss"))
    rows = load_from_disk(folder)
    rows.load_faiss_index("embedding", folder.with_suffix(".faiss"))
    return rows


def search(index: Any, queries: Any, count: int) -> list[list[int]]:
    """For each query the rows that are nearest, the nearest first."""
    return [list(map(int, rows)) for rows in index.search_batch("embedding", queries.numpy(), k=count).total_indices]


def main(arguments: list[str] | None = None) -> None:
    args, flags = parse(arguments)  # before torch is imported, so that --help comes at once
    from datasets import Dataset
    from transformers import Trainer, set_seed

    from modeling_frozen import DataCollatorForFrozenPrefixRetrieval, FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor
    from modeling_frozen.data.feature_cache import cache_vision_features
    from modeling_frozen.data.splits import load_questions
    from modeling_frozen.evaluation.plots import finish, new_figure, show_image
    from modeling_frozen.evaluation.retrieval import embed_images, embed_texts, evaluate_retrieval
    from modeling_frozen.training.arguments import training_arguments

    training = training_arguments(flags, **RECIPE, output_dir=str(args.output_dir / "training"))
    photos = load_questions(args.dataset, ("train", "test"), image_root=args.image_root, seed=training.seed)
    for split, rows in photos.items():
        texts = [sum(answers, []) for answers in rows["answers"]]
        photos[split] = rows.select_columns(["image"]).add_column("text", texts)
    if args.model is None:
        set_seed(training.seed)
        lit = {"trainable": ("connector", "text")}  # the image tower is locked
        model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(args.vision, args.text, **lit)
        processor = FrozenPrefixProcessor.from_model(model)
        seen = cache_vision_features(photos["train"], model, processor, cache_dir=args.output_dir / "features")
        Trainer(model, training, train_dataset=seen, data_collator=DataCollatorForFrozenPrefixRetrieval(processor)).train()
        model.eval().save_pretrained(args.output_dir / "retrieval_model")
        processor.save_pretrained(args.output_dir / "retrieval_model")
    else:
        model = FrozenPrefixForImageTextRetrieval.from_pretrained(args.model)
        processor = FrozenPrefixProcessor.from_pretrained(args.model)
    gallery = photos["test"].select(range(min(args.gallery, len(photos["test"]))))
    captions = list(dict.fromkeys(text for texts in gallery["text"] for text in texts))
    seen, read = embed_images(model, processor, gallery["image"][:]), embed_texts(model, processor, captions)
    images = make_index(gallery.select_columns(["image"]), seen, args.output_dir / "pictures")
    texts = make_index(Dataset.from_dict({"text": captions}), read, args.output_dir / "texts")
    recall = evaluate_retrieval(model, processor, gallery["image"][:], gallery["text"][:])
    results = json.dumps({"gallery": len(gallery), "texts": len(captions), **recall}, indent=2)
    (args.output_dir / "results.json").write_text(results + "\n")
    rng = random.Random(training.seed)
    queries = args.queries or rng.sample(captions, 4)
    lines = list(zip(queries, search(images, embed_texts(model, processor, queries), 8), strict=True))
    liked = rng.sample(range(len(gallery)), 3)
    nearest = search(images, seen[liked].mean(0, keepdim=True), 8)[0]  # to the mean of what somebody liked
    offered = [row for row in nearest if row not in liked][:5]
    lines.append(("three that somebody liked, and five that are like them", [*liked, *offered]))
    figure = new_figure(15, 2.3 * len(lines))
    for line, (title, found) in enumerate(lines):
        for column, row in enumerate(found):
            axes = figure.add_subplot(len(lines), 8, 8 * line + column + 1)
            axes.set_title("" if column else textwrap.shorten(title, 90), loc="left")
            show_image(axes, gallery[row]["image"])
    finish(figure, args.output_dir / "sheet.png")
    said = [f"photo {row}: {captions[text]}" for row, (text,) in zip(liked, search(texts, seen[liked], 1), strict=True)]
    print(*said, results, sep="\n")


if __name__ == "__main__":
    main()
