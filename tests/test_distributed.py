"""Two processes on one machine, over gloo: the curve is that of one process with twice the batch, sharded or not."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import save_parents


pytestmark = pytest.mark.slow

# `accelerate launch` is this module; its umbrella command imports whatever else lies in the environment.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(folder: Path, way: str, batch_size: int, processes: int) -> dict:
    several = ["--multi_gpu", "--main_process_port", free_port()] if processes > 1 else ["--cpu"]
    command = [*LAUNCH, "--num_processes", str(processes), *several, "-m", "tests.helpers.distributed_run"]
    done = subprocess.run(
        [sys.executable, *command, str(folder), way, str(batch_size)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{way}{batch_size}" / "result.json").read_text())


def last(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """What a run saved at its end: the connector alone, which loads with its parents as anybody's does."""
    path = folder / run / "last"
    weights = load_file(path / "model.safetensors")
    assert all(".connector." in name for name in weights)
    state = FrozenPrefixForConditionalGeneration.from_pretrained(path).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    return weights


def check_same(folder: Path, one: tuple[str, dict], two: tuple[str, dict], **tolerance: float) -> None:
    tolerance = tolerance or {"abs": 1e-5, "rel": 1e-4}
    assert len({round(loss, 4) for loss in one[1]["losses"]}) > 4
    for name in ("losses", "gradients"):
        assert two[1][name] == pytest.approx(one[1][name], **tolerance)
    weights = [last(folder, run) for run, _ in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=10 * tolerance["abs"], rtol=10 * tolerance["rel"])


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Steps where one process, or each, has no picture are among them: nobody may wait for the other's gradients."""
    save_parents(tmp_path)
    single, double = run(tmp_path, "plain", 4, processes=1), run(tmp_path, "plain", 2, processes=2)
    assert (single["processes"], double["processes"], double["kind"]) == (1, 2, "MULTI_CPU")
    check_same(tmp_path, ("plain4", single), ("plain2", double))


def test_frozen_and_trained_parts_shard_together(tmp_path: Path) -> None:
    """FSDP2 as Trainer and accelerate do it: the same curve, small checkpoints, and a stopped run goes on."""
    save_parents(tmp_path)
    single, sharded = run(tmp_path, "plain", 4, processes=1), run(tmp_path, "fsdp", 2, processes=2)
    assert (sharded["processes"], sharded["kind"]) == (2, "FSDP")
    check_same(tmp_path, ("plain4", single), ("fsdp2", sharded))
    resumed = run(tmp_path, "fsdp_resumed", 2, processes=2)
    check_same(tmp_path, ("fsdp2", sharded), ("fsdp_resumed2", resumed))


def test_half_parents_shard_with_a_whole_connector(tmp_path: Path) -> None:
    save_parents(tmp_path)
    half = run(tmp_path, "fsdp_half", 2, processes=2)
    assert half["kind"] == "FSDP" and half["losses"][0] > half["losses"][-2]
    assert {tensor.dtype for tensor in last(tmp_path, "fsdp_half2").values()} == {torch.float32}


@pytest.mark.parametrize("way", ["evaluated", "fsdp_evaluated"])
def test_processes_share_the_rows_of_an_evaluation(tmp_path: Path, way: str) -> None:
    """Each takes its part, where the model is not sharded over them; the main one writes; the numbers are those of one."""
    save_parents(tmp_path)
    single = run(tmp_path, "evaluated", 2, processes=1)["results"]
    lines = (tmp_path / "evaluated2" / "evaluation" / "predictions.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "evaluated2")
    both = run(tmp_path, way, 2, processes=2)["results"]
    written = (tmp_path / f"{way}2" / "evaluation" / "predictions.jsonl").read_text().splitlines()
    assert len(single) == 1 and len(both) == 2
    assert single[0]["rows"] == [8, 0] and len(set(single[0]["predictions"]["sighted"])) > 1
    for one in both:
        assert one["scores"] == single[0]["scores"] and one["predictions"] == single[0]["predictions"]
    assert [one["rows"] for one in both] == ([[6, 0], [2, 0]] if way == "evaluated" else [[8, 0], [8, 0]])
    outputs = [[(line["kind"], line["row"], line["output"]) for line in map(json.loads, some)] for some in (lines, written)]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 14
