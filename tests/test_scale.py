"""More data takes more time, but no more memory: what lives after many steps is what lived after a few."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState

from benchmarks.scale import LazyRows, streamed
from modeling_frozen import DataCollatorForFrozenPrefix
from tests.helpers.tiny import join
from tests.helpers.training import arguments


class LiveTensors(TrainerCallback):
    """Number and bytes of all tensors that live after some steps."""

    def __init__(self, *steps: int) -> None:
        self.counts: dict[int, tuple[int, int]] = dict.fromkeys(steps, (0, 0))

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step not in self.counts:
            return
        gc.collect()
        # Exactly these: other tests leave fakes behind, which have no storage.
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        self.counts[state.global_step] = len(tensors), sum(storages.values())


@pytest.mark.parametrize("source", ["map", "stream"])
def test_memory_is_flat_however_many_rows(tmp_path: Path, source: str) -> None:
    model, processor = join(tmp_path)
    steps = 40
    live = LiveTensors(4, 8, steps - 4, steps)  # every fourth writes a log
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", max_steps=steps, logging_steps=4, per_device_train_batch_size=3),
        train_dataset=LazyRows(3 * steps) if source == "map" else streamed(3 * steps),
        data_collator=DataCollatorForFrozenPrefix(processor),
        callbacks=[live],
    )
    trainer.train()
    assert trainer.state.global_step == steps
    # Batches are of two or three widths: nothing more may live late than early, but for that of a batch.
    (early, early_bytes), (late, late_bytes) = (max(live.counts[step] for step in pair) for pair in ((4, 8), (36, 40)))
    assert late <= early and late_bytes <= early_bytes + 4096
