"""The parents and the data as folders: whatever trains on Hub ids or folders trains on these."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .parents import train_language_model, train_tower
from .scenes import QUESTIONS, Scene, draw, split_scenes


def write_parents(folder: Path, *, tower_steps: int = 1000, language_model_steps: int = 110, seed: int = 0) -> None:
    """Trains `tower` and `language_model`; those that are there are left as they are."""
    if not (folder / "tower" / "config.json").is_file():
        train_tower(folder / "tower", tower_steps, seed)
    if not (folder / "language_model" / "config.json").is_file():
        train_language_model(folder / "language_model", language_model_steps, seed)


def write_data(folder: Path, *, pictures: int = 1500, test_pictures: int = 96, seed: int = 0) -> None:
    """`captions` (a picture with its sentence) and `questions` (a picture with a question and its answer, four rows to a
    picture), each with a split to train on and one of held-out scenes to test."""
    for number, (split, count) in enumerate({"train": pictures, "test": test_pictures}.items()):
        rng, scenes = random.Random(seed + number), split_scenes()[number]
        seen = [(scene, draw(scene, rng)) for scene in (rng.sample(scenes, len(scenes)) * -(-count // len(scenes)))[:count]]
        write_split(folder / "captions", split, [{"image": image, "text": scene.sentence} for scene, image in seen])
        write_split(folder / "questions", split, [row for scene, image in seen for row in _asked(scene, image)])


def _asked(scene: Scene, image: Any) -> list[dict[str, Any]]:
    return [{"image": image, "prompt": one, "answer": scene.answer(one).removesuffix(" .")} for one in QUESTIONS]


def write_split(folder: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of an `image` and texts as a Parquet file, which `load_dataset` and `load_image_text` read."""
    from datasets import Dataset, Features, Image, Value

    features = Features({name: Image() if name == "image" else Value("string") for name in rows[0]})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), features=features).to_parquet(folder / f"{split}.parquet")
