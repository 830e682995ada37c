"""What is loaded computes bit for bit what was saved, wherever a file puts its tensors."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    CLIPVisionModel,
    Trainer,
    TrainingArguments,
)

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixModel,
)
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.weights import ALIGNMENT, align_weights
from tests.helpers.fresh_python import ROOT
from tests.helpers.tiny import join, rows, save_parents, skip_where_peft_is_too_old


Model = FrozenPrefixForConditionalGeneration


def shift(folder: Path, by: int = 8) -> None:
    """Pads the header of the folder's weights, as JSON may be padded, so that the first tensor lies `by` bytes past 64."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].rstrip()
        header += b" " * ((by - 8 - len(header)) % 64)
        moved = path.with_suffix(".moved")  # models may be mapped from the file itself
        moved.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        moved.replace(path)


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def off(module: nn.Module, alignment: int = ALIGNMENT) -> list[str]:
    return [name for name, address in addresses(module).items() if address % alignment]


def joined(folder: Path, by: int = 0, model_class: type = Model, **options: Any) -> Any:
    """A model whose parents' files put them `by` bytes past 64."""
    if not (folder / "tower").exists():
        save_parents(folder)
    shift_parents(folder, by)
    options = {"connector_type": "mlp", **options}
    model = model_class.from_vision_text_pretrained(str(folder / "tower"), str(folder / "words"), **options)
    with torch.no_grad():  # as trained: none is zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    return model


def shift_parents(folder: Path, by: int = 8) -> None:
    for name in ("tower", "words"):
        shift(folder / name, by)


def saved(model: Any, folder: Path, by: int = 8, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    shift(folder, by)
    return folder


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    """Of one word alone, for a product with one row is the first to show it, and of a picture and words."""
    word = torch.tensor([[5]])
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if hasattr(model, "logit_scale"):
        return [model.get_text_features(word).pooler_output, model.get_image_features(picture).pooler_output]
    if model.config.num_labels == 3:
        return [model(word, picture).logits]
    placeholders = 1 if model.config.fusion == "cross_attention" else model.config.prefix_length
    ids = torch.tensor([[5] + [model.config.image_token_id] * placeholders + [6]])
    both = model(word), model(ids, picture)
    return [output["logits" if "logits" in output else "last_hidden_state"] for output in both]


# A road takes a model and gives one with its weights, out of files that put them `by` bytes past 64; the parents' do already.
def refilled(model: Any, folder: Path, by: int) -> Any:
    return type(model).from_pretrained(saved(model, folder / "out", by))


def whole(model: Any, folder: Path, by: int) -> Any:
    return type(model).from_pretrained(saved(model, folder / "out", by, include_base_models=True))


def by_auto_class(model: Any, folder: Path, by: int) -> Any:
    return AutoModelForImageTextToText.from_pretrained(saved(model, folder / "out", by, include_base_models=True))


def from_loaded_parents(model: Any, folder: Path, by: int) -> Any:
    parents = CLIPVisionModel.from_pretrained(folder / "tower"), AutoModelForCausalLM.from_pretrained(folder / "words")
    assert all(off(parent) for parent in parents)  # or nothing is shown here
    again = Model.from_vision_text_pretrained(*parents, connector_type="mlp")
    again.model.connector.load_state_dict(model.model.connector.state_dict())
    return again


def from_a_state_dict(model: Any, folder: Path, by: int) -> Any:
    weights = saved(model, folder / "out", by, include_base_models=True) / "model.safetensors"
    return Model.from_pretrained(None, config=model.config, state_dict=load_file(weights))


def with_a_tower_fetched_later(model: Any, folder: Path, by: int) -> Any:
    again = Model.from_pretrained(saved(model, folder / "out", by), load_vision_tower=False)
    again.load_base_model("vision")
    return again


def as_another_connector(model: Any, folder: Path, by: int) -> Any:
    again = joined(folder, by)
    again.load_connector(str(saved(model, folder / "out", by)), "other")
    again.set_connector("other")
    return again


def by_load_state_dict(model: Any, folder: Path, by: int) -> Any:
    weights = saved(model, folder / "out", by) / "model.safetensors"
    again = joined(folder, by)
    again.load_state_dict(load_file(weights), strict=False)  # as Trainer resumes
    return again


ROADS = [
    refilled, whole, by_auto_class, from_loaded_parents, from_a_state_dict, with_a_tower_fetched_later, as_another_connector,
    by_load_state_dict,
]  # fmt: skip


@pytest.mark.parametrize("by", [4, 8])
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_every_road_leads_to_the_same_bits(tmp_path: Path, road: Callable, by: int) -> None:
    model = joined(tmp_path)
    expected = outputs(model)
    shift_parents(tmp_path, by)
    again = road(model, tmp_path, by)
    assert not off(again)
    assert all(torch.equal(one, other) for one, other in zip(outputs(again), expected, strict=True))


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (FrozenPrefixForImageTextRetrieval, {"text_pooling": "ret"}),  # its scale, of four bytes, comes before other weights
        (FrozenPrefixForSequenceClassification, {"num_labels": 3}),
        (FrozenPrefixModel, {}),
        (Model, {"trainable": ("connector", "text")}),
        (Model, {"trainable": ("connector", "vision")}),
        (Model, {"unlocked_layers": {"text": 1}}),
        (Model, {"fusion": "cross_attention"}),
    ],
)
def test_every_class_and_whatever_trained(tmp_path: Path, model_class: type, options: dict) -> None:
    model = joined(tmp_path, model_class=model_class, **options)
    shift_parents(tmp_path)
    for again in (refilled(model, tmp_path, 8), whole(model, tmp_path, 8)):
        assert not off(again)
        assert all(torch.equal(one, other) for one, other in zip(outputs(again), outputs(model), strict=True))


def test_a_head_of_four_bytes_shifts_nothing(tmp_path: Path) -> None:
    """No file was padded here: the scale's four bytes are enough."""
    save_parents(tmp_path)
    names = str(tmp_path / "tower"), str(tmp_path / "words")
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(*names)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "out")
    assert not off(again)
    assert all(torch.equal(one, other) for one, other in zip(outputs(again), outputs(model), strict=True))


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config

    skip_where_peft_is_too_old()
    saved(joined(tmp_path, 8), tmp_path / "eyes")
    model = Model.from_pretrained(tmp_path / "eyes")
    config = lora_config(model, r=2, init_lora_weights=False)
    model.add_adapter(config)
    saved(model, tmp_path / "adapter")
    later = Model.from_pretrained(tmp_path / "eyes")
    later.load_adapter(tmp_path / "adapter")
    tuned = peft.get_peft_model(Model.from_pretrained(tmp_path / "eyes"), config)
    saved(tuned, tmp_path / "tuned")
    wrapped = peft.PeftModel.from_pretrained(Model.from_pretrained(tmp_path / "eyes"), tmp_path / "tuned")
    wrapped.load_adapter(tmp_path / "tuned", "other")  # as Trainer resumes one
    for one, expected in (
        (later, model),
        (Model.from_pretrained(tmp_path / "adapter"), model),
        (wrapped.eval(), tuned.eval()),
    ):
        assert not off(one)
        assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(expected), strict=True))


@pytest.mark.parametrize("trainable", [("connector",), ("connector", "text")])
def test_a_resumed_training(tmp_path: Path, trainable: tuple[str, ...]) -> None:
    def trainer(folder: Path, steps: int) -> Trainer:
        model = joined(folder, 8, trainable=trainable)
        options = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True}
        args = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=1, eval_strategy="steps", eval_steps=1, logging_strategy="no",
            per_device_train_batch_size=2, load_best_model_at_end=True, **options,
        )  # fmt: skip
        collator = DataCollatorForFrozenPrefix(join(folder)[1])
        return Trainer(model=model, args=args, train_dataset=rows(4), eval_dataset=rows(2), data_collator=collator)

    first = trainer(tmp_path, 2)
    first.train()
    for folder in (tmp_path / "run").iterdir():
        shift(folder)
    resumed = trainer(tmp_path, 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    loaded = Model.from_pretrained(resumed.state.best_model_checkpoint)
    assert not off(resumed.model) and not off(loaded)
    assert all(torch.equal(a, b) for a, b in zip(outputs(resumed.model.eval()), outputs(loaded), strict=True))


def test_rows_of_a_store(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    stored = cache_vision_features(Dataset.from_list(rows(3)), model, processor, cache_dir=tmp_path / "store")
    for row in stored:
        features, _ = row["image"].load()
        assert features.data_ptr() % ALIGNMENT == 0


# --- What is copied, and what is not ---------------------------------------------------------------------------------


def test_what_lies_well_stays_mapped(tmp_path: Path) -> None:
    save_parents(tmp_path, text={"tie_word_embeddings": True})
    for by in (0, 16, 48):
        shift(tmp_path / "words", by)
        words = AutoModelForCausalLM.from_pretrained(tmp_path / "words")
        assert len(off(words, 64)) > 10 if by else not off(words)
        before = addresses(words)
        align_weights(words)
        assert addresses(words) == before


def test_only_what_lies_off_is_copied(tmp_path: Path) -> None:
    flat = torch.arange(64, dtype=torch.float32)
    module = nn.ParameterDict({"well": flat[4:20].view(4, 4), "off": flat[21:37].view(4, 4).t()})
    module["in 16 bits"] = nn.Parameter(flat.bfloat16()[1:9], requires_grad=False)
    module.register_buffer("counted", torch.arange(8)[1:], persistent=False)
    module.register_buffer("table", flat[1:5], persistent=False)
    expected = copy.deepcopy(module.state_dict())
    before, parameters = addresses(module), dict(module.named_parameters())
    align_weights(module)
    assert {name for name, address in addresses(module).items() if address != before[name]} == {"off", "table"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
    assert module["off"].stride() == (1, 4) and module["off"].requires_grad and not module["in 16 bits"].requires_grad
    assert all(parameters[name] is parameter for name, parameter in module.named_parameters())


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    save_parents(tmp_path, text={"tie_word_embeddings": True})
    model = joined(tmp_path, 8)
    for again in (model, refilled(model, tmp_path, 8), whole(model, tmp_path, 8)):
        words = again.model.language_model
        assert words.lm_head.weight is words.get_input_embeddings().weight
    # two parameters of one memory, too
    flat = torch.arange(20, dtype=torch.float32)
    two = nn.ParameterList([nn.Parameter(flat[1:17].view(4, 4)), nn.Parameter(flat[1:17].view(4, 4))])
    align_weights(two)
    assert not off(two) and two[0].data_ptr() == two[1].data_ptr()


def test_a_quantised_or_absent_weight_is_left_alone() -> None:
    module = nn.ParameterList([torch.empty(3, 5, device="meta"), nn.Parameter(torch.zeros(4, 4).to_sparse())])
    align_weights(module)
    assert module[0].is_meta and module[1].is_sparse


# --- What the CPU at hand does with addresses ------------------------------------------------------------------------


def at(tensor: torch.Tensor, address: int) -> torch.Tensor:
    """A copy that begins `address` bytes past a multiple of 64."""
    memory = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    moved = memory[address : address + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)


def products(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = weight.shape[1]
    for count in (1, 2, 3, 7, 16, 33):
        rows = torch.randn(count, width, generator=generator).to(weight.dtype)
        yield linear(rows, weight)
        yield linear(weight, rows)
        yield linear(rows, weight, weight[:, 0].contiguous())
        yield scaled_dot_product_attention(rows[None, None], weight[None, None], weight[None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_products_are_the_same_wherever_weights_are_left(dtype: torch.dtype) -> None:
    """If this fails, there is a CPU that asks for more than [`ALIGNMENT`], or for it in other dtypes."""
    step = ALIGNMENT if dtype in (torch.float32, torch.float64) else dtype.itemsize
    for rows_, width in ((8, 32), (12, 32), (32, 32), (96, 64), (17, 33), (64, 768), (512, 128), (100, 1000)):
        weight = torch.randn(rows_, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = list(products(weight))
        for address in range(0, 64, step):
            actual = products(at(weight, address))
            assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True)), (address, rows_, width)


def test_on_an_older_cpu_too() -> None:
    """MKL and torch keep to what the variables allow, read once per process."""
    older = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}
    test = f"{Path(__file__).relative_to(ROOT)}::test_every_road_leads_to_the_same_bits[whole-8]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **older}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
