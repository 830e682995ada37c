"""Every message that the package raises, read from its source, with the kind of docs/errors.md that it names at its end.

The page says what a kind means and what to do; `docs/build_site.py` writes the messages below it, and a test fails for a
message that names no kind (`tests/test_docs_errors.py`). Standard library only.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_frozen", "processors")
HEADING = re.compile(r"^## (?P<title>.+?) \{#(?P<anchor>[\w-]+)\}$", re.MULTILINE)
SUFFIX = re.compile(r" ?\[errors\.md#([\w-]+)\]")
# Named by what they are, not by what they say.
NO_MESSAGES = ("NotImplementedError", "SystemExit", "KeyError")
# What whoever knows the row says to its end, and names the kind of; and a window of the demo page.
PHRASES = ("RowError", "MissingFile", "NothingToLearn", "UnreadableRow", "_Broken", "_wrong_count", "gr.Error")


@dataclass(frozen=True)
class Message:
    """A `raise`: where it is, what it says, with `…` for what is filled in, and its kind."""

    file: str
    line: int
    text: str
    kind: str | None


def _strings(node: ast.AST) -> list[str]:
    """The text of an expression of strings, one for each way that it may come out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _strings(node.left) or ["…"] for right in _strings(node.right) or ["…"]]
    if isinstance(node, ast.IfExp):
        return _strings(node.body) + _strings(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("strip", "format", "join"):
        return [re.sub(r"\{\w+\}", "…", text) for text in _strings(node.func.value)]
    return []


def _told(call: ast.Call, module: ast.Module, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What an exception that is built by `call` says: its longest argument, or the strings of what is called or named there,
    with the kind that stands behind."""
    texts = [text for argument in call.args for text in _strings(argument)]
    longest = max(texts, key=len, default="")
    if len(SUFFIX.sub("", longest)) > 15:
        return [text for text in texts if len(text) > 15] if isinstance(call.args[0], ast.IfExp) else [longest]
    suffix = found[0] if (found := SUFFIX.search(longest)) else ""
    names = [node.id for node in ast.walk(call) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)]
    for name in names:
        if name in functions:
            said = [
                text
                for node in ast.walk(functions[name])
                if isinstance(node, ast.Return | ast.Raise)
                for one in ast.walk(node)
                for text in _strings(one)
                if len(text) > 15
            ]
            if said:
                return [max(said, key=len) + suffix]
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
                if named := _strings(node.value):
                    return [text + suffix for text in named]
    return texts


def messages() -> Iterator[Message]:
    """All messages, in the order of files and lines; one that can't be read from its `raise` has an empty text."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    for path, module in modules.items():
        functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
        for other in modules.values():
            for node in other.body:
                if isinstance(node, ast.FunctionDef):
                    functions.setdefault(node.name, node)
        for node in ast.walk(module):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue  # what is raised on, or raised again, was said elsewhere
            if ast.unparse(node.exc.func) in (*NO_MESSAGES, *PHRASES):
                continue
            for text in _told(node.exc, module, functions) or [""]:
                found = SUFFIX.search(text)
                said = " ".join(SUFFIX.sub("", text).split())
                yield Message(path.relative_to(ROOT).as_posix(), node.lineno, said, found[1] if found else None)


def kinds(page: str) -> list[str]:
    """Anchor of each kind of the page, in its order."""
    return [found["anchor"] for found in HEADING.finditer(page)]
