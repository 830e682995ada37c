"""`frozen-prefix export`: a checkpoint, in the form in which it is, for other runtimes.

frozen-prefix export me/eyes --to onnx eyes-onnx              # image encoder, first step and further steps, as graphs
frozen-prefix export me/eyes --to transformers.js eyes-js     # for browsers and Node
frozen-prefix export me/eyes --to llama.cpp mmproj.gguf       # for llama.cpp's own programs, beside the words' GGUF
"""

import argparse
from pathlib import Path
from typing import Any


TARGETS = ("onnx", "transformers.js", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `frozen-prefix export` takes."""
    parser.add_argument("model", help="checkpoint: folder or id on the Hub")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what shall run it")
    parser.add_argument("out", help="folder to write (a file for llama.cpp)")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE[,DTYPE]",
        help="how weights are stored: for transformers.js some of fp32, q8, int8, uint8, q4, the first loaded by default "
        "(fp32); for llama.cpp float32 or float16 (float32)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    parser.add_argument("--trust_remote_code", action="store_true", help="run a backbone's own code")


def run(args: argparse.Namespace) -> int:
    """
    Exports, and prints what was written; returns the exit code.

    Raises:
        ValueError: what `--to` can't run, named; options that do not go together.
        OSError: a checkpoint that is not there.
        ImportError: an extra that is not installed.
    """
    for file in _export(args):
        print(f"{file.stat().st_size:>14,} bytes  {file}")
    return 0


def _export(args: argparse.Namespace) -> list[Path]:
    import torch

    from ..modeling_frozen_prefix import FrozenPrefixForConditionalGeneration
    from ..processors import FrozenPrefixProcessor
    from .graphs import export_decode, export_image_encoder, export_prefill
    from .llama_cpp import export_mmproj
    from .transformers_js import export_transformers_js

    dtypes: list[str] = args.dtype.split(",") if args.dtype else []
    if dtypes and (args.to == "onnx" or (args.to == "llama.cpp" and len(dtypes) > 1)):
        kinds = "none: graphs are written in float32" if args.to == "onnx" else "one"
        raise ValueError(f"--dtype {args.dtype}: --to {args.to} takes {kinds}. [errors.md#export]")
    origin: dict[str, Any] = {"revision": args.revision} if args.revision else {}
    if args.trust_remote_code:
        origin["trust_remote_code"] = True
    model = FrozenPrefixForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32, **origin).eval()
    processor = FrozenPrefixProcessor.from_pretrained(args.model, **origin)
    out = Path(args.out)
    if args.to == "llama.cpp":
        return [export_mmproj(model, out, processor, **({"dtype": dtypes[0]} if dtypes else {}))]
    if args.to == "transformers.js":
        export_transformers_js(model, out, processor, **({"dtypes": dtypes} if dtypes else {}))
    else:
        import numpy as np

        image = processor.image_processor(np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="pt")
        # What a model can't give is said before anything is written.
        parts = {
            "image_encoder": export_image_encoder(model, sample_inputs=image),
            "prefill": export_prefill(model),
            "decode": export_decode(model),
        }
        for name, exported in parts.items():
            exported.save_pretrained(out / name)
    return sorted(file for file in out.rglob("*") if file.is_file())


__all__ = ["TARGETS", "add_arguments", "run"]
