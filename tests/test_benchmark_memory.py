"""What the benchmark of training memory computes is what models take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import training_memory
from tests.helpers.tiny import save_parents


@pytest.mark.slow
def test_it_prints_computed_sizes_that_a_step_confirms() -> None:
    """On the model of 135 M: what the way back needs, with and without activation checkpointing."""
    command = [sys.executable, "-m", "benchmarks.training_memory"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^\| 70 B .*\| 141\.1\d \|", done.stdout, flags=re.MULTILINE), done.stdout
    ratios = re.findall(r"^\| (?:all activations|with activation).*\| (\d\.\d\d) \| \d+ \|$", done.stdout, flags=re.MULTILINE)
    assert len(ratios) == 2 and all(0.7 < float(ratio) < 1.3 for ratio in ratios), done.stdout


@pytest.mark.parametrize("kind", training_memory.KINDS)
def test_quantised_weights_take_what_is_computed(kind: str, tmp_path: Path) -> None:
    _, words = save_parents(tmp_path, text={"hidden_size": 256, "intermediate_size": 512})
    if kind != "bfloat16":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    plain = training_memory.load_as(words, "bfloat16")
    held = training_memory.held_bytes(training_memory.load_as(words, kind))
    assert held == pytest.approx(training_memory.weight_bytes(plain, kind), rel=0.01)
