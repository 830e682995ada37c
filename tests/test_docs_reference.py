"""The reference leaves nothing out: every public name, every field of the config, every command and its options."""

import ast
import dataclasses
import importlib
import inspect
import re
from typing import Any

import draw
import pytest
from transformers import TrainingArguments

import modeling_frozen
from modeling_frozen import FrozenPrefixConfig, FrozenPrefixProcessor
from tests.helpers import fresh_python
from tests.helpers.docs_world import ROOT
from tests.helpers.packaging import command_module, extras


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


def help_of(*command: str) -> str:
    done = fresh_python.run(
        "-m", command_module(), *command, "--help", env=fresh_python.environment(COLUMNS="300"), cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> list[str]:
    said = help_of()
    chosen = re.search(r"\{([\w,-]+)\}", said)
    return chosen[1].split(",") if chosen else re.findall(r"^  (\w+)  +\S", said.partition("commands:")[2], re.MULTILINE)


def test_every_command_and_option_is_described() -> None:
    """But for the options of Trainer, and of transformers' own commands."""
    page, known = PAGES["command.md"], {"--help", *(f"--{one.name}" for one in dataclasses.fields(TrainingArguments))}
    found = commands()
    assert "check" in found and not [name for name in found if f"## frozen-prefix {name}\n" not in page]
    for name in set(found) - {"serve", "chat"}:
        section = page.partition(f"## frozen-prefix {name}\n")[2].partition("\n## ")[0]
        options = set(re.findall(r"(?<!\S)--[a-z][\w-]+", help_of(name))) - known
        assert not {option for option in options if f"`{option}" not in section}, name


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
