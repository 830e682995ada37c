"""ClipCap's own code out of a checkout of github.com/rmokady/CLIP_prefix_caption, for benchmarks that run beside it.

Nothing of it is copied here: the files are read where they lie and run as they are, but for the names that are put in.
"""

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup


def _parse(checkout: str, name: str) -> ast.Module:
    path = Path(checkout) / name
    if not path.is_file():
        raise FileNotFoundError(f"{checkout!r} holds no {name}: give a checkout of github.com/rmokady/CLIP_prefix_caption.")
    return ast.parse(path.read_text(encoding="utf-8"))


def decoding_functions(checkout: str) -> dict[str, Callable[..., Any]]:
    """`generate2` and `generate_beam` out of a checkout's `predict.py`, without what that file imports beside."""
    wanted = ("generate2", "generate_beam")
    functions = [one for one in _parse(checkout, "predict.py").body if isinstance(one, ast.FunctionDef) and one.name in wanted]
    space: dict[str, Any] = {"torch": torch, "np": np, "nnf": nn.functional}
    exec(compile(ast.Module(body=functions, type_ignores=[]), "predict.py", "exec"), space)
    return {name: space[name] for name in wanted}


def training_code(
    checkout: str,
    language_model: Callable[[], nn.Module],
    tokenizer: Any,
    device: str = "cpu",
    after: Callable[[], None] = lambda: None,
) -> SimpleNamespace:
    """
    Everything in a checkout's `train.py`, with these names given to it:

    - `GPT2LMHeadModel.from_pretrained` gives what `language_model()` does, `GPT2Tokenizer.from_pretrained` gives `tokenizer`;
    - `AdamW`, which transformers has no more, is torch's with the defaults of transformers': no weight decay, eps 1e-6; it
      calls `after` behind each of its steps;
    - the device `cuda:0` is `device`;
    - the bar of `tqdm` is off.
    """
    tree = _parse(checkout, "train.py")

    def adamw(*args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(*args, weight_decay=0.0, eps=1e-6, **options)
        optimizer.register_step_post_hook(lambda *_: after())
        return optimizer

    names = {
        "GPT2LMHeadModel": SimpleNamespace(from_pretrained=lambda *_: language_model()),
        "GPT2Tokenizer": SimpleNamespace(from_pretrained=lambda *_: tokenizer),
        "AdamW": adamw,
        "get_linear_schedule_with_warmup": get_linear_schedule_with_warmup,
        "tqdm": functools.partial(tqdm, disable=True),
    }
    absent = ("transformers", "tqdm")
    tree.body = [one for one in tree.body if not (isinstance(one, ast.ImportFrom) and one.module in absent)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "cuda:0":
            node.value = device
    space = {"__name__": "clipcap_train", **names}
    exec(compile(tree, "train.py", "exec"), space)
    return SimpleNamespace(**space)
