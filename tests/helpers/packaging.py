"""What setup.py declares, without installing anything."""

import ast
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]


def extras() -> list[str]:
    """The names of all extras."""
    names: list[Any] = []
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "extras" and isinstance(node.value, ast.Dict):
                names += [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id == "extras":
                names += [target.slice.value] if isinstance(target.slice, ast.Constant) else []
    return names


def command_module() -> str:
    """The module whose `main` is `frozen-prefix`."""
    found = re.search(r'"frozen-prefix = ([\w.]+):main"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]
