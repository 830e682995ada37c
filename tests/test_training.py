"""Training by transformers' own Trainer: what moves, what stands still, and that a stopped run goes on as if it had not."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import join, rows, save_parents
from tests.helpers.training import arguments


def train(folder: Path, model, processor, *, resume: str | None = None, eval_rows=None, **options: object) -> Trainer:
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=rows(16),
        eval_dataset=eval_rows,
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_only_the_connector_moves(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    before = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer = train(tmp_path / "run", model, processor)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.model.connector.parameters()}


def test_a_frozen_language_model_learns_to_see(tmp_path: Path) -> None:
    """Colours are read from the picture, and only from it."""
    model, processor = join(tmp_path, connector_type="linear")
    trainer = train(tmp_path / "run", model, processor, max_steps=60, learning_rate=3e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    data = DataCollatorForFrozenPrefix(processor)(rows(4))
    model.eval()
    with torch.no_grad():
        right = model(**data).loss
        wrong = model(**{**data, "pixel_values": data["pixel_values"].roll(1, 0)}).loss
    assert right < wrong - 0.5


def test_gradient_accumulation_is_exact(tmp_path: Path) -> None:
    """Samples of unequal length: a mean of means would weigh words by their neighbours."""
    data = [{**row, "text": row["text"] * (1 + i % 3)} for i, row in enumerate(rows(8))]
    weights = []
    save_parents(tmp_path)
    for i, (size, steps) in enumerate(((8, 1), (2, 4))):
        torch.manual_seed(0)
        model, processor = join(tmp_path)
        trainer = Trainer(
            model=model,
            args=arguments(
                tmp_path / f"run{i}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
                optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
            ),
            train_dataset=data,
            data_collator=DataCollatorForFrozenPrefix(processor),
        )  # fmt: skip
        trainer.train()
        weights.append(model.model.connector.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20}
    torch.manual_seed(0)
    model, processor = join(tmp_path, connector_config={"input_dropout": 0.2})
    train(tmp_path / "whole", model, processor, **save)
    whole = model.model.connector.state_dict()

    checkpoint = tmp_path / "whole" / "checkpoint-10"
    names = set(load_file(checkpoint / "model.safetensors"))
    assert names == {f"model.connector.{name}" for name in whole}
    torch.manual_seed(1)
    fresh, processor = join(tmp_path, connector_config={"input_dropout": 0.2})
    assert any(not torch.equal(whole[name], tensor) for name, tensor in fresh.model.connector.state_dict().items())
    train(tmp_path / "resumed", fresh, processor, resume=str(checkpoint), **save)
    resumed = fresh.model.connector.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_says_nothing_of_missing_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    model, processor = join(tmp_path)
    train(tmp_path / "run", model, processor, **save)
    fresh, processor = join(tmp_path)
    train(tmp_path / "run", fresh, processor, resume=str(tmp_path / "run" / "checkpoint-2"), **save)
    assert "missing keys" not in caplog.text


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    trainer = train(
        tmp_path / "run", model, processor, eval_rows=rows(4), max_steps=4, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    now = model.state_dict()
    assert best and all(torch.equal(now[name], tensor) for name, tensor in best.items())


def test_checkpoints_of_trainer_load_by_themselves(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    train(tmp_path / "run", model, processor, save_strategy="steps", save_steps=4)
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    assert type(processor).from_pretrained(tmp_path / "run" / "checkpoint-4").prefix_length == processor.prefix_length


def test_dropped_columns_are_explained(tmp_path: Path) -> None:
    """Trainer removes columns that `forward` does not name, pictures among them, unless `remove_unused_columns=False`."""
    from datasets import Dataset

    model, processor = join(tmp_path)
    data = Dataset.from_list([{"picture_path": "x", "text": "a"}, {"picture_path": "y", "text": "a"}])
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", remove_unused_columns=True),
        train_dataset=data,
        data_collator=DataCollatorForFrozenPrefix(processor),
    )
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer.train()


# --------------------------------------------------------------------------------------------------------- no wasted work


def kept_by_a_step(model: FrozenPrefixForConditionalGeneration, data: dict[str, torch.Tensor]) -> tuple[dict, dict, set]:
    """Storages that autograd kept in a step (of activations, by address, with bytes), what frozen or trained linear layers
    of the language model read, and what the tower's modules gave."""
    kept: dict[int, int] = {}
    read: dict[int, str] = {}
    inputs: set[int] = set()
    alive: list[torch.Tensor] = []  # an address must not be used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def note_input(name: str):
        def hook(module: torch.nn.Module, args: tuple) -> None:
            alive.append(args[0])
            read[args[0].untyped_storage().data_ptr()] = name

        return hook

    def note_output(module: torch.nn.Module, args: tuple, output: object) -> None:
        for tensor in output.values() if isinstance(output, dict) else [output]:
            if isinstance(tensor, torch.Tensor):
                assert not tensor.requires_grad
                alive.append(tensor)
                inputs.add(tensor.untyped_storage().data_ptr())

    handles = [module.register_forward_hook(note_output) for module in model.model.vision_tower.modules()]
    for name, module in model.model.language_model.base_model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "gate_proj", "down_proj"):
            handles.append(module.register_forward_pre_hook(note_input(name)))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**data).loss.backward()
    for handle in handles:
        handle.remove()
    return {at: size for at, size in kept.items() if at not in parameters}, read, inputs


def test_nothing_is_kept_that_only_frozen_weights_would_need(tmp_path: Path) -> None:
    """The tower keeps nothing; the language model what the prefix's gradient needs, not what its weights' would."""
    sizes = {}
    for trainable in (("connector",), ("connector", "text")):
        model, processor = join(tmp_path, trainable=trainable)
        data = DataCollatorForFrozenPrefix(processor)(rows(4))
        model.train()(**data)  # the first call tries the head, on words of its own
        kept, read, inputs = kept_by_a_step(model, data)
        assert len(read) == 3 * 2 and inputs
        wasted = {name for at, name in read.items() if at in kept}
        assert wasted == (set() if trainable == ("connector",) else set(read.values()))
        # The connector's first layer reads what the tower gave last, and nothing else of the tower is kept.
        assert len(inputs & set(kept)) <= 1
        sizes[trainable] = sum(kept.values())
    assert sizes["connector",] < 0.8 * sizes["connector", "text"]


def test_optimizer_state_is_the_connectors_alone(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    trainer = train(tmp_path / "run", model, processor, weight_decay=0.1)
    connector = {id(parameter) for parameter in model.model.connector.parameters()}
    assert {id(parameter) for parameter in trainer.optimizer.state} == connector
    weights = sum(parameter.numel() for parameter in model.model.connector.parameters())
    state = sum(t.numel() for one in trainer.optimizer.state.values() for t in one.values() if t.ndim)
    assert state == 2 * weights
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in connector)


def test_half_parents_with_a_whole_connector_learn(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="linear", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "connector" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "connector" not in name} == {torch.bfloat16}
    trainer = train(tmp_path / "run", model, processor, max_steps=60, learning_rate=3e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
