"""examples/quickstart_real.py: it runs on any captions, in the language model's own turns, and writes what it says."""

from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoProcessor

import modeling_frozen  # noqa: F401  (registers the model type)
from benchmarks import real_parents
from tests.helpers.scripts import run_example
from tests.helpers.tiny import captions_in, save_parents


def test_a_short_run_writes_everything(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path, text={"max_position_embeddings": 128})
    parents = ["--vision", tower, "--text", words, "--dataset", str(captions_in(tmp_path / "captions"))]
    few = ["--steps", "2", "--photos_per_step", "2", "--test_photos", "5", "--num_beams", "1", "--prompt", "a picture ?"]
    results, printed = run_example("quickstart_real", tmp_path / "out", *parents, *few, "--question", "what colour ?")
    assert set(results) >= {"sighted", "blind", "random_connector", "intervals"} and results["rows"] == 5
    assert {"sighted", "blind", "random_connector", "gain"} == set(results["intervals"])
    assert "sighted - blind" in printed and printed.count("what colour ?") == 5 and "frozen-prefix demo" in printed
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "training.png").is_file() and (tmp_path / "out" / "predictions.jsonl").is_file()
    asked = AutoProcessor.from_pretrained(tmp_path / "out" / "eyes").chat_prompt("a picture ?")
    assert asked == "User: <image>a picture ?\nAssistant:"
    assert f'"prompt": "{asked}"'.replace("\n", "\\n") in (tmp_path / "out" / "predictions.jsonl").read_text()


@pytest.mark.real_data
def test_the_photos_of_flickr8k_have_the_columns_that_they_have_outside(assets: Path, tmp_path: Path) -> None:
    real_parents.write_flickr8k(assets / "captions" / "flickr8k_1k", tmp_path / "flickr8k")
    splits = load_dataset(str(tmp_path / "flickr8k"), cache_dir=str(tmp_path / "cache"))
    assert set(splits) == {"train", "validation", "test"}
    assert splits["test"].column_names == ["image", *(f"caption_{index}" for index in range(5))]
