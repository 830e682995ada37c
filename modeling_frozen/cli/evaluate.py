"""`frozen-prefix evaluate`: a checkpoint's scores on a split, beside those that it gets without looking."""

import argparse
from typing import Any


_EPILOG = """\
Beside the model as it is (sighted) stand the same model with shuffled images (blind), with a random connector, and the
language model alone; brackets hold 95 % bootstrap intervals over rows. Of several checkpoints
mean and standard deviation are given.
OUTPUT_DIR gets results.json, from which a card takes its numbers, and predictions.jsonl, row by row: a run that was stopped
goes on where it was.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="MODEL", help="checkpoints; several are taken as seeds of one recipe")
    add("--dataset", nargs="+", required=True, help="any form of load_image_text, or several files of one set")
    add("--split", help="of a dataset with several")
    add("--image_root", metavar="FOLDER", help="of relative image paths (default: the file's own)")
    add("--task", choices=("captioning", "vqa"), help="default: vqa where rows have a question, else captioning")
    add("--kinds", nargs="+", help="of sighted, blind, random_connector, language_model (default: all)")
    add("--question", metavar="TEXT", help="asked of a photo with a caption (default: in a chat model, 'Describe the photo.')")
    add("--no_chat", action="store_true", help="ask outside of the language model's own turns")
    add("--rows", type=int, metavar="N", help="only the first so many")
    add("--batch_size", type=int, default=16, metavar="N", help="default: 16")
    add("--max_new_tokens", type=int, default=30, metavar="N", help="default: 30")
    add("--num_beams", type=int, default=1, metavar="N", help="default: 1, greedy")
    add("--no_repeat_ngram_size", type=int, default=0, metavar="N", help="default: 0, anything may be said again")
    add("--first_sentence", action="store_true", help="score what stands before the first full stop")
    add("--output_dir", default="scores", metavar="OUTPUT_DIR", help="default: scores")
    add("--write_card", action="store_true", help="write the scores into the model's card (of one checkpoint, in a folder)")
    add("--seed", type=int, default=0, help="of the shuffle, the random connector and the bootstrap (default: 0)")
    add("--device", help="default: the GPU where there is one")


def first_sentence(text: str) -> str:
    return text.split(".")[0].strip()


def run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from ..data.formats import load_image_text
    from ..evaluation import over_seeds, table_over_seeds

    several, out = len(args.model) > 1, Path(args.output_dir)
    if args.write_card and (several or not Path(args.model[0]).is_dir()):
        raise ValueError("--write_card writes into the folder of one checkpoint: name one that lies here. [errors.md#command]")
    source = args.dataset[0] if len(args.dataset) == 1 else args.dataset
    dataset = load_image_text(source, split=args.split, image_root=args.image_root)
    if args.rows is not None:
        dataset = dataset.select(range(min(args.rows, len(dataset))))
    results = []
    for index, name in enumerate(args.model):
        model, result = _score(args, name, out / f"{index}" if several else out, dataset)
        results.append(result)
        print(f"\n{name}\n{result.table()}")
    if several:
        summary = over_seeds(results)
        (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"\nmean ± standard deviation over {len(results)} checkpoints\n{table_over_seeds(summary)}")
    elif args.write_card:
        from ..model_card.card import write_model_card

        metrics = {**results[0].as_dict(), "dataset": str(source)}
        print(f"\nThe card: {write_model_card(args.model[0], model, metrics=metrics)}")


def _score(args: argparse.Namespace, name: str, folder: Any, dataset: Any) -> tuple[Any, Any]:
    from ..data.asking import Asking
    from ..evaluation import KINDS, evaluate
    from ..serving.answering import load

    model, processor = load(name, args.device)
    asking = Asking(processor, args.question, chat=False if args.no_chat else None)
    # A caption is asked for as `prompt`, so that what is kept of a run names it.
    captions = not {"prompt", "messages"} & set(dataset.column_names)
    task = args.task or ("captioning" if captions else "vqa")
    result = evaluate(
        model,
        processor,
        dataset if captions else [asking.row(row) for row in dataset],
        task=task,
        kinds=args.kinds or KINDS,
        prompt=asking.prompt() if captions else "",
        batch_size=args.batch_size,
        output_dir=folder,
        postprocess=first_sentence if args.first_sentence else str.strip,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
    return model, result


__all__ = ["add_arguments", "run"]
