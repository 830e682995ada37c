"""Random draws of a data pipeline. In a data loader of accelerate, `Trainer`'s for one, they depend on the epoch and on what
they are for and on nothing else: a training that is resumed goes on with the draws of one that was never stopped.

A global generator would be at another place: loaders read ahead, and batches that a resumed run skips are never made.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from torch.utils.data import get_worker_info
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The epoch in memory that worker processes share, written by `EpochCallback`, for those that outlive one; and, in a worker
# that was spawned for one epoch, that epoch.
_shared_epoch: torch.Tensor | None = None
_worker_epoch: int | None = None


def share_epoch(epoch: int | None) -> None:
    """Says which epoch begins, also to workers that were started since it was said for the first time; `None`: no epoch."""
    global _shared_epoch
    if _shared_epoch is None:
        _shared_epoch = torch.full((), -1, dtype=torch.int64).share_memory_()
    _shared_epoch.fill_(-1 if epoch is None else epoch)


class EpochForWorkers:
    """Held by what draws in worker processes. Those that are spawned know nothing of the process that started them but what
    they are given: with this, its epoch."""

    def __getstate__(self) -> dict[str, Any]:
        return {"process": os.getpid(), "shared": _shared_epoch, "own": _of_loader(), "outlive": _workers_outlive_epochs()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        global _shared_epoch, _worker_epoch
        if os.getpid() == state["process"]:  # a copy
            return
        _shared_epoch, _worker_epoch = state["shared"], state["own"]
        if state["outlive"]:
            _warn_where_not_shared()


def _of_loader() -> int | None:
    """By the accelerate data loader that is being iterated over, where its workers end with the epoch."""
    loader = GradientState().active_dataloader
    if loader is None or loader.persistent_workers or not hasattr(loader, "iteration"):
        return None
    return loader.iteration + getattr(loader.dataset, "epoch_offset", 0)  # a resumed stream is counted anew


def _workers_outlive_epochs() -> bool:
    return getattr(GradientState().active_dataloader, "persistent_workers", False)


def _warn_where_not_shared() -> None:
    if _shared_epoch is None or _shared_epoch < 0:
        logger.warning_once(
            "Workers that outlive an epoch (dataloader_persistent_workers=True) don't know which one it is, so what they draw "
            "(texts, views, augmentations) can't be drawn again by a resumed run: Trainer(callbacks=[EpochCallback()]) of "
            "modeling_frozen.training.epochs tells them."
        )


def current_epoch() -> int | None:
    """The epoch of the stream that a worker reads, or of the accelerate data loader that is being iterated over. `None`
    outside of one, and in workers that outlive an epoch (`persistent_workers`) where no [`EpochCallback`] tells them."""
    worker = get_worker_info()
    of_stream = getattr(worker.dataset, "epoch", None) if worker is not None else None
    if of_stream is not None:
        return int(of_stream)
    epoch = _of_loader()
    if epoch is None and worker is not None:
        epoch = _worker_epoch
    if epoch is None and _shared_epoch is not None and _shared_epoch >= 0:
        epoch = int(_shared_epoch)
    if epoch is None and worker is not None and _workers_outlive_epochs():
        _warn_where_not_shared()
    return epoch


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


__all__ = ["EpochForWorkers", "current_epoch", "draw", "seeded", "share_epoch"]
