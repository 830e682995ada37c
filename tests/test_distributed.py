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
from tests.helpers.tiny import save_parents, skip_before


pytestmark = pytest.mark.slow

# `accelerate launch` is this module; its umbrella command imports whatever else lies in the environment.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


# How each engine starts two processes.
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ENGINES = ["plain", "fsdp", "fsdp_sharded", "fsdp_tower_pictured", "zero2", "zero3_pictured", "ray"]
ROOT = Path(__file__).parents[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, **env, "PYTHONPATH": path},
    )  # fmt: skip


def result_of(folder: Path, way: str, batch_size: int, done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{way}{batch_size}" / "result.json").read_text())


def run(folder: Path, way: str, batch_size: int, processes: int) -> dict:
    """By `accelerate launch`; DeepSpeed's ways by `torchrun`, which sets them up on CPUs too; Ray's by `on_ray.py`."""
    module: tuple[str, ...] = ("-m", "tests.helpers.distributed_run")
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
        launcher: tuple[str, ...] = (*TORCHRUN, "--master_port", free_port())
    elif way.startswith("ray"):
        pytest.importorskip("ray", reason="needs the extra `ray`")
        launcher, module = ("examples/on_ray.py", "--num_workers", "2"), ("tests/helpers/distributed_run.py",)
    else:
        several = ["--multi_gpu", "--main_process_port", free_port()] if processes > 1 else ["--cpu"]
        launcher = (*LAUNCH, "--num_processes", str(processes), *several)
    done = start(*launcher, *module, str(folder), way, str(batch_size))
    return result_of(folder, way, batch_size, done)


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
    assert len({round(loss, 4) for loss in one[1]["losses"]}) > 15 and len(one[1]["losses"]) == 20
    for name in ("losses", "gradients"):
        assert two[1][name] == pytest.approx(one[1][name], **tolerance)
    weights = [last(folder, run) for run, _ in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=10 * tolerance["abs"], rtol=10 * tolerance["rel"])


def check_equal_bits(folder: Path, one: tuple[str, dict], two: tuple[str, dict]) -> None:
    assert two[1]["losses"] == one[1]["losses"] and len(one[1]["losses"]) == 20
    weights = [last(folder, run) for run, _ in (one, two)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def rows_found(folder: Path, weights: dict[str, torch.Tensor]) -> set[str]:
    """Of which matrices 32 bytes of a row lie in any file of a folder, whatever its format and however it was sharded."""
    content = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    # The second row, for of words the first is the padding's: zeros.
    rows = {name: tensor[1].contiguous().numpy().tobytes()[:32] for name, tensor in weights.items() if tensor.dim() > 1}
    return {name for name, row in rows.items() if any(row in one for one in content)}


@pytest.mark.parametrize("way", ENGINES)
def test_two_processes_train_as_one_with_twice_the_batch(way: str, tmp_path: Path) -> None:
    """The same curve and connector; what is kept for resuming is what was learnt and its optimizer; a resumed run goes on to
    the last bit. Steps where one process, or each, has no picture are among them: nobody waits for the other's gradients."""
    save_parents(tmp_path)
    alone = "plain_pictured" if way.endswith("pictured") else "plain"
    single, double = run(tmp_path, alone, 4, processes=1), run(tmp_path, way, 2, processes=2)
    kind = {"p": "MULTI_CPU", "r": "MULTI_CPU", "f": "FSDP", "z": "DEEPSPEED"}[way[0]]
    assert (single["processes"], double["processes"], double["kind"]) == (1, 2, kind)
    check_same(tmp_path, (f"{alone}4", single), (f"{way}2", double))
    assert ("was dealt out over the processes" in double["refusal"]) is way.startswith(("fsdp", "zero3"))
    # What all ask of what was dealt out, a connector drawn anew among it, and put back; and one process of the whole model.
    assert double["together"] == double["after"] == single["together"]
    assert double["together"]["sighted"] != double["together"]["random_connector"]
    if way.startswith(("plain", "fsdp")):
        assert double["whole"] == double["together"]
        assert double["own"] is way.startswith("plain")

    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / f"{way}2" / "last")
    state = model.state_dict()
    frozen = {name: tensor for name, tensor in state.items() if ".connector." not in name and tensor.is_floating_point()}
    checkpoint = tmp_path / f"{way}2" / "checkpoint-10"
    assert not (kept := rows_found(checkpoint, frozen)), f"a resume checkpoint holds {sorted(kept)}"
    if way != "fsdp_sharded":  # whose processes write their own parts of what was learnt, and none of them a whole
        assert rows_found(checkpoint, load_file(checkpoint / "model.safetensors"))
    parents = sum(tensor.nbytes for tensor in state.values())
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size < parents, (size, parents)

    resumed = run(tmp_path, f"{way}_resumed", 2, processes=2)
    check_equal_bits(tmp_path, (f"{way}2", double), (f"{way}_resumed2", resumed))


@pytest.mark.parametrize("way", ["fsdp_tower", "zero3"])
def test_a_batch_without_a_picture_is_refused_where_processes_would_wait(way: str, tmp_path: Path) -> None:
    if way == "zero3":
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    save_parents(tmp_path)
    module = ("-m", "tests.helpers.distributed_run", str(tmp_path), way, "2")
    done = start(*TORCHRUN, "--master_port", free_port(), *module)
    assert done.returncode != 0
    assert "holds no image, video or audio, and the vision tower is sharded in layers" in done.stderr


def test_deepspeed_clips_gradients_by_its_own_config(tmp_path: Path) -> None:
    """Where that says nothing, accelerate says 1.0: the curve parts from Trainer's at the third step, for the first update of
    Adam does not depend on the gradient's length. `"gradient_clipping": "auto"` is Trainer's `max_grad_norm`."""
    save_parents(tmp_path)
    single, unclipped = run(tmp_path, "plain", 4, processes=1), run(tmp_path, "zero2_unclipped", 2, processes=2)
    assert unclipped["losses"][:2] == pytest.approx(single["losses"][:2], rel=1e-5)
    assert unclipped["losses"][4] != pytest.approx(single["losses"][4], rel=1e-4)


@pytest.mark.parametrize("way", ["plain", "fsdp", "zero2"])
def test_a_process_is_killed_and_the_run_goes_on(way: str, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        save_parents(tmp_path / name)
    whole, folder = run(tmp_path / "whole", way, 2, processes=2), tmp_path / "killed" / f"{way}2"
    module = ("-m", "tests.helpers.distributed_run", str(tmp_path / "killed"), way, "2")
    killed = start(*TORCHRUN, "--master_port", free_port(), *module, "13")
    assert killed.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in killed.stderr and "Signal 9 (SIGKILL)" in killed.stderr
    # As a run leaves it that is killed while it saves.
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-13")
    state = folder / "checkpoint-13" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    resumed = start(*TORCHRUN, "--master_port", free_port(), *module)
    assert "checkpoint-13` was not written to its end (half of trainer_state.json)" in resumed.stderr
    again = result_of(tmp_path / "killed", way, 2, resumed)
    check_equal_bits(tmp_path, (f"whole/{way}2", whole), (f"killed/{way}2", again))


def test_a_tensor_parallel_language_model_trains_the_same_connector(tmp_path: Path) -> None:
    """Each process has half of every layer, sees all rows, and holds the whole connector."""
    skip_before("5.24", "has another Trainer for models that were sharded as they were loaded")
    save_parents(tmp_path)
    single = run(tmp_path, "plain", 4, processes=1)
    module = ("-m", "tests.helpers.distributed_run", str(tmp_path), "tp", "4")
    both = result_of(tmp_path, "tp", 4, start(*TORCHRUN, "--master_port", free_port(), *module))
    assert both["processes"] == 2
    check_same(tmp_path, ("plain4", single), ("tp4", both))


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
