"""The profile of loading names each step of ours and of the parents, and the main job says what each of its steps holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loading, parents
from benchmarks.loading_profile import profile


SIZES = parents.Sizes(
    vision_width=32, vision_layers=1, image_size=16, patch_size=8, text_width=32, text_layers=1, vocab_size=64, prefix_length=4
)


def test_each_step_of_loading_is_named(tmp_path: Path) -> None:
    model = parents.join(str(tmp_path), SIZES)
    model.save_pretrained(tmp_path / "model")
    steps = profile(loading.OURS.format(saved=tmp_path / "model", options=""), rounds=1, clock="cpu")
    named = {"the config", "building the connector", "the parents' fingerprints", "joining"}
    named |= {"freezing, and what need not be saved", "copying weights that lie off 16 bytes in their files"}
    assert named <= set(steps) and all(steps[name] > 0 for name in named)
    assert steps["in all"] == pytest.approx(sum(steps.values()) - steps["in all"])


@pytest.mark.slow
def test_the_main_job_is_measured_step_by_step() -> None:
    command = [sys.executable, "-m", "benchmarks.main_job", "--rows", "100"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    for step in ("opening", "storing", "an epoch of training"):
        assert f"{step}, 100 rows" in done.stdout and f"{step}: peak memory, 100 rows" in done.stdout
