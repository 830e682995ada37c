"""benchmarks/digits.py, one seed of it: what it prints is what it says."""

import json
from pathlib import Path

import pytest

from benchmarks.digits import main, shuffled


pytestmark = pytest.mark.slow


def test_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    result = main(["--seeds", "0", "--epochs", "5", "--output", str(tmp_path / "digits.json")])
    assert json.loads((tmp_path / "digits.json").read_text())["rows"] == result["rows"]
    accuracy = {name: row["accuracy"]["mean"] for name, row in result["rows"].items()}
    assert accuracy["classifier, image"] > 0.8 and accuracy["classifier, both"] > 0.8
    assert accuracy["classifier, image, blind"] < 0.2 and accuracy["classifier, text"] <= 0.25
    assert accuracy["classifier, image, random connector"] < accuracy["classifier, image"]
    assert accuracy["nearest prompt"] > 0.8 and accuracy["nearest prompt, blind"] < 0.2
    assert "linear probe, all positions" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 9])
def test_no_row_keeps_its_picture(count: int) -> None:
    order = shuffled(count, 0).tolist()
    assert sorted(order) == list(range(count)) and all(i != j for i, j in enumerate(order))
