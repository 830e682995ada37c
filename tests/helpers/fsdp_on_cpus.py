"""FSDP2 on CPUs, where accelerate passes it by without a word (and refuses tensor parallel); the code is that of GPUs.

    python -m torch.distributed.run … -m tests.helpers.fsdp_on_cpus SCRIPT ARGUMENTS --fsdp True --fsdp_config FILE

runs a script as it is.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments


def as_on_gpus(arguments: TrainingArguments) -> None:
    """To be called when they are made, before the Trainer."""
    if arguments.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    made = TrainingArguments.__post_init__

    def make(self: TrainingArguments) -> None:
        made(self)
        as_on_gpus(self)

    TrainingArguments.__post_init__ = make  # in this process, which the script alone runs in
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
