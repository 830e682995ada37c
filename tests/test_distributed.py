"""Two processes on one machine, over gloo: the curve is that of one process with twice the batch, sharded or not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.tiny import save_parents


pytestmark = pytest.mark.slow

# `accelerate launch` is this module; its umbrella command imports whatever else lies in the environment.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(folder: Path, way: str, batch_size: int, processes: int) -> dict:
    several = ["--multi_gpu", "--main_process_port", free_port()] if processes > 1 else ["--cpu"]
    command = [*LAUNCH, "--num_processes", str(processes), *several, "-m", "tests.distributed_run"]
    done = subprocess.run(
        [sys.executable, *command, str(folder), way, str(batch_size)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{way}{batch_size}" / "result.json").read_text())


def check_same(folder: Path, one: tuple[str, int], two: tuple[str, int]) -> None:
    """Losses and weights of a run in one process and of one in two; and what the latter saved is small and loads."""
    single, double = run(folder, *one, processes=1), run(folder, *two, processes=2)
    assert single.pop("processes") == 1 and double.pop("processes") == 2
    assert len(set(map(round, single["losses"], [4] * 6))) > 1
    for name, values in single.items():
        assert double[name] == pytest.approx(values, abs=1e-5, rel=1e-4)
    saved = [folder / f"{way}{size}" / "last" / "model.safetensors" for way, size in (one, two)]
    weights = [load_file(path) for path in saved]
    assert weights[0].keys() == weights[1].keys() and all("connector" in name for name in weights[1])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)
    again = FrozenPrefixForConditionalGeneration.from_pretrained(saved[1].parent)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights[1].items())


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Steps where one process, or each, has no picture are among them: nobody may wait for the other's gradients."""
    save_parents(tmp_path)
    check_same(tmp_path, ("trainer", 4), ("trainer", 2))


def test_frozen_and_trained_parts_shard_together(tmp_path: Path) -> None:
    """FSDP2; the state dict that was gathered is filtered as any other, on saving."""
    save_parents(tmp_path)
    check_same(tmp_path, ("alone", 4), ("fsdp", 2))
