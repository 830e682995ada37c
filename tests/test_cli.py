"""`frozen-prefix`: its commands, exit codes, and what it says of a user's mistakes."""

import argparse
import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from modeling_frozen import cli
from modeling_frozen.cli import COMMANDS, main


def test_a_mistake_is_a_sentence_and_a_code(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.json")
    assert main(["check", gone]) == 1
    said = capsys.readouterr()
    assert (
        said.err == f"frozen-prefix check: {gone} is not there. A Hub id is owner/name. [errors.md#source]\n" and not said.out
    )
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "check", gone])
    with pytest.raises(SystemExit) as ended:
        main(["chekc"])
    assert ended.value.code == 2 and "invalid choice: 'chekc'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "frozen-prefix check: stopped.\n"),
        (ImportError(), 1, "frozen-prefix check: ImportError\n"),
        (None, 0, ""),
    ],
)
def test_what_a_command_ends_with(
    raised: BaseException | None, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(args: object) -> None:
        if raised is not None:
            raise raised

    command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda *name: command)
    assert main(["check"]) == code and capsys.readouterr().err == said


def test_a_torchvision_for_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(args: object) -> None:
        exec(compile("raise RuntimeError('no operator')", "ops.py", "exec"), {"__name__": "torchvision.ops"})

    command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(cli.importlib, "import_module", lambda *name: command)
    assert main(["check"]) == 1
    assert "torchvision 0.1 can't be imported beside torch" in capsys.readouterr().err


def test_a_fault_of_ours_is_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    command = SimpleNamespace(add_arguments=lambda parser: None, run=lambda args: {}["key"])
    monkeypatch.setattr(cli.importlib, "import_module", lambda *name: command)
    with pytest.raises(KeyError):
        main(["check"])


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "modeling_frozen.cli"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: frozen-prefix [-h]")
    done = subprocess.run([sys.executable, "-m", "modeling_frozen.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(f"  {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_stands_in_the_docs(name: str) -> None:
    """In the part of its own command."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "command.md").read_text(encoding="utf-8")
    assert f"| `{name}` | " in page
    part = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"modeling_frozen.{COMMANDS[name][0]}").add_arguments(parser)
    flags = [option for action in parser._actions for option in action.option_strings]
    assert not [flag for flag in flags if flag not in part]


def test_the_docs_name_no_flag_that_is_not_there() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "command.md").read_text(encoding="utf-8")
    known = {"--help", "--traceback", "--port", "--allow-local-media", "--allow-private-addresses"}
    known |= {"--media-timeout", "--max-media-bytes", *(f"--{field.name}" for field in dataclasses.fields(TrainingArguments))}
    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"modeling_frozen.{module}").add_arguments(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) - known
