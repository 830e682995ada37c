"""Examples, run as their readers run them: by path, in a Python of their own. (To import one, `pythonpath` in pyproject.toml
puts `examples/` where tests find it.)"""

import json
from pathlib import Path
from typing import Any

from tests.helpers import fresh_python


def run_example(
    name: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """What `examples/NAME.py --output_dir FOLDER *ARGUMENTS` writes into `results.json`, and what it prints."""
    script = str(fresh_python.ROOT / "examples" / f"{name}.py")
    env = fresh_python.environment(**(variables or {}))
    done = fresh_python.run(*launcher, script, "--output_dir", str(folder), *arguments, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text()), done.stdout
