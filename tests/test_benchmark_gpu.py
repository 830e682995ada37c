"""benchmarks/gpu.py in its small form, on whatever device there is; and how often a training step waits for its device."""

import json
from pathlib import Path

import torch

from benchmarks import gpu, training
from tests.helpers.tiny import skip_before


def test_its_small_form_measures_all_that_it_says(tmp_path: Path) -> None:
    skip_before("5.21", "takes no mask in `logits_to_keep`, by which the limit is computed")
    options = ["--small", "--rounds", "1", "--loads", "1", "2", "--steps", "6", "--new-tokens", "3"]
    gpu.main([*options, "--output", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    expected = [
        "sdpa, step, batch 16",
        "sdpa, step, batch 10 of 5 captions an image",
        "sdpa, generate, 2 images, tower included",
    ]
    assert all(rows[name]["ratio"] > 0 for name in expected)
    loss = rows["sdpa, Trainer in bfloat16: the last loss, beside the first"]
    assert loss["ours"] < loss["limit"] and results["settings"]["dtype"] == "bfloat16"
    assert rows["sdpa, generate, 1 images"]["ours"] > 0


def test_a_step_waits_no_more_often_with_more_rows(tmp_path: Path) -> None:
    """What asks the device for a value makes the host wait for it: never once a row, an image or a label."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = training.join(tmp_path, gpu.SMALL)

    def waits(rows: int, captions: int = 1) -> int:
        step = training.our_step(model, training.batch_of(model, gpu.SMALL, rows, device, captions))
        step()
        return gpu.count_waits(step, device)

    model.to(device)
    alone, shared = waits(2), waits(4, captions=2)
    assert 0 < alone == waits(12) and shared == waits(12, captions=2) == waits(12, captions=4)
    assert alone <= 16 and shared <= 32
