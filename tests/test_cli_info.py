"""`frozen-prefix info`: what a checkpoint is made of, as it is made."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from transformers import CLIPVisionModel

import modeling_frozen
from modeling_frozen import FrozenPrefixForImageTextRetrieval
from modeling_frozen.cli import main
from tests.helpers import fresh_python
from tests.helpers.tiny import join, save_parents, vision_config


def numbers(parameters: object) -> int:
    return sum(one.numel() for one in parameters)  # type: ignore[attr-defined]


def test_what_a_checkpoint_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = join(tmp_path, connector_type="resampler", prefix_length=3, connector_config={"num_layers": 1})
    model.save_pretrained(tmp_path / "eyes")
    assert main(["info", str(tmp_path / "eyes"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parents, connector = facts["parents"], facts["connector"]
    assert parents["vision"]["parameters"] == numbers(model.model.vision_tower.parameters())
    assert parents["text"]["parameters"] == numbers(model.model.language_model.parameters())
    assert parents["text"]["name_or_path"] == str(tmp_path / "words") and parents["vision"]["type"] == "clip_vision_model"
    assert connector["parameters"] == numbers(model.model.connector.parameters())
    assert facts["bytes of weights"] == 4 * connector["parameters"]
    assert (connector["type"], connector["vectors"], facts["trained"], facts["parts in it"]) == (
        "resampler",
        3,
        ["connector"],
        [],
    )
    assert main(["info", str(tmp_path / "eyes")]) == 0
    said = capsys.readouterr().out
    assert f"vision tower    {tmp_path / 'tower'} (clip_vision_model, {parents['vision']['parameters']:,} parameters" in said
    assert f"connector       resampler (num_layers=1), {connector['parameters']:,} parameters" in said
    assert "the connector's alone" in said and "3 vectors an image, 32 wide" in said
    versions = f"frozen-prefix {modeling_frozen.__version__}, transformers {transformers.__version__}"
    assert f"saved with      {versions}\n" in said and f"here            {versions}, torch {metadata.version('torch')}" in said


def test_a_whole_one_and_one_that_finds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "copy", include_base_models=True)
    assert main(["info", str(tmp_path / "copy"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["parts in it"]) == {"vision", "text"}
    assert facts["bytes of weights"] == 4 * numbers(model.parameters())
    tower, words = save_parents(tmp_path)
    finder = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        CLIPVisionModel(vision_config()), words, trainable=("connector", "text")
    )
    finder.save_pretrained(tmp_path / "finder")
    assert main(["info", str(tmp_path / "finder")]) == 0
    said = capsys.readouterr().out
    assert "in the checkpoint itself" in said and "trained         connector, text" in said and "ForImageTextRetrieval" in said


def test_what_is_no_checkpoint_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, words = save_parents(tmp_path)
    assert main(["info", words]) == 1
    assert f"{words} is a checkpoint of 'llama', not of frozen-prefix." in capsys.readouterr().err
    done = fresh_python.run("-m", "modeling_frozen.cli", "info", str(tmp_path / "gone"), env=fresh_python.environment())
    assert done.returncode == 1 and done.stderr.startswith("frozen-prefix info: ") and "Traceback" not in done.stderr
