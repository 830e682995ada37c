# ruff: noqa: F811 (fixtures are imported by name)
"""The notebooks of docs/ are what their sources say, small and of no machine, and run from top to bottom."""

import io
import json
import re
from pathlib import Path
from typing import Any

import build_notebooks
import build_site
import pytest
from PIL import Image

from tests.helpers.docs_world import OWNERS, ROOT
from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401
from tests.helpers.tiny import COLOURS


NOTEBOOKS = {name: json.loads((build_notebooks.FOLDER / f"{name}.ipynb").read_text("utf-8")) for name in build_notebooks.NAMES}
pytestmark = pytest.mark.parametrize("name", build_notebooks.NAMES)


def percent(notebook: dict[str, Any]) -> str:
    """The cells of a notebook in the percent format."""
    cells = []
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).split("\n")
        if cell["cell_type"] == "markdown":
            cells.append("\n".join(["# %% [markdown]", *(f"# {line}".rstrip() for line in lines)]))
        else:
            cells.append("\n".join(["# %%", *(f"# {line}" if line.startswith(("!", "%")) else line for line in lines)]))
    return "\n\n".join(cells) + "\n"


def test_a_notebook_says_what_its_source_says(name: str) -> None:
    source = (build_notebooks.FOLDER / f"{name}.py").read_text("utf-8")
    assert percent(NOTEBOOKS[name]) == re.sub(r"\n\n+# %%", "\n\n# %%", source), (
        "`python docs/build_notebooks.py` makes it anew"
    )


def test_what_is_kept_of_a_run_is_whole_small_and_of_no_machine(name: str) -> None:
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not {output["output_type"] for output in outputs} - {"stream", "display_data", "execute_result"}
    for output in outputs:
        data = output.get("data", {})
        assert all(len(value) * 3 / 4 < 100_000 for kind, value in data.items() if kind.startswith("image/"))
        text = json.dumps({kind: value for kind, value in data.items() if not kind.startswith("image/")})
        text += "".join(output.get("text", ""))
        assert not re.search(r"/tmp|/home/|/root|/Users/|127\.0\.0\.1|localhost|site-packages|it/s\]|Warning", text), text
    assert (build_notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 500_000


def test_a_page_of_the_site_shows_its_cells_and_what_they_drew(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.ipynb"
    path.write_text(json.dumps(NOTEBOOKS[name]), "utf-8")
    page = build_site.notebook_page(path)
    assert page.count("```python\n") == sum(cell["cell_type"] == "code" for cell in NOTEBOOKS[name]["cells"])
    images = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert images and all(Image.open(tmp_path / image).width > 300 for image in images)
    assert page.startswith("---\nsearch:")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All run in one: some go on with what an earlier one left there."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def world(module_hub: Hub) -> Hub:
    module_hub.add_user("me", module_hub.token, orgs=OWNERS)
    module_hub.run("from tests.helpers.docs_world import fill; fill()")
    return module_hub


def a_photo(file: str) -> bytes:
    """Stands for one of COCO's: of another colour for another number."""
    colours = list(COLOURS.values())
    written = io.BytesIO()
    Image.new("RGB", (48, 40), colours[sum(map(ord, file)) % len(colours)]).save(written, "JPEG")
    return written.getvalue()


@pytest.mark.hub
@pytest.mark.slow
def test_it_runs_from_top_to_bottom(name: str, world: Hub, folder: Path) -> None:
    """On tiny parents under the ids that it names; what is committed was made by `docs/build_notebooks.py` with real ones."""
    for package in ("ipykernel", "jupytext", "nbclient"):
        pytest.importorskip(package)
    if name == "look_inside" and not (folder / "eyes").is_dir():
        pytest.skip("goes on with what the quickstart leaves: run both")
    with build_notebooks.photos(a_photo) as proxy:
        notebook = build_notebooks.execute(ROOT / "docs" / "notebooks" / f"{name}.py", folder, world.env(**proxy))
    assert percent(notebook) == percent(NOTEBOOKS[name])
    kinds = [
        [sorted(kind.partition("/")[0] for kind in output.get("data", ["text"])) for output in cell.get("outputs", [])]
        for made in (notebook, NOTEBOOKS[name])
        for cell in made["cells"]
    ]
    half = len(kinds) // 2
    assert kinds[:half] == kinds[half:]  # as much is printed and drawn as is shown
