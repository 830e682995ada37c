"""Exported graphs give what the model gives: any number of images, every tower and connector, read back from disk."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.connectors import CONNECTORS
from modeling_frozen.export.graphs import export_decode, export_image_encoder, export_prefill
from modeling_frozen.transformers_compat import CACHE, cache_of
from tests.helpers.families_vision import TOWERS, Tower, image_inputs, reason_to_skip, tiny_tower
from tests.helpers.talking import QUESTION, TOKENS, picture, talking
from tests.helpers.tiny import is_before, join, length_of_its_own, rows, skip_before, text_config


# Traced for any number of images they can't be: they go over them one by one. From 5.24 on transformers' don't.
ONE_BY_ONE = {"siglip2_naflex", "siglip2_naflex_dual"} if is_before("5.24.0") else set()
ROTARY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ROTARY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CAUSAL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # learned positions
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # slopes in place of positions
    "gemma": {**ROTARY, "head_dim": 8},  # scales its embeddings
    "qwen3": {**ROTARY, "head_dim": 8},
}


@pytest.fixture(autouse=True)
def exporters(request: pytest.FixtureRequest) -> None:
    if request.function is not test_an_older_transformers_is_named:
        skip_before("5.23.0", "exports no graph that can be saved and read back")


def test_an_older_transformers_is_named(tmp_path: Path) -> None:
    model = seeing(TOWERS["clip"])
    if is_before("5.23.0"):
        with pytest.raises(ImportError, match=r"needs transformers 5.23 or later.* is installed: pip install -U transformers"):
            export_image_encoder(model, tmp_path, format="pt2", sample_inputs=image_inputs(TOWERS["clip"]))
    else:
        assert export_image_encoder(model, tmp_path, format="pt2", sample_inputs=image_inputs(TOWERS["clip"])) is not None


def seeing(tower: Tower, connector: str = "resampler") -> FrozenPrefixForConditionalGeneration:
    torch.manual_seed(0)
    options: dict[str, Any] = length_of_its_own(connector)
    language_model = LlamaForCausalLM(text_config())
    if connector == "identity":
        language_model = LlamaForCausalLM(text_config(hidden_size=tiny_tower(tower).config.hidden_size))
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tiny_tower(tower), language_model, connector_type=connector, image_token_id=17, **options
    )


def read_back(folder: Path) -> Any:
    """What was exported; programs of torch.export are pickles, which releases from 5.24 on read for who trusts them."""
    from transformers.exporters import ExportedModel

    trusts = "trust_remote_code" in inspect.signature(ExportedModel.from_pretrained).parameters
    return ExportedModel.from_pretrained(folder, **({"trust_remote_code": True} if trusts else {}))


def check(model: FrozenPrefixForConditionalGeneration, tower: Tower, format: str, folder: Path) -> None:
    """Exports, reads back, and compares with the model on one image and on five."""
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    exported = export_image_encoder(model, folder, format=format, sample_inputs=image_inputs(tower))
    for source in (exported, read_back(folder)):
        for images in (1, 5):
            inputs = image_inputs(tower, images=images, seed=3)
            expected = torch.stack(model.get_image_features(**inputs).pooler_output)
            result = source(**inputs)["image_embeds"]
            assert expected.std() > 1e-3 and result.shape == expected.shape
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].requires_grad == grad for name, (value, grad) in before.items())


def skip_without(format: str) -> None:
    if format == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "format"),
    [("clip", "pt2")] + [slow(name, "pt2") for name in TOWERS if name != "clip"] + [slow(name, "onnx") for name in TOWERS],
)
def test_towers(name: str, format: str, tmp_path: Path) -> None:
    skip_without(format)
    if reason := reason_to_skip(TOWERS[name]):
        pytest.skip(reason)
    model = seeing(TOWERS[name])
    if name in ONE_BY_ONE:
        with pytest.raises(ValueError, match="one by one"):
            check(model, TOWERS[name], format, tmp_path)
    else:
        check(model, TOWERS[name], format, tmp_path)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("mlp", "pt2"),
        *(slow(name, "pt2") for name in CONNECTORS if name != "mlp"),
        *(slow(name, "onnx") for name in CONNECTORS),
    ],
)
def test_connectors(name: str, format: str, tmp_path: Path) -> None:
    skip_without(format)
    check(seeing(TOWERS["clip"], name), TOWERS["clip"], format, tmp_path)


def test_other_layers_and_strategies(tmp_path: Path) -> None:
    tower = TOWERS["clip"]
    torch.manual_seed(0)
    for options in ({"vision_feature_layer": [-1, -2]}, {"vision_feature_select_strategy": "pooled"}):
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            tiny_tower(tower), LlamaForCausalLM(text_config()), connector_type="linear", image_token_id=17, **options
        )
        check(model, tower, "pt2", tmp_path)


def test_half_precision_parents_keep_a_full_precision_connector(tmp_path: Path) -> None:
    model, processor = join(tmp_path, dtype=torch.bfloat16)
    inputs = processor(images=[row["image"] for row in rows(3)], return_tensors="pt")
    result = export_image_encoder(model, format="pt2", sample_inputs=inputs)(**inputs)["image_embeds"]
    expected = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    assert result.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_images_of_the_processors_size_are_asked_for(tmp_path: Path) -> None:
    """Without a sample the tower's own size is taken; a connector that was made for another says so."""
    model, processor = join(tmp_path)
    inputs = processor(images=rows(1)[0]["image"], return_tensors="pt")
    expected = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    result = export_image_encoder(model, format="pt2")(**inputs)["image_embeds"]
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="no pixel_values"):
        export_image_encoder(model, format="pt2", sample_inputs={"input_ids": torch.zeros(1, 1)})


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    with pytest.raises(ValueError, match=r"format='torchscript' is not known; choose one of .*'onnx'"):
        export_image_encoder(model, format="torchscript")
    with pytest.raises(ValueError, match="eval"):
        export_image_encoder(model.train(), format="pt2")
    across, _ = join(tmp_path, connector_type="resampler", prefix_length=3, fusion="cross_attention")
    with pytest.raises(ValueError, match="fusion='cross_attention'.*export_for_generation"):
        export_prefill(across, format="pt2")


# ------------------------------------------------------------------------------------------------- the language model


@pytest.mark.parametrize(
    ("name", "format"),
    [("llama", "pt2"), slow("llama", "onnx"), *(slow(name, format) for name in CAUSAL for format in ("pt2", "onnx"))],
)
def test_the_first_step(name: str, format: str, tmp_path: Path) -> None:
    """From prefix and words, padded on the left, to logits and cache; then on with the cache, in torch."""

    skip_without(format)
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(text_config())
    if name != "llama":
        config = AutoConfig.for_model(name, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **CAUSAL[name])
        language_model = AutoModelForCausalLM.from_config(config)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tiny_tower(TOWERS["clip"]), language_model, connector_type="resampler", prefix_length=3, image_token_id=17
    )
    exported = export_prefill(model, tmp_path, format=format)
    for source in (exported, read_back(tmp_path)):
        for batch, length in ((1, 4), (3, 11)):
            ids = torch.randint(3, 16, (batch, length))
            ids[:, 1:4] = 17
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, 0] = 0
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            images = image_inputs(TOWERS["clip"], images=batch, seed=4)
            expected = model(input_ids=ids, attention_mask=mask, use_cache=True, **images)
            prefix = torch.cat(model.get_image_features(**images).pooler_output)
            embeds = model.get_input_embeddings()(ids.where(ids != 17, 0)).masked_scatter((ids == 17)[..., None], prefix)
            result = source(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
            real = mask.bool()
            torch.testing.assert_close(result["logits"][real], expected.logits[real], rtol=1e-3, atol=1e-3)
            step = {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
            logits = model(**step, cache=expected.cache).logits
            torch.testing.assert_close(model(**step, cache=cache_of(result)).logits, logits, rtol=1e-3, atol=1e-3)


def three_graphs(model: Any, processor: Any, images: list[Any], texts: list[str], format: str) -> tuple[Any, Any]:
    """What tower and connector, first step and further steps say as graphs, word by word; and what `generate` says."""
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not mask.all(), "nothing is padded"
    see = export_image_encoder(model, format=format, sample_inputs=inputs)
    read, go_on = export_prefill(model, format=format), export_decode(model, format=format)
    place = (ids == model.config.image_token_id)[..., None]
    words = model.get_input_embeddings()(ids.masked_fill(place[..., 0], 0))
    embeds = words.masked_scatter(place, see(pixel_values=inputs["pixel_values"])["image_embeds"])
    outputs = read(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    answer = []
    for _ in range(TOKENS):
        answer.append(outputs["logits"][:, -1:].argmax(-1))
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        past, position = cache_of(outputs), mask.cumsum(-1)[:, -1:] - 1
        outputs = go_on(input_ids=answer[-1], attention_mask=mask, position_ids=position, **{CACHE: past})
    expected = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return torch.cat(answer, dim=1), expected[:, ids.shape[1] :]


@pytest.mark.parametrize("format", ["pt2", slow("onnx")])
def test_three_graphs_answer_as_generate_does(format: str, tmp_path: Path) -> None:
    skip_without(format)
    saved = talking(tmp_path)
    images, texts = [picture("red"), picture("blue")], [f"<image> {QUESTION}", "<image> a"]
    result, expected = three_graphs(saved.model, saved.processor, images, texts, format)
    assert torch.equal(result, expected) and not torch.equal(result[0], result[1])


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_real_weights_and_photos(assets: Path, format: str) -> None:
    skip_without(format)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        str(assets / "vision/mobilenet_v2_1.0_224"),
        str(assets / "lm/stories260k"),
        connector_type="resampler",
        prefix_length=8,
    )
    processor = FrozenPrefixProcessor.from_model(model)
    photos = sorted(str(path) for path in (assets / "vision/sample_photos").glob("*.jp*g"))[:2]
    texts = ["<image> One day, there was a", "<image> A"]
    result, expected = three_graphs(model, processor, photos, texts, format)
    assert torch.equal(result, expected)
