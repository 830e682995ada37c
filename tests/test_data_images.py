"""An image is known by what it shows, in every part of the package, and its column is found by one rule."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    DataCollatorForFrozenPrefixClassification,
    DataCollatorForFrozenPrefixRetrieval,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixProcessor,
)
from modeling_frozen.data.columns import image_column, images_of
from modeling_frozen.data.formats import split_by_image
from modeling_frozen.data.image_reading import digest_of_image
from modeling_frozen.processors import load_rgb_image
from tests.helpers.tiny import join


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FrozenPrefixProcessor:
    return join(tmp_path_factory.mktemp("parents"))[1]


def palette(*colour: int) -> Image.Image:
    image = Image.new("P", (20, 18))  # every pixel has index 0
    image.putpalette([*colour, 1, 2, 3])
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def half(orientation: int) -> Image.Image:
    """Red over blue, to be turned by its EXIF."""
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    image.paste((0, 0, 255), (0, 8, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.open(BytesIO(encoded(image, exif=exif)))


def transparent(index: int) -> Image.Image:
    image = palette(255, 0, 0)
    image.info["transparency"] = index
    return image


def ids(processor: Any, *rows: dict[str, Any]) -> list[int]:
    rows = tuple({"text": "a square .", **row} for row in rows)
    return DataCollatorForFrozenPrefixRetrieval(processor)(rows)["image_ids"].tolist()


TWINS = {
    "palettes": (palette(255, 0, 0), palette(0, 0, 255)),
    "rotations": (half(1), half(3)),
    "transparency": (transparent(0), transparent(1)),
    "ranges": (np.full((18, 20), 0.5, np.float32), np.full((18, 20), 0.25, np.float32)),
    "depths": (Image.fromarray(np.full((18, 20), 300, np.uint16)), Image.fromarray(np.full((18, 20), 60000, np.uint16))),
    "shapes": (Image.new("L", (20, 18)), Image.new("L", (18, 20))),
}


@pytest.mark.parametrize("twins", TWINS)
def test_different_images_with_equal_raw_bytes_are_two(twins: str, processor: FrozenPrefixProcessor) -> None:
    one, other = TWINS[twins]
    result = ids(processor, {"image": one}, {"image": other}, {"image": one.copy()})
    assert result[0] == result[2] != result[1]
    assert digest_of_image(one) == digest_of_image(one.copy()) != digest_of_image(other)


def test_the_loss_of_pairs_tells_them_apart(tmp_path: Path) -> None:
    processor = join(tmp_path)[1]
    torch.manual_seed(0)
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        str(tmp_path / "tower"), str(tmp_path / "words"), projection_dim=16
    )
    rows = [{"image": image, "text": text} for image, text in zip(TWINS["palettes"], ("a red .", "a blue ."), strict=True)]
    collate = DataCollatorForFrozenPrefixRetrieval(processor)
    rgb = [{**row, "image": row["image"].convert("RGB")} for row in rows]
    assert model(**collate(rows)).loss == model(**collate(rgb)).loss > 0.1


@pytest.mark.parametrize(
    "name", [7, np.int64(7), np.uint8(7), torch.tensor(7), np.array(7), 7.0, np.float32(7), torch.tensor(7.0)]
)
def test_a_name_of_an_image_counts_whatever_type_it_has(name: Any, processor: FrozenPrefixProcessor) -> None:
    red, blue = TWINS["palettes"]
    result = ids(processor, {"image": red, "image_id": name}, {"image": blue, "image_id": 7}, {"image": red, "image_id": 8})
    assert result == [7, 7, 8]


def test_other_names_of_images(processor: FrozenPrefixProcessor) -> None:
    red, blue = TWINS["palettes"]
    names = ["7", np.str_("7"), None, float("nan"), "", 2**70, 0.5]
    result = ids(processor, *({"image": red, "image_id": name} for name in names), {"image": red})
    assert result[0] == result[1] and result[2] == result[3] == result[4] == result[-1]
    assert len(set(result)) == 4
    with pytest.raises(ValueError, match=r"Row 0: an image is named by a number or a string, not by \[1\] \(list\)"):
        ids(processor, {"image": red, "image_id": [1]})


KINDS: dict[str, Image.Image] = {
    **{
        mode: Image.linear_gradient("L").resize((20, 18)).convert(mode)
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    },
    **{mode: Image.radial_gradient("L").resize((20, 18)).convert(mode) for mode in ("YCbCr", "HSV", "I", "F", "RGBX")},
    "LAB": Image.merge("LAB", [Image.radial_gradient("L").resize((20, 18))] * 3),  # Pillow converts to it from 10.1 on
    **{f"turned {turn}": half(turn) for turn in range(2, 9)},
    "palette with a transparent index": transparent(0),
    "deep": Image.fromarray(np.arange(360, dtype=np.uint16).reshape(18, 20) * 180),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_of_what_the_loader_shows(kind: str) -> None:
    image = KINDS[kind]
    shown = load_rgb_image(image)
    assert digest_of_image(image) == digest_of_image(shown) == digest_of_image(np.asarray(shown))
    assert digest_of_image(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90)) != digest_of_image(image)


def test_a_file_has_one_digest_however_it_comes(tmp_path: Path, processor: FrozenPrefixProcessor) -> None:
    data = encoded(Image.new("RGB", (20, 18), (1, 2, 3)))
    (tmp_path / "a.png").write_bytes(data)
    path = str(tmp_path / "a.png")
    ways = [path, Path(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": path}, {"bytes": data, "path": "b"}]
    assert len({digest_of_image(way) for way in ways}) == 1
    assert len(set(ids(processor, *({"image": way} for way in ways)))) == 1
    text = base64.b64encode(data).decode()
    assert (
        digest_of_image(text) == digest_of_image(f"data:image/png;base64,{text}") == digest_of_image(Image.open(BytesIO(data)))
    )
    normalised = torch.randn(3, 16, 16)
    assert digest_of_image(normalised) == digest_of_image(normalised.numpy()) != digest_of_image(normalised + 1)
    with pytest.raises(ValueError, match="Can't open the image of row 1 .*gone.png"):
        ids(processor, {"image": path}, {"image": str(tmp_path / "gone.png")})


# ------------------------------------------------------------------------------------------------------------- columns


def test_the_column_of_images() -> None:
    image = Image.new("RGB", (2, 2))
    assert (
        images_of({"image": image})
        == images_of({"images": [None, image]})
        == images_of({"photo": (image,)}, "photo")
        == [image]
    )
    assert images_of({"image": None}) == [] and images_of({"images": [image], "image": None}) == []
    assert images_of({"photo": image}) is None and images_of({"image": image}, "photo") is None
    assert len(images_of({"images": np.zeros((3, 4, 4, 3))}) or []) == 3
    assert image_column(["text", "images"]) == "images"
    with pytest.raises(ValueError, match=r"no image column 'image' or 'images' \(its columns: \['photo'\]\): name it by"):
        image_column(["photo"])


def test_a_split_and_a_classifier_find_it_too(processor: FrozenPrefixProcessor) -> None:
    several = [[Image.new("RGB", (4, 4), (i, 0, 0))] for i in range(4)]
    data = datasets.Dataset.from_dict({"images": several}, features=datasets.Features({"images": [datasets.Image()]}))
    assert set(split_by_image(data, validation=0, test=0.5)) == {"train", "test"}
    with pytest.raises(ValueError, match="no image column 'photo'"):
        split_by_image(data, image_column="photo")
    collate = DataCollatorForFrozenPrefixClassification(processor, image_column="photo")
    with pytest.raises(ValueError, match="Row 0 has no image column 'photo'"):
        collate([{"image": several[0][0], "text": "a", "label": 0}])


CHAT = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "a red square ."}]
WITHOUT_COLUMN: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (DataCollatorForFrozenPrefix, {"messages": CHAT}),
    "labelled": (DataCollatorForFrozenPrefixClassification, {"text": "a", "label": 0}),
}


@pytest.mark.parametrize("kind", WITHOUT_COLUMN)
def test_an_image_in_a_column_that_nobody_reads_is_no_row_of_text(kind: str, processor: FrozenPrefixProcessor) -> None:
    """These may be of text alone, and would train without a word on nothing that they show."""
    collator, row = WITHOUT_COLUMN[kind]
    image = Image.new("RGB", (4, 4))
    stored = {"bytes": encoded(image), "path": None}
    assert "pixel_values" not in collator(processor)([row])
    assert "pixel_values" in collator(processor, image_column="photo")([{**row, "photo": image}])
    assert "pixel_values" not in collator(processor, image_column="photo")([{**row, "photo": None}])
    for shown in (image, [image], stored):
        with pytest.raises(ValueError, match="Row 0 has no image column 'image' or 'images'.*image_column=…"):
            collator(processor)([{**row, "photo": shown}])
    with pytest.raises(ValueError, match="Row 0 has no image column 'foto'"):
        collator(processor, image_column="foto")([{**row, "image": image}])


@pytest.mark.parametrize("bad", [b"none", {"bytes": b"none", "path": None}, "nowhere.png"])
def test_an_image_of_a_pair_that_can_not_be_opened_is_named_with_its_row(bad: Any, processor: FrozenPrefixProcessor) -> None:
    row = {"image": Image.new("RGB", (4, 4)), "text": "a"}
    with pytest.raises(ValueError, match="Can't open the image of row 2"):
        DataCollatorForFrozenPrefixRetrieval(processor)([row, row, {"image": bad, "text": "a"}])


# ------------------------------------------------------------------------------------------------- rows of other kinds


COLLATORS = [
    DataCollatorForFrozenPrefix,
    DataCollatorForFrozenPrefixClassification,
    DataCollatorForFrozenPrefixRetrieval,
]


@pytest.mark.parametrize("collator", COLLATORS)
def test_nothing_to_collate_is_said(collator: Any, processor: FrozenPrefixProcessor) -> None:
    collate = collator(processor)
    with pytest.raises(ValueError, match="The batch has no rows"):
        collate([])
    with pytest.raises(ValueError, match="Row 0: column 'text' must be a string or a list of them, got an empty list"):
        collate([{"image": Image.new("RGB", (20, 18)), "text": [], "label": 0}])


@pytest.mark.parametrize("collator", COLLATORS)
def test_arrays_of_objects_are_lists(collator: Any, processor: FrozenPrefixProcessor) -> None:
    """As pandas and `with_format("numpy")` have texts, and several images of a row."""
    image = Image.new("RGB", (20, 18))
    images = np.empty(1, dtype=object)
    images[0] = image
    collate = collator(processor, all_texts=True)
    result = collate(
        [{"image": images, "text": np.array(["a", "a square"], dtype=kind), "label": 0} for kind in (object, "U9")]
    )
    wanted = collate([{"image": image, "text": ["a", "a square"], "label": 0}] * 2)
    assert result.keys() - {"image_index"} == wanted.keys() - {"image_index"}
    assert torch.equal(result["input_ids"], wanted["input_ids"])
    with pytest.raises(ValueError, match=r"Row 0.*array\(\[1, 2\]\).*text|Row 0.*'text'.*array\(\[1, 2\]\)"):
        collator(processor)([{"image": image, "text": np.array([1, 2]), "label": 0}])
