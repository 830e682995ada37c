"""benchmarks/masked_words.py in small: words are masked and found again in German, and a photo alone brings a colour back."""

import itertools
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from benchmarks import masked_words
from tests.helpers.tiny import COLOURS, rows, save_parents


GERMAN = {"red": "rotes", "green": "grünes", "blue": "blaues", "black": "schwarzes"}
PLACES = {"in snow": "im Schnee", "on grass": "auf Gras", "at sea": "auf See", "at home": "daheim"}


def lay_out(folder: Path, count: int = 24) -> Path:
    """Sentences of coloured squares in both languages, some of them with a photo."""
    images = [row["image"] for row in rows(count)]
    pairs = itertools.product(COLOURS, PLACES.items(), range(4))
    table = [
        {"en": f"A {colour} square {place}.", "de": f"Ein {GERMAN[colour]} Quadrat {there}.", "flickr8k_image": None}
        for colour, (place, there), _ in pairs
    ]
    names = list(COLOURS)
    for index, image in enumerate(images):
        image.putpixel((0, 0), (index, 0, 0))  # no two alike
        place = list(PLACES)[index // 4 % 4]
        colour = names[index % 4]
        told = {"en": f"A {colour} square {place}.", "de": f"Ein {GERMAN[colour]} Quadrat {PLACES[place]}."}
        table.append({**told, "flickr8k_image": f"{index}.jpg"})
    (folder / "multi30k" / "data").mkdir(parents=True)
    Dataset.from_list(table).to_parquet(folder / "multi30k" / "data" / "train.parquet")
    photos = {
        "image": images,
        "image_id": [f"{index}.jpg" for index in range(count)],
        "captions": [[f"A {names[index % 4]} square at home .", "A square ."] for index in range(count)],
    }
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "captions": List(Value("string"))})
    (folder / "captions" / "flickr8k_1k" / "data").mkdir(parents=True)
    Dataset.from_dict(photos, features).to_parquet(
        folder / "captions" / "flickr8k_1k" / "data" / "train-00000-of-00001.parquet"
    )
    return folder


def test_words_are_masked_and_found_in_german() -> None:
    english, german = "Two Black dogs near a dark red redwood.", "Zwei schwarze Hunde bei einem dunkelroten Brot."
    assert masked_words.mask(english) == "<extra_id_0> <extra_id_0> dogs near a dark <extra_id_0> redwood."
    assert masked_words.hidden_words(english, german) == ["two", "black", "red"]
    assert masked_words.hidden_words(english, "Hunde bei einem Brot.") == []  # "rot" within a word is no colour
    assert masked_words.share_told("Zwei rote Hunde.", ["two", "black", "red"]) == pytest.approx(2 / 3)
    assert masked_words.share_told("Schwarze, rosafarbene und hellgrüne.", ["black", "pink", "green"]) == 1


def test_a_photo_brings_back_what_the_translator_cant_know(tmp_path: Path) -> None:
    tower, _ = save_parents(tmp_path)
    assets, out = lay_out(tmp_path / "assets"), tmp_path / "out"
    small = ["--vocab_size", "150", "--width", "64", "--layers", "1", "--translator_steps", "300"]
    small += ["--translator_learning_rate", "5e-3"]
    eyes = ["--folds", "2", "--steps", "150", "--batch_size", "16", "--learning_rate", "5e-3"]
    asked = [str(assets), "--vision", tower, "--output_dir", str(out), "--table", str(tmp_path / "table.md"), *small, *eyes]
    found = masked_words.main(asked)
    assert len(found["said"]) == 24 and {row["fold"] for row in found["said"]} == {0, 1}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines()]
    shares = dict(zip(masked_words.CONDITIONS, map(float, table[2][2:-1]), strict=True))
    assert table[2][:2] == ["all", "24"] and [line[0] for line in table[2:]] == ["all", "colours"]
    assert shares["language_model, unmasked"] > 0.9  # it learnt to translate
    assert shares["sighted"] > 0.9 and shares["blind"] < 0.5 and shares["language_model"] < 0.5

    before = (out / "translator" / "model.safetensors").read_bytes()
    again = masked_words.main(asked)  # the translator that stands there is taken
    assert (out / "translator" / "model.safetensors").read_bytes() == before
    assert again["said"] == found["said"]
