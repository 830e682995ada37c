"""What training draws (texts, views, augmentations) depends on seed, epoch and row, so that a resumed run is the same run."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    DataCollatorForFrozenPrefixRetrieval,
    FrozenPrefixForImageTextRetrieval,
    cache_vision_features,
)
from modeling_frozen.data.draws import seeded
from modeling_frozen.training.epochs import EpochCallback
from tests.helpers.tiny import COLOURS, join


TEXTS = ["a red square .", "what is that ?", "a green picture that is black .", "blue", "is a square"]


def turned(image: Image.Image) -> Image.Image:
    return image.rotate(int(torch.randint(360, ())))


def several_texts(count: int = 12) -> datasets.Dataset:
    colours = list(COLOURS.values())
    rows = [{"image": Image.new("RGB", (20, 18), colours[i % 4]), "text": TEXTS[i % 3 :]} for i in range(count)]
    return datasets.Dataset.from_list(rows)


class Notes:
    """A collator that writes down what it made."""

    def __init__(self, collator: Any):
        self.collator, self.ids = collator, []

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        self.ids.append(batch["input_ids"].tolist())
        return batch


def run(folder: Path, model: Any, data: Any, collator: Any, resume: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    defaults = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "num_train_epochs": 3, "save_steps": 8, "report_to": "none",
        "remove_unused_columns": False, "disable_tqdm": True, "use_cpu": True, "seed": 3, "save_strategy": "steps",
    }  # fmt: skip
    callbacks = options.pop("callbacks", None)
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "connector" in name}


@pytest.mark.parametrize("options", [
    {}, {"dataloader_num_workers": 2}, {"per_device_train_batch_size": 1, "save_steps": 8},
    {"gradient_accumulation_steps": 2, "save_steps": 8, "num_train_epochs": 5},
], ids=["plain", "workers", "single rows", "accumulated"])  # fmt: skip
@pytest.mark.parametrize("kind", ["texts", "augmented", "views"])
def test_a_resumed_run_goes_on_as_if_it_was_never_stopped(kind: str, options: dict, tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = several_texts()
    if kind == "views":
        stored = {"augment": turned, "views": 4, "num_workers": 0}
        data = cache_vision_features(data, model, processor, cache_dir=tmp_path / "store", dtype="float32", **stored)
    collator = DataCollatorForFrozenPrefix(processor, augment=turned if kind == "augmented" else None)
    whole = run(tmp_path / "run", model, data, collator, **options)
    model.load_state_dict(start)
    torch.manual_seed(99)
    resumed = run(tmp_path / "run", model, data, collator, resume=True, **options)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_pairs_resume_too(tmp_path: Path) -> None:
    join(tmp_path)
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        str(tmp_path / "tower"), str(tmp_path / "words"), projection_dim=16
    )
    processor = join(tmp_path)[1]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collator = DataCollatorForFrozenPrefixRetrieval(processor)
    whole = run(tmp_path / "run", model, several_texts(), collator)
    model.load_state_dict(start)
    resumed = run(tmp_path / "run", model, several_texts(), collator, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_every_epoch_draws_anew_and_seeds_draw_differently(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    ids = []
    for seed in (0, 0, 1):
        notes = Notes(DataCollatorForFrozenPrefix(processor, seed=seed))
        run(
            tmp_path / "run",
            model,
            several_texts(2),
            notes,
            num_train_epochs=8,
            save_strategy="no",
            train_sampling_strategy="sequential",
        )
        ids.append(notes.ids)
        torch.manual_seed(len(ids))
    assert len(ids[0]) == 8 and ids[0] == ids[1] != ids[2]
    assert len({str(one) for one in ids[0]}) > 4  # of the same two rows


def trained_on(model: Any, folder: Path, data: Any, collator: Any, resume: bool = False, **options: Any) -> list[Any]:
    """The batches of a run, or of what follows when it is resumed."""
    seen: list[Any] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        images = next(kwargs[name] for name in ("pixel_values", "vision_features") if name in kwargs)
        seen.append((kwargs["input_ids"].tolist(), images.tolist()))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    for again in (False, True) if resume else (False,):
        seen.clear()
        run(folder, model, data, collator, again, **options)
    hook.remove()
    return seen


LASTING = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


@pytest.mark.parametrize("kind", ["texts", "views"])
@pytest.mark.parametrize("resume", [False, True], ids=["whole", "resumed"])
def test_workers_that_outlive_an_epoch_draw_as_others_do(kind: str, resume: bool, tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    data = several_texts()
    if kind == "views":
        stored = {"augment": turned, "views": 4, "num_workers": 0}
        data = cache_vision_features(data, model, processor, cache_dir=tmp_path / "store", dtype="float32", **stored)
    collator = DataCollatorForFrozenPrefix(processor, augment=turned if kind == "texts" else None)
    whole = trained_on(model, tmp_path / "none", data, collator, resume)
    assert len(whole) == (10 if resume else 18)
    assert trained_on(model, tmp_path / "workers", data, collator, resume, dataloader_num_workers=2) == whole
    options = {**LASTING, "callbacks": [EpochCallback()]}
    assert trained_on(model, tmp_path / "lasting", data, collator, resume, **options) == whole


def test_workers_that_outlive_an_epoch_say_that_they_do_not_know_it(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    handler = logging.FileHandler(tmp_path / "log")  # what forked workers log goes there too
    logging.getLogger("modeling_frozen").addHandler(handler)
    trained_on(model, tmp_path / "run", several_texts(), DataCollatorForFrozenPrefix(processor), num_train_epochs=1, **LASTING)
    logging.getLogger("modeling_frozen").removeHandler(handler)
    assert "callbacks=[EpochCallback()]" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_workers_that_are_spawned_draw_as_others_do(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor, augment=turned)
    whole = trained_on(model, tmp_path / "none", several_texts(), collator)
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        for options in ({"dataloader_num_workers": 1}, {**LASTING, "callbacks": [EpochCallback()]}):
            assert trained_on(model, tmp_path / "spawned", several_texts(), collator, **options) == whole
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


def test_what_is_seeded_leaves_the_generators_alone() -> None:
    import random

    import numpy as np

    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    drawn = []
    for key in (1, 1, 2):
        with seeded("here", key):
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])
    assert torch.equal(state[0], torch.get_rng_state()) and state[1:] == (random.getstate(), np.random.get_state()[1].tolist())
