"""One process of a training run, started by a launcher (see test_distributed.py): trains, saves, and writes what came of it.

    python -m accelerate.commands.launch … -m tests.distributed_run FOLDER WAY BATCH_SIZE

FOLDER holds the tiny parents. WAY is `trainer`, or `fsdp` for FSDP2 (`fully_shard`) in a loop of our own: accelerate applies
FSDP on accelerators alone, and to a CPU gives plain data parallelism without a word. Some rows have no picture, and stand so
that in some steps one process, or both, see none.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix
from tests.tiny import join, rows


STEPS, RATE = 6, 1e-2


def data() -> list[dict]:
    """24 rows, as blocks of 2 that one of two processes would see at a step."""
    seen = [True, True, True, False, False, True, False, False, True, False, False, True]
    texts = ["", " that is a picture .", " ?"]  # of unequal length: a mean of means would weigh words by their neighbours
    return [
        {"image": row["image"] if seen[i // 2] else None, "text": row["text"] + texts[i % 3]}
        for i, row in enumerate(rows(24))
    ]


def by_trainer(model, processor, output: Path, batch_size: int) -> dict:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output), per_device_train_batch_size=batch_size, learning_rate=RATE, max_steps=STEPS, logging_steps=1,
            report_to="none", remove_unused_columns=False, save_strategy="steps", save_steps=3, disable_tqdm=True,
            use_cpu=True, seed=3, train_sampling_strategy="sequential",
        ),
        train_dataset=data(),
        data_collator=DataCollatorForFrozenPrefix(processor),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(output / "last"))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": [entry["loss"] for entry in logged], "gradients": [entry["grad_norm"] for entry in logged]}


def by_fsdp(model, processor, output: Path, batch_size: int) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.language_model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # frozen words, head and tower, and the connector that trains, in one group
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    collator, losses = DataCollatorForFrozenPrefix(processor), []
    model.train()
    for step in range(STEPS):
        start = (step * world + rank) * batch_size
        batch = collator(data()[start : start + batch_size])
        count = (batch["labels"][:, 1:] != -100).sum()
        torch.distributed.all_reduce(count)
        loss = model(**batch, num_items_in_batch=count).loss * world  # gradients are averaged over processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(output / "last", state_dict=whole)
    torch.distributed.barrier()
    return {"losses": losses}


def alone(model, processor, output: Path, batch_size: int) -> dict:
    """What `by_fsdp` does, in one process."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=RATE), []
    collator = DataCollatorForFrozenPrefix(processor)
    model.train()
    for step in range(STEPS):
        loss = model(**collator(data()[step * batch_size : (step + 1) * batch_size])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(output / "last")
    return {"losses": losses}


WAYS = {"trainer": by_trainer, "fsdp": by_fsdp, "alone": alone}


def main(folder: Path, way: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model, processor = join(folder, connector_type="linear")
    output = folder / f"{way}{batch_size}"
    result = WAYS[way](model, processor, output, batch_size)
    distributed = torch.distributed.is_initialized()
    result["processes"] = torch.distributed.get_world_size() if distributed else 1
    if not distributed or torch.distributed.get_rank() == 0:
        (output / "result.json").write_text(json.dumps(result))
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
