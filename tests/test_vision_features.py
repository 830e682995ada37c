"""What the tower would have returned may come in its place, and an image that stands in several places is encoded once: the
same logits, losses, gradients and words as from the pictures themselves."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, ViTConfig, ViTImageProcessorPil

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from modeling_frozen.connectors import CONNECTORS, ConvolutionBlock
from modeling_frozen.vision_towers import encode_images
from tests.helpers.families_joined import CONNECTOR_SIZES
from tests.helpers.families_text import DECODERS, VOCAB_SIZE, text_config
from tests.helpers.families_vision import TOWERS, vision_config
from tests.helpers.tiny import skip_where_torch_traces_no_forward


IMAGE, LENGTH = VOCAB_SIZE, 4  # past the vocabulary; prefix vectors of every connector here
INDEX = torch.tensor([0, 1, 0, 0, 1])
GATED = {
    "fusion": "cross_attention",
    "cross_attention_config": {"every_n_layers": 1, "num_heads": 2, "head_dim": 8, "feedforward_multiple": 2},
}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def build(family: str = "llama", connector: str = "mlp", **options: Any) -> FrozenPrefixForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"connector_config": CONNECTOR_SIZES.get(connector, {}), "prefix_length": LENGTH, **options}
    if connector == "pixel_shuffle":
        options["prefix_length"] = None
    tower = options.pop("tower", None) or CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = FrozenPrefixConfig.from_vision_text_configs(tower, text_config(family), connector_type=connector, **options)
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration(config).eval()
    for block in model.model.cross_attention or ():
        torch.nn.init.ones_(block.attention_gate)
    return model


@functools.cache
def shared(family: str = "llama", connector: str = "mlp") -> FrozenPrefixForConditionalGeneration:
    """For the checks that change nothing in it."""
    return build(family, connector)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_of(model: FrozenPrefixForConditionalGeneration, pixels: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    config = model.config
    features, mask, _ = encode_images(
        model.model.vision_tower, pixels, num_leading_tokens=config.num_leading_tokens, layer=config.vision_feature_layer,
        select_strategy=config.vision_feature_select_strategy, **options,
    )  # fmt: skip
    return {"vision_features": features} | ({} if mask is None else {"vision_features_mask": mask})


GRID_CONNECTORS = ["avg_pool", "pixel_shuffle", "c_abstractor"]


@pytest.mark.parametrize("connector", GRID_CONNECTORS)
@pytest.mark.parametrize("size", [(48, 48), (32, 64), (64, 32)])
@torch.no_grad()
def test_a_bright_patch_of_an_image_lights_its_own_vector(connector: str, size: tuple[int, int]) -> None:
    """From the picture on, through processor and a tower with a class token, on grids of 6 x 6, 4 x 8 and 8 x 4."""
    rows, columns = size[0] // 8, size[1] // 8
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = ViTConfig(**sizes, image_size=list(size), patch_size=8)
    config = dict(CONNECTOR_SIZES.get(connector, {}))
    if connector != "pixel_shuffle":
        config["output_size"] = [rows // 2, columns // 2]
    model = build("llama", connector, tower=tower, connector_config=config, prefix_length=None)
    assert model.config.vision_grid == [rows, columns]
    for module in model.model.connector.modules():
        if isinstance(module, ConvolutionBlock):  # random convolutions blur: their part is made small
            torch.nn.init.constant_(module.project_norm.weight, 0.3)
    processor = ViTImageProcessorPil(do_resize=False)
    grey = np.random.default_rng(0).integers(100, 140, (*size, 3), dtype=np.uint8)
    pictures = [grey]
    for row in range(rows // 2):
        for column in range(columns // 2):
            lit = grey.copy()
            lit[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] = 255
            pictures.append(lit)
    pixels = processor([Image.fromarray(one) for one in pictures], return_tensors="pt")
    dark, *lit = model.get_image_features(**pixels).pooler_output
    assert [(one - dark).norm(dim=-1).argmax().item() for one in lit] == list(range(rows * columns // 4))


def batch(model: FrozenPrefixForConditionalGeneration, family: str = "llama") -> dict[str, torch.Tensor]:
    """Four rows with the five images of `INDEX`: two stand in the second, and the words are the same in all."""
    placeholders = [IMAGE] * (model.config.num_image_tokens or 0)
    alone = [5, *placeholders, 7, 9]
    rows = [alone, [5, *placeholders, 8, *placeholders, 9], alone, alone]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if family not in DECODERS:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 8]]).expand(4, -1)
    return inputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mamba"])
@torch.no_grad()
def test_features_and_an_index_give_the_logits_of_the_pictures(family: str) -> None:
    model, pixels = shared(family), pictures()
    inputs = batch(model, family)
    if family == "mamba":  # reads padding on the left
        inputs = {"input_ids": inputs["input_ids"][:1, -7:].expand(5, -1)}
    whole = model(**inputs, pixel_values=pixels[INDEX]).logits
    features = features_of(model, pixels)
    close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)  # the tower saw two pictures, not five
    close(model(**inputs, vision_features=features["vision_features"][INDEX]).logits, whole)
    close(model(**inputs, **features, image_index=INDEX).logits, whole)
    close(model(**inputs, pixel_values=pixels, image_index=INDEX).logits, whole)
    states = model.model(**inputs, **features, image_index=INDEX)
    close(states.last_hidden_state, model.model(**inputs, pixel_values=pixels[INDEX]).last_hidden_state)
    assert len(states.image_hidden_states) == len(INDEX) * LENGTH
    other = model(**inputs, **features, image_index=INDEX.flip(0)).logits
    assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize(("connector", "options"), [*((name, {}) for name in CONNECTORS), ("resampler", GATED)])
def test_losses_and_gradients_are_those_of_the_pictures(connector: str, options: dict[str, Any]) -> None:
    model, pixels = build(connector=connector, **options), pictures()
    inputs = batch(model)
    inputs["labels"] = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == 0), -100)
    results = []
    for images in (
        {"pixel_values": pixels[INDEX]},
        {"pixel_values": pixels, "image_index": INDEX},
        {**features_of(model, pixels), "image_index": INDEX},
    ):
        model.zero_grad()
        loss = model.train()(**inputs, **images).loss
        if connector != "identity":
            loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *grads])
    assert connector == "identity" or sum(grad.abs().sum() for grad in results[0][1:]) > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("connector", ["mlp", "resampler", "transformer"])
def test_dropout_falls_on_each_use_by_itself(connector: str) -> None:
    """As many draws as without the index, so the very same ones; and two uses of an image differ."""
    options = {**CONNECTOR_SIZES[connector], "dropout": 0.5}
    model, pixels = build(connector=connector, connector_config=options).train(), pictures()
    repeated = []
    for images in ({"pixel_values": pixels[INDEX]}, {"pixel_values": pixels, "image_index": INDEX}):
        torch.manual_seed(3)
        repeated.append(torch.stack(model.get_image_features(**images).pooler_output))
    torch.testing.assert_close(*repeated)
    assert (repeated[1][0] - repeated[1][2]).abs().max() > 1e-3
    model.eval()
    same = model.get_image_features(pixel_values=pixels, image_index=INDEX).pooler_output
    assert torch.equal(same[0], same[2])


@pytest.mark.parametrize("connector", ["resampler", "mlp", "avg_pool", "c_abstractor"])
@torch.no_grad()
def test_positions_may_vary(connector: str) -> None:
    """A tower of variable patches: masked positions have no influence, and connectors that keep positions drop them."""
    model = build(
        tower=vision_config(TOWERS["siglip2_naflex"]), connector=connector, prefix_length=None if connector == "mlp" else 4
    )
    positions = model.config.num_positions
    size = 3 * model.config.vision_config.patch_size**2
    pixels = torch.randn(2, positions, size, generator=torch.Generator().manual_seed(0))
    sides = torch.tensor([[2, 2], [2, 3]])
    there = torch.arange(positions)[None] < sides.prod(-1, keepdim=True)
    features = features_of(model, pixels, pixel_attention_mask=there.long(), spatial_shapes=sides)
    assert torch.equal(features["vision_features_mask"], there)
    whole = model.get_image_features(pixels, pixel_attention_mask=there.long(), spatial_shapes=sides).pooler_output
    features["vision_features"] = features["vision_features"].masked_fill(~there[..., None], 7.0)
    if model.model.connector.reads_grid:
        with pytest.raises(ValueError, match="reads grids, which differ by image, so it needs"):
            model.get_image_features(**features)
        features["spatial_shapes"] = sides
    again = model.get_image_features(**features, image_index=torch.tensor([1, 0, 1])).pooler_output
    assert [len(one) for one in again] == ([6, 4, 6] if connector == "mlp" else [4, 4, 4])
    for mine, its in zip(again, (whole[1], whole[0], whole[1]), strict=True):
        torch.testing.assert_close(mine, its)
    ids = torch.tensor([[5, *[IMAGE] * len(again[0]), 7], [5, *[IMAGE] * len(again[2]), 7]])
    assert torch.isfinite(model(ids, **features, image_index=torch.tensor([1, 1])).logits).all()


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation(family: str, beams: int) -> None:
    model, pixels = shared(family), pictures()
    inputs = {name: value for name, value in batch(model).items() if name != "decoder_input_ids"}
    options = {**OPTIONS, "num_beams": beams, "num_return_sequences": beams, "output_logits": True}
    options["return_dict_in_generate"] = True
    whole = model.generate(**inputs, pixel_values=pixels[INDEX], **options)
    for images in ({"pixel_values": pixels}, features_of(model, pixels)):
        again = model.generate(**inputs, **images, image_index=INDEX, **options)
        assert torch.equal(again.sequences, whole.sequences)
        torch.testing.assert_close(again.logits[0], whole.logits[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generation_with_gated_blocks() -> None:
    model, pixels = build(connector="resampler", **GATED), pictures()
    inputs = batch(model)
    whole = model.generate(**inputs, pixel_values=pixels[INDEX], **OPTIONS)
    again = model.generate(**inputs, **features_of(model, pixels), image_index=INDEX, **OPTIONS)
    assert torch.equal(whole, again)


@torch.no_grad()
def test_compiled_in_one_graph() -> None:
    skip_where_torch_traces_no_forward()
    model, pixels = build(), pictures()
    inputs = {**batch(model), **features_of(model, pixels), "image_index": INDEX}
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_features_of_any_float_dtype(dtype: torch.dtype) -> None:
    model, inputs = shared(), batch(shared())
    features = features_of(model, pictures())["vision_features"]
    whole = model(**inputs, vision_features=features, image_index=INDEX).logits
    torch.testing.assert_close(
        model(**inputs, vision_features=features.to(dtype), image_index=INDEX).logits, whole, atol=0.05, rtol=0
    )


@torch.no_grad()
def test_a_model_without_its_tower_reads_features() -> None:
    model, pixels = build(), pictures()
    inputs, features = batch(model), features_of(model, pixels)
    whole = model(**inputs, pixel_values=pixels[INDEX]).logits
    model.model.vision_tower = None
    torch.testing.assert_close(model(**inputs, **features, image_index=INDEX).logits, whole)
    with pytest.raises(ValueError, match="tower is not loaded.*load_base_model.*vision_features"):
        model(**inputs, pixel_values=pixels, image_index=INDEX)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": pictures()}, "both pixel_values and vision_features"),
        ({"vision_features": torch.zeros(2, 4, 31)}, r"shape \(2, 4, 31\).*\(images, positions, 32\)"),
        ({"vision_features": torch.zeros(2, 32)}, r"shape \(2, 32\)"),
        ({"vision_features": torch.zeros(2, 4, 32, dtype=torch.long)}, "torch.int64"),
        ({"vision_features_mask": torch.ones(2, 3)}, r"mask` of shape \(2, 3\) should be \(2, 4\)"),
        ({"image_index": INDEX + 1}, "runs from 1 to 2, but 2 distinct"),
        ({"image_index": INDEX - 1}, "runs from -1 to 0"),
        ({"image_index": INDEX.float()}, "of integers"),
        ({"image_index": INDEX[:4]}, "placeholders"),
        ({"vision_features": None}, "`image_index` goes with"),
        ({"vision_features": None, "image_index": None, "vision_features_mask": torch.ones(2, 4)}, "_mask` goes with"),
        (
            {"vision_features": None, "pixel_values": pictures(), "vision_features_mask": torch.ones(2, 4)},
            "`pixel_values` were passed",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {**batch(shared()), **features_of(shared(), pictures()), "image_index": INDEX, **change}
    with pytest.raises(ValueError, match=message):
        shared()(**inputs)
