# SPDX-License-Identifier: Apache-2.0
"""The processes that run one program together, by torch.distributed."""

import os
from typing import Any

import torch

from ..weights import alone, gathers_layers


class Processes:
    """This process among those that run the same program, whether or not they met already; or this one alone."""

    def __init__(self, alone: bool = False) -> None:
        distributed = torch.distributed
        if not alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            PartialState()  # lets them meet
        together = not alone and distributed.is_available() and distributed.is_initialized()
        self.rank, self.count = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank. All must call it."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def does(self, digest: bytes) -> bool:
        # By content: what is done already may look different to each process, while others write.
        return int.from_bytes(digest[:8], "little") % self.count == self.rank


def refuse_parts(model: torch.nn.Module, instead: str = "") -> None:
    """
    For what one process does by itself.

    Args:
        instead (`str`): another way out.

    Raises:
        ValueError: where others hold parts of the model, so that this process would wait for them for ever.
    """
    if not alone() and gathers_layers(model):
        raise ValueError(
            "This model was dealt out over the processes (FSDP2, DeepSpeed ZeRO-3), and one that runs it alone would wait for "
            f"the others for ever: {instead}take the whole one, by `whole_model(trainer, folder)` of "
            "`modeling_frozen.training.checkpoints` after `trainer.save_model(folder)`. [errors.md#devices]"
        )


__all__ = ["Processes", "refuse_parts"]
