"""One process of a training run, started by a launcher (see test_distributed.py): trains, saves, and writes what came of it.

    python -m accelerate.commands.launch … -m tests.helpers.distributed_run FOLDER WAY BATCH_SIZE

FOLDER holds the tiny parents. WAY is `plain`, `fsdp` (FSDP2, by Trainer and accelerate), `fsdp_half` (with parents in bf16 and
the connector in fp32) or `fsdp_resumed` (`fsdp`, from its checkpoint in mid-training). Some rows have no picture, and stand so
that in some steps one process, or both, see none.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix
from tests.helpers.tiny import join, rows


def data() -> list[dict]:
    """24 rows, as blocks of 2 that one of two processes would see at a step."""
    seen = [True, True, True, False, False, True, False, False, True, False, False, True]
    texts = ["", " that is a picture .", " ?"]  # of unequal length: a mean of means would weigh words by their neighbours
    return [
        {"image": row["image"] if seen[i // 2] else None, "text": row["text"] + texts[i % 3]} for i, row in enumerate(rows(24))
    ]


def arguments(output: Path, batch_size: int, fsdp: bool) -> TrainingArguments:
    options = {}
    if fsdp:
        wrapped = ["LlamaDecoderLayer"]  # the rest (words, head, tower, connector: frozen and trained) is one group
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": wrapped,
            "state_dict_type": "FULL_STATE_DICT",
        }
    made = TrainingArguments(
        str(output), per_device_train_batch_size=batch_size, learning_rate=1e-2, max_steps=6, logging_steps=1,
        report_to="none", remove_unused_columns=False, save_strategy="steps", save_steps=3, disable_tqdm=True,
        use_cpu=True, seed=3, train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,  # DDP then waits for the gradient of every parameter that trains
        **options,
    )  # fmt: skip
    if fsdp and made.device.type == "cpu":
        # On CPUs accelerate passes FSDP by without a word (its list of kinds of machines); the code is the same.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def main(folder: Path, way: str, batch_size: int) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16} if way == "fsdp_half" else {}
    model, processor = join(folder, connector_type="linear", **options)
    output = folder / f"{way}{batch_size}"
    trainer = Trainer(
        model=model,
        args=arguments(output, batch_size, fsdp="fsdp" in way),
        train_dataset=data(),
        data_collator=DataCollatorForFrozenPrefix(processor),
    )
    resumed = str(folder / f"fsdp{batch_size}" / "checkpoint-3") if way == "fsdp_resumed" else None
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model(str(output / "last"))
    if trainer.is_world_process_zero():
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "kind": trainer.accelerator.distributed_type.value,
            "processes": trainer.accelerator.num_processes,
            "losses": [entry["loss"] for entry in logged],
            "gradients": [entry["grad_norm"] for entry in logged],
        }
        (output / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
