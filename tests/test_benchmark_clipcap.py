"""benchmarks/clipcap.py in small, beside a checkout of ClipCap named by FROZEN_PREFIX_CLIPCAP: both sides train, write and
are scored, and our `generate()` writes what ClipCap's own loop writes from its own prefix."""

import json
import os
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.real_data
def test_both_sides_are_trained_and_scored(tmp_path: Path, assets: Path) -> None:
    checkout = os.environ.get("FROZEN_PREFIX_CLIPCAP")
    if checkout is None:
        pytest.skip("no checkout of github.com/rmokady/CLIP_prefix_caption: name it by FROZEN_PREFIX_CLIPCAP")
    from benchmarks import clipcap

    parents = {
        "--vision": assets / "vision" / "mobilenet_v1_0.25_128",
        "--text": assets / "lm" / "tinystories_instruct_3m_chat",
        "--dataset": assets / "captions" / "coco_open",
        "--output": tmp_path / "clipcap.json",
        "--store": tmp_path,
    }
    options = ["--epochs", "1", "--batch-size", "40", "--layers", "1", "--prefix-length", "2", "--max-new-tokens", "6"]
    command = [checkout, *[str(word) for pair in parents.items() for word in pair], *options, "--seeds", "0"]
    for mapper in clipcap.MAPPERS:  # piece by piece, into one file
        results = clipcap.main([*command, "--decodings", "greedy", "--mappers", mapper])
    assert json.loads((tmp_path / "clipcap.json").read_text()) == results
    assert set(results["runs"]) == {f"{side}, {mapper}" for side in clipcap.SIDES for mapper in clipcap.MAPPERS}
    assert [row["seeds"] for row in results["compared"]] == [1, 1]
    runs = {name: by_seed["0"] for name, by_seed in results["runs"].items()}
    assert len({run["steps"] for run in runs.values()}) == 1
    for mapper in clipcap.MAPPERS:
        assert set(runs[f"ours, {mapper}"]["scores"]) == {"greedy", "greedy, blind"}
        assert runs[f"clipcap, {mapper}"]["same"]["greedy"] > 0.9
    # Theirs have no LayerNorm on the features, and are otherwise as large.
    norm = 2 * 256
    assert runs["ours, mlp"]["parameters"] - norm == runs["clipcap, mlp"]["parameters"]
    with pytest.raises(ValueError, match="figures of other settings"):
        clipcap.main([*command, "--mappers", "mlp"])
    with pytest.raises(FileNotFoundError, match="holds no train.py"):
        clipcap.training_code(str(tmp_path), lambda: None, None)
