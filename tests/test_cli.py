"""`frozen-prefix`: its commands, exit codes, and what it says of a user's mistakes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modeling_frozen import cli
from modeling_frozen.cli import COMMANDS, main


def test_a_mistake_is_a_sentence_and_a_code(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.json")
    assert main(["check", gone]) == 1
    said = capsys.readouterr()
    assert said.err == f"frozen-prefix check: {gone} is not there. A Hub id is owner/name.\n" and not said.out
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
