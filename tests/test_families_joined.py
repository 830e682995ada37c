"""Towers and connectors, joined: every tower with one language model, every connector with three of each, and compiled."""

import pytest
import torch

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from modeling_frozen.connectors import CONNECTORS
from tests.helpers.families_text import DECODERS, FAMILIES, VOCAB_SIZE, text_config
from tests.helpers.families_vision import TOWERS, image_inputs, reason_to_skip, tiny_tower, vision_config
from tests.helpers.tiny import length_of_its_own, skip_where_torch_traces_no_forward


SMALL = {"hidden_size": 16, "num_layers": 1}
OPTIONS = {
    "resampler": {**SMALL, "num_heads": 2},
    "transformer": {**SMALL, "num_heads": 2},
    "qformer": {**SMALL, "num_heads": 2},
    "lstm": SMALL,
    "c_abstractor": SMALL,
}


def join(tower: str, family: str, connector: str) -> FrozenPrefixForConditionalGeneration:
    config = FrozenPrefixConfig.from_vision_text_configs(
        vision_config(TOWERS[tower]),
        text_config(family),
        connector_type=connector,
        connector_config=OPTIONS.get(connector, {}),
        **length_of_its_own(connector),
    )
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration(config)
    # Random towers hardly tell pictures apart; this one is spread out.
    model.model.vision_tower.load_state_dict(tiny_tower(TOWERS[tower]).state_dict())
    return model.eval()


def check(model: FrozenPrefixForConditionalGeneration, tower: str, family: str) -> None:
    """Another picture gives other logits, and each tensor of the connector a gradient."""
    first, second = ({key: value[:1] for key, value in image_inputs(TOWERS[tower], seed=seed).items()} for seed in (1, 2))
    length = len(model.get_image_features(**first).pooler_output[0])
    index = model.config.image_token_id
    ids = torch.tensor([[5, *[index] * length, 6, 7]])
    target = {} if family in DECODERS else {"decoder_input_ids": torch.tensor([[2, 7, 8]])}
    with torch.no_grad():
        moved = (model(ids, **first, **target).logits - model(ids, **second, **target).logits)[:, -1].abs().max()
    assert moved > 1e-5
    model.train()(ids, **first, labels=ids.masked_fill(ids == index, -100)).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_with_one_language_model(tower: str) -> None:
    if reason := reason_to_skip(TOWERS[tower]):
        pytest.skip(reason)
    check(join(tower, "llama", "resampler"), tower, "llama")


@pytest.mark.parametrize("connector", [name for name in CONNECTORS if name != "identity"])
@pytest.mark.parametrize(("tower", "family"), [("clip", "gpt2"), ("swin", "opt_350m"), ("siglip", "t5")])
def test_every_connector_with_three_of_each(connector: str, tower: str, family: str) -> None:
    check(join(tower, family, connector), tower, family)


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_identity_where_widths_agree(tower: str) -> None:
    width = 16
    text = text_config("opt_350m")
    text.word_embed_proj_dim = width
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(TOWERS[tower]), text, connector_type="identity")
    model = FrozenPrefixForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tiny_tower(TOWERS[tower]).state_dict())
    encoded = model.get_image_features(**image_inputs(TOWERS[tower]))
    expected = encoded.last_hidden_state[:, config.num_leading_tokens :]
    assert torch.equal(torch.stack(encoded.pooler_output), expected)


COMPILED = ["llama", "t5"]


@pytest.mark.parametrize(
    "family", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@torch.no_grad()
def test_compiled_it_gives_the_same_logits_where_the_parent_compiles(family: str) -> None:
    model = join("clip", family, "resampler")
    if not model.model.language_model._can_compile_fullgraph:
        pytest.skip("the parent itself does not compile as one graph")
    skip_where_torch_traces_no_forward()
    torch.compiler.reset()
    ids = torch.tensor([[5, *[model.config.image_token_id] * 3, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": image_inputs(TOWERS["clip"])["pixel_values"][:1]}
    if family not in DECODERS:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 8]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    wrong = {**inputs, "input_ids": ids.clone()}
    wrong["input_ids"][0, 1] = VOCAB_SIZE - 1
    with pytest.raises((ValueError, RuntimeError)):
        compiled(**wrong)
