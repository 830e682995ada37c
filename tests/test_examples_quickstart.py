"""examples/quickstart.py: it runs, writes what it says, and (slow) sees held-out pictures."""

from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.scripts import run_example


def quickstart(folder: Path, *arguments: str) -> dict:
    results, printed = run_example("quickstart", folder, *arguments)
    assert "sighted" in printed and "random_connector" in printed
    return results


def test_a_short_run_writes_everything(tmp_path: Path) -> None:
    few = ["--tower_steps", "2", "--language_model_steps", "2", "--steps", "2", "--held_out", "12"]
    results, printed = run_example("quickstart", tmp_path, *few)
    assert set(results) == {"sighted", "blind", "random_connector", "checkpoint_bytes", "parents_bytes", "seconds"}
    assert all(set(results[name]) > {"exact_match", "cider"} for name in ("sighted", "blind", "random_connector"))
    assert results["checkpoint_bytes"] < results["parents_bytes"] / 10
    assert (tmp_path / "pictures.png").stat().st_size > 10_000
    curves = Image.open(tmp_path / "training.png")  # the loss, and beside it what another picture adds to it
    assert curves.width > 2 * curves.height
    names = [tmp_path / "eyes", tmp_path / "picture_*.png"]
    assert f"frozen-prefix demo {names[0]} --first_sentence --pictures {names[1]}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_sighted_beats_blind_on_held_out_pictures(tmp_path: Path, seed: str) -> None:
    results = quickstart(tmp_path, "--seed", seed)
    assert results["sighted"]["exact_match"] >= 0.9
    assert results["blind"]["exact_match"] <= 0.2 and results["random_connector"]["exact_match"] <= 0.2
