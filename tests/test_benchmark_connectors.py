"""benchmarks/connectors.py in small: each kind of candidate runs and is kept, and what it is asked is what it says."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from benchmarks import connectors
from tests.helpers.tiny import save_parents, vision_config


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("connectors")
    save_parents(folder)
    torch.manual_seed(0)
    for name, width in (("tower", 32), ("further", 16)):
        CLIPVisionModel(vision_config(image_size=24, patch_size=4, hidden_size=width)).save_pretrained(folder / name)
        size = {"height": 24, "width": 24}
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size).save_pretrained(folder / name)
    columns = {
        "captions/flickr8k_1k": {"captions": ["a red square .", "a square ."]},
        "vqa/easy_vqa": {"questions": ["what is that ?", "is that a square ?"], "answers": ["a square", "red"]},
    }
    for place, texts in columns.items():
        for number, split in enumerate(("train", "validation", "test")):
            rows = [{"image": noise(10 * number + index), **texts} for index in range(6)]
            features = {name: datasets.List(datasets.Value("string")) for name in texts}
            made = datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(), **features}))
            (folder / place / "data").mkdir(parents=True, exist_ok=True)
            made.to_parquet(folder / place / "data" / f"{split}-00000-of-00001.parquet")
    return {name: str(folder / name) for name in ("tower", "further", "words")} | {"assets": str(folder)}


def arguments(places: dict[str, str], folder: Path, *more: str) -> list[str]:
    small = {"steps": 2, "batch_size": 2, "images": 6, "test_images": 4, "tower_side": 24, "side": 48, "height": 12}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    parents = ["--vision", places["tower"], "--further", places["further"], "--text", places["words"]]
    return [places["assets"], *parents, *words, "--store", str(folder / "store"), "--output", str(folder / "runs.json"), *more]


def test_each_kind_runs_and_is_kept(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["--only", "both towers", "avg_pool", "resampler, one checkpoint", "avg_pool, int8", "tiles"]
    first = connectors.main(arguments(places, tmp_path, "--seeds", "0", *only, "--table", str(tmp_path / "table.md")))
    assert json.loads((tmp_path / "runs.json").read_text())["runs"] == first["runs"]
    lengths = first["runs"]["lengths: resampler, one checkpoint, captions"]["sighted"]["0"]["lengths"]
    assert list(lengths) == ["1", "4", "9"] and lengths["1"]["own"]["nats"] != lengths["9"]["own"]["nats"]
    assert first["runs"]["tiles: avg_pool, 4 tiles and the whole, small text"]["sighted"]["0"]["tiles"] == 5
    assert {"sighted", "blind"} == set(first["runs"]["towers: both towers, questions"])
    table = (tmp_path / "table.md").read_text()
    assert "| avg_pool, 4 tiles and the whole | 20 |" in table and "| resampler, one checkpoint | 4 |" in table
    assert table.count("| avg_pool | 9 |") == 5  # its own two tables, two of towers, one of stores

    made: list[str] = []
    run = connectors.run

    def counted(candidate, task, seed, *args):
        made.append(f"{candidate.name} {seed}")
        return run(candidate, task, seed, *args)

    monkeypatch.setattr(connectors, "run", counted)
    more = ["--only", "resampler, one checkpoint", "--seeds", "0", "1"]
    second = connectors.main(arguments(places, tmp_path, *more))
    assert made == ["resampler, one checkpoint 1"]
    assert second["runs"]["towers: both towers, questions"] == first["runs"]["towers: both towers, questions"]
    with pytest.raises(ValueError, match="figures of other settings"):
        connectors.main([*arguments(places, tmp_path, *more), "--learning_rate", "1"])


def test_no_row_keeps_its_image_and_each_word_is_drawn_on_a_photo() -> None:
    order = connectors.shuffled(7, 3)
    assert sorted(order) == list(range(7)) and all(one != other for one, other in enumerate(order))
    photos = datasets.Dataset.from_list(
        [{"image": noise(seed)} for seed in range(16)], datasets.Features({"image": datasets.Image()})
    )
    rows = connectors.small_text(photos, 64, 12, seed=0)
    assert sorted(row["answer"][0] for row in rows) == sorted(connectors.WORDS * 2)
    word, place = rows[0]["answer"][0], torch.Generator().manual_seed(1)
    plain = np.asarray(noise(0).crop((0, 5, 30, 35)).resize((64, 64)), dtype=int)
    written = np.asarray(Image.open(io.BytesIO(connectors.with_a_word(noise(0), word, 64, 12, place))), dtype=int)
    changed = np.abs(written - plain).mean(-1) > 60
    assert written.shape == (64, 64, 3) and 20 < changed.sum() < 64 * 64 / 3
