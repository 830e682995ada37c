"""Trainer's checkpoints on several devices: that they hold what was learnt alone, which one is whole, and the whole model that
one gives where each process trained a part.

FSDP2 needs nothing of this: the state dict of a sharded model leaves out what need not be saved.
"""

import functools
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoints import keys_left_out, trained_parts
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from ..weights import gathers_layers, is_sharded


logger = logging.get_logger(__name__)


class DeepSpeedCheckpointCallback(TrainerCallback):
    """
    Has DeepSpeed save what was learnt and its optimizer, where it would write the frozen backbones too, and under ZeRO-3
    gather them on one process. Without DeepSpeed it does nothing.

    A backbone without a place of its own, from which it could be had again, is saved whole, as everywhere.

    Args:
        trainer (`Trainer`): whose engine it is.

    Example:

    ```python
    >>> trainer.add_callback(DeepSpeedCheckpointCallback(trainer))
    ```"""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            return
        engine: Any = self.trainer.model_wrapped
        model = engine.module
        if not hasattr(model, "backbones"):
            return  # PEFT's, of which Trainer saves the adapter alone
        left_out = keys_left_out(model, trained_parts(model))
        if not all(name in left_out for name, parameter in model.named_parameters() if not parameter.requires_grad):
            return
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if engine.zero_optimization_partition_weights():
            # By which Trainer saves the model: by itself it gathers all of it.
            self.trainer.accelerator.get_state_dict = lambda *_, **__: _gathered(model, left_out)


def _gathered(model: Any, left_out: set[str]) -> dict[str, torch.Tensor]:
    """What ZeRO-3 partitioned of a model, whole and in memory of the CPU, but for some names. All processes call it."""
    import deepspeed

    wanted = [parameter for name, parameter in model.named_parameters() if name not in left_out]
    with deepspeed.zero.GatheredParameters(wanted):
        state = model.state_dict().items()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state if name not in left_out}


def whole_model(trainer: Trainer, folder: str | Path) -> Any:
    """
    The model that was trained, for what a process does by itself: `generate`, `evaluate`, the questions of `interpretation`.

    It is the Trainer's own; where FSDP2 dealt that out over the processes, what was saved is loaded, whole and on this
    process's device. All processes call it.

    Args:
        trainer (`Trainer`): that has trained.
        folder: into which it has saved, by `trainer.save_model(folder)`.

    Raises:
        ValueError: for what was dealt out by ZeRO-3, under which all that is loaded is, and with PEFT.

    Example:

    ```python
    >>> trainer.save_model("eyes")
    >>> model = whole_model(trainer, "eyes")
    >>> result = evaluate(model, processor, rows, distributed=True)
    ```"""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not gathers_layers(model):
        return model
    if not (is_sharded(model) and isinstance(model, FrozenPrefixPreTrainedModel)):
        raise ValueError(
            f"This {type(model).__name__} was dealt out over the processes by ZeRO-3, or with PEFT's adapter: what runs "
            f"outside of Trainer wants it whole. Load {str(folder)!r} in a run without that. [errors.md#devices]"
        )
    trainer.accelerator.wait_for_everyone()
    saved: Any = next(one for one in type(model).__mro__ if not issubclass(one, torch.distributed.fsdp.FSDPModule))
    return saved.from_pretrained(folder).to(trainer.args.device)


def last_whole_checkpoint(output_dir: str | Path, processes: int | None = None) -> str | None:
    """
    The newest of Trainer's checkpoints that was written to its end, for `resume_from_checkpoint`.

    A run that is killed while it saves leaves half of one, which transformers' `get_last_checkpoint` would name. Last are
    written the state of random numbers, by each process, and the run's own state, by the first one.

    Args:
        output_dir: the folder of the run.
        processes (`int`, *optional*): by how many it was written; as many as run now, by default.

    Returns:
        `str`: its folder; `None` where there is none. Each that is passed over is logged, with the reason.
    """
    count = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {int(number): path for path in found if (number := path.name.rpartition("-")[2]).isdecimal()}
    for path in (numbered[number] for number in sorted(numbered, reverse=True)):
        if (why := _what_lacks(path, count)) is None:
            return str(path)
        logger.warning(f"`{path}` was not written to its end ({why}), so it is passed over: delete it.")
    return None


def _what_lacks(checkpoint: Path, processes: int) -> str | None:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "no trainer_state.json"
    except ValueError:
        return "half of trainer_state.json"
    states = sum(zipfile.is_zipfile(path) for path in checkpoint.glob("rng_state*.pth"))
    return None if states >= processes else f"rng_state of {states} processes, not {processes}"


__all__ = ["DeepSpeedCheckpointCallback", "last_whole_checkpoint", "whole_model"]
