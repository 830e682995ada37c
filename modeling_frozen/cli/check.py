"""`frozen-prefix check`: prints what `check_image_text` finds; the exit code is 1 where training would fail."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="file, files that belong together, folder, glob of tars, or Hub id")
    parser.add_argument("--image_root", help="folder of relative image paths (default: the file's own)")
    parser.add_argument("--format", default="auto", help="of load_image_text; default: found by the fields")
    parser.add_argument("--split", help="of a source with several")
    parser.add_argument("--model", help="checkpoint: also count tokens against its positions, and draw a row in them")
    parser.add_argument("--open", action="store_true", help="open every image")


def run(args: argparse.Namespace) -> int:
    from ..data.checking import check_image_text

    source = args.source[0] if len(args.source) == 1 else args.source
    options = {"format": args.format, "image_root": args.image_root, "split": args.split, "model": args.model}
    check = check_image_text(source, **options, open_images=args.open)
    print(check)
    return 1 if check.fails else 0


__all__ = ["add_arguments", "run"]
