"""Several vision towers for one prefix: each with its own images, place, layer and store, all read by one connector."""

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
    TrainingArguments,
)

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    DataCollatorForFrozenPrefixRetrieval,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.checkpoints import refuse_unexpected
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.data.image_reading import Prepare
from modeling_frozen.evaluation.retrieval import embed_images
from modeling_frozen.export import export_image_encoder, export_transformers_js
from modeling_frozen.interpretation import attention_to_image
from modeling_frozen.model_card import write_model_card
from modeling_frozen.vision_towers import join_features
from tests.helpers.tiny import save_parents, vision_config


Model = FrozenPrefixForConditionalGeneration
PIXELS = {"vision": "pixel_values", "vision_2": "pixel_values_2"}
DINO, SIGLIP = (
    {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.3, 0.2, 0.25]},
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
)


def save_towers(folder: Path) -> list[str]:
    """DINOv2 with registers (five leading tokens, a grid of 4 x 4, width 24) and SigLIP (none, 2 x 2, width 32)."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    dino, siglip = folder / "dino", folder / "siglip"
    config = Dinov2WithRegistersConfig(hidden_size=24, image_size=28, patch_size=7, num_register_tokens=4, **sizes)
    Dinov2WithRegistersModel(config).save_pretrained(dino)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size, do_convert_rgb=True, **DINO).save_pretrained(dino)
    siglip_config = SiglipVisionConfig(hidden_size=32, intermediate_size=64, image_size=16, patch_size=8, **sizes)
    SiglipVisionModel(siglip_config).save_pretrained(siglip)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}, **SIGLIP).save_pretrained(siglip)
    return [str(dino), str(siglip)]


def join(folder: Path, towers: int | list[int] = 2, **options: Any) -> tuple[Model, FrozenPrefixProcessor]:
    if not (folder / "words").exists():
        save_parents(folder)
        save_towers(folder)
    places = [str(folder / "dino"), str(folder / "siglip"), str(folder / "tower")]
    chosen = [places[one] for one in towers] if isinstance(towers, list) else places[:towers]
    small = {"connector_type": "resampler", "prefix_length": 3, "connector_config": {"hidden_size": 16, "num_heads": 2}}
    options = {**small, **options} if "connector_type" not in options else options
    torch.manual_seed(1)
    model = Model.from_vision_text_pretrained(chosen, str(folder / "words"), **options)
    return model, FrozenPrefixProcessor.from_model(model)


def noise(seed: int, height: int = 30, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def inputs_of(processor: FrozenPrefixProcessor, count: int = 2) -> Any:
    texts = ["<image> what is that ?", "a <image>", "<image>"][:count]
    images = [[noise(seed)] for seed in range(count)]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_each_tower_sees_the_image_by_its_own_processor(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    images = [noise(0), noise(1, 40, 28)]
    made = processor(images=images, return_tensors="pt")
    own = [part(images, return_tensors="pt")["pixel_values"] for part in processor.image_processors]
    assert [tuple(one.shape) for one in own] == [(2, 3, 28, 28), (2, 3, 16, 16)]
    assert torch.equal(made["pixel_values"], own[0]) and torch.equal(made["pixel_values_2"], own[1])
    assert {"pixel_values", "pixel_values_2"} <= set(processor.model_input_names)

    core = model.model
    dino = core.vision_tower(own[0]).last_hidden_state[:, 5:]  # class token and registers are cut
    siglip = core.vision_tower_2(own[1]).last_hidden_state
    maps = siglip.transpose(1, 2).reshape(2, 32, 2, 2)
    maps = nn.functional.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False)
    expected = torch.cat([dino, maps.permute(0, 2, 3, 1).reshape(2, 16, 32)], dim=-1)
    features, mask, outputs = core.read_images(dict(made), {})
    assert mask is None and outputs is not None and outputs.last_hidden_state.shape == (2, 21, 24)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-5)
    assert model.config.vision_width == 24 and model.config.features_width == 56
    assert model.config.vision_2_geometry == {"num_leading_tokens": 0, "num_positions": 4, "vision_width": 32, "grid": [2, 2]}


def test_a_bright_place_stays_where_it_is() -> None:
    small, large = torch.zeros(1, 2 * 3, 2), torch.zeros(1, 4 * 6, 5)
    small[0, 1 * 3 + 2] = 1.0  # row 1, column 2 of 2 x 3
    joined = join_features([large, small], [(4, 6), (2, 3)])[0, :, 5:].amax(-1).reshape(4, 6)
    assert joined.shape == (4, 6) and divmod(int(joined.argmax()), 6) == (3, 5)
    assert joined[:2].max() < joined[2:].max() and float(joined[0, 0]) == 0
    with pytest.raises(ValueError, match=r"vision tower 2 have shape \(1, 5, 2\), where its grid of 2 rows and 3 columns"):
        join_features([large, small[:, :5]], [(4, 6), (2, 3)])
    with pytest.raises(ValueError, match=r"Of 1 images .* tower 2 have shape \(2, 6, 2\)"):
        join_features([large, small.repeat(2, 1, 1)], [(4, 6), (2, 3)])


@torch.no_grad()
def test_no_tower_rules_by_its_scale(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    assert model.config.connector_config["input_norm_groups"] == [24, 32]
    features = torch.randn(2, 16, 56)
    louder = torch.cat([features[..., :24], 1000 * features[..., 24:]], dim=-1)
    connector = model.model.connector.eval()
    torch.testing.assert_close(connector(louder), connector(features), atol=1e-4, rtol=1e-4)
    layered, _ = join(tmp_path, vision_feature_layer=[-2, -1], vision_2_feature_layer=[1, -1])
    assert layered.config.connector_config["input_norm_groups"] == [24, 24, 32, 32]
    equal, _ = join(tmp_path, [1, 2])
    assert equal.config.connector_config["input_norm_groups"] == 2


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 1])
def test_each_tower_has_its_own_layer(tmp_path: Path, layer: int) -> None:
    model, processor = join(tmp_path, vision_2_feature_layer=layer)
    made = processor(images=noise(0), return_tensors="pt")
    output = model.model.vision_tower_2(made["pixel_values_2"], output_hidden_states=True)
    own = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    features = model.model.read_images(dict(made), {})[0][..., 24:]
    torch.testing.assert_close(features, join_features([features, own], [(4, 4), (2, 2)])[..., 32:])


@torch.no_grad()
@pytest.mark.parametrize("connector_type", ["mlp", "resampler", "avg_pool", "pixel_shuffle", "c_abstractor", "qformer"])
def test_saved_small_and_whole_and_loaded_again(tmp_path: Path, connector_type: str) -> None:
    options: dict[str, Any] = {"connector_type": connector_type}
    if connector_type in ("resampler", "qformer", "avg_pool", "c_abstractor"):
        options["prefix_length"] = 4
    model, processor = join(tmp_path, **options)
    inputs = inputs_of(processor)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.model.connector.state_dict().values())
    assert size <= own + 64 * 1024
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(**inputs).logits, logits)
    again = AutoProcessor.from_pretrained(tmp_path / "small")
    assert all(torch.equal(inputs[key], value) for key, value in inputs_of(again).items())
    read = FrozenPrefixConfig.from_pretrained(tmp_path / "small")
    assert read.to_json_string() == FrozenPrefixConfig.from_dict(loaded.config.to_dict()).to_json_string()
    model.save_pretrained(tmp_path / "whole", include_base_models=True)
    for name in ("dino", "siglip", "words"):
        (tmp_path / name).rename(tmp_path / f"{name}_moved")
    assert torch.equal(Model.from_pretrained(tmp_path / "whole")(**inputs).logits, logits)
    copy = AutoProcessor.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(inputs[key], value) for key, value in inputs_of(copy).items())


def test_a_config_of_one_tower_is_what_it_was(tmp_path: Path) -> None:
    model, processor = join(tmp_path, 1)
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    for file in ("config.json", "processor_config.json"):
        text = (tmp_path / "one" / file).read_text()
        assert "_2" not in text.replace("frozen_prefix_2", "") and "_3" not in text
    assert set(processor(images=noise(0), return_tensors="pt")) == {"pixel_values"}


def test_each_record_is_checked(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    assert model.config.vision_2_base_model["name_or_path"].endswith("siglip")
    assert model.config.vision_2_base_model["fingerprint"] != model.config.vision_base_model["fingerprint"]
    model.save_pretrained(tmp_path / "small")
    other = SiglipVisionModel(model.model.vision_tower_2.config)
    other.save_pretrained(tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"second vision tower at .* has fingerprint .*pass vision_2_base_model="):
        Model.from_pretrained(tmp_path / "small")
    other.save_pretrained(tmp_path / "other")
    loaded = Model.from_pretrained(tmp_path / "small", vision_2_base_model=str(tmp_path / "other"))
    assert loaded.config.vision_2_base_model["name_or_path"].endswith("other")
    wide = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=24, patch_size=8
    )
    SiglipVisionModel(wide).save_pretrained(tmp_path / "wide")
    loaded = Model.from_pretrained(tmp_path / "small", vision_2_base_model=str(tmp_path / "wide"))
    assert loaded.config.vision_2_geometry["grid"] == [3, 3]


def test_another_first_tower_brings_its_grid(tmp_path: Path) -> None:
    model, _ = join(tmp_path, [1], connector_type="avg_pool", prefix_length=4)
    model.save_pretrained(tmp_path / "small")
    wide = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=24, patch_size=8
    )
    SiglipVisionModel(wide).save_pretrained(tmp_path / "wide")
    loaded = Model.from_pretrained(tmp_path / "small", vision_base_model=str(tmp_path / "wide"))
    assert loaded.config.vision_grid == [3, 3] and loaded.config.num_positions == 9


def test_unloaded_and_loaded_each_by_itself(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    made = dict(processor(images=noise(0), return_tensors="pt"))
    before = model.get_image_features(**made).pooler_output[0]
    model.unload_base_model("vision_2")
    assert model.model.vision_tower_2 is None and model.model.vision_tower is not None
    with pytest.raises(
        ValueError, match=r'second vision tower is not loaded: .*load_base_model\("vision_2"\).*vision_features_2'
    ):
        model.get_image_features(**made)
    model.save_pretrained(tmp_path / "unloaded")
    model.load_base_model("vision_2")
    assert torch.equal(model.get_image_features(**made).pooler_output[0], before)
    loaded = Model.from_pretrained(tmp_path / "unloaded", load_vision_tower=False)
    assert set(loaded.backbones) == {"text"}
    with pytest.raises(ValueError, match="contradict each other"):
        Model.from_pretrained(tmp_path / "unloaded", load_vision_tower=False, vision_2_base_model=str(tmp_path / "siglip"))
    joined, _ = join(tmp_path, load_vision_tower=False)
    assert set(joined.backbones) == {"text"} and joined.config.vision_2_base_model is not None


@pytest.mark.parametrize("part", ["vision", "vision_2"])
def test_what_trains_is_said_of_each(tmp_path: Path, part: str) -> None:
    model, processor = join(tmp_path, trainable=("connector", part), torch_dtype=torch.float32)
    inputs = inputs_of(processor)
    model.train()
    assert model.backbones[part].training and not any(one.training for name, one in model.backbones.items() if name != part)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, backbone in model.backbones.items() if any(p.grad is not None for p in backbone.parameters())}
    assert trained == {part}
    with torch.no_grad():
        next(iter(model.backbones[part].parameters())).add_(1.0)
    model.save_pretrained(tmp_path / "tuned")
    assert model.config.saved_parts is None
    loaded = Model.from_pretrained(tmp_path / "tuned")
    assert set(loaded.config.saved_parts) == {"connector", part}
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_last_layers_and_lora_reach_a_further_tower(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = join(tmp_path, unlocked_layers={"vision_2": 1})
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("vision_tower_2" in name and ".1." in name for name in trains)
    assert not any("vision_tower." in name or "vision_tower_2.encoder.layers.0." in name for name in trains)
    model, processor = join(tmp_path)
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower_2\..*q_proj", modules_to_save=["connector"]))
    inputs = inputs_of(processor)
    tuned.train()
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    lora = {name for name, parameter in tuned.named_parameters() if "lora_B" in name and parameter.grad is not None}
    assert len(lora) == 2 and all("vision_tower_2" in name for name in lora)


@torch.no_grad()
def test_batches_beams_and_prefix_cache_equal_single_rows(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    texts, images = ["<image> what is that ?", "a square .", "a <image> <image>"], [[noise(0)], [], [noise(1), noise(2)]]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    logits = model(**batch).logits[:, -1]
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = processor(images=own or None, text=text, return_tensors="pt")
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[row], atol=1e-5, rtol=1e-4)
        for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
            written = model.generate(**alone, max_new_tokens=5, do_sample=False, **options)[0, alone["input_ids"].shape[1] :]
            in_batch = model.generate(**batch, max_new_tokens=5, do_sample=False, **options)[
                row, batch["input_ids"].shape[1] :
            ]
            assert torch.equal(in_batch[: len(written)], written), (row, options)
    alone = processor(images=noise(0), text="<image> what is", return_tensors="pt")
    prefix = model.encode_prefix(**alone)
    more = torch.cat([alone["input_ids"], torch.tensor([[7, 5]])], dim=1)
    whole = {**alone, "input_ids": more, "attention_mask": torch.ones_like(more)}
    cached = model.generate(torch.tensor([[7, 5]]), prefix_cache=prefix, max_new_tokens=4, do_sample=False)
    expected = model.generate(**whole, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached[0, -4:], expected[0, -4:])


def test_images_that_stand_in_several_rows_are_encoded_once(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    image = noise(0)
    rows = [{"image": image, "text": "a square ."}, {"image": noise(1), "text": "what"}, {"image": image, "text": "that"}]
    batch = DataCollatorForFrozenPrefix(processor)(rows)
    assert batch["image_index"].tolist() == [0, 1, 0] and len(batch["pixel_values_2"]) == 2
    shared = model(**batch).loss
    apart = DataCollatorForFrozenPrefix(processor, share_images=False)(rows)
    assert len(apart["pixel_values_2"]) == 3
    torch.testing.assert_close(model(**apart).loss, shared)


def test_what_goes_together_is_refused_by_name_where_it_does_not(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    inputs = inputs_of(processor)
    with pytest.raises(ValueError, match="exactly one of pixel_values_2 or vision_features_2, which the second vision tower"):
        model(**{key: value for key, value in inputs.items() if key != "pixel_values_2"})
    with pytest.raises(ValueError, match="`pixel_values_2` goes with `pixel_values`"):
        model(**{key: value for key, value in inputs.items() if key != "pixel_values"})
    with pytest.raises(ValueError, match=r"\['pixel_values_3'\] were passed, and this model has 2 vision towers, which read"):
        model(**inputs, pixel_values_3=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"Of 2 images .* tower 2"):
        model(**{**inputs, "pixel_values_2": inputs["pixel_values_2"][:1]})
    with pytest.raises(ValueError, match="crop_to_patches=True cuts tiles of one tower's size.* 2 vision towers"):
        FrozenPrefixProcessor.from_model(model, crop_to_patches=True)
    with pytest.raises(ValueError, match="crop_to_patches=True cuts tiles of one tower's size"):
        processor(images=noise(0), text="<image>", crop_to_patches=True)
    with pytest.raises(ValueError, match="`num_frames=4` samples frames for one vision tower, and this model has 2"):
        join(tmp_path, num_frames=4)
    for strategy in ("pooled", "full"):
        with pytest.raises(ValueError, match=rf"the (second )?vision tower .* has none with .*'{strategy}'.* positions"):
            join(tmp_path, vision_feature_select_strategy=strategy)
    with pytest.raises(ValueError, match="4 vision towers: one connector reads at most 3"):
        join(tmp_path, [0, 1, 2, 0])
    one, _ = join(tmp_path, 1)
    with pytest.raises(ValueError, match=r"\['pixel_values_2'\] were passed, and this model has 1 vision tower, which reads"):
        one.get_image_features(**processor(images=noise(0), return_tensors="pt"))


def test_three_towers_and_loaded_ones(tmp_path: Path) -> None:
    model, processor = join(tmp_path, 3)
    assert model.config.features_width == 24 + 32 + 32
    inputs = inputs_of(processor)
    assert inputs["pixel_values_3"].shape == (2, 3, 16, 16)
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2
    towers: list[Any] = [
        CLIPVisionModel(vision_config()),
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    ]
    loaded = Model.from_vision_text_pretrained(towers, str(tmp_path / "words"), connector_type="mlp")
    assert loaded.config.vision_grid == [2, 2] and loaded.config.vision_2_geometry["vision_width"] == 16
    loaded.save_pretrained(tmp_path / "own")
    again = Model.from_pretrained(tmp_path / "own")
    assert set(again.backbones) == {"vision", "vision_2", "text"}


def stored(folder: Path, model: Model, processor: FrozenPrefixProcessor, images: list[Any], **options: Any) -> Any:
    rows = datasets.Dataset.from_dict(
        {"image": images, "text": ["a square ."] * len(images)},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    options = {"cache_dir": folder / "store", "num_workers": 0, "dtype": "float32", **options}
    return cache_vision_features(rows, model, processor, **options)


def shards(folder: Path) -> dict[str, set[str]]:
    """The stores that there are, each with its files."""
    return {one.name: {file.name for file in one.glob("*.arrow")} for one in (folder / "store").iterdir() if one.is_dir()}


def test_a_pair_reads_the_stores_of_its_towers(tmp_path: Path) -> None:
    images = [noise(seed) for seed in range(3)]
    for tower in ([0], [1]):
        model, processor = join(tmp_path, tower)
        stored(tmp_path, model, processor, images)
    before = shards(tmp_path)
    assert len(before) == 2 and all(before.values())
    model, processor = join(tmp_path, load_vision_tower=False)
    rows = stored(tmp_path, model, processor, images)  # needs no tower: both stores are full
    assert shards(tmp_path) == before
    backwards, other = join(tmp_path, [1, 0], load_vision_tower=False)
    stored(tmp_path, backwards, other, images)
    assert shards(tmp_path) == before
    with pytest.raises(ValueError, match=r'second vision tower is not loaded: .*load_base_model\("vision_2"\)'):
        model.load_base_model("vision")
        stored(tmp_path, model, processor, [noise(9)])
    layered, _ = join(tmp_path, vision_2_feature_layer=1)
    stored(tmp_path, layered, processor, images)
    assert len(shards(tmp_path)) == 3  # the first tower's is the same

    model, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    batch = collator([rows[index] for index in (2, 0, 1)])
    assert {"vision_features", "vision_features_2"} <= set(batch) and "pixel_values" not in batch
    assert batch["vision_features"].shape == (3, 16, 24) and batch["vision_features_2"].shape == (3, 4, 32)
    fresh = collator([{"image": images[index], "text": "a square ."} for index in (2, 0, 1)])
    made, expected = model(**batch).loss, model(**fresh).loss
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="exactly one of pixel_values_2 or vision_features_2"):
        model(**{key: value for key, value in batch.items() if key != "vision_features_2"})
    one, own = join(tmp_path, [0])
    with pytest.raises(ValueError, match=r"\['vision_features_2'\] were passed, and this model has 1 vision tower"):
        one(**batch)
    mixed = [rows[0], stored(tmp_path, one, own, images)[1]]
    with pytest.raises(ValueError, match="one vision tower and of several: take rows of one kind"):
        collator(mixed)


def one_colour(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, tuple(random.choices(range(256), k=3)))


@torch.no_grad()
def test_views_of_a_pair_are_of_the_same_draw(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    rows = stored(tmp_path, model, processor, [noise(0)], views=3, augment=one_colour)
    prepare = Prepare(processor, 3, one_colour, False, 0)
    seen = set()
    for _ in range(40):
        image = rows[0]["image"]
        own = image.further[0]
        assert (own.view, own.digest) == (image.view, image.digest)
        drawn = processor(images=prepare._view(noise(0), image.digest, image.view), return_tensors="pt")
        made = [model.model._encode_pixels(part, drawn[name], {}, {})[0][0] for part, name in PIXELS.items()]
        torch.testing.assert_close([image.load()[0], own.load()[0]], made, atol=1e-6, rtol=1e-5)
        seen.add(image.view)
    assert seen == {0, 1, 2}


def test_a_stream_is_stored_for_each_tower(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    rows = datasets.IterableDataset.from_generator(
        lambda: iter([{"image": noise(0), "text": "a"}, {"image": noise(1), "text": "what"}])
    )
    made = cache_vision_features(rows, model, processor, cache_dir=tmp_path / "store", num_workers=0, dtype="float32")
    batch = DataCollatorForFrozenPrefix(processor)(list(made))
    fresh = dict(processor(images=[noise(0), noise(1)], return_tensors="pt"))
    features = model.model.read_images(fresh, {})[0]
    again = model.model.read_images({key: value for key, value in batch.items() if "features" in key}, {})[0]
    torch.testing.assert_close(again, features, atol=1e-6, rtol=1e-6)


def test_stores_refuse_what_several_towers_can_not_have(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="avg_pool", prefix_length=4)
    with pytest.raises(ValueError, match="`pool=True` stores means of one tower's positions, and those of 2 towers"):
        stored(tmp_path, model, processor, [noise(0)], pool=True)
    model, processor = join(tmp_path, trainable=("connector", "vision_2"))
    with pytest.raises(ValueError, match=r'The second vision tower trains \("vision_2" in `config.trainable`'):
        stored(tmp_path, model, processor, [noise(0)])
    model, processor = join(tmp_path)
    with pytest.raises(ValueError, match="by 2 vision towers, and a graph has one"):
        export_image_encoder(model, "dynamo")
    with pytest.raises(ValueError, match="transformers.js can't run this model, which reads images by 2 vision towers"):
        export_transformers_js(model, tmp_path / "page", processor)


def test_trained_from_the_stores_alone_and_described(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    rows = stored(tmp_path, model, processor, [noise(seed) for seed in range(4)])
    for part in ("vision", "vision_2"):
        model.unload_base_model(part)
    options = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, options, train_dataset=rows, data_collator=DataCollatorForFrozenPrefix(processor)).train()
    model.save_pretrained(tmp_path / "trained")
    loaded = Model.from_pretrained(tmp_path / "trained")
    assert set(loaded.backbones) == {"vision", "vision_2", "text"}
    write_model_card(tmp_path / "trained", loaded)
    text = (tmp_path / "trained" / "README.md").read_text()
    assert "second vision tower" in text and "16 positions of width 56" in text and "vision_2_feature_layer=-1" in text


@torch.no_grad()
@pytest.mark.parametrize("embedding", ["prefix", "tower"])
def test_a_classifier_and_retrieval_read_several_towers(tmp_path: Path, embedding: str) -> None:
    join(tmp_path)
    places = [str(tmp_path / "dino"), str(tmp_path / "siglip")], str(tmp_path / "words")
    options: dict[str, Any] = {"connector_type": "resampler", "prefix_length": 2}
    options["connector_config"] = {"hidden_size": 16, "num_heads": 2}
    model: Any = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
        *places, num_labels=3, image_embedding=embedding, fused_inputs=["image"], **options
    ).eval()
    processor = FrozenPrefixProcessor.from_model(model)
    inputs = processor(images=[noise(0), noise(1)], text=["<image>", "<image>"], padding=True, return_tensors="pt")
    logits = model(**inputs).logits
    swapped = model(**{**inputs, "pixel_values_2": inputs["pixel_values_2"].flip(0)}).logits
    assert logits.shape == (2, 3) and not torch.allclose(swapped, logits, atol=1e-5)
    model.save_pretrained(tmp_path / "classifier")
    assert torch.equal(type(model).from_pretrained(tmp_path / "classifier")(**inputs).logits, logits)
    if embedding == "tower":
        return
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(*places, projection_dim=8, **options).eval()
    rows = [{"image": noise(seed), "text": text} for seed, text in enumerate(("a square", "what is that"))]
    batch = DataCollatorForFrozenPrefixRetrieval(processor)(rows)
    assert model(**batch).loss.isfinite()
    embeds = embed_images(model, processor, [noise(0), noise(1)])
    from_store = stored(tmp_path, model, processor, [noise(0), noise(1)])
    torch.testing.assert_close(embed_images(model, processor, list(from_store["image"])), embeds, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_prefixes_of_several_lengths_gated_blocks_and_maps(tmp_path: Path) -> None:
    model, processor = join(tmp_path, prefix_lengths=[1, 3], prefix_length=None)
    inputs = processor(images=noise(0), text="a <image>", prefix_length=1, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 1 and model(**inputs).logits.isfinite().all()
    gated, own = join(tmp_path, fusion="cross_attention")
    inputs = own(images=noise(0), text="a <image> square", return_tensors="pt")
    assert gated.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    drawn = attention_to_image(model, processor, noise(0), "<image> what")
    assert drawn.grid == (4, 4) and drawn.image.shape == (28, 28, 3)


def test_switched_connectors_bring_the_layers_of_each_tower(tmp_path: Path) -> None:
    first, processor = join(tmp_path)
    second, _ = join(tmp_path, vision_2_feature_layer=1)
    second.save_pretrained(tmp_path / "second")
    inputs = inputs_of(processor)
    first.load_connector(str(tmp_path / "second"), "second")
    first.set_connector("second")
    assert first.config.vision_2_feature_layer == 1
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, second(**inputs).logits)
    other, _ = join(tmp_path, [0, 2])
    with pytest.raises(ValueError, match="trained with another vision_2 model"):
        other.load_connector(str(tmp_path / "second"), "second")


def test_weights_of_a_second_tower_are_no_weights_of_the_first(tmp_path: Path) -> None:
    model, _ = join(tmp_path, 1)
    replaced = frozenset({"vision"})  # whose own weights in the file are then left aside
    refuse_unexpected(model, "a checkpoint", {"unexpected_keys": ["model.vision_tower.embeddings.weight"]}, replaced)
    with pytest.raises(ValueError, match="holds 1 tensors that the model of its config has no place for"):
        refuse_unexpected(model, "a checkpoint", {"unexpected_keys": ["model.vision_tower_2.embeddings.weight"]}, replaced)
