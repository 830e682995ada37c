"""benchmarks/few_shot_photos.py in small: categories are told by captions, episodes are what they say, each way of telling
shows what it names, and a further training changes the connector alone."""

import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from benchmarks import few_shot_photos
from tests.helpers.tiny import join, rows, save_parents


KINDS = {"red": "a dog runs .", "green": "a boy runs .", "blue": "a man runs .", "black": "a tree ."}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("few_shot")
    save_parents(folder, text={"max_position_embeddings": 512})
    model, processor = join(folder, connector_type="resampler", prefix_length=2)
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    (folder / "photos" / "data").mkdir(parents=True)
    for number, split in enumerate(("train", "validation", "test")):
        photos = rows(16)
        for index, row in enumerate(photos):
            row["image"].putpixel((0, 0), (index, number, 0))  # no two alike
            kind = KINDS[row.pop("text").split()[1]]
            row |= {"caption_0": kind, "caption_1": kind.replace("runs", "jumps")}
        Dataset.from_list(photos).to_parquet(folder / "photos" / "data" / f"{split}-00000-of-00001.parquet")
    return {"eyes": folder / "eyes", "photos": folder / "photos"}


def text_of(episode: Any, names: dict[str, str], photos: Any, draw: random.Random, how: str) -> tuple[str, list[Any]]:
    messages, images = few_shot_photos.tell(episode, names, photos, how, draw)
    said = [item.get("text", "<image>").strip() for message in messages for item in message["content"]]
    return " ".join(said), images


def test_an_episode_is_told_as_it_says() -> None:
    captions = [[KINDS[colour], KINDS[colour].replace("runs", "jumps")] for colour in KINDS] * 4
    places = few_shot_photos.members(captions, few_shot_photos.CATEGORIES)
    assert places == {"dog": [0, 4, 8, 12], "child": [1, 5, 9, 13], "man": [2, 6, 10, 14]}  # a tree is none of them
    photos = SimpleNamespace(captions=captions, images=[f"photo {place}" for place in range(16)], own=["mine"] * 16)
    draw = random.Random(0)
    for _ in range(20):
        episode = few_shot_photos.make_episode(draw, places, shots=3)
        shown = [place for place, _ in episode.shown]
        assert len(set(shown)) == 6 and episode.query[0] not in shown and len(set(episode.categories)) == 2
        assert all(place in places[category] for place, category in [*episode.shown, episode.query])
        assert sorted(category for _, category in episode.shown) == sorted(episode.categories * 3)
        names = dict(zip(episode.categories, few_shot_photos.NAMES, strict=True))

        told = functools.partial(text_of, episode, names, photos, draw)
        text, images = told("photos")
        assert images == [f"photo {place}" for place, _ in [*episode.shown, episode.query]] and text.count("<image>") == 7
        assert text.startswith("Answer with dax or blicket. <image> What is this?") and text.endswith("What is this?")
        assert [word for word in text.split() if word in names.values()][1:] == [names[kind] for _, kind in episode.shown]
        assert len(told("blind")[1]) == 7 and told("blind")[0] == text
        text, images = told("captions")
        assert not images and text.count(captions[episode.query[0]][0][:6]) >= 1 and "<image>" not in text
        assert told("own captions")[0].count("mine") == 7
        text, images = told("photos, then caption")
        assert len(images) == 6 and text.rpartition("<image>")[2].count(captions[episode.query[0]][0][:6]) == 1


def test_each_training_is_scored_in_each_way(places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    asked = [str(places["eyes"]), str(places["photos"]), "--shots", "1", "2", "--episodes", "2", "--steps", "1"]
    found = few_shot_photos.main(
        [*asked, "--store", str(tmp_path), "--output", str(out), "--table", str(tmp_path / "table.md")]
    )
    assert list(found["runs"]) == ["single photos", "then captions", "then names"]
    assert json.loads(out.read_text())["runs"] == found["runs"]
    for scores in found["runs"].values():
        assert len(scores) == len(few_shot_photos.WAYS_OF_TELLING) * 2 * 2  # made-up and true names, one and two shots
        assert all(0 <= score <= 1 for score in scores.values())
        # Words that the tokenizer doesn't know are equally likely: asked with both bindings, half of them are right.
        assert {score for name, score in scores.items() if "true" not in name} == {0.5}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| right out of two | 1 of each | 2 of each |" and len(lines) == 2 + 3 * 10
