"""Teaches two frozen parents to tell classes by image and text together: any tower, any language model, one small head.

    python examples/classify.py               (for whom is it made? by photo and name of what a shop sells)
    python examples/classify.py --dataset DATASET --output_dir classifier

DATASET has columns of images, texts and labels (numbers, names, or `ClassLabel`); or it is whatever `load_image_text` reads:
the answer to a question is its class then. Without a split test, a tenth of the rows is held out. Accuracy and macro F1 on the
test rows stand beside those of the same model *blind* (images shuffled) and before training (*random connector*). Into
`--output_dir` go the checkpoint, its card and `results.json`. Every field of `TrainingArguments` is a flag too. Offline:

    python -m modeling_frozen.shapes --output_dir shapes
    python examples/classify.py --vision shapes/tower --text shapes/language_model --dataset shapes/questions
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
    add("--text", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="language model: Hub id or folder")
    add("--dataset", nargs="+", help="with labels; or any form of load_image_text (default: a shop's, with its columns)")
    add("--image_root", help="folder of relative image paths (default: the file's own)")
    for column in ("image", "text", "label"):
        add(f"--{column}_column", default=column)
    add("--output_dir", type=Path, default=Path("classifier"))
    add("--fused_inputs", nargs="+", default=["image", "text"], help="what the head reads (default: image text)")
    shop = {"dataset": ["ashraq/fashion-product-images-small"], "text_column": "productDisplayName", "label_column": "gender"}
    small = {"num_layers": 1, "num_heads": 4, "hidden_size": 96, "position_embedding": True}
    add("--connector_config", type=json.loads, default=small, metavar="JSON", help="of the resampler")
    add("--prefix_length", type=int, default=8)
    add("--balanced", action="store_true", help="weigh classes by how rare they are")
    args, flags = parser.parse_known_args(arguments)
    vars(args).update(shop if args.dataset is None else {})
    return args, flags


def read_rows(args: argparse.Namespace) -> Any:
    """Splits with columns of images, texts and labels (`ClassLabel`)."""
    from datasets import ClassLabel, DatasetDict, load_dataset

    from modeling_frozen.data.splits import load_questions

    try:
        rows = load_dataset(args.dataset[0])
        labelled = args.label_column in rows["train"].column_names
    except (OSError, ValueError):  # a form that `datasets` alone can't read
        labelled = False
    if labelled and "test" not in rows:
        rows = rows["train"].train_test_split(0.1, seed=0)
    if not labelled:
        loaded = load_questions(args.dataset, ("train", "test"), image_root=args.image_root, flat=True)
        columns = {"image": args.image_column, "question": args.text_column, "answer": args.label_column}
        rows = DatasetDict(loaded).rename_columns(columns)
    label = args.label_column
    if not isinstance(rows["train"].features[label], ClassLabel):
        values = sorted(rows["train"].unique(label))
        if unknown := set(rows["test"].unique(label)) - set(values):
            raise ValueError(f"{min(unknown)!r} is a class of the test rows, but of no row to train on.")
        rows = rows.map(lambda row: {label: values.index(row[label])})
        rows = rows.cast_column(label, ClassLabel(names=[str(value) for value in values]))
    return rows


def blind(rows: Any, image_column: str, seed: int) -> list[dict[str, Any]]:
    """The same rows, each with the image of another: one cycle through all."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    pairs = sorted(zip(order, order[1:] + order[:1], strict=True))
    return [{**rows[one], image_column: rows[other][image_column]} for one, other in pairs]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, flags = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, set_seed

    import modeling_frozen as frozen
    from modeling_frozen.metrics import classification_compute_metrics
    from modeling_frozen.model_card import write_model_card
    from modeling_frozen.training.arguments import training_arguments

    rows = read_rows(args)
    names = rows["train"].features[args.label_column].names
    chosen = {"output_dir": str(args.output_dir), "logging_steps": 25, "save_strategy": "no", "per_device_eval_batch_size": 64}
    set_seed(training_arguments(flags, **chosen).seed)
    counts = [max(1, rows["train"][args.label_column].count(index)) for index in range(len(names))]
    model = frozen.FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
        args.vision, args.text, id2label=dict(enumerate(names)), fused_inputs=args.fused_inputs,
        class_weights=[len(rows["train"]) / len(names) / count for count in counts] if args.balanced else None,
        connector_type="resampler", connector_config=args.connector_config, prefix_length=args.prefix_length,
    )  # fmt: skip
    processor = frozen.FrozenPrefixProcessor.from_model(model)
    training = training_arguments(flags, model=model, rows=rows["train"], **chosen)
    columns = {name: value for name, value in vars(args).items() if name.endswith("_column")}
    collator = frozen.DataCollatorForFrozenPrefixClassification(processor, **columns)
    scored = {"compute_metrics": classification_compute_metrics, "processing_class": processor}
    trainer = Trainer(model, training, collator, rows["train"], **scored)

    def score(some: Any) -> dict[str, float]:
        measured = trainer.evaluate(some)
        return {name: measured[f"eval_{name}"] for name in ("accuracy", "f1", "loss")}

    results = {"random_connector": score(rows["test"])}
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    results |= {"sighted": score(rows["test"]), "blind": score(blind(rows["test"], args.image_column, training.seed))}
    trainer.save_model()
    write_model_card(args.output_dir, model, training=trainer, metrics=results, dataset=" ".join(args.dataset))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, scores in results.items():
        print(f"{name:18}" + "".join(f"{key} {value:.3f}   " for key, value in scores.items()))
    return results


if __name__ == "__main__":
    main()
