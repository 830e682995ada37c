"""Scores a checkpoint on a split, beside the scores that it gets without looking.

    python examples/evaluate_checkpoint.py --model ID_OR_FOLDER --dataset DATASET --task captioning --output_dir scores
    python examples/evaluate_checkpoint.py --model seed-0 seed-1 seed-2 --dataset DATASET --task vqa --output_dir scores

The dataset is whatever `load_image_text` reads: images with captions, or with prompts and answers. Beside the model as
it is (*sighted*) stand the same model with shuffled pictures (*blind*), with a *random connector*, and the *language model*
alone; brackets hold 95 % bootstrap intervals over rows, and with several checkpoints (of several seeds) the table gives mean
and standard deviation. `predictions.jsonl` is written row by row: a run that was stopped goes on where it was. A model card
takes its numbers from `results.json`: `write_model_card(folder, model, metrics=json.load(...))`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from modeling_frozen import load_image_text
from modeling_frozen.evaluation import KINDS, Evaluation, evaluate, over_seeds, table_over_seeds


@dataclass
class Arguments:
    model: list[str] = field(metadata={"help": "Checkpoints: Hub ids or folders; several are taken as seeds of one recipe."})
    dataset: list[str] = field(metadata={"help": "Any form of load_image_text, or several files of one set."})
    split: str | None = field(default=None, metadata={"help": "Of a dataset with several."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of relative image paths; default: the file's."})
    task: str = field(default="captioning", metadata={"help": "'captioning' or 'vqa'."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    prompt: str = field(default="", metadata={"help": "For a dataset without a column of prompts."})
    chat: bool = field(default=False, metadata={"help": "Ask the prompt in the language model's chat format."})
    rows: int | None = field(default=None, metadata={"help": "Only the first so many rows."})
    batch_size: int = 16
    max_new_tokens: int = 30
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    first_sentence: bool = field(default=False, metadata={"help": "Score what stands before the first full stop."})
    output_dir: Path = Path("scores")
    seed: int = 0


def first_sentence(text: str) -> str:
    return text.split(".")[0].strip()


def score(args: Arguments, name: str, folder: Path, dataset: Any) -> Evaluation:
    model = AutoModelForImageTextToText.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(name)
    return evaluate(
        model,
        processor,
        dataset,
        task=args.task,
        kinds=args.kinds,
        prompt=processor.chat_prompt(args.prompt) if args.chat else args.prompt,
        batch_size=args.batch_size,
        output_dir=folder,
        postprocess=first_sentence if args.first_sentence else str.strip,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    source = args.dataset[0] if len(args.dataset) == 1 else args.dataset
    dataset = load_image_text(source, split=args.split, image_root=args.image_root)
    if args.rows is not None:
        dataset = dataset.select(range(min(args.rows, len(dataset))))
    several = len(args.model) > 1
    results = []
    for index, name in enumerate(args.model):
        results.append(score(args, name, args.output_dir / f"{index}" if several else args.output_dir, dataset))
        print(f"\n{name}\n{results[-1].table()}")
    if not several:
        return results[0].as_dict()
    summary = over_seeds(results)
    (args.output_dir / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\nmean ± standard deviation over {len(results)} checkpoints\n{table_over_seeds(summary)}")
    return summary


if __name__ == "__main__":
    main()
