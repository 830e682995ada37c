"""The pages of docs/ are true to the code: the files and names that they walk through exist."""

import json
import re
from pathlib import Path

import pytest

from modeling_frozen import load_image_text
from modeling_frozen.training import checkpoints
from tests.helpers.formats import lay_out


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


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_each_documented_row_is_of_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_out(tmp_path / "data")
    (folder / "a.png").write_bytes((folder / "images" / "red.png").read_bytes())
    (folder / "val2014").mkdir()
    (folder / "val2014" / "a.png").write_bytes((folder / "images" / "red.png").read_bytes())
    documented = re.findall(r"^\| `(\w+)` \| `(\{.+?\})`(?:;| \|)", DATA, flags=re.MULTILINE)
    assert len(documented) == 9
    for name, row in documented:
        content = json.loads(row)
        (folder / "row.json").write_text(json.dumps(content if name in ("coco", "karpathy") else [content]))
        assert f"read as {name}" in load_image_text(folder / "row.json").info.description


def test_the_page_on_several_devices_names_what_there_is() -> None:
    page = (ROOT / "docs" / "several_devices.md").read_text(encoding="utf-8")
    blocks = [json.loads(block) for block in re.findall(r"^```json\n(.+?)^```", page, flags=re.MULTILINE | re.DOTALL)]
    assert blocks[0]["version"] == 2 and blocks[1]["gradient_clipping"] == "auto"
    assert all((ROOT / name).is_file() for name in re.findall(r"(?:examples|tests)/\w+\.py", page))
    for name in ("DeepSpeedCheckpointCallback", "last_whole_checkpoint"):
        assert name in page and hasattr(checkpoints, name)
    extras = re.findall(r"frozen-prefix\[(\w+)\]", page)
    assert extras and all(f'"{extra}": [' in (ROOT / "setup.py").read_text(encoding="utf-8") for extra in extras)


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_first_pages_lead_somewhere(page: Path) -> None:
    """Those of docs/ are checked as the site is built."""
    for link in re.findall(r"\]\((?!https?:|#|\{\{)([^)\s#]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link
