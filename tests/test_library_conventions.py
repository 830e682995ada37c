"""What transformers and its tools ask of any vision-language model, asked of ours: its own generic suites where its tests can
be had (slow), and the same behaviours in our own words, always.

The suites: FROZEN_PREFIX_LIBRARY_TESTS names a folder that holds the `tests/` of the installed version, such as an unpacked
source distribution (`pip download --no-deps --no-binary :all: transformers==…`).
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, FrozenPrefixModel
from modeling_frozen.connectors import CONNECTORS
from modeling_frozen.parts import PARTS
from tests.helpers.library_suites import LEFT_OUT, SUITES
from tests.helpers.tiny import WORDS, join, length_of_its_own, rows, save_parents, text_config, vision_config


Model = FrozenPrefixForConditionalGeneration
FUSIONS = [{}, {"fusion": "cross_attention", "cross_attention_config": {"num_heads": 2, "head_dim": 8}}]


# ------------------------------------------------------------------------------------------------- transformers' suites

# Cases that must have passed, so that a suite which asks nothing is noticed.
AT_LEAST = {
    "Images": 95, "ImagesAndAudio": 105, "CrossAttention": 93, "EncoderDecoder": 86, "Config": 1, "ImageProcessor": 33,
    "ClipLlama": 92, "ClipT5": 85, "SiglipGpt2": 90, "Dinov2Gpt2": 88, "VitQwen3": 95,
    "Lengths": 95, "AvgPool": 95, "PixelShuffle": 95, "CAbstractor": 95, "TwoTowers": 95,
}  # fmt: skip


def library_tests() -> Path | None:
    candidates = [Path(transformers.__file__).parents[2]]  # of an editable install
    if os.environ.get("FROZEN_PREFIX_LIBRARY_TESTS"):
        candidates.insert(0, Path(os.environ["FROZEN_PREFIX_LIBRARY_TESTS"]))
    return next((one for one in candidates if (one / "tests" / "test_modeling_common.py").is_file()), None)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_transformers_own_suite(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("parameterized")
    folder = library_tests()
    if folder is None:
        pytest.skip("transformers' tests are not here: name their folder by FROZEN_PREFIX_LIBRARY_TESTS")
    results = tmp_path / "results.json"
    script = Path(__file__).parent / "helpers" / "library_suites.py"
    subprocess.run([sys.executable, str(script), str(folder), suite, str(results)], check=True, capture_output=True)
    outcomes = json.loads(results.read_text())
    failed = {name: reason[-1500:] for name, (outcome, reason) in outcomes.items() if outcome == "failed"}
    assert not failed
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) >= AT_LEAST[suite]
    assert set(LEFT_OUT[suite]) <= set(outcomes), "a case that is left out is no longer there"


# --------------------------------------------------------------------------------------------------------- the model


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.full((2, model.config.num_image_tokens + 4), 5)
    ids[:, 1:-3] = model.config.image_token_id
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def constructed(cls: type = Model, **options: object) -> PreTrainedModel:
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(), connector_type="mlp", **options)
    return cls(config).eval()


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_attention_of_each_part_may_be_chosen_and_changes_nothing(tmp_path: Path, fusion: dict) -> None:
    model, _ = join(tmp_path, **fusion)
    model.save_pretrained(tmp_path / "eyes")
    expected = model(**inputs(model)).logits
    parts = {"vision_config": "vision_tower", "text_config": "language_model"}
    for chosen in ("eager", "sdpa", {"vision_config": "eager"}, {"text_config": "eager"}):
        loaded = Model.from_pretrained(tmp_path / "eyes", attn_implementation=chosen)
        switched = copy.deepcopy(model)
        switched.set_attn_implementation(chosen)
        for one in (loaded, switched):
            torch.testing.assert_close(one(**inputs(one)).logits, expected, atol=1e-5, rtol=1e-4)
            for key, part in parts.items():
                wanted = chosen if isinstance(chosen, str) else chosen.get(key, "sdpa")
                assert getattr(one.model, part).config._attn_implementation == wanted
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_hidden_states_and_attentions_of_each_part(tmp_path: Path, fusion: dict) -> None:
    model, _ = join(tmp_path, attn_implementation="eager", **fusion)
    batch = inputs(model)
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    length = batch["input_ids"].shape[1]
    assert [states.shape for states in output.hidden_states] == [(2, length, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(2, 4, length, length)] * 2
    bare = model.model(**batch, output_hidden_states=True)
    assert torch.equal(bare.hidden_states[-1], bare.last_hidden_state)
    seen = model.get_image_features(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert isinstance(seen, BaseModelOutputWithPooling)
    assert [states.shape for states in seen.hidden_states] == [(2, 5, 32)] * 3
    assert [weights.shape for weights in seen.attentions] == [(2, 4, 5, 5)] * 2
    plain = model(**batch)
    assert plain.hidden_states is None and plain.attentions is None


@torch.no_grad()
def test_a_tuple_for_who_wants_one() -> None:
    for cls in (Model, FrozenPrefixModel):
        model = constructed(cls)
        output, fields = model(**inputs(model)), model(**inputs(model), return_dict=False)
        assert isinstance(fields, tuple) and torch.equal(fields[0], output[0])
        assert [type(one) for one in fields] == [type(one) for one in output.to_tuple()]
        assert isinstance(model.get_image_features(inputs(model)["pixel_values"], return_dict=False), tuple)


def test_transformers_accessors_return_the_parts(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    words = model.model.language_model
    for one in (model, model.model):
        assert one.get_input_embeddings() is words.get_input_embeddings()
        assert one.get_decoder() is words.get_decoder()
        assert one.get_encoder(modality="image") is model.model.vision_tower
    assert model.get_output_embeddings() is words.lm_head
    assert model.base_model is model.model and model.model.base_model is model.model
    assert model.can_generate() and not model.model.can_generate()
    assert model.main_input_name == "input_ids" and model.input_modalities == ("image", "text")
    new = torch.nn.Embedding.from_pretrained(torch.zeros_like(words.get_input_embeddings().weight))
    model.set_input_embeddings(new)
    assert words.get_input_embeddings() is model.get_input_embeddings() is new
    head = torch.nn.Linear(32, words.config.vocab_size)
    model.set_output_embeddings(head)
    assert words.lm_head is model.get_output_embeddings() is head
    for one in (model, model.model):
        with pytest.raises(ValueError, match="never resized"):
            one.resize_token_embeddings(5)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied(tmp_path: Path, tied: bool) -> None:
    save_parents(tmp_path, text={"tie_word_embeddings": tied})
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    for one in (model, Model.from_pretrained(tmp_path / "eyes"), copy.deepcopy(model)):
        words = one.model.language_model
        assert (words.lm_head.weight is words.get_input_embeddings().weight) == tied
        key, source = "model.language_model.lm_head.weight", "model.language_model.model.embed_tokens.weight"
        assert one.all_tied_weights_keys == ({key: source} if tied else {})
        assert one.config.tie_word_embeddings == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_stays_in_fp32_and_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    save_parents(tmp_path)
    for options in FUSIONS:
        model, _ = join(tmp_path, dtype=dtype, **options)
        model.save_pretrained(tmp_path / "eyes")
        model = Model.from_pretrained(tmp_path / "eyes", dtype=dtype)
        kept = model._keep_in_fp32_modules_strict
        assert kept == {"connector", "cross_attention"} if options else {"connector"}
        for name, tensor in model.state_dict().items():
            trains = name.split(".")[1] in kept
            assert tensor.dtype == (torch.float32 if trains else dtype), name


@pytest.mark.parametrize(
    ("auto_class", "own", "options"),
    [
        *((AutoModelForImageTextToText, "model.", options) for options in FUSIONS),
        (AutoModelForZeroShotImageClassification, "contrastive_head", {}),
        (AutoModelForSequenceClassification, "classifier", {}),
    ],
)
def test_what_trains_is_made_in_fp32(auto_class: type, own: str, options: dict) -> None:
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(), connector_type="mlp", **options)
    made = auto_class.from_config(config, dtype=torch.float16).state_dict()
    parts = ("model.vision_tower.", "model.language_model.")
    assert {tensor.dtype for name, tensor in made.items() if name.startswith(parts)} == {torch.float16}
    assert {tensor.dtype for name, tensor in made.items() if not name.startswith(parts)} == {torch.float32}
    assert any(name.startswith(own) for name in made)


@pytest.mark.parametrize("connector_type", [name for name in CONNECTORS if name != "identity"])
def test_every_tensor_of_a_connector_is_initialised(connector_type: str) -> None:
    """Tensors are made empty and filled later: one that is forgotten holds whatever lay in memory."""
    made = []
    for filling in (float("nan"), 1e30):
        real = torch.empty

        def empty(*args: object, filling: float = filling, real: object = real, **kwargs: object) -> torch.Tensor:
            tensor = real(*args, **kwargs)
            return tensor.fill_(filling) if tensor.is_floating_point() and not tensor.is_meta else tensor

        torch.manual_seed(3)
        torch.empty = empty
        try:
            config = FrozenPrefixConfig.from_vision_text_configs(
                vision_config(), text_config(), connector_type=connector_type, **length_of_its_own(connector_type)
            )
            made.append(FrozenPrefixModel(config).connector.state_dict())
        finally:
            torch.empty = real
    for name, tensor in made[0].items():
        assert torch.equal(tensor, made[1][name]) and tensor.isfinite().all(), name


def test_copies_are_their_own() -> None:
    model = constructed()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)).logits, copied(**inputs(copied)).logits)
        for parameter in copied.model.connector.parameters():
            parameter.zero_()
        assert not torch.equal(model(**inputs(model)).logits, copied(**inputs(copied)).logits)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in copied.parameters()]


def test_weights_from_a_state_dict(tmp_path: Path) -> None:
    model = constructed()
    again = Model.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)).logits, again(**inputs(again)).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.slow
def test_compiled_in_training_it_gives_the_same_gradients() -> None:
    model = constructed().train()
    batch = inputs(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    results = []
    torch.compiler.reset()
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(**batch).loss.backward()
        results.append([p.grad.clone() for p in model.model.connector.parameters()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("spare", [7, 0])
def test_ids_copied_into_labels_teach_no_placeholder(tmp_path: Path, spare: int) -> None:
    """As many collators do; with no spare row in the head, the placeholder's id would overrun it."""
    save_parents(tmp_path, text={"vocab_size": len(WORDS) + spare})
    model, _ = join(tmp_path)
    batch = inputs(model)
    for mode in (True, False):
        model.train(mode)
        copied = model(**batch, labels=batch["input_ids"]).loss
        named = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
        assert torch.equal(copied, model(**batch, labels=named).loss)


# --------------------------------------------------------------------------------------------------------- the config


def test_the_config_answers_what_tools_ask() -> None:
    config = constructed().config
    written = config.to_dict()
    assert set(config.sub_configs) == {f"{part}_config" for part in PARTS} <= set(written)
    assert not {"audio_config", "vision_2_config"} & set(json.loads(config.to_json_string()))
    assert config.get_text_config() is config.text_config is config.get_text_config(decoder=True)
    assert config.get_text_config().vocab_size == config.text_config.vocab_size
    assert type(config).from_dict(written).to_dict() == written == copy.deepcopy(config).to_dict()
    assert (
        AutoConfig.for_model("frozen-prefix", **{k: v for k, v in written.items() if k != "model_type"}).to_dict() == written
    )
    config.text_config._attn_implementation = "eager"
    assert config.vision_config._attn_implementation != "eager"


def test_generation_settings_live_with_the_generation_config(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "eyes")
    assert "max_new_tokens" not in (tmp_path / "eyes" / "config.json").read_text()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes")
    assert again.generation_config.max_new_tokens == 3
    assert again.generation_config.eos_token_id == 2
    (tmp_path / "eyes" / "generation_config.json").unlink()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes").generation_config.eos_token_id == 2
    save_parents(tmp_path / "other", text={"eos_token_id": 3})
    model.save_pretrained(tmp_path / "eyes")
    replaced = Model.from_pretrained(tmp_path / "eyes", text_base_model=str(tmp_path / "other" / "words"))
    assert replaced.generation_config.eos_token_id == 3 and replaced.generation_config.max_new_tokens is None


# ------------------------------------------------------------------------------------------------------ the processor


def test_keywords_by_modality_and_flat_ones(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    images, texts = [row["image"] for row in rows(2)], ["a red square .", "a"]
    flat = processor(images=images, text=texts, padding="max_length", max_length=16, do_normalize=False, return_tensors="pt")
    by_modality = processor(
        images=images,
        text=texts,
        text_kwargs={"padding": "max_length", "max_length": 16},
        images_kwargs={"do_normalize": False},
        common_kwargs={"return_tensors": "pt"},
    )
    assert flat["input_ids"].shape == (2, 16) and flat.keys() == by_modality.keys()
    assert all(torch.equal(flat[name], by_modality[name]) for name in flat)
    normal = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert not torch.equal(normal["pixel_values"], flat["pixel_values"])


def test_what_a_processor_overrides_shows(tmp_path: Path) -> None:
    """Tools compare a processor's hooks with those of the class after it, and ask no keyword of both call and constructor."""
    import inspect

    _, processor = join(tmp_path)
    cls = type(processor)
    assert cls.replace_image_token is not cls.__mro__[1].replace_image_token
    keywords = {
        name for kind in cls.valid_processor_kwargs.__annotations__.values() for name in getattr(kind, "__annotations__", {})
    }
    assert not keywords & set(inspect.signature(cls.__init__).parameters)
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values"}
