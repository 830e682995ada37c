"""Examples and experiments, run as their readers run them: by path or as a module, in a Python of their own. (To import an
example, `pythonpath` in pyproject.toml puts `examples/` where tests find it.)"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers import fresh_python


def run_script(*script: str, folder: Path, arguments: Sequence[str] = (), **options: Any) -> tuple[dict[str, Any], str]:
    """What `SCRIPT --output_dir FOLDER ARGUMENTS` writes into `results.json`, and what it prints."""
    done = fresh_python.run(*script, "--output_dir", str(folder), *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text()), done.stdout


def run_example(
    name: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """The same of `examples/NAME.py`."""
    script = str(fresh_python.ROOT / "examples" / f"{name}.py")
    env = fresh_python.environment(**(variables or {}))
    return run_script(*launcher, script, folder=folder, arguments=arguments, env=env)


def run_benchmark(name: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The same of `python -m benchmarks.NAME`."""
    return run_script("-m", f"benchmarks.{name}", folder=folder, arguments=arguments, cwd=fresh_python.ROOT)
