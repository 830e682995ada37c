"""One process of a training on a stream, started by a launcher (see test_streaming.py).

    python -m torch.distributed.run --nproc_per_node 2 -m tests.helpers.streaming_run FOLDER NAME STOP RESUME

FOLDER holds the tiny parents and the stream's files. The run is called NAME; it saves and stops after STOP steps (0: it does
not), and goes on from the checkpoint RESUME ("": from the start).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, load_image_text
from modeling_frozen.training.streaming import StreamCallback
from tests.helpers.tiny import join


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def main(folder: Path, name: str, stop: int, resume: str) -> None:
    torch.manual_seed(0)
    model, processor = join(folder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder / name), per_device_train_batch_size=2, learning_rate=1e-2, max_steps=14, save_strategy="no",
            report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True, seed=3, dataloader_num_workers=1,
            accelerator_config={"dispatch_batches": False}, ddp_find_unused_parameters=False,
        ),
        train_dataset=load_image_text(str(folder / "*.jsonl"), streaming=True, buffer_size=4, on_error="skip"),
        data_collator=DataCollatorForFrozenPrefix(processor),
        callbacks=[Stop(stop), StreamCallback()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.accelerator.num_processes == 2 and trainer.state.global_step == (stop or 14)
    trainer.save_model(str(folder / name / "last"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
