"""`frozen-prefix caption`: what a model says of photos, a line each."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders of files, or addresses")
    add("--model", required=True, metavar="MODEL", help="checkpoint: folder or Hub id")
    add("--question", metavar="TEXT", help="asked of each (default: in a chat model 'Describe the photo.', else nothing)")
    add("--no_chat", action="store_true", help="ask outside of the language model's own turns")
    add("--blind", action="store_true", help="say beside it what the model says of a plain grey image")
    add("--json", action="store_true", help="lines of JSON, which `frozen-prefix check` and `train` read too")
    add("--on_error", default="raise", choices=("raise", "skip"), help="at an image that can't be opened")
    add("--batch_size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--max_new_tokens", type=int, default=40, metavar="N", help="longest answer (default: 40)")
    add("--num_beams", type=int, default=1, metavar="N", help="of the search (default: 1, greedy)")
    add("--first_sentence", action="store_true", help="cut each answer at its first full stop")
    add("--device", help="default: the GPU where there is one")


def run(args: argparse.Namespace) -> int:
    import json
    import sys

    from PIL import Image

    from ..data.asking import Asking
    from ..processors import load_rgb_image
    from ..serving.answering import load
    from .images import files_of_images

    names = files_of_images(args.images)
    model, processor = load(args.model, args.device)
    prompt = Asking(processor, args.question, chat=False if args.no_chat else None).prompt()
    failed = 0
    for start in range(0, len(names), args.batch_size):
        opened = []
        for name in names[start : start + args.batch_size]:
            try:
                opened.append((name, load_rgb_image(name, name)))
            except ValueError as error:
                if args.on_error == "raise":
                    raise
                print(error, file=sys.stderr)
                failed += 1
        if not opened:
            continue
        said = _say(model, processor, [image for _, image in opened], prompt, args)
        grey = [Image.new("RGB", image.size, (128, 128, 128)) for _, image in opened]
        blind = _say(model, processor, grey, prompt, args) if args.blind else [None] * len(opened)
        for (name, _), text, unseen in zip(opened, said, blind, strict=True):
            if args.json:
                print(
                    json.dumps(
                        {"image": name, "text": text, **({} if unseen is None else {"blind": unseen})}, ensure_ascii=False
                    )
                )
            else:
                print(f"{name}: {text}" + ("" if unseen is None else f"\n{'blind':>{len(name)}}: {unseen}"), flush=True)
    return 1 if failed else 0


def _say(model: Any, processor: Any, images: list[Any], prompt: str, args: argparse.Namespace) -> list[str]:
    import torch

    inputs = processor(images=[[one] for one in images], text=[prompt] * len(images), padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **inputs.to(model.device), do_sample=False, num_beams=args.num_beams, max_new_tokens=args.max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = [" ".join(text.split()) for text in processor.batch_decode(ids[:, start:], skip_special_tokens=True)]
    return [text.partition(".")[0].strip() + "." if args.first_sentence and "." in text else text for text in texts]


__all__ = ["add_arguments", "run"]
