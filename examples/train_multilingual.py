"""One connector, several languages: captions with the language named in the prompt, and translation helped by the image.

    python examples/train_multilingual.py                                                      (Multi30k, with its photos)
    python examples/train_multilingual.py --dataset TEXTS --images PHOTOS --image_key COLUMN

TEXTS, a Hub id or folder with the splits train and test, is a table of translations: a row has a caption in each language,
in columns `en`, `de`, …, and the photo, in a column `image`, or by its name in COLUMN, as `image_id` in PHOTOS, a set with the
columns `image` and `image_id`, says it too:

    en                       de                         fr                          cs                   flickr8k_image
    Two dogs play in snow.   Zwei Hunde im Schnee.      Deux chiens dans la neige.  Dva psi ve sněhu.    3585117340.jpg

as Multi30k has it (Elliott et al. 2016, arXiv 1605.00459). Where there is a column `en_masked` too, translations from English
start from that: a sentence without a word that the image alone tells (as in Caglayan et al. 2019, arXiv 1903.08678).
Each language is scored sighted and blind. Every field of `TrainingArguments` is a flag too. Without a network, with parents:

    python -m benchmarks.shapes.languages --output_dir languages
    python examples/train_multilingual.py --vision languages/tower --text languages/language_model --dataset languages/texts
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--vision", default="google/siglip2-base-patch16-224", help="vision tower: Hub id or folder")
    add("--text", default="Qwen/Qwen3-0.6B", help="language model: Hub id or folder")
    add("--dataset", default="romrawinjp/multi30k", help="the table of translations: Hub id or folder")
    names = ["English=en", "German=de", "French=fr", "Czech=cs"]
    add("--languages", nargs="+", default=names, help=f"names, as prompts say them, and columns (default: {' '.join(names)})")
    add("--images", help="photos, with the columns image and image_id, where the table has none")
    add("--image_key", default="flickr8k_image", help="column of the table that names the photo")
    add("--output_dir", type=Path, default=Path("multilingual"))
    add("--pictures", type=int, default=1200, help="images to train on, at most")
    add("--test_pictures", type=int, default=100, help="images to be scored, at most")
    add("--connector_config", type=json.loads, default={}, metavar="JSON")
    add("--prefix_length", type=int)
    add("--vision_features", default="default", help="'default' (every position) or 'pooled'")
    add("--max_new_tokens", type=int, default=24)
    return parser.parse_known_args(arguments)


def read(args: argparse.Namespace, split: str, limit: int, seed: int) -> Any:
    """Of each image a caption in each language, and a translation into each from another."""
    from datasets import Dataset, Features, Image, Value, load_dataset

    photos, rng, rows = {}, random.Random(f"{seed} {split}"), []
    for part in load_dataset(args.images).cast_column("image", Image(decode=False)).values() if args.images else ():
        photos.update({name: (part, index) for index, name in enumerate(part["image_id"])})
    columns = dict(one.split("=") for one in args.languages)
    table = load_dataset(args.dataset, split=split)
    for row in table if args.images else table.cast_column("image", Image(decode=False)):
        told = {name: row[column] for name, column in columns.items() if row[column]}
        if args.images:
            part, index = photos.get(row[args.image_key], (None, 0))
            row["image"] = part and part[index]["image"]
        if limit == 0:
            break
        if row["image"] is None or len(told) < 2:
            continue
        limit -= 1
        for name, sentence in told.items():
            source = rng.choice([other for other in told if other != name])
            start = row.get(f"{columns[source]}_masked") or told[source]
            common = {"image": row["image"], "answer": sentence, "language": name}
            rows.append({**common, "task": "caption", "prompt": f"{name} :"})
            rows.append({**common, "task": "translation", "prompt": f"{source} : {start} {name} :"})
    texts = {name: Value("string") for name in ("prompt", "answer", "language", "task")}
    return Dataset.from_list(rows, features=Features({"image": Image(), **texts}))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, flags = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, set_seed

    import modeling_frozen as frozen
    from modeling_frozen.evaluation import evaluate
    from modeling_frozen.metrics import exact_match
    from modeling_frozen.training.arguments import training_arguments

    out = args.output_dir
    chosen = {"output_dir": str(out / "training"), "logging_steps": 20, "save_strategy": "no"}
    seed = training_arguments(flags, **chosen).seed
    set_seed(seed)
    train, test = read(args, "train", args.pictures, seed), read(args, "test", args.test_pictures, seed)
    model = frozen.FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type="mlp", connector_config=args.connector_config,
        prefix_length=args.prefix_length, vision_feature_select_strategy=args.vision_features,
    )  # fmt: skip
    processor = frozen.FrozenPrefixProcessor.from_model(model)
    training = training_arguments(flags, model=model, rows=train, **chosen)
    stored = frozen.cache_vision_features(train, model, processor, cache_dir=out / "features")
    collator = frozen.DataCollatorForFrozenPrefix(processor)
    trainer = Trainer(model, training, train_dataset=stored, data_collator=collator, processing_class=processor)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(out / "eyes"))

    results: dict[str, Any] = {}
    for task in ("caption", "translation"):
        for language in test.unique("language"):
            rows = test.filter(lambda row, key=(task, language): (row["task"], row["language"]) == key)
            options = {"kinds": ("sighted", "blind"), "batch_size": 64, "max_new_tokens": args.max_new_tokens}
            result = evaluate(model, processor, rows, output_dir=out / f"{task}-{language}", seed=seed, **options)
            exact = {kind: exact_match(said, result.references) for kind, said in result.predictions.items()}
            results[f"{task} {language}"] = {k: {"exact_match": exact[k], **scores} for k, scores in result.scores.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, scores in results.items():
        cells = [f"{metric} {kind} {scores[kind][metric]:.3f}" for metric in ("exact_match", "cider") for kind in scores]
        print(f"{name:24}" + "   ".join(cells))
    return results


if __name__ == "__main__":
    main()
