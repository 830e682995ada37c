"""A real language model gets eyes on real photos: in a quarter of an hour on two cores, by its own chat template.

    python examples/quickstart_real.py
    python examples/quickstart_real.py --vision ID_OR_FOLDER --text ID_OR_FOLDER --dataset ID_OR_FOLDER

Both parents are frozen, and a connector learns from captioned photos what to write between "user" and "Describe the photo."
The tower looks at each photo once. A step learns one caption of each of twenty photos, drawn anew every epoch; with
`--all_captions` all of each, of fewer photos. Into `--output_dir` go the checkpoint (`eyes`), `results.json`,
`predictions.jsonl`, `training.png` and `sheet.png`. The data set is of any form that `load_image_text` reads, in three splits.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vision", default="google/mobilenet_v2_1.0_224", help="vision tower: Hub id or folder")
    add("--text", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="language model: Hub id or folder")
    add("--dataset", default="jxie/flickr8k", help="captioned photos: Hub id, folder or file")
    add("--output_dir", type=Path, default=Path("quickstart_real_output"))
    add("--prompt", default="Describe the photo.")
    add("--question", default="What is the dog doing?", help="asked about the first photos at the end")
    add("--prefix_length", type=int, default=10)
    add("--connector_config", type=json.loads, default={}, metavar="JSON", help="options of the connector")
    add("--crops", type=int, default=0, help="random crops of each training photo, beside the photo itself")
    add("--steps", type=int, default=300)
    add("--photos_per_step", type=int, default=20)
    add("--all_captions", action="store_true", help="all captions of a photo in one step, in place of one of them")
    add("--learning_rate", type=float, default=3e-3)
    add("--test_photos", type=int, default=125)
    add("--num_beams", type=int, default=3)
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def read(args: argparse.Namespace, processor: Any, split: str, count: int | None = None) -> Any:
    """Photos with all their captions, each of which answers the prompt."""
    from modeling_frozen import load_image_text

    rows = load_image_text(args.dataset, split=split)
    prompt = processor.chat_prompt(args.prompt)

    def as_answers(row: dict[str, Any]) -> dict[str, Any]:
        captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
        return {"prompt": prompt, "answer": [caption.strip().replace(" .", ".") for caption in captions]}

    rows = rows.select(range(min(len(rows), count or len(rows))))
    return rows.map(as_answers, remove_columns=["text"])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, TrainingArguments, set_seed

    import modeling_frozen as frozen
    from modeling_frozen.data.augmentation import PhotoAugmentation
    from modeling_frozen.evaluation import evaluate
    from modeling_frozen.evaluation.plots import plot_sheet, plot_training
    from modeling_frozen.metrics import caption_scores
    from modeling_frozen.training.sight import SightCallback

    begin, processor_begin, out = time.time(), time.process_time(), args.output_dir
    set_seed(args.seed)
    model = frozen.FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type="mlp", connector_config=args.connector_config,
        prefix_length=args.prefix_length,
        vision_feature_select_strategy="pooled",  # one vector for a photo, from which the connector writes the whole prefix
    )  # fmt: skip
    processor = frozen.FrozenPrefixProcessor.from_model(model)
    crops = {"views": args.crops + 1, "augment": PhotoAugmentation(), "plain_view": True} if args.crops else {}
    seen = {
        split: frozen.cache_vision_features(
            read(args, processor, split), model, processor, cache_dir=out / "features", **options
        )
        for split, options in (("train", crops), ("validation", {}))
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out / "training"), max_steps=args.steps, per_device_train_batch_size=args.photos_per_step,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.steps // 20, weight_decay=0.05,
            adam_beta2=0.98, logging_steps=10, remove_unused_columns=False, save_strategy="no", report_to="none",
            seed=args.seed,
        ),
        train_dataset=seen["train"],
        data_collator=frozen.DataCollatorForFrozenPrefix(processor, all_texts=args.all_captions),
        processing_class=processor,
        callbacks=[SightCallback(seen["validation"], frozen.DataCollatorForFrozenPrefix(processor))],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "eyes"))
    plot_training(trainer, out / "training.png")

    test = read(args, processor, "test", args.test_photos)
    kinds = ("sighted", "blind", "random_connector")
    options = {"num_beams": args.num_beams, "max_new_tokens": 24, "batch_size": 25}
    results = evaluate(model, processor, test, kinds=kinds, output_dir=out, seed=args.seed, **options)
    said = results.predictions["sighted"]
    score = caption_scores(said, results.references)["cider"]
    images = [row["image"] for row in test]
    plot_sheet(images, said, results.references, score, out / "sheet.png", each=3, score_name="CIDEr")

    print(f"\n{results.table()}\n")
    for image, caption in list(zip(images, said, strict=True))[:5]:
        inputs = processor(images=image, text=processor.chat_prompt(args.question), return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        print(f"{caption}  {args.question} {processor.decode(ids, skip_special_tokens=True)}")
    used = time.process_time() - processor_begin
    print(f"\n{time.time() - begin:.0f} seconds, {used:.0f} of processor time. See {out / 'sheet.png'}.")
    print(f"Drop a photo into the page of\n    frozen-prefix demo {out / 'eyes'}")


if __name__ == "__main__":
    main()
