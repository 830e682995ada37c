"""benchmarks/masked_words.py in small: words are masked and told behind sentinels, and a photo alone brings them back."""

import random
from pathlib import Path

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from benchmarks import masked_words
from tests.helpers.tiny import rows, save_parents


PLACES = ("in snow", "on grass", "at sea", "at home")
COLOURS = ("red", "green", "blue", "black")


def lay_out(folder: Path, count: int = 24) -> Path:
    """Sentences of coloured squares, some of them with a photo."""
    images = [row["image"] for row in rows(count)]
    table = [
        {"en": f"A {colour} square {place}.", "en_captions": [f"{colour} it is {place} ."], "flickr8k_image": None}
        for colour in COLOURS
        for place in PLACES
    ] * 4
    for index, image in enumerate(images):
        image.putpixel((0, 0), (index, 0, 0))  # no two alike
        told = f"A {COLOURS[index % 4]} square {PLACES[index // 4 % 4]}."
        table.append({"en": told, "en_captions": [], "flickr8k_image": f"{index}.jpg"})
    (folder / "multi30k" / "data").mkdir(parents=True)
    Dataset.from_list(table).to_parquet(folder / "multi30k" / "data" / "train.parquet")
    photos = {
        "image": images,
        "image_id": [f"{index}.jpg" for index in range(count)],
        "captions": [[f"A {COLOURS[index % 4]} square at home .", "A square ."] for index in range(count)],
    }
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "captions": List(Value("string"))})
    (folder / "captions" / "flickr8k_1k" / "data").mkdir(parents=True)
    Dataset.from_dict(photos, features).to_parquet(
        folder / "captions" / "flickr8k_1k" / "data" / "train-00000-of-00001.parquet"
    )
    return folder


def test_words_of_colour_and_number_are_masked() -> None:
    source, hidden = masked_words.mask("Two Black dogs near a dark-red wall, and a redwood.")
    assert source == "<extra_id_0> <extra_id_1> dogs near a dark-red wall , and a redwood ." and hidden == ["two", "black"]
    assert masked_words.answer(hidden) == "<extra_id_0> two <extra_id_1> black"
    assert masked_words.restored("two white", hidden) == [True, False] and masked_words.restored("two", hidden) == [
        True,
        False,
    ]
    assert masked_words.restored("black", ["two"]) == [False] and masked_words.restored("", ["two"]) == [False]
    source, hidden = masked_words.mask("A dog runs on grass, in 2010.", random.Random(0), 1.0)
    assert source == "<extra_id_0> <extra_id_1> <extra_id_2> <extra_id_3> <extra_id_4> , <extra_id_5> 2010 ."


def test_a_photo_brings_back_what_a_sentence_hides(tmp_path: Path) -> None:
    tower, _ = save_parents(tmp_path)
    assets, out = lay_out(tmp_path / "assets"), tmp_path / "out"
    texts, photos = masked_words.read(assets)
    assert len(texts) == 16 * 4 * 2 and len(photos) == 24 and len(photos[0]["sentences"]) == 3
    small = ["--vocab_size", "150", "--width", "32", "--layers", "1", "--lm_steps", "150", "--lm_learning_rate", "5e-3"]
    eyes = ["--folds", "2", "--steps", "100", "--batch_size", "16", "--learning_rate", "5e-3"]
    asked = [str(assets), "--vision", tower, "--output_dir", str(out), "--table", str(tmp_path / "table.md"), *small, *eyes]
    found = masked_words.main(asked)
    assert {row["fold"] for row in found["said"]} == {0, 1}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines()]
    shares = dict(zip(masked_words.CONDITIONS, map(float, table[2][2:-1]), strict=True))
    assert table[2][:2] == ["all", str(len(found["said"]))] and [line[0] for line in table[2:]] == ["all", "colours"]
    assert shares["sighted"] > 0.9 and shares["blind"] < 0.5 and shares["language_model"] < 0.5

    before = (out / "language_model" / "model.safetensors").read_bytes()
    again = masked_words.main(asked)  # the language model that stands there is taken
    assert (out / "language_model" / "model.safetensors").read_bytes() == before
    assert again["said"] == found["said"]
