"""The names in a file are those of the state dict, for every family, however the model came about: every class loads it, and
Trainer's plain `load_state_dict` goes on from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPVisionModel, Trainer, TrainingArguments

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixModel,
)
from tests.helpers.audio_towers import AUDIO_TOWERS
from tests.helpers.families_text import FAMILIES, language_model
from tests.helpers.families_vision import TOWERS, full_config, reason_to_skip
from tests.helpers.tiny import join, rows, vision_config


EVERY_CLASS = (AutoModel, FrozenPrefixForImageTextRetrieval, FrozenPrefixForSequenceClassification, FrozenPrefixModel)


SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Of the backbones and the connector; what is tied, under each name."""
    return {name: tensor for name, tensor in model.base_model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different


@torch.no_grad()
def train(model: Any) -> None:
    """What training does to weights, at once."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tower")
    CLIPVisionModel(vision_config()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_language_model_comes_back_by_every_way(family: str, tower: str, tmp_path: Path) -> None:
    language_model(family).save_pretrained(tmp_path / "words")
    options = {"connector_type": "linear", "trainable": ("connector", "text")}
    join_anew = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained
    model = join_anew(tower, str(tmp_path / "words"), **options)
    train(model)
    model.save_pretrained(tmp_path / "trained")
    assert load_file(tmp_path / "trained" / "model.safetensors").keys() <= model.state_dict().keys()
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert_equal(weights(model), weights(again))
    assert_equal(weights(model), weights(AutoModel.from_pretrained(tmp_path / "trained")))

    # Of a model that was loaded: resumed by a joined one, and embedded.
    train(again)
    again.save_pretrained(tmp_path / "resumed")
    fresh = join_anew(tower, str(tmp_path / "words"), **options)
    result = fresh.load_state_dict(load_file(tmp_path / "resumed" / "model.safetensors"), False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_equal(weights(again), weights(fresh))
    again.save_pretrained(tmp_path / "copy", include_base_models=True)
    assert_equal(weights(again), weights(AutoModel.from_pretrained(tmp_path / "copy")))


def check_a_trained_tower(part: str, folder: Path, **options: Any) -> None:
    """The tower lies in `folder`, where a language model is put beside it."""
    language_model("gpt2").save_pretrained(folder / "words")
    places = {name: str(folder / name) if name == part else None for name in ("vision", "audio")}

    def join_anew() -> Any:
        return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            places["vision"], str(folder / "words"), places["audio"], trainable=("connector", part), **options
        )

    model = join_anew()
    train(model)
    model.save_pretrained(folder / "trained")
    assert load_file(folder / "trained" / "model.safetensors").keys() <= model.state_dict().keys()
    again = FrozenPrefixForConditionalGeneration.from_pretrained(folder / "trained")
    assert_equal(weights(model), weights(again))
    train(again)
    again.save_pretrained(folder / "copy", include_base_models=True)
    assert_equal(weights(again), weights(AutoModel.from_pretrained(folder / "copy")))
    fresh = join_anew()
    result = fresh.load_state_dict(load_file(folder / "copy" / "model.safetensors"), False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_equal(weights(again), weights(fresh))


@pytest.mark.parametrize("name", TOWERS)
def test_a_trained_vision_tower_comes_back_by_every_way(name: str, tmp_path: Path) -> None:
    if reason := reason_to_skip(TOWERS[name]):
        pytest.skip(reason)
    AutoModel.from_config(full_config(TOWERS[name])).save_pretrained(tmp_path / "vision")
    check_a_trained_tower("vision", tmp_path, connector_type="resampler", prefix_length=2, connector_config=SMALL)


@pytest.mark.parametrize("name", AUDIO_TOWERS)
def test_a_trained_audio_tower_comes_back_by_every_way(name: str, tmp_path: Path) -> None:
    config, whole, feature_extractor = AUDIO_TOWERS[name]
    whole(config).save_pretrained(tmp_path / "audio")
    feature_extractor().save_pretrained(tmp_path / "audio")
    check_a_trained_tower(
        "audio", tmp_path, audio_connector_type="resampler", audio_prefix_length=2, audio_connector_config=SMALL
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("trainable", [("connector",), ("connector", "vision"), ("connector", "text")])
def test_every_class_loads_every_checkpoint(family: str, trainable: tuple[str, ...], tower: str, tmp_path: Path) -> None:
    language_model(family).save_pretrained(tmp_path / "words")
    model: Any = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower, str(tmp_path / "words"), connector_type="linear", trainable=trainable
    )
    for step, embedded in (("trained", False), ("copy", True)):
        train(model)
        model.save_pretrained(tmp_path / step, include_base_models=embedded)
        for loader in EVERY_CLASS:
            assert_equal(weights(model), weights(loader.from_pretrained(tmp_path / step)))
        model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / step)
    headless = AutoModel.from_pretrained(tmp_path / "copy")
    headless.save_pretrained(tmp_path / "headless", include_base_models=True)
    assert_equal(weights(model), weights(FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "headless")))


PARTS = {
    "connector": {},
    "vision": {"trainable": ("connector", "vision")},
    "text": {"trainable": ("connector", "text")},
    "last layer": {"unlocked_layers": {"vision": 1}},
}


def trainer(model: Any, processor: Any, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.01, remove_unused_columns=False,
        save_steps=2, logging_steps=1, report_to="none", use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, DataCollatorForFrozenPrefix(processor), rows(8), eval_dataset=rows(4), processing_class=processor
    )


@pytest.mark.parametrize("loaded", [False, True], ids=["joined", "loaded"])
@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS.keys())
def test_resuming_goes_on_from_all_that_trained(
    options: dict[str, Any], loaded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> tuple[Any, Any]:
        model, processor = join(tmp_path, **options)
        if loaded:
            model.save_pretrained(tmp_path / "start")
            model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "start")
        return model, processor

    torch.manual_seed(0)
    model, processor = start()
    if loaded:
        model.save_pretrained(tmp_path / "start")  # both runs begin alike
    else:
        start_of_connector = {name: tensor.clone() for name, tensor in model.model.connector.state_dict().items()}
    whole = trainer(model, processor, tmp_path / "whole", 4)
    whole.train()
    other = (
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "start") if loaded else join(tmp_path, **options)[0]
    )
    if not loaded:
        other.model.connector.load_state_dict(start_of_connector)
    resumed = trainer(other, processor, tmp_path / "resumed", 4)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(weights(model), weights(other))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS.keys())
def test_the_best_model_is_loaded_with_all_that_trained(options: dict[str, Any], tmp_path: Path) -> None:
    model, processor = join(tmp_path, **options)
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(model, processor, tmp_path / "run", 4, metric_for_best_model="eval_loss", **best)
    run.train()
    checkpoint = run.state.best_model_checkpoint
    assert checkpoint is not None
    assert_equal(weights(model), weights(FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)))


def test_names_of_another_model_in_place_of_trained_ones_are_an_error(tmp_path: Path) -> None:
    model, _ = join(tmp_path, trainable=("connector", "vision"))
    tensors = {name.replace("vision_tower", "vision_model"): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="that train.*vision_tower.*vision_model.*from_pretrained"):
        model.load_state_dict(tensors, strict=False)


def test_a_part_of_a_state_dict_may_be_loaded(tmp_path: Path) -> None:
    """As transformers does with shards; what is missing says so."""
    model, _ = join(tmp_path, trainable=("connector", "vision"))
    tower = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
    result = model.load_state_dict(tower, strict=False)
    assert result.missing_keys and all("connector" in name for name in result.missing_keys)


# --------------------------------------------------------------------------------------------- what lies in the folder


def test_shards_and_one_file_take_each_other_s_place(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    for size in ("50GB", "4KB", "50GB"):
        train(model)
        model.save_pretrained(tmp_path / "eyes", max_shard_size=size)
        assert_equal(weights(model), weights(FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")))
        files = {path.name for path in (tmp_path / "eyes").glob("model*")}
        if size == "50GB":
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "eyes" / "model.safetensors.index.json").read_text())
            assert files == {"model.safetensors.index.json", *index["weight_map"].values()} and len(files) > 2
    # A whole copy in shards into the folder of a small checkpoint.
    model.save_pretrained(tmp_path / "eyes", max_shard_size="20KB", include_base_models=True)
    assert_equal(weights(model), weights(FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")))


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    model, _ = join(tmp_path, connector_type="resampler", prefix_length=3, connector_config={"num_layers": 2})
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "connector_config": {"num_layers": 1}}))
    with pytest.raises(ValueError, match="no place for.*connector.*config"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
