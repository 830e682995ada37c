"""One process of a training run, started by a launcher (see test_distributed.py): trains, saves, and writes what came of it.

    python -m accelerate.commands.launch … -m tests.helpers.distributed_run FOLDER WAY BATCH_SIZE

FOLDER holds the tiny parents. WAY is `plain`, `fsdp` (FSDP2, by Trainer and accelerate), `fsdp_half` (with parents in bf16 and
the connector in fp32), `fsdp_resumed` (`fsdp`, from its checkpoint in mid-training), `evaluated` or `fsdp_evaluated` (no
training, but `Trainer.evaluate` with `EvaluationCallback`, twice into one folder). Some rows have no picture, and stand so
that in some steps one process, or both, see none.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.evaluation import EvaluationCallback
from tests.helpers.tiny import captioned_rows, join, rows


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


def evaluate_twice(trainer: Trainer, processor: Any, output: Path, batch_size: int) -> None:
    """Writes the scores and predictions of each process, and the rows that each one generated, by call."""
    with torch.no_grad():  # so that different images get different words
        for parameter in trainer.model.model.connector.parameters():
            parameter.mul_(4)
    rows, generate = [], trainer.model.generate

    def counted(**inputs: Any) -> torch.Tensor:
        rows[-1] += len(inputs["input_ids"])
        return generate(**inputs)

    if trainer.is_fsdp_enabled:  # which Trainer prepares for training alone
        trainer.args.max_steps, trainer.args.learning_rate = 1, 0.0
        trainer.train()
    trainer.model.generate = counted
    callback = EvaluationCallback(
        trainer, processor, captioned_rows(7), output_dir=output / "evaluation", max_new_tokens=6, batch_size=batch_size
    )
    trainer.add_callback(callback)
    scores = []
    for _ in range(2):
        rows.append(0)
        scores.append({name: value for name, value in trainer.evaluate().items() if "cider" in name})
    result = {"scores": scores, "predictions": callback.results.predictions, "rows": rows}
    results = gather_object([result])
    if trainer.is_world_process_zero():
        kind = trainer.accelerator.distributed_type.value
        (output / "result.json").write_text(json.dumps({"kind": kind, "results": results}))


def main(folder: Path, way: str, batch_size: int) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16} if way == "fsdp_half" else {}
    model, processor = join(folder, connector_type="linear", **options)
    output = folder / f"{way}{batch_size}"
    trainer = Trainer(
        model=model,
        args=arguments(output, batch_size, fsdp="fsdp" in way),
        train_dataset=data(),
        eval_dataset=data(),
        data_collator=DataCollatorForFrozenPrefix(processor),
    )
    if "evaluated" in way:
        return evaluate_twice(trainer, processor, output, batch_size)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
