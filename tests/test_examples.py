"""What holds for every example: a reader can copy it, and its help comes at once."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
COUNT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nimported", *sorted({"torch", "datasets", "matplotlib", "ray", "openai"} & set(sys.modules)))
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short_and_stands_by_itself(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    others = {other.stem for other in EXAMPLES}
    said = {line.split()[1].split(".")[0] for line in lines if line.lstrip().startswith(("import ", "from "))}
    assert not said & (others | {"benchmarks", "tests", "examples"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_its_help_comes_before_torch(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT, path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage, _, imported = done.stdout.rpartition("\nimported")
    assert usage.startswith("usage: ") and len(usage.splitlines()) < 90
    assert not imported.split()
