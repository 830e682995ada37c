"""benchmarks/peers.py in small, its part that needs no checkout: both sides are the same model, and every row has figures."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import peers


SMALL = {"vision-width": 64, "vision-layers": 1, "image-size": 32, "text-width": 64, "text-layers": 1, "vocab-size": 100}
PICTURES = ("from a picture", "from each of 2 pictures")
SMALL |= {"prefix-length": 3, "text-length": 4, "batch-size": 2, "new-tokens": 3, "qformer-layers": 1, "rounds": 1}


def test_ours_and_blip2_are_the_same_model_and_both_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "peers.json"
    arguments = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    rows = peers.main([*arguments, "--device", "cpu", "--output", str(output)])["rows"]
    assert json.loads(output.read_text())["rows"] == rows
    by_name = {row["name"].removeprefix("BLIP-2, prefix 3: "): row for row in rows}
    assert by_name["parameters"]["ours"] == by_name["parameters"]["limit"] > by_name["trained parameters"]["limit"]
    loss = by_name["loss at the start"]
    assert loss["ours"] == pytest.approx(loss["limit"], abs=1e-4)
    for source in ("pictures", "features"):
        assert 0 <= by_name[f"how far apart the gradients, from {source}"]["ours"] < 1e-3
    assert all(by_name[f"words that differ, {pictures}"]["ours"] == 0 for pictures in PICTURES)
    timed = (
        "step from pictures",
        "step from stored features, to theirs from pictures",
        *(f"3 words, {one}" for one in PICTURES),
    )
    assert all(math.isfinite(by_name[name]["ratio"]) and by_name[name]["ratio"] > 0 for name in timed)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--dtype", "bfloat16"], ["--text-type", "gpt2", "--nanovlm", str(tmp_path)]):
        with pytest.raises(SystemExit):
            peers.main(words)
        assert words[1] in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="github.com/huggingface/nanoVLM"):
        peers.nanovlm_code(str(tmp_path), None)
