"""Teaches a frozen language model to answer questions about images, with LoRA on top if asked.

    python examples/train_vqa.py                                 (VQA-RAD: what clinicians asked about X-rays and scans)
    python examples/train_vqa.py --dataset llava.json --image_root images --output_dir vqa
    python examples/train_vqa.py --dataset questions.json annotations.json --lora_rank 8
    torchrun --nproc_per_node 2 examples/train_vqa.py --dataset llava.json                        (on two processes)

The dataset is whatever `load_image_text` reads (a Hub id, a folder, VQA v2's two files, LLaVA's JSON, …), in the splits train
and test, or without: then a tenth of its images is held out. A chat model is asked in its own turns, any other by the
question alone. Every image is encoded once and then read from the store. The test split is answered four times: sighted,
blind (images shuffled), with a random connector, and by the language model alone. Into `--output_dir` go the checkpoint
(`eyes`), `results.json`, `predictions.jsonl`, `training.png` and `sheet.png` (images with answers). Every field of
`TrainingArguments` is a flag too; those left out follow the sizes of language model and data.

Without a network, parents and questions are made here:

    python -m modeling_frozen.shapes --output_dir shapes
    python examples/train_vqa.py --vision shapes/tower --text shapes/language_model --dataset shapes/questions
"""

import argparse
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--vision", default="google/siglip2-base-patch16-224", help="vision tower: Hub id or folder")
    add("--text", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="language model: Hub id or folder")
    usual = ["flaviagiammarino/vqa-rad"]  # columns: image, question, answer
    add("--dataset", nargs="+", default=usual, help="any form of load_image_text, or several files of one set")
    add("--image_root", help="folder of relative image paths (default: the file's own)")
    add("--output_dir", type=Path, default=Path("vqa"))
    add("--rows", type=int, help="train on so many, drawn at random (default: all)")
    add("--test_rows", type=int, default=400, help="score at most so many")
    add("--connector", default="mlp")
    add("--prefix_length", type=int, help="vectors an image, for connectors that choose it")
    add("--lora_rank", type=int, default=0, help="LoRA on the language model as well, of this rank (default: none)")
    add("--max_new_tokens", type=int, default=16)
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, flags = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, set_seed

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor, cache_vision_features
    from modeling_frozen.data.asking import Asking, AskingCollator
    from modeling_frozen.data.splits import load_splits
    from modeling_frozen.evaluation import evaluate
    from modeling_frozen.evaluation.plots import plot_sheet, plot_training
    from modeling_frozen.metrics import exact_match
    from modeling_frozen.training.arguments import training_arguments
    from modeling_frozen.training.checkpoints import whole_model

    out = args.output_dir
    chosen = {"output_dir": str(out / "training"), "logging_steps": 20, "logging_first_step": True, "save_strategy": "no"}
    training = training_arguments(flags, **chosen)
    set_seed(training.seed)
    with training.main_process_first():
        rows = load_splits(args.dataset, ("train", "test"), image_root=args.image_root, on_error="skip")
    rows = {split: some.shuffle(seed=training.seed) for split, some in rows.items()}
    train = rows["train"].select(range(min(args.rows or len(rows["train"]), len(rows["train"]))))
    test = rows["test"].select(range(min(args.test_rows, len(rows["test"]))))

    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type=args.connector, prefix_length=args.prefix_length
    )
    processor = FrozenPrefixProcessor.from_model(model)
    asking = Asking(processor)  # in the language model's own turns, where it has such
    training = training_arguments(flags, model=model, rows=train, **chosen)
    trained = model
    if args.lora_rank:
        from peft import get_peft_model

        from modeling_frozen.training.lora import lora_config

        trained = get_peft_model(model, lora_config(model, r=args.lora_rank, lora_alpha=2 * args.lora_rank))
    trainer = Trainer(
        model=trained,
        args=training,
        train_dataset=cache_vision_features(train, model, processor, cache_dir=out / "features"),
        data_collator=AskingCollator(processor, asking=asking),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(out / "eyes"))

    asked = [asking.row(row) for row in test]
    options = {"batch_size": 64, "max_new_tokens": args.max_new_tokens, "distributed": True}
    whole = model if args.lora_rank else whole_model(trainer, out / "eyes")
    result = evaluate(whole, processor, asked, task="vqa", output_dir=out, seed=training.seed, **options)
    if not trainer.is_world_process_zero():
        return {}
    plot_training(trainer, out / "training.png")
    said = result.predictions["sighted"]
    right = [exact_match([one], [some]) for one, some in zip(said, result.references, strict=True)]
    images = [row["image"] if "image" in row else row["images"][0] for row in test]
    lines = [f"{prompt}  {one}" for prompt, one in zip(result.prompts, said, strict=True)]
    plot_sheet(images, lines, result.references, right, out / "sheet.png", each=3, score_name="right")
    print(result.table())
    return result.as_dict()


if __name__ == "__main__":
    main()
