"""One process of a training run, started by a launcher (see test_distributed.py): trains, saves, and writes what came of it.

    python -m accelerate.commands.launch … -m tests.helpers.distributed_run FOLDER WAY BATCH_SIZE [DIES_AT]

FOLDER holds the tiny parents. WAY is `plain`, `fsdp` (FSDP2, by Trainer and accelerate), `fsdp_sharded` (its checkpoints in
shards), `fsdp_tower` (the tower's layers sharded too), `fsdp_half` (with parents in bf16 and the connector in fp32), `zero2`
and `zero3` (DeepSpeed), `zero2_unclipped` (its config says nothing of gradient clipping), `ray` (as `plain`), each of these
also as `…_pictured` (all rows have a picture) and `…_resumed` (from its checkpoint in mid-training), `tp` (the language
model tensor-parallel), `evaluated` or `fsdp_evaluated` (no training, but `Trainer.evaluate` with `EvaluationCallback`, twice
into one folder). Some rows have no picture, and stand so that in some steps one process, or both, see none. After step DIES_AT
the last process is killed; the same run, started again, goes on at the last whole checkpoint.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.backbones import word_embedding_norm
from modeling_frozen.evaluation import EvaluationCallback, evaluate
from modeling_frozen.training.checkpoints import DeepSpeedCheckpointCallback, last_whole_checkpoint, whole_model
from tests.helpers.fsdp_on_cpus import as_on_gpus
from tests.helpers.tiny import captioned_rows, join, rows


def data(way: str) -> list[dict]:
    """24 rows, as blocks of 2 that one of two processes would see at a step. In some blocks both have the same picture, which
    the language model then reads once, where the other process reads its two."""
    seen = [True, True, True, False, False, True, False, False, True, False, False, True]
    if "pictured" in way:
        seen = [True] * 12
    texts = ["", " that is a picture .", " ?"]  # of unequal length: a mean of means would weigh words by their neighbours
    made = rows(24)
    pictures = [made[i - i % 2 if i // 2 in (1, 2, 8) else i]["image"] for i in range(24)]
    return [{"image": pictures[i] if seen[i // 2] else None, "text": row["text"] + texts[i % 3]} for i, row in enumerate(made)]


class DiesAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(output: Path, way: str, batch_size: int) -> TrainingArguments:
    options: dict[str, Any] = {}
    fsdp = "fsdp" in way
    if way.startswith("zero"):
        options["deepspeed"] = {
            "zero_optimization": {"stage": int(way[4]), "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
        if "unclipped" not in way:
            options["deepspeed"]["gradient_clipping"] = "auto"  # or DeepSpeed clips at 1, whatever max_grad_norm is
    if fsdp:
        wrapped = ["LlamaDecoderLayer"]  # the rest (words, head, tower, connector: frozen and trained) is one group
        if "tower" in way:
            wrapped.append("CLIPEncoderLayer")
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": wrapped,
            "state_dict_type": "SHARDED_STATE_DICT" if "sharded" in way else "FULL_STATE_DICT",
        }
    made = TrainingArguments(
        str(output), per_device_train_batch_size=batch_size, learning_rate=1e-2, max_steps=20, max_grad_norm=4.0,
        logging_steps=1, report_to="none", remove_unused_columns=False, save_strategy="steps", save_steps=10,
        disable_tqdm=True, use_cpu=True, seed=3, train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,  # DDP then waits for the gradient of every parameter that trains
        **options,
    )  # fmt: skip
    made.save_only_model = way == "tp"  # Trainer resumes no model that was sharded as it was loaded
    if fsdp or way == "tp":
        as_on_gpus(made)
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


def refusal(model: Any, processor: Any) -> str:
    """What one process is told that asks a model of which it holds a part, where it would wait for the others."""
    try:
        evaluate(model, processor, captioned_rows(2), max_new_tokens=1)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, way: str, batch_size: int, dies_at: int = 0) -> None:
    torch.manual_seed(0)
    output = folder / f"{way}{batch_size}"
    args = arguments(output, way, batch_size)  # before the model, which ZeRO-3 partitions while it is loaded
    options: dict[str, Any] = {"dtype": torch.bfloat16} if way == "fsdp_half" else {}
    if way == "tp":
        options["text_tp_plan"] = "auto"
    model, processor = join(folder, connector_type="linear", **options)
    # Loading draws random numbers under ZeRO-3 alone, so the connector starts here.
    torch.manual_seed(0)
    model.model.connector.reset_parameters()
    model.model.connector.set_output_norm(word_embedding_norm(model.model.language_model))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data(way),
        eval_dataset=data(way),
        data_collator=DataCollatorForFrozenPrefix(processor),
    )
    if "evaluated" in way:
        return evaluate_twice(trainer, processor, output, batch_size)
    trainer.add_callback(DeepSpeedCheckpointCallback(trainer))
    trainer.add_callback(DiesAt(dies_at))
    resumed = folder / f"{way.removesuffix('_resumed')}{batch_size}" / "checkpoint-10"
    trainer.train(resume_from_checkpoint=str(resumed) if way.endswith("_resumed") else last_whole_checkpoint(output))
    if "sharded" in way:  # which Trainer itself would not save for anybody to load
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output / "last"))
    whole = whole_model(trainer, output / "last") if way.startswith(("plain", "fsdp")) else None
    asked = {"processor": processor, "dataset": captioned_rows(4), "max_new_tokens": 3, "num_resamples": 0}
    together = None if way == "tp" else evaluate(trainer.accelerator.unwrap_model(trainer.model), **asked, distributed=True)
    after = None if way == "tp" else evaluate(trainer.accelerator.unwrap_model(trainer.model), **asked, distributed=True)
    if trainer.is_world_process_zero():
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "kind": trainer.accelerator.distributed_type.value,
            "processes": trainer.accelerator.num_processes,
            "losses": [entry["loss"] for entry in logged],
            "gradients": [entry["grad_norm"] for entry in logged],
            "refusal": refusal(trainer.model, processor) if way.startswith(("fsdp", "zero3")) else "",
            "together": together and together.predictions,
            "after": after and after.predictions,
            "whole": None if whole is None else evaluate(whole, **asked).predictions,
            "own": whole is trainer.model,
        }
        (output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not sys.argv[2].startswith("ray"):  # whose worker goes on
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; threads of torch's that still run while Python ends abort it now and then
