"""The reference leaves nothing out: every public name, every field of the config. Of commands and
their options `test_cli.py` asks it."""

import ast
import importlib
import inspect
import re
from typing import Any

import draw
import pytest

import modeling_frozen
from modeling_frozen import FrozenPrefixConfig, FrozenPrefixProcessor
from tests.helpers.docs_world import ROOT
from tests.helpers.packaging import extras


PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
SHOWN = re.findall(r"^::: (\S+)", "\n".join(PAGES.values()), flags=re.MULTILINE)
PACKAGES = ("evaluation", "export", "interpretation", "metrics", "model_card")


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    # `processors` is read by its path in the checkout, and imported as a part of the package.
    return getattr(importlib.import_module(re.sub(r"^processors\b", "modeling_frozen.processors", module)), name)


def test_what_it_shows_is_there_once() -> None:
    assert len(SHOWN) == len(set(SHOWN)) > 60
    for path in SHOWN:
        assert named(path) is not None


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_public_name_is_shown(package: str) -> None:
    module = importlib.import_module(f"modeling_frozen.{package}" if package else "modeling_frozen")
    shown = {path.rpartition(".")[2] for path in SHOWN}
    public = set(module.__all__) - {"__version__"}
    assert public and not public - shown


def test_every_callback_of_training_is_shown() -> None:
    shown = {path.rpartition(".")[2] for path in SHOWN}
    for path in (ROOT / "modeling_frozen" / "training").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert node.name in shown, f"{path.name}: {node.name}"


def test_every_field_of_the_config_is_described() -> None:
    described = set()
    for names in re.findall(r"^        ((?:\w+, )*\w+)(?: \(.*\))?:", FrozenPrefixConfig.__doc__ or "", re.MULTILINE):
        described |= set(names.split(", "))
    own = {name for name in FrozenPrefixConfig.__annotations__ if not name.startswith("_")} - {"tie_word_embeddings"}
    assert len(own) > 40 and not own - described


def test_every_option_of_the_processor_is_described() -> None:
    text = inspect.getdoc(FrozenPrefixProcessor) or ""
    options = set(inspect.signature(FrozenPrefixProcessor.__init__).parameters) - {"self", "args", "kwargs"}
    assert options and not {name for name in options if not re.search(rf"\b{name}\b", text)}


def test_every_option_that_we_add_to_the_server_is_described() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("transformers.cli.serve")
    from transformers.cli.serve import Serve

    from modeling_frozen.serving.server import build_app

    (serve,) = [one.callback for one in build_app().registered_commands if one.name == "serve"]
    added = set(inspect.signature(serve).parameters) - set(inspect.signature(Serve).parameters)
    assert added and not {name for name in added if f"`--{name.replace('_', '-')}" not in PAGES["command.md"]}


def test_every_extra_is_described() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert len(extras()) > 10 and not {name for name in extras() if f"`{name}`" not in page}


def test_the_version_shown_is_this_one() -> None:
    assert f"# {modeling_frozen.__version__}\n" in (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_are_as_they_are_drawn(name: str) -> None:
    assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == draw.PICTURES[name]()
