"""Where the time of loading goes: each step's own milliseconds, in a fresh Python, without what is listed apart inside it.

    python -m benchmarks.loading --profile

A tracing profiler makes small Python functions look several times as dear as they are, so only the steps that are named
here are timed, and nothing else is touched.
"""

import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.timing import CLOCKS


PROFILED = """
import json
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaForCausalLM, GPT2LMHeadModel
import modeling_frozen, torch, transformers
from benchmarks.loading_profile import time_steps
transformers.utils.logging.disable_progress_bar()
modeling_frozen.FrozenPrefixForConditionalGeneration
print(json.dumps(time_steps(lambda: exec({load!r}), {clock!r})))
"""


def profile(load: str, *, rounds: int, clock: str) -> dict[str, float]:
    """The median seconds of each step of the piece of code `load`, each round in a Python of its own."""
    seconds_of: dict[str, list[float]] = {}
    for _ in range(rounds):
        code = PROFILED.format(load=load, clock=clock)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The profiled process failed:\n{done.stderr}")
        for step, seconds in json.loads(done.stdout.splitlines()[-1]).items():
            seconds_of.setdefault(step, []).append(seconds)
    return {step: statistics.median(seconds) for step, seconds in seconds_of.items()}


def time_steps(load: Callable[[], Any], clock: str) -> dict[str, float]:
    """Seconds of each step of `load()`, in order of their ends; changes functions in place, so it wants its own process."""
    from transformers import PreTrainedModel, modeling_utils

    from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, backbones
    from modeling_frozen import modeling_frozen_prefix_pretrained as pretrained

    now, spent, inside = CLOCKS[clock], {}, []

    def timed(owner: Any, name: str, label: Callable[..., str]) -> None:
        method = vars(owner)[name]
        plain = getattr(method, "__func__", method)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = now()
            try:
                return plain(*args, **kwargs)
            finally:
                took = now() - start
                step = label(*args)
                spent[step] = spent.get(step, 0.0) + took - inside.pop()
                if inside:
                    inside[-1] += took

        setattr(owner, name, type(method)(call) if isinstance(method, (classmethod, staticmethod)) else call)

    ours = FrozenPrefixForConditionalGeneration
    timed(PreTrainedModel, "from_pretrained", lambda cls, *_: f"{cls.__name__}: the rest of transformers' loading")
    timed(PreTrainedModel, "_load_pretrained_model", lambda model, *_: f"{type(model).__name__}: its tensors")
    timed(modeling_utils, "get_model_conversion_mapping", lambda *_: "transformers' table of old names, once per process")
    timed(FrozenPrefixConfig, "from_dict", lambda *_: "the config")
    timed(ours, "__init__", lambda *_: "building the connector")
    timed(backbones, "fingerprint", lambda *_: "the parents' fingerprints")
    timed(pretrained, "refill", lambda *_: "joining")
    timed(_owner(ours, "_finish_loading"), "_finish_loading", lambda *_: "freezing, and what need not be saved")
    timed(pretrained, "align_weights", lambda *_: "copying weights that lie off 16 bytes in their files")
    start = now()
    load()
    total = now() - start
    return {**spent, "all else": total - sum(spent.values()), "in all": total}


def _owner(klass: type, name: str) -> type:
    return next(base for base in klass.__mro__ if name in vars(base))


__all__ = ["profile", "time_steps"]
