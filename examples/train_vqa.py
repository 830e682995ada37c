"""Teaches a frozen language model to answer questions about pictures, with LoRA on top if asked.

    python examples/train_vqa.py                                          (parents and pictures made here, see `shapes.py`)
    python examples/train_vqa.py --lora_rank 8
    python examples/train_vqa.py --vision TOWER --text MODEL --dataset DATASET --template "Question: {} Answer:"
    torchrun --nproc_per_node 2 examples/train_vqa.py                     (on two processes)

DATASET is whatever `load_image_text` reads (a Hub id, a folder, VQA v2's two files, LLaVA's JSON, …), rows with one image, in
the splits train and test, or without: then a tenth of its images is held out. Every picture is encoded once and then read from
the store. The test split is answered four times: sighted, blind (pictures shuffled), with a random connector, and by the
language model alone. Into `--output_dir` go `results.json`, `predictions.jsonl`, the checkpoint, `training.png`, `sheet.png`
(pictures with answers), and `sightedness.png` (what each word of the answers owes to the picture).
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, Image, Value
from own_data import ExampleTrainingArguments, read_splits
from transformers import HfArgumentParser, Trainer, set_seed

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.evaluation import Evaluation, evaluate
from modeling_frozen.evaluation.plots import plot_sheet, plot_training
from modeling_frozen.interpretation import sightedness
from modeling_frozen.metrics import exact_match
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import QUESTIONS, draw, split_scenes


@dataclass
class Arguments:
    vision: str | None = field(default=None, metadata={"help": "Vision tower: Hub id or folder; made here by default."})
    text: str | None = field(default=None, metadata={"help": "Language model: Hub id or folder; made here by default."})
    dataset: list[str] | None = field(
        default=None, metadata={"help": "Any form of load_image_text, or several files of one set; made here by default."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of relative image paths; default: the file's."})
    template: str = field(default="{}", metadata={"help": "The prompt; {} stands for the question."})
    rows: int = field(default=6000, metadata={"help": "Questions to train on, at most."})
    test_rows: int = field(default=400, metadata={"help": "Questions to be scored, at most."})
    connector: str = "mlp"
    prefix_length: int | None = None
    lora_rank: int = field(default=0, metadata={"help": "LoRA on the language model as well, of this rank; 0: none."})
    max_new_tokens: int = 4


@dataclass
class VQATrainingArguments(ExampleTrainingArguments):
    output_dir: str = "vqa"


def made_here(count: int, held_out: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Pictures of one coloured shape, and all questions about each. Scenes of the test split are met by nobody else."""
    rng, scenes = random.Random(seed), split_scenes()[held_out]
    for _ in range(count):
        scene = rng.choice(scenes)
        questions = list(QUESTIONS)
        yield {
            "image": draw(scene, rng),
            "questions": questions,
            "answers": [[scene.answer(one).removesuffix(" .")] for one in questions],
        }


def one_question_a_row(dataset: Dataset, args: Arguments, limit: int, seed: int) -> Dataset:
    """Rows `image`, `prompt`, `answer`: `limit` of them, drawn at random."""
    pairs = []
    for index, (asked, said) in enumerate(zip(dataset["questions"], dataset["answers"], strict=True)):
        pairs += [(index, args.template.format(one), answers) for one, answers in zip(asked, said, strict=True)]
    pairs = random.Random(seed).sample(pairs, min(limit, len(pairs)))
    rows = dataset.select([index for index, _, _ in pairs]).select_columns(["image"])
    rows = rows.add_column("prompt", [prompt for _, prompt, _ in pairs])
    return rows.add_column("answer", [answers for _, _, answers in pairs])


def parents(args: Arguments, folder: Path, seed: int) -> tuple[str, str]:
    """The two parents' folders or ids; those that are made here are trained once, by the first process."""
    tower, words = args.vision or str(folder / "tower"), args.text or str(folder / "language_model")
    with PartialState().main_process_first():
        if args.vision is None and not (Path(tower) / "config.json").is_file():
            train_tower(Path(tower), 1000, seed)
        if args.text is None and not (Path(words) / "config.json").is_file():
            train_language_model(Path(words), 110, seed)
    return tower, words


def read(args: Arguments, seed: int) -> dict[str, Dataset]:
    limits = {"train": args.rows, "test": args.test_rows}
    if args.dataset is not None:
        loaded = read_splits(args.dataset, list(limits), args.image_root, seed)
        return {split: one_question_a_row(loaded[split], args, limit, seed) for split, limit in limits.items()}
    columns = Features({"image": Image(), "questions": [Value("string")], "answers": [[Value("string")]]})
    made = {}
    for split, limit in limits.items():
        generator = partial(made_here, -(-limit // len(QUESTIONS)), split == "test", seed)
        rows = Dataset.from_list(list(generator()), features=columns)
        made[split] = one_question_a_row(rows, args, limit, seed)
    return made


def draw_plots(folder: Path, model: Any, processor: Any, trainer: Trainer, test: Dataset, result: Evaluation) -> None:
    """How training went, and some pictures with what was asked and said of them."""
    plot_training(trainer, folder / "training.png")
    few = range(min(64, len(test)))
    images, said = test.select(few)["image"][:], result.predictions["sighted"]
    lines = [f"{result.prompts[i]} {said[i]}" for i in few]
    right = [exact_match([said[i]], [result.references[i]]) for i in few]
    plot_sheet(images, lines, result.references[: len(few)], right, folder / "sheet.png", each=3, score_name="right")
    answers = [f" {some[0]}" for some in result.references[: len(few)]]
    sightedness(model, processor, images, answers, prompts=result.prompts[: len(few)]).plot(folder / "sightedness.png")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, training = HfArgumentParser((Arguments, VQATrainingArguments)).parse_args_into_dataclasses(arguments)
    folder = Path(training.output_dir)
    set_seed(training.seed)
    tower, words = parents(args, folder, training.seed)
    data = read(args, training.seed)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower, words, connector_type=args.connector, prefix_length=args.prefix_length
    )
    processor = FrozenPrefixProcessor.from_model(model)
    stored = cache_vision_features(data["train"], model, processor, cache_dir=folder / "features")
    trained = model
    if args.lora_rank:
        from peft import get_peft_model

        from modeling_frozen.lora import lora_config

        trained = get_peft_model(model, lora_config(model, r=args.lora_rank, lora_alpha=2 * args.lora_rank))
        trained.print_trainable_parameters()
    trainer = Trainer(
        model=trained,
        args=training,
        train_dataset=stored,
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(folder / "eyes"))
    if not trainer.is_world_process_zero():
        return {}
    result = evaluate(
        model,
        processor,
        data["test"],
        task="vqa",
        batch_size=64,
        output_dir=folder,
        postprocess=lambda text: text.split(".")[0].strip(),
        max_new_tokens=args.max_new_tokens,
    )
    draw_plots(folder, model, processor, trainer, data["test"], result)
    print(result.table())
    return result.as_dict()


if __name__ == "__main__":
    main()
