"""What trains does so in the mode that was asked for, and looks at a model leave modes and random numbers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import CLIPVisionModel, Trainer, TrainingArguments

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
)
from tests.helpers.families_text import language_model
from tests.helpers.tiny import join, recompute_activations, rows, save_parents, vision_config
from tests.helpers.training import arguments


def batch(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.tensor([[1, *[model.config.image_token_id] * model.config.num_image_tokens, 4, 5, 6, 2]])
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


# --------------------------------------------------------------------------------------------------------- no look draws


@pytest.mark.parametrize("family", ["gpt2", "opt", "mamba", "t5", "bart"])
def test_the_first_step_draws_as_every_later_one(family: str) -> None:
    """GPT-2 trains with dropout; what is tried on the first step is tried without."""
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        CLIPVisionModel(vision_config()).eval(),
        language_model(family),
        connector_type="linear",
        trainable=("connector", "text"),
    )
    model.train()
    inputs = batch(model)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        losses.append(model(**inputs, image_index=torch.tensor([0])).loss.item())
    assert losses[0] == losses[1] == losses[2]
    assert model.model.language_model.training


def test_looks_leave_the_random_state_alone(tmp_path: Path) -> None:
    join(tmp_path)  # writes the backbones
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    model, _ = join(tmp_path, connector_type="identity")  # without a weight
    assert torch.equal(torch.random.get_rng_state(), state)
    inputs = batch(model)
    state = torch.random.get_rng_state()
    model.save_pretrained(tmp_path / "eyes")
    model.train()
    model(**inputs).loss  # noqa: B018
    FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    assert torch.equal(torch.random.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------------- NEFTune


def losses_of_training(tmp_path: Path, **options: Any) -> list[float]:
    torch.manual_seed(0)
    model, processor = join(tmp_path)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorForFrozenPrefix(processor), rows(8))
    trainer.train()
    assert not model.model.language_model.get_input_embeddings()._forward_hooks
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_neftune_adds_its_noise_to_the_words_of_a_frozen_model(tmp_path: Path) -> None:
    join(tmp_path)  # writes the backbones
    plain, noisy = losses_of_training(tmp_path), losses_of_training(tmp_path, neftune_noise_alpha=50.0)
    assert plain == losses_of_training(tmp_path)
    assert abs(plain[0] - noisy[0]) > 1e-3


# ---------------------------------------------------------------------------------------------------- activation checkpoints


@pytest.mark.parametrize("connector_type", ["transformer", "resampler", "qformer", "lstm"])
def test_layers_of_a_training_connector_are_computed_again(connector_type: str, tmp_path: Path) -> None:
    model, _ = join(tmp_path, connector_type=connector_type, prefix_length=3, connector_config={"num_layers": 2})
    connector = model.model.connector
    layers = connector.qformer.encoder.layer if connector_type == "qformer" else connector.layers
    kept: list[int] = []
    results = []
    for enable in (False, True):
        recompute_activations(model, enable)
        model.train()
        assert all(layer.gradient_checkpointing is enable for layer in layers)
        model.zero_grad()
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel() > 0  # torch 2.6 keeps an empty one for each layer
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prefix = connector(torch.linspace(-1, 1, 128).view(1, 4, 32))
        prefix.square().sum().backward()
        results.append([prefix, *(parameter.grad for parameter in connector.parameters())])
    assert kept[1] <= kept[0] / 2, "inside the layers nothing is kept but their inputs"
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------------------ offloading


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        name: (FrozenPrefixForConditionalGeneration, {"connector_type": name, "prefix_length": length})
        for name, length in {
            "linear": None, "resampler": 3, "lstm": 3, "qformer": 3, "avg_pool": 4, "c_abstractor": 4, "pixel_shuffle": None,
        }.items()
    },
    "gated": (FrozenPrefixForConditionalGeneration, {"connector_type": "mlp", "fusion": "cross_attention"}),
    "classifier": (FrozenPrefixForSequenceClassification, {"connector_type": "mlp"}),
    "retrieval": (FrozenPrefixForImageTextRetrieval, {"connector_type": "mlp"}),
    "retrieval by [RET]": (
        FrozenPrefixForImageTextRetrieval, {"connector_type": "mlp", "text_pooling": "ret", "contrastive_loss_type": "siglip"},
    ),
}  # fmt: skip


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "disk_offload":
        disk_offload(model, str(folder / "offload"), execution_device=torch.device("cpu"))
    elif how == "cpu_offload":
        cpu_offload(model, torch.device("cpu"))
    else:
        model.save_pretrained(folder / how, include_base_models=how == "device_map")
        own = {name.split(".")[0] for name in model.base_model.state_dict()} - {"vision_tower", "language_model"}
        heads = {name.split(".")[0] for name in model.state_dict()} - {"model"}
        places = {"model.vision_tower": "cpu", "model.language_model": "cpu"}
        places |= dict.fromkeys([*(f"model.{name}" for name in own), *heads], "disk")
        return type(model).from_pretrained(folder / how, device_map=places, offload_folder=str(folder / "offload"))
    return model


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map", "device_map of a small checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_it_sees_the_same(how: str, kind: str, tmp_path: Path) -> None:
    save_parents(tmp_path)
    loader, options = KINDS[kind]
    model = loader.from_vision_text_pretrained(str(tmp_path / "tower"), str(tmp_path / "words"), **options)
    writes = loader is FrozenPrefixForConditionalGeneration
    inputs = batch(model)
    del inputs["labels"]
    if kind == "gated":
        inputs["input_ids"] = torch.tensor([[1, model.config.image_token_id, 4, 5, 6, 2]])
    if kind.startswith("retrieval"):
        inputs["input_ids"] = torch.tensor([[1, 4, 5, 6, 2]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.split(".")[-1]:
                parameter.fill_(0.5)
        expected = model(**inputs)[0]
        written = model.generate(**inputs, max_new_tokens=4) if writes else None
        model = offloaded(model, how, tmp_path)
        # A file on disk gives weights at any address, with which the last bits differ.
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
        if written is not None:
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), written)


@pytest.mark.parametrize("how", ["cpu_offload", "device_map", "a layer on disk"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_connector_of_an_offloaded_language_model_trains_the_same(recompute: bool, how: str, tmp_path: Path) -> None:
    save_parents(tmp_path, text={"num_hidden_layers": 4})

    def train(model: Any, processor: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = Trainer(model, arguments(tmp_path / "run"), DataCollatorForFrozenPrefix(processor), rows(16))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, model.model.connector.state_dict()

    plain, processor = join(tmp_path)
    start = {name: tensor.clone() for name, tensor in plain.model.connector.state_dict().items()}
    losses, connector = train(plain, processor)
    assert losses[-1] < losses[0]
    places: dict[str, Any] = {"": "disk", "computed": "cpu"}  # no module's name: accelerate before 1.15 refuses the disk alone
    if how == "a layer on disk":
        here = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm", "model.rotary_emb", "lm_head"]
        places = {"model.layers.3": "disk", **dict.fromkeys(here, "cpu")}
    options = {"text_device_map": places, "text_offload_folder": str(tmp_path / "offload")}
    model, _ = join(tmp_path, **({} if how == "cpu_offload" else options))
    model.model.connector.load_state_dict(start)
    if how == "cpu_offload":
        cpu_offload(model.model.language_model, torch.device("cpu"))
    if recompute:
        recompute_activations(model)
    own, trained = train(model, processor)
    assert model.model.language_model.model.layers[3].mlp.up_proj.weight.is_meta, "nothing was offloaded"
    torch.testing.assert_close(own, losses, rtol=1e-5, atol=1e-5)
    for name, tensor in trained.items():  # Adam makes more of the last bits of a gradient near zero
        torch.testing.assert_close(tensor, connector[name], rtol=1e-3, atol=1e-4)


def test_what_can_compile_as_one_graph_says_so_on_the_class(tmp_path: Path) -> None:
    assert FrozenPrefixForConditionalGeneration._can_compile_fullgraph
    model, _ = join(tmp_path)
    assert model._can_compile_fullgraph
    gated, _ = join(tmp_path, fusion="cross_attention")
    assert not gated._can_compile_fullgraph
