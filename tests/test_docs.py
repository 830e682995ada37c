"""The pages of docs/ are true to the code: the files and names that they walk through exist."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\d+\. (.+?)(?=^\d+\. |^#|\Z)", ARCHITECTURE, flags=re.MULTILINE | re.DOTALL)


def place(name: str) -> Path:
    return ROOT / name if name.startswith("processors/") else ROOT / "modeling_frozen" / name


@pytest.mark.parametrize("step", STEPS, ids=lambda step: re.findall(r"`(\S+?)`", step)[0])
def test_the_walks_name_what_there_is(step: str) -> None:
    names = re.findall(r"`([^`\s]+)`", step)
    files = [name for name in names if name.endswith(".py")]
    assert files and all(place(name).is_file() for name in files), files
    text = "".join(place(name).read_text(encoding="utf-8") for name in files)
    for name in (name for name in names if name not in files and not name.startswith("<")):
        assert re.search(rf"\b{re.escape(name)}\b", text), (name, files)


def test_each_walk_meets_six_steps_at_most() -> None:
    walks = re.split(r"^## ", ARCHITECTURE, flags=re.MULTILINE)[1:]
    assert len(walks) == 3
    assert all(1 <= len(re.findall(r"^\d+\. ", walk, flags=re.MULTILINE)) <= 6 for walk in walks)
