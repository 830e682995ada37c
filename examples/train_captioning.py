"""Teaches a frozen language model to caption photos: any two parents, any dataset of captioned images, one connector.

    python examples/train_captioning.py --output_dir captioning
    python examples/train_captioning.py --vision TOWER --text MODEL --dataset DATASET --output_dir captioning

TOWER and MODEL are Hub ids or folders; DATASET is whatever `load_image_text` reads (a Hub id, a folder, COCO's or Karpathy's
file, LLaVA's JSON, …), with the splits train, validation and test, or without: then a tenth of its images each is held out.
Rows have one image, and one or several captions. The tower runs once per photo and crop, then the connector trains from
its features with `Trainer`, and the epoch of the lowest validation loss is kept. The test split is captioned by `generate()`
from the photos themselves, and scored beside the same model blind, with a random connector, and the language model alone.

Into `--output_dir` go the checkpoint, `results.json`, `predictions.jsonl`, `training.png`, `sheet.png` (the best, the middle
and the worst photos with what is said of them) and the store of features. Every field of `TrainingArguments` is a flag too. On
several devices `torchrun`, `accelerate launch`, `deepspeed` or, by `on_ray.py`, Ray start the script as it is
(docs/several_devices.md). Mean and deviation of several seeds, each in a folder: `frozen-prefix evaluate --model FOLDER …`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any


RECIPE = {
    "learning_rate": 4e-3, "num_train_epochs": 5, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64,
    "weight_decay": 0.1, "adam_beta2": 0.98, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "eval_strategy": "epoch",
    "save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": True, "logging_steps": 20,
    "logging_first_step": True, "remove_unused_columns": False,
}  # fmt: skip


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--vision", default="google/mobilenet_v2_1.0_224", help="vision tower: Hub id or folder")
    add("--text", default="openai-community/gpt2", help="language model: Hub id or folder")
    add("--dataset", nargs="+", default=["jxie/flickr8k"], help="any form of load_image_text, or several files of one set")
    add("--image_root", help="folder of relative image paths (default: the file's own)")
    add("--output_dir", type=Path, default=Path("captioning"))
    add("--connector", default="mlp")
    small = {"hidden_size": 64, "input_dropout": 0.5, "dropout": 0.3}
    add("--connector_config", type=json.loads, default=small, metavar="JSON")
    add("--prefix_length", type=int, default=48)
    add("--vision_features", default="pooled", help="'pooled' (one vector), 'default' (every position) or 'full'")
    add("--prompt", default="", help="words between the image and the caption, not learnt")
    add("--views", type=int, default=3, help="random crops of each training photo, beside the photo itself")
    add("--num_beams", type=int, default=5)
    add("--no_repeat_ngram_size", type=int, default=3)
    add("--max_new_tokens", type=int, default=30)
    add("--resume", action="store_true", help="go on at the last checkpoint in --output_dir")
    return parser.parse_known_args(arguments)


def tidy(caption: str) -> str:
    """A caption as a sentence that continues a text: " a dog runs." Language models know those best."""
    words = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.lower().split()))
    return f" {words.rstrip(' .')}."


def one_caption_a_row(photos: Any, prompt: str) -> Any:
    """Rows of photos, each with one of its captions as the answer that is learnt."""
    pairs = [(row, tidy(one)) for row, answers in enumerate(photos["answers"]) for one in sum(answers, [])]
    rows = photos.select([row for row, _ in pairs]).select_columns(["image"])
    return rows.add_column("prompt", [prompt] * len(pairs)).add_column("answer", [caption for _, caption in pairs])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, flags = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, set_seed

    from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from modeling_frozen.data.augmentation import random_crop
    from modeling_frozen.data.feature_cache import cache_vision_features
    from modeling_frozen.data.splits import load_questions
    from modeling_frozen.evaluation import evaluate
    from modeling_frozen.evaluation.plots import plot_sheet, plot_training
    from modeling_frozen.metrics import caption_scores
    from modeling_frozen.training.arguments import training_arguments
    from modeling_frozen.training.checkpoints import DeepSpeedCheckpointCallback, last_whole_checkpoint, whole_model
    from modeling_frozen.training.starting import start_as_words

    out, training = args.output_dir, training_arguments(flags, **RECIPE, output_dir=str(args.output_dir))
    photos = load_questions(args.dataset, ("train", "validation", "test"), image_root=args.image_root)
    set_seed(training.seed)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type=args.connector, connector_config=args.connector_config,
        prefix_length=args.prefix_length, vision_feature_select_strategy=args.vision_features,
    )  # fmt: skip
    processor = FrozenPrefixProcessor.from_model(model)
    start_as_words(model, processor, [tidy(answers[0][0]) for answers in photos["train"]["answers"]])
    crops = {"views": args.views + 1, "augment": random_crop, "plain_view": True} if args.views else {}
    store = {"cache_dir": out / "features", "dtype": "float32"}
    train = cache_vision_features(photos["train"], model, processor, **store, **crops)
    validation = cache_vision_features(photos["validation"], model, processor, **store)
    trainer = Trainer(
        model=model, args=training, train_dataset=one_caption_a_row(train, args.prompt),
        eval_dataset=one_caption_a_row(validation, args.prompt),
        data_collator=DataCollatorForFrozenPrefix(processor), processing_class=processor,
    )  # fmt: skip
    trainer.add_callback(DeepSpeedCheckpointCallback(trainer))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(out) if args.resume else training.resume_from_checkpoint)
    trainer.save_model()

    test = photos["test"].select_columns(["image"]).add_column("captions", [sum(one, []) for one in photos["test"]["answers"]])
    options = {name: getattr(args, name) for name in ("prompt", "num_beams", "no_repeat_ngram_size", "max_new_tokens")}
    options |= {"output_dir": out, "seed": training.seed, "batch_size": 25, "distributed": True}
    result = evaluate(whole_model(trainer, out), processor, test, **options)
    if trainer.is_world_process_zero():
        plot_training(trainer, out / "training.png")
        said, images = result.predictions["sighted"], test["image"][:]
        score = caption_scores(said, result.references)["cider"]
        plot_sheet(images, said, result.references, score, out / "sheet.png", each=3, score_name="CIDEr")
        print(result.table())
    return result.as_dict()


if __name__ == "__main__":
    main()
