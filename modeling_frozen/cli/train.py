"""`frozen-prefix train`: a connector between two frozen parents, by `Trainer`, from one file of settings or flags."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


TAKES_OTHERS = True  # every field of TrainingArguments

_EPILOG = """\
Every field of transformers' TrainingArguments is a flag too (--learning_rate 1e-3, --num_train_epochs 3, --push_to_hub …).
Those that you leave out follow the sizes of language model and data, and are printed with their reasons.

  frozen-prefix train --vision google/siglip2-base-patch16-224 --text Qwen/Qwen3-0.6B \\
      --dataset llava.json --image_root images --output_dir eyes
  frozen-prefix train --model eyes --lora 16 --dataset questions.json --output_dir assistant    # a second stage
  frozen-prefix train --config eyes.yaml --learning_rate 1e-3    # names as above, without dashes; flags win over the file
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML: any of these settings, and fields of TrainingArguments")
    add("--vision", metavar="ID", help="vision tower: Hub id or folder")
    add("--text", metavar="ID", help="language model: Hub id or folder")
    add("--model", metavar="CHECKPOINT", help="go on with a trained connector, in place of --vision and --text")
    add("--lora", type=int, metavar="RANK", help="with --model: LoRA in the language model, beside its trained connector")
    add("--dataset", nargs="+", help="any form of load_image_text: file, files of one set, folder, or Hub id")
    add("--image_root", metavar="FOLDER", help="of relative image paths (default: the file's own)")
    add("--format", default="auto", help="of load_image_text (default: found by the fields)")
    add("--held_out", type=float, metavar="SHARE", help="of the images, where the data have no validation split; 0 for none")
    add("--streaming", action="store_true", help="read rows as they come; set --max_steps")
    add("--on_error", default="raise", choices=("raise", "skip"), help="at rows and images that can't be read")
    add("--output_dir", default="eyes", metavar="FOLDER", help="of the trained model (default: eyes)")
    add("--resume", action="store_true", help="go on at the last checkpoint in --output_dir, where there is one")
    add("--connector", default="mlp", metavar="TYPE", help="see docs/connectors.md (default: mlp)")
    add("--connector_config", metavar="JSON", help="options of the connector")
    add("--prefix_length", type=int, metavar="N", help="vectors an image, for connectors that choose it")
    add(
        "--vision_features", default="default", choices=("default", "full", "pooled"), help="positions, or one vector an image"
    )
    add("--dtype", default="auto", help="of the two parents (default: as they were saved)")
    add("--question", metavar="TEXT", help="asked of a photo with a caption (default: in a chat model, 'Describe the photo.')")
    add("--no_chat", action="store_true", help="ask outside of the language model's own turns")
    add("--all_texts", action="store_true", help="all captions of an image in one batch; batch sizes then count images")
    add("--max_length", type=int, metavar="N", help="tokens of a row, placeholders included (default: the tokenizer's)")
    add("--cache_features", action="store_true", help="run the tower once over each image, and train from what it gave")


# ------------------------------------------------------------------------------------------------------------- settings


def read_settings(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """Our settings; those of `TrainingArguments` in the file; and the flags that are `TrainingArguments`'."""
    from transformers import TrainingArguments

    from ..training.arguments import _nearest

    args, others = parser.parse_known_args(arguments)
    if args.config is None:
        return args, {}, others
    own, theirs = set(vars(parser.parse_args([]))), {field.name for field in fields(TrainingArguments)}
    written = _read_yaml(args.config)
    for name in written:
        if name not in own | theirs or name == "config":
            raise ValueError(f"{args.config}: {_nearest(name, own | theirs)} [errors.md#choices]")
    parser.set_defaults(**{name: value for name, value in written.items() if name in own})
    args, others = parser.parse_known_args(arguments)
    return args, {name: value for name, value in written.items() if name not in own}, others


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())} [errors.md#command]") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: write `name: value` on each line. [errors.md#command]")
    return dict(content)


def _own_names() -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return list(vars(parser.parse_args([])))


# ------------------------------------------------------------------------------------------------------- data and model


def load_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """Rows to train on, and rows that are held out; None for none."""
    from ..data.formats import load_image_text
    from ..data.splits import load_splits

    source = args.dataset[0] if len(args.dataset) == 1 else args.dataset
    options = {"format": args.format, "image_root": args.image_root, "on_error": args.on_error}
    if args.streaming:
        from ..data.formats import SplitError

        try:
            return load_image_text(source, streaming=True, **options), None
        except SplitError:
            return load_image_text(source, split="train", streaming=True, **options), None
    share = 0.05 if args.held_out is None else args.held_out
    try:
        rows = load_splits(source, ("train", "validation"), share=share, **options)
    except ValueError as error:
        if "too few for a share" in str(error):
            raise ValueError(
                f"{str(error).partition(' [errors.md#')[0]} Pass --held_out 0, or a larger share. [errors.md#command]"
            ) from error
        raise
    return rows["train"], rows.get("validation")


def build_model(args: argparse.Namespace) -> tuple[Any, Any]:
    from ..modeling_frozen_prefix import FrozenPrefixForConditionalGeneration
    from ..processors import FrozenPrefixProcessor

    if args.model is not None:
        model = FrozenPrefixForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype)
        return model, FrozenPrefixProcessor.from_pretrained(args.model)
    config = args.connector_config or {}
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError as error:
            raise ValueError(f"--connector_config {config!r} is no JSON: {error}. [errors.md#command]") from error
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type=args.connector, connector_config=config, prefix_length=args.prefix_length,
        vision_feature_select_strategy=args.vision_features, dtype=args.dtype,
    )  # fmt: skip
    return model, FrozenPrefixProcessor.from_model(model)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for settings that don't go together, before anything is read."""
    if (args.model is None) == (args.vision is None and args.text is None):
        raise ValueError(
            "Give the two parents, --vision ID --text ID, or --model CHECKPOINT to go on with one. [errors.md#command]"
        )
    if args.model is None and (args.vision is None or args.text is None):
        missing = "--vision" if args.vision is None else "--text"
        raise ValueError(f"{missing} ID is missing: a connector stands between two parents. [errors.md#command]")
    if args.lora is not None and args.lora < 1:
        raise ValueError(f"--lora {args.lora} must be a rank, at least 1; leave it out for none. [errors.md#range]")
    if args.lora is not None and args.model is None:
        raise ValueError(
            f"--lora {args.lora} adapts a language model whose connector is trained: train one first without --lora, then go "
            "on with --model CHECKPOINT. [errors.md#command]"
        )
    if not args.dataset:
        raise ValueError(
            "Give rows to train on: --dataset FILE, FOLDER or ID (`frozen-prefix check` says what is wrong with them)."
            " [errors.md#command]"
        )
    args.dataset = [args.dataset] if isinstance(args.dataset, str) else list(args.dataset)
    if args.held_out is not None and not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out {args.held_out} must be a share of the images, from 0 to below 1. [errors.md#command]")
    if args.streaming and args.cache_features:
        raise ValueError(
            "--cache_features reads all rows before the first step, so --streaming makes no sense with it: leave one out."
            " [errors.md#command]"
        )


# ------------------------------------------------------------------------------------------------------------- training


def run(args: argparse.Namespace) -> None:
    args, in_file, flags = read_settings(args.parser, args.arguments)
    check(args)
    from transformers import Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from ..data.asking import Asking, AskingCollator
    from ..data.feature_cache import cache_vision_features
    from ..model_card.callback import FrozenPrefixHubCallback
    from ..model_card.card import write_model_card
    from ..training.arguments import training_arguments

    out, chosen = Path(args.output_dir), {**in_file, "output_dir": args.output_dir}
    named: dict[str, Any] = {"prog": "frozen-prefix train", "others": _own_names()}
    first = training_arguments(flags, **named, **chosen)  # before anything is read
    set_seed(first.seed)
    with first.main_process_first(desc="reading the data"):
        rows, held_out = load_data(args)
    model, processor = build_model(args)
    training = training_arguments(flags, model=model, rows=rows, **named, **{**_ours(held_out), **chosen})
    is_first = training.process_index == 0
    if held_out is not None and is_first:
        held_out.save_to_disk(str(out / "held_out"))
    asking = Asking(processor, args.question, chat=False if args.no_chat else None)
    options = {"asking": asking, "max_length": args.max_length, "on_error": args.on_error, "seed": training.seed}
    collator = AskingCollator(processor, all_texts=args.all_texts, **options)
    if args.cache_features:
        rows, held_out = (
            one if one is None else cache_vision_features(one, model, processor, cache_dir=out / "features")
            for one in (rows, held_out)
        )
    trained = model if args.lora is None else _with_lora(model, args.lora, verbose=is_first)
    trainer = Trainer(
        model=trained, args=training, train_dataset=rows, eval_dataset=held_out, data_collator=collator,
        processing_class=processor, callbacks=_callbacks(args, collator),
    )  # fmt: skip
    if training.push_to_hub:
        trainer.add_callback(FrozenPrefixHubCallback(trainer))
    sight = _watch(trainer, rows if held_out is None else held_out, AskingCollator(processor, **options), args.streaming)
    checkpoint = get_last_checkpoint(str(out)) if args.resume and out.is_dir() else training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    drawn = None
    if trainer.is_world_process_zero():
        dataset = args.dataset[0] if len(args.dataset) == 1 else ", ".join(args.dataset)
        write_model_card(out, model, training=trainer, dataset=dataset)
        drawn = _draw(trainer, out)
    if training.push_to_hub:
        trainer.push_to_hub()  # all processes: it saves once more, which gathers what FSDP2 dealt out
    if not trainer.is_world_process_zero():
        return
    print(_farewell(args, asking, out, sight, held_out is not None, drawn))


def _with_lora(model: Any, rank: int, verbose: bool) -> Any:
    from peft import get_peft_model

    from ..training.lora import lora_config

    tuned = get_peft_model(model, lora_config(model, r=rank, lora_alpha=2 * rank))
    if verbose:
        learnt = sum(weight.numel() for name, weight in tuned.named_parameters() if ".lora_" in name)
        print(f"LoRA of rank {rank}, scaled by 2: {learnt:,} parameters beside the connector's.")
    return tuned


def _ours(held_out: Any) -> dict[str, Any]:
    """What suits a run that is watched and may be stopped; a connector's checkpoints are small."""
    evaluated = {} if held_out is None else {"eval_strategy": "steps", "eval_steps": 0.1}
    return {"logging_steps": 10, "logging_first_step": True, "save_steps": 0.1, "save_total_limit": 2, **evaluated}


def _callbacks(args: argparse.Namespace, collator: Any) -> list[Any]:
    from ..training.skipped_rows import SkippedRowsCallback
    from ..training.streaming import StreamCallback

    return [StreamCallback()] if args.streaming else [SkippedRowsCallback(collator)]


def _watch(trainer: Any, rows: Any, collator: Any, streaming: bool) -> Any:
    """Says while it trains whether the loss depends on the image; None where that can't be seen."""
    from transformers.utils import logging

    from ..training.sight import SightCallback

    if streaming or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # no rows at hand, or but a part of the model
        return None
    sight = SightCallback(rows, collator)
    try:
        sight.compare(trainer.model)
    except ValueError as error:  # now, and not at step 50
        logging.get_logger(__name__).warning(f"Whether the loss depends on the image is not watched: {error}")
        return None
    trainer.add_callback(sight)
    return sight


def _draw(trainer: Any, out: Path) -> Path | None:
    from ..evaluation.plots import plot_training

    try:
        plot_training(trainer, out / "training.png")
    except (ImportError, ValueError):  # without matplotlib, or nothing was logged
        return None
    return out / "training.png"


def _farewell(args: argparse.Namespace, asking: Any, out: Path, sight: Any, has_held_out: bool, drawn: Path | None) -> str:
    seen = ""
    if sight is not None and sight.history:
        last = sight.history[-1]
        gap = last["wrong"] - last["right"]
        seen = f" Another image adds {gap:.3f} nats a token to the loss: " + (
            "it sees." if gap >= sight.smallest else "it is blind."
        )
    asked = "" if args.question is None else f' --question "{args.question}"'
    asked += " --no_chat" if args.no_chat else ""
    data = str(out / "held_out") if has_held_out else "FILE_OR_ID"
    lines = [
        f"\nSaved to {out}.{seen}" + ("" if drawn is None else f" The curves: {drawn}"),
        "What it says, and its scores beside blind:",
    ]
    lines += [f"  frozen-prefix caption PHOTO --model {out}{asked}"]
    lines += [f"  frozen-prefix evaluate --model {out} --dataset {data}{asked}"]
    return "\n".join(lines)


__all__ = ["TAKES_OTHERS", "add_arguments", "run"]
