"""benchmarks/retrieval.py and benchmarks/lit_step.py in small: they run, add up piece by piece, and say what they are."""

import json
from pathlib import Path

import pytest

from benchmarks import lit_step


pytestmark = pytest.mark.slow


def test_a_step_is_measured_against_the_text_side(tmp_path: Path) -> None:
    small = {"vision-width": 64, "vision-layers": 1, "text-width": 64, "text-layers": 1, "vocab-size": 100, "batch-size": 4}
    arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    output = tmp_path / "lit_step.json"
    result = lit_step.main([*arguments, "--rounds", "3", "--output", str(output)])
    assert json.loads(output.read_text())["rows"] == result["rows"]
    assert [row["name"] for row in result["rows"]] == list(lit_step.CONNECTORS)
    assert result["rows"][0]["bar"] == 1.1 and result["rows"][0]["ratio"] > 0.5


@pytest.mark.real_data
def test_recall_is_measured_piece_by_piece(tmp_path: Path, assets: Path) -> None:
    from benchmarks import retrieval

    data = [assets / "captions" / "coco_open", assets / "vision" / "mobilenet_v1_0.25_128"]
    data = [str(path) for path in (*data, assets / "lm" / "tinystories_instruct_3m_chat")]
    options = ["--steps", "2", "--batch-size", "16", "--seeds", "0", "--output", str(tmp_path / "retrieval.json")]
    for candidate in ("locked image", "transformers, locked image"):
        results = retrieval.main([*data, *options, "--candidates", candidate])
    assert set(results["runs"]) == {"locked image", "transformers, locked image"} and results["gallery"] == 53
    assert results["chance"]["text_to_image_recall_at_1"] == pytest.approx(1 / 53)
    assert "| locked image | 1 |" in retrieval.table(results)
    with pytest.raises(ValueError, match="figures of other settings"):
        retrieval.main([*data, *options, "--learning-rate", "1"])
