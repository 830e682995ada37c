"""`frozen-prefix export`: one command for every runtime; mistakes are said in a sentence."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_frozen.cli import main
from modeling_frozen.export import command
from tests.helpers.talking import talking
from tests.helpers.tiny import skip_before


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(arguments)))


def test_its_help_waits_for_nothing() -> None:
    code = """
import argparse, sys
from modeling_frozen.export.command import add_arguments
parser = argparse.ArgumentParser()
add_arguments(parser)
parser.format_help()
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mistakes_are_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--dtype q8: --to onnx takes none"):
        run(str(tmp_path), "--to", "onnx", "--dtype", "q8", str(tmp_path / "out"))
    saved = talking(tmp_path)
    arguments = ["export", saved.path, "--to", "transformers.js", "--dtype", "q8,q3", str(tmp_path / "js")]
    assert main(arguments) == 1
    assert "\nfrozen-prefix export: dtypes=['q8', 'q3']: choose some of" in f"\n{capsys.readouterr().err}"
    assert not (tmp_path / "js").exists()


@pytest.mark.slow
def test_each_runtime_gets_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_before("5.23.0", "exports no graph that can be saved and read back")
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'frozen-prefix[export]'")
    saved = talking(tmp_path)
    assert run(saved.path, "--to", "transformers.js", str(tmp_path / "js"), "--dtype", "q8,fp32") == 0
    config = json.loads((tmp_path / "js" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llava" and config["transformers.js_config"]["dtype"] == "q8"
    graphs = {file.name for file in (tmp_path / "js" / "onnx").iterdir()}
    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    assert graphs == {f"{name}{end}.onnx" for name in names for end in ("", "_quantized")}
    assert run(saved.path, "--to", "onnx", str(tmp_path / "onnx")) == 0
    parts = ("image_encoder", "prefill", "decode")
    assert all((tmp_path / "onnx" / part / "model.onnx").is_file() for part in parts)
    assert str(tmp_path / "onnx" / "decode" / "model.onnx") in capsys.readouterr().out
