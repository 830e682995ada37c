"""The arguments that tests train by: a few steps of the Trainer that write nothing."""

from pathlib import Path

from transformers import TrainingArguments


def arguments(folder: Path, **options: object) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "report_to": "none",
        "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **options})
