"""A real language model gets eyes on real photos: in a quarter of an hour on two cores, by its own chat template.

    python examples/quickstart_real.py
    python examples/quickstart_real.py --vision ID_OR_FOLDER --text ID_OR_FOLDER --dataset ID_OR_FOLDER

Both parents are frozen, and a connector learns from captioned photos what to write between "user" and "Describe the photo."
The tower looks at each photo once; all captions of a photo are learnt behind one reading of it. Into `--output_dir` go the
checkpoint (`eyes`), `results.json`, `predictions.jsonl`, `training.png` and `sheet.png`: photos with what is said of them. The
data set is of any form that `load_image_text` reads, with the splits train, validation and test.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
    load_image_text,
)
from modeling_frozen.data.augmentation import PhotoAugmentation
from modeling_frozen.evaluation import evaluate
from modeling_frozen.evaluation.plots import plot_sheet, plot_training
from modeling_frozen.metrics import caption_scores
from modeling_frozen.training.sight import SightCallback


@dataclass
class Arguments:
    vision: str = field(default="google/mobilenet_v2_1.0_224", metadata={"help": "Vision tower: Hub id or folder."})
    text: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Language model: Hub id or folder."})
    dataset: str = field(default="jxie/flickr8k", metadata={"help": "Captioned photos: Hub id, folder or file."})
    output_dir: Path = Path("quickstart_real_output")
    prompt: str = "Describe the photo."
    question: str = field(default="What is the dog doing?", metadata={"help": "Asked about the first photos at the end."})
    prefix_length: int = 10
    connector_config: str = field(default="{}", metadata={"help": "Options of the connector, as JSON."})
    crops: int = field(default=0, metadata={"help": "Random crops of each training photo, beside the photo itself."})
    steps: int = 480
    photos_per_step: int = 4
    learning_rate: float = 3e-3
    test_photos: int = 125
    num_beams: int = 3
    seed: int = 0


def read(args: Arguments, processor: Any, split: str, count: int | None = None) -> Any:
    """Photos with all their captions, each of which answers the prompt."""
    rows = load_image_text(args.dataset, split=split)
    prompt = processor.chat_prompt(args.prompt)

    def as_answers(row: dict[str, Any]) -> dict[str, Any]:
        captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
        return {"prompt": prompt, "answer": [caption.strip().replace(" .", ".") for caption in captions]}

    rows = rows.select(range(min(len(rows), count or len(rows))))
    return rows.map(as_answers, remove_columns=["text"])


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    begin, processor_begin, out = time.time(), time.process_time(), args.output_dir
    set_seed(args.seed)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision,
        args.text,
        connector_type="mlp",
        connector_config=json.loads(args.connector_config),
        prefix_length=args.prefix_length,
        vision_feature_select_strategy="pooled",  # one vector for a photo, from which the connector writes the whole prefix
    )
    processor = FrozenPrefixProcessor.from_model(model)
    crops = {"views": args.crops + 1, "augment": PhotoAugmentation(), "plain_view": True} if args.crops else {}
    seen = {
        split: cache_vision_features(read(args, processor, split), model, processor, cache_dir=out / "features", **options)
        for split, options in (("train", crops), ("validation", {}))
    }
    collator = DataCollatorForFrozenPrefix(processor, all_texts=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out / "training"), max_steps=args.steps, per_device_train_batch_size=args.photos_per_step,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.steps // 20, weight_decay=0.05,
            adam_beta2=0.98, logging_steps=10, remove_unused_columns=False, save_strategy="no", report_to="none",
            seed=args.seed,
        ),
        train_dataset=seen["train"],
        data_collator=collator,
        processing_class=processor,
        callbacks=[SightCallback(seen["validation"], DataCollatorForFrozenPrefix(processor))],
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
    print(
        f"\n{time.time() - begin:.0f} seconds, {used:.0f} of processor time. See {out / 'sheet.png'}; drop a photo into the "
        f"page of\n    frozen-prefix demo {out / 'eyes'}"
    )


if __name__ == "__main__":
    main()
