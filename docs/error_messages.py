"""Every message that the package raises, read from its source, and which kind of error of docs/errors.md it is.

The page says what a kind means and what to do, with an expression that finds its messages; `docs/build_site.py` writes the
messages below it, and a test fails for a message of no kind (`tests/test_docs_errors.py`). Standard library only.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_frozen", "processors")
KIND = re.compile(
    r"^## (?P<title>.+?) \{#(?P<anchor>[\w-]+)\}\n+<!-- messages:\s+(?P<pattern>.+?)\s+-->$", re.MULTILINE | re.DOTALL
)
# Named by what they are, not by what they say.
NO_MESSAGES = ("NotImplementedError", "SystemExit")


@dataclass(frozen=True)
class Message:
    """A `raise`: where it is, and what it says, with `…` for what is filled in."""

    file: str
    line: int
    text: str


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
    """What an exception that is built by `call` says: its longest argument, or the strings of the function that writes it."""
    texts = [text for argument in call.args for text in _strings(argument)]
    if texts and max(map(len, texts)) > 15:
        longest = max(texts, key=len)
        return [text for text in texts if len(text) > 15] if isinstance(call.args[0], ast.IfExp) else [longest]
    names = [node.id for node in ast.walk(call) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)]
    for name in names:
        if name in functions:
            found = [
                text
                for node in ast.walk(functions[name])
                if isinstance(node, ast.Return | ast.Raise)
                for one in ast.walk(node)
                for text in _strings(one)
                if len(text) > 15
            ]
            if found:
                return [max(found, key=len)]
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
                if found := _strings(node.value):
                    return found
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
            raised = ast.unparse(node.exc.func)
            if raised in NO_MESSAGES:
                continue
            for text in _told(node.exc, module, functions) or [""]:
                yield Message(path.relative_to(ROOT).as_posix(), node.lineno, " ".join(text.split()))


def kinds(page: str) -> dict[str, re.Pattern[str]]:
    """Anchor of each kind of the page, in its order, with the expression for its messages (or for `file: message`)."""
    return {
        found["anchor"]: re.compile("|".join(line.strip() for line in found["pattern"].split("\n") if line.strip()))
        for found in KIND.finditer(page)
    }


def kind_of(message: Message, of: dict[str, re.Pattern[str]]) -> str | None:
    """The first kind whose expression is found in the message."""
    return next((anchor for anchor, pattern in of.items() if pattern.search(f"{message.file}: {message.text}")), None)
