"""Random draws of a data pipeline. In a data loader of accelerate, `Trainer`'s for one, they depend on the epoch and on what
they are for and on nothing else: a training that is resumed goes on with the draws of one that was never stopped.

A global generator would be at another place: loaders read ahead, and batches that a resumed run skips are never made.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState


def current_epoch() -> int | None:
    """The epoch of the accelerate data loader that is being iterated over. `None` outside of one, in workers that outlive an
    epoch (`persistent_workers`) and in those that are not forked: they do not learn of it."""
    loader = GradientState().active_dataloader
    if loader is None or loader.persistent_workers or not hasattr(loader, "iteration"):
        return None
    return loader.iteration + getattr(loader.dataset, "epoch_offset", 0)  # a resumed stream is counted anew


def draw(count: int, *key: Any) -> int:
    """A number below `count`: by the epoch and the `repr` of `key`, or, without an epoch, by torch's global generator."""
    epoch = current_epoch()
    return int(torch.randint(count, ())) if epoch is None else _number(epoch, *key) % count


@contextmanager
def seeded(*key: Any) -> Iterator[None]:
    """Inside, the global generators of `random`, numpy and torch (CPU) start from `key`; afterwards they are as before."""
    number = _number(*key) % 2**32
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number), np.random.seed(number), torch.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(states[0]), np.random.set_state(states[1])


def _number(*key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


__all__ = ["current_epoch", "draw", "seeded"]
