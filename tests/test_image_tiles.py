"""Images in tiles: as transformers cuts them, counted alike by processor, collator and model, wherever an image goes."""

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, Siglip2ImageProcessorPil
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    DataCollatorForFrozenPrefixRetrieval,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.connectors import CONNECTORS
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.data.lengths import add_lengths
from modeling_frozen.evaluation.retrieval import embed_images
from modeling_frozen.interpretation import attention_to_image
from modeling_frozen.processors.image_tiles import count_tiles, cut_tiles, tile_grid
from tests.helpers.tiny import join, tokenizer


Model = FrozenPrefixForConditionalGeneration
TILES: dict[str, Any] = {"crop_to_patches": True, "max_patches": 6}
SIZES = [
    (16, 16), (1, 1), (1, 4000), (4000, 1), (32, 32), (33, 32), (31, 32),
    (32, 33), (32, 64), (48, 32), (47, 33), (20, 70), (17, 15),
]  # fmt: skip


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiled(folder: Path, **options: Any) -> tuple[Model, FrozenPrefixProcessor]:
    sizes = {"connector_type": "resampler", "prefix_length": 2, "connector_config": {"hidden_size": 16, "num_heads": 2}}
    model, processor = join(folder, **{**sizes, **options})
    return model.eval(), FrozenPrefixProcessor.from_model(model, **TILES)


def test_the_grid_is_that_of_transformers() -> None:
    for bounds in ((1, 12), (1, 1), (2, 6), (3, 3), (1, 40)):
        for height, width in [*SIZES, (4000, 1), (1, 4000), (1080, 1920), (768, 1024), (447, 448), (449, 448), (896, 448)]:
            for tile in ((448, 448), (16, 16), (224, 336)):
                columns, rows = got_ocr2.get_optimal_tiled_canvas((height, width), tile, *bounds)
                assert tile_grid(height, width, tile, *bounds) == (rows, columns), (height, width, tile, bounds)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_those_of_transformers(thumbnail: bool) -> None:
    size = {"height": 16, "width": 16}
    theirs = got_ocr2.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=6)  # always with a thumbnail
    options = {**TILES, "min_patches": 1, "use_thumbnail": thumbnail}
    for height, width in SIZES:
        image = noise(height, width)
        made = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        made = made if thumbnail or len(made) == 1 else made[:-1]
        own = [np.asarray(tile).transpose(2, 0, 1) for tile in cut_tiles(image, (16, 16), options, theirs.resample)]
        assert len(own) == len(made) == count_tiles(height, width, (16, 16), options), (height, width)
        np.testing.assert_array_equal(np.stack(own), made, err_msg=str((height, width)))


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@torch.no_grad()
def test_processor_and_model_count_alike(tmp_path: Path, backend: str) -> None:
    model, processor = tiled(tmp_path)
    if backend == "torchvision":
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
        processor.image_processor = CLIPImageProcessor.from_dict(processor.image_processor.to_dict())
    images = [noise(*size) for size in SIZES]
    pairs = [images[start : start + 2] for start in range(1, len(images), 2)]
    texts = ["a <image> square", *["<image> is <image> what"] * len(pairs), "a square ."]
    nested = [images[:1], *pairs, []]
    inputs = processor(images=nested, text=texts, padding=True, return_tensors="pt")
    tiles = [processor.count_tiles(image) for image in images]
    assert max(tiles) == 7 and min(tiles) == 1
    assert len(inputs["pixel_values"]) == sum(tiles) and "num_patches" not in inputs
    held = (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    first = iter(tiles)
    assert held == [2 * sum(next(first) for _ in own) for own in nested]
    whole = model(**inputs).logits[:, -1]
    for row, (own, text) in enumerate(zip(nested, texts, strict=True)):
        alone = processor(images=own or None, text=text, return_tensors="pt")
        torch.testing.assert_close(model(**alone).logits[0, -1], whole[row], atol=1e-5, rtol=1e-4)
    numbers = processor._get_num_multimodal_tokens([list(size) for size in SIZES])
    assert numbers["num_image_patches"] == tiles and numbers["num_image_tokens"] == [2 * count for count in tiles]


@torch.no_grad()
def test_each_tile_is_read_in_its_place(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path, connector_type="mlp", prefix_length=None, connector_config={})
    image = noise(32, 48)
    inputs = processor(images=image, return_tensors="pt")
    assert len(inputs["pixel_values"]) == 7  # two rows, three columns, the thumbnail
    tile = image.crop((32, 16, 48, 32))  # the second row's third
    alone = processor(images=tile, crop_to_patches=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(inputs["pixel_values"][5], alone)
    bright = np.array(image)
    bright[16:32, 32:48] = 255
    lit = processor(images=Image.fromarray(bright), return_tensors="pt")
    change = [
        (one - other).norm().item()
        for one, other in zip(
            model.get_image_features(lit["pixel_values"]).pooler_output,
            model.get_image_features(inputs["pixel_values"]).pooler_output,
            strict=True,
        )
    ]
    assert [number > 1e-4 for number in change] == [False] * 5 + [True, True]


@torch.no_grad()
def test_generation_beams_chats_and_prefix_caches(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    image = noise(32, 48)
    inputs = processor(images=image, text="a <image> square", return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **options)
    batch = processor(
        images=[[noise(16, 16)], [image]], text=["<image> is", "a <image> square"], padding=True, return_tensors="pt"
    )
    assert torch.equal(model.generate(**batch, **options)[1, -4:], plain[0, -4:])
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static")[0], plain[0])
    alone = model.generate(**inputs, **options, num_beams=3)
    assert torch.equal(model.generate(**batch, **options, num_beams=3)[1, -4:], alone[0, -4:])
    question = torch.tensor([[7]])
    together = {**inputs, "input_ids": torch.cat([inputs["input_ids"], question], dim=1)}
    del together["attention_mask"]
    continued = model.generate(input_ids=question, prefix_cache=model.encode_prefix(**inputs), **options)
    assert torch.equal(continued[:, -4:], model.generate(**together, **options)[:, -4:])
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what ?"}]}]
    made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert (made["input_ids"] == processor.image_token_id).sum() == 14 and len(made["pixel_values"]) == 7


def test_training_rows_hold_tiles_too(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    wide, small = noise(32, 48), noise(16, 16)
    data = [{"image": image, "text": "a square ."} for image in (wide, small, wide)]
    batch = DataCollatorForFrozenPrefix(processor)(data)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [14, 2, 14]
    assert len(batch["pixel_values"]) == 8  # each image once
    assert batch["image_index"].tolist() == [*range(7), 7, *range(7)]
    separate = DataCollatorForFrozenPrefix(processor, share_images=False)(data)
    assert len(separate["pixel_values"]) == 15
    torch.testing.assert_close(model(**batch).loss, model(**separate).loss)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.connector.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="take 15 positions that are never cut"):
        DataCollatorForFrozenPrefix(processor, max_length=15)(data[:1])


def test_lengths_of_rows_count_the_tiles_of_images_that_are_not_open(tmp_path: Path) -> None:
    _, processor = tiled(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    images = [noise(32, 48), noise(16, 16), noise(20, 70)]
    data = [{"image": image, "text": "a square ."} for image in images]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    with_lengths = add_lengths(datasets.Dataset.from_list(data, features=features), collator, batch_size=2)
    assert list(with_lengths["length"]) == [collator([row])["input_ids"].shape[1] for row in data]
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    paths = [{"image": str(tmp_path / f"{place}.png"), "text": "a square ."} for place in range(3)]
    assert list(add_lengths(datasets.Dataset.from_list(paths), collator)["length"]) == list(with_lengths["length"])
    paths[1]["image"] = str(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"Can't open image .*missing.png"):
        add_lengths(datasets.Dataset.from_list(paths), collator)


def test_truncation_counts_tiles(tmp_path: Path) -> None:
    _, processor = tiled(tmp_path)
    image, text = noise(32, 48), "<image> a square that is what"
    for length in (16, 18):
        ids = processor(images=image, text=text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == length and (ids == processor.image_token_id).sum() == 14
    with pytest.raises(ValueError, match="its 1 images take 14 placeholders, 15 tokens with the"):
        processor(images=image, text=text, truncation=True, max_length=14)


def test_options_of_a_call_and_of_what_was_saved(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    processor.save_pretrained(tmp_path / "saved")
    loaded = FrozenPrefixProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.tile_options() == {"crop_to_patches": True, "min_patches": 1, "max_patches": 6, "use_thumbnail": True}
    image = noise(32, 48)
    for options, count in (
        ({}, 7),
        ({"use_thumbnail": False}, 6),
        ({"max_patches": 2}, 3),
        ({"min_patches": 1, "max_patches": 1}, 1),
        ({"crop_to_patches": False}, 1),
    ):
        inputs = loaded(images=image, text="<image>", return_tensors="pt", **options)
        assert len(inputs["pixel_values"]) == count
        assert (inputs["input_ids"] == loaded.image_token_id).sum() == 2 * count
    plain = FrozenPrefixProcessor.from_model(model)
    assert len(plain(images=image, return_tensors="pt")["pixel_values"]) == 1


def test_with_a_prefix_of_several_lengths(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path, prefix_length=None, prefix_lengths=[1, 3])
    inputs = processor(images=noise(32, 48), text="a <image> square", prefix_length=1, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 7
    assert model(**inputs).logits.isfinite().all()


def test_where_there_are_no_tiles(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    with pytest.raises(ValueError, match="an image is matched by one embedding: take a processor"):
        embed_images(model, processor, [noise(16, 32)])
    with pytest.raises(ValueError, match="an image is matched by one embedding"):
        DataCollatorForFrozenPrefixRetrieval(processor)([{"image": noise(16, 32), "text": "a square"}] * 2)
    with pytest.raises(ValueError, match="cuts the image into 7 tiles"):
        attention_to_image(model, processor, noise(32, 48), "<image> what")
    with pytest.raises(ValueError, match="here is a ndarray"):
        processor(images=np.zeros((32, 48, 3), np.float32), text="<image>", do_rescale=False)
    for options in ({"min_patches": 0}, {"min_patches": 3, "max_patches": 2}):
        with pytest.raises(ValueError, match="1 <= min_patches <= max_patches"):
            processor(images=noise(16, 16), **options)
    whole = FrozenPrefixProcessor(
        image_processor=Siglip2ImageProcessorPil(patch_size=8), tokenizer=tokenizer(), prefix_length=1, tiles=TILES
    )
    with pytest.raises(ValueError, match="its max_num_patches is the way"):
        whole(images=noise(16, 16))
    with pytest.raises(ValueError, match=r"Tiles have no option \['max_tiles'\]"):
        FrozenPrefixProcessor(CLIPImageProcessorPil(), tokenizer(), tiles={"max_tiles": 3})
    gated, _ = join(tmp_path / "gated", connector_type="resampler", prefix_length=2, fusion="cross_attention")
    with pytest.raises(ValueError, match="here the last tile"):
        FrozenPrefixProcessor.from_model(gated, **TILES)


def test_tiles_are_not_resized_again(tmp_path: Path) -> None:
    """Of a processor that resizes to more than it crops, tiles would lose their borders."""
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor = FrozenPrefixProcessor(image_processor=cropping, tokenizer=tokenizer(), prefix_length=1, tiles=TILES)
    image = noise(16, 32)
    first = processor(images=image, return_tensors="pt")["pixel_values"][0]
    exact = cropping(image.crop((0, 0, 16, 16)), do_resize=False, do_center_crop=False, return_tensors="pt")
    torch.testing.assert_close(first, exact["pixel_values"][0])


def stored(folder: Path, pair: tuple[Model, FrozenPrefixProcessor], images: list[Image.Image], **options: Any) -> Any:
    rows = datasets.Dataset.from_dict(
        {"image": images, "text": ["a square ."] * len(images)},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    options = {"cache_dir": folder / "store", "num_workers": 0, "dtype": "float32", **options}
    return cache_vision_features(rows, *pair, **options)


@pytest.mark.parametrize("options", [{}, {"connector_type": "avg_pool", "prefix_length": 1, "connector_config": {}}])
def test_tiles_are_stored_and_read_as_the_tower_gives_them(tmp_path: Path, options: dict[str, Any]) -> None:
    model, processor = tiled(tmp_path, **options)
    images = [noise(32, 48), noise(16, 16), noise(16, 32), noise(33, 32)]
    rows = stored(tmp_path, (model, processor), images, batch_size=3, pool="connector_type" in options)
    assert [row["image"].count_tiles() for row in rows] == [processor.count_tiles(image) for image in images]
    order = [2, 0, 1, 0, 3]
    collator = DataCollatorForFrozenPrefix(processor)
    batch = collator([rows[index] for index in order])
    fresh = collator([{"image": images[index], "text": "a square ."} for index in order])
    assert torch.equal(batch["input_ids"], fresh["input_ids"]) and torch.equal(batch["image_index"], fresh["image_index"])
    assert len(batch["vision_features"]) == len(fresh["pixel_values"]) and "vision_features_mask" not in batch
    made, expected = model(**batch, skip_logits=False), model(**fresh, skip_logits=False)
    torch.testing.assert_close(made.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.loss, expected.loss)
    made = processor(images=[row["image"] for row in rows], text=["a square"] * 4, padding=True, return_tensors="pt")
    fresh = processor(images=images, text=["a square"] * 4, padding=True, return_tensors="pt")
    assert torch.equal(made["input_ids"], fresh["input_ids"]) and "num_patches" not in made
    torch.testing.assert_close(model(**made).logits, model(**fresh).logits, atol=1e-5, rtol=1e-4)


def test_stores_of_other_tiles_are_others(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    images = [noise(32, 48), noise(16, 16)]
    kinds = [TILES, {**TILES, "max_patches": 2}, {**TILES, "use_thumbnail": False}, {**TILES, "min_patches": 2}, {}]
    processors = [FrozenPrefixProcessor.from_model(model, **kind) for kind in kinds]
    made = [stored(tmp_path, (model, one), images) for one in processors]
    assert len({rows[0]["image"].store for rows in made}) == len(kinds)
    assert [rows[0]["image"].count_tiles() for rows in made] == [7, 3, 6, 7, 1]
    for number, one in ((0, processors[4]), (4, processors[0]), (0, processors[1])):
        with pytest.raises(ValueError, match="take the processor that they were stored with, or run cache_vision_features"):
            DataCollatorForFrozenPrefix(one)([made[number][0]])
        with pytest.raises(ValueError, match="take the processor that they were stored with, or run cache_vision_features"):
            one(images=made[number][0]["image"], text="a")
    plain = DataCollatorForFrozenPrefix(processors[4])([made[4][0]])
    assert len(plain["vision_features"]) == 1


def test_views_of_an_image_may_differ_in_tiles(tmp_path: Path) -> None:
    model, processor = tiled(tmp_path)
    rows = stored(tmp_path, (model, processor), [noise(32, 48)], views=4, augment=resized, seed=1)
    shapes = {(stored.view, stored.count_tiles(), len(stored.load()[0])) for stored in (rows[0]["image"] for _ in range(60))}
    assert {view for view, _, _ in shapes} == {0, 1, 2, 3} and {tiles for _, tiles, _ in shapes} == {1, 3}
    batch = DataCollatorForFrozenPrefix(processor)([rows[0]])
    held = int((batch["input_ids"] == processor.image_token_id).sum())
    assert held == 2 * len(batch["vision_features"]) and model(**batch).loss.isfinite()


def resized(image: Image.Image) -> Image.Image:
    return image.resize(random.choice([(16, 16), (32, 16)]))


@torch.no_grad()
def test_a_classifier_reads_all_tiles_of_an_image(tmp_path: Path) -> None:
    plain, processor = tiled(tmp_path)
    parents = plain.config.vision_base_model["name_or_path"], plain.config.text_base_model["name_or_path"]
    for embedding in ("prefix", "tower"):
        model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
            *parents, connector_type="resampler", prefix_length=2, connector_config={"hidden_size": 16, "num_heads": 2},
            num_labels=3, image_embedding=embedding, fused_inputs=["image"],
        ).eval()  # fmt: skip
        wide, small = noise(32, 48), noise(16, 16)
        inputs = processor(images=[[wide], [small]], text=["<image>", "<image>"], padding=True, return_tensors="pt")
        logits = model(**inputs).logits
        for row, image in enumerate((wide, small)):
            alone = processor(images=image, text="<image>", return_tensors="pt")
            torch.testing.assert_close(model(**alone).logits[0], logits[row], atol=1e-5, rtol=1e-4)
        cut = processor(images=wide, text="<image>", crop_to_patches=False, return_tensors="pt")
        assert not torch.allclose(model(**cut).logits[0], logits[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("connector_type", [name for name in CONNECTORS if name != "identity"])
def test_a_learned_separator_ends_each_tile(tmp_path: Path, connector_type: str) -> None:
    length = {"prefix_length": 5} if CONNECTORS[connector_type].reads_positions and connector_type != "pixel_shuffle" else {}
    options = {"connector_type": connector_type, "connector_config": {"separator": True}}
    model, processor = tiled(tmp_path, **{**options, "prefix_length": None, **length})
    connector = model.model.connector
    per_tile = {"pixel_shuffle": 2}.get(connector_type, 5)  # of a grid of 2 x 2: all together, or four
    assert model.config.num_image_tokens == processor.prefix_length == per_tile
    inputs = processor(images=noise(32, 48), text="a <image> square", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 7 * per_tile
    prefix = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert prefix.shape == (7, per_tile, 32)
    assert all(torch.equal(tile[-1], connector.separator) for tile in prefix)
    assert not torch.allclose(prefix[0, 0], prefix[1, 0])
    norm = prefix[:, :-1].norm(dim=-1).mean()
    assert 0.5 < float(connector.separator.norm() / norm) < 2
    assert model(**inputs).logits.isfinite().all()
    assert connector(torch.zeros(0, 4, 32)).shape == (0, per_tile, 32)
    model.save_pretrained(tmp_path / "saved")
    again = Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.model.connector.separator, connector.separator)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_separator_learns_and_is_refused_where_it_has_no_place(tmp_path: Path) -> None:
    model, processor = tiled(
        tmp_path, prefix_length=3, connector_config={"hidden_size": 16, "num_heads": 2, "separator": True}
    )
    batch = DataCollatorForFrozenPrefix(processor)([{"image": noise(32, 48), "text": "a square ."}])
    model.train()(**batch).loss.backward()
    assert model.model.connector.separator.grad.any()
    drawn = attention_to_image(model.eval(), FrozenPrefixProcessor.from_model(model), noise(16, 16), "<image> what")
    assert len(drawn.origins) == 2 and drawn.attention[0].shape[-1] == 2
    small = {"hidden_size": 16, "num_heads": 2, "separator": True}
    for options, why in (
        ({"prefix_length": 1}, "a prefix of at least one vector beside the separator"),
        ({"prefix_length": None, "prefix_lengths": [1, 2]}, "`prefix_lengths=.* go without `separator=True`"),
        ({"prefix_length": 3, "fusion": "cross_attention"}, "`separator=True` ends each tile among the words"),
    ):
        with pytest.raises(ValueError, match=why):
            tiled(tmp_path, connector_config=small, **options)
