# ruff: noqa: F811 (fixtures are imported by name)
"""`frozen-prefix info`: what a checkpoint is made of, as it is made."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from transformers import CLIPVisionModel

import modeling_frozen
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixForImageTextRetrieval
from modeling_frozen.cli import main
from tests.helpers import fresh_python
from tests.helpers.hub_fixtures import Hub, hub  # noqa: F401
from tests.helpers.tiny import join, save_parents, skip_where_peft_is_too_old, vision_config


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


def test_one_in_shards_beside_files_that_are_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "copy", include_base_models=True, max_shard_size="20KB")
    assert len(list((tmp_path / "copy").glob("model-*-of-*.safetensors"))) > 2
    shutil.copy(tmp_path / "tower" / "model.safetensors", tmp_path / "copy" / "optimizer.safetensors")
    assert main(["info", str(tmp_path / "copy"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes of weights"] == 4 * numbers(model.parameters())
    assert facts["connector"]["parameters"] == numbers(model.model.connector.parameters())


def tuned(folder: Path) -> tuple[object, int]:
    """An adapter of LoRA and connector beside "eyes", and its parameters."""
    peft = pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config

    join(folder)[0].save_pretrained(folder / "eyes")
    model = FrozenPrefixForConditionalGeneration.from_pretrained(folder / "eyes")
    model = peft.get_peft_model(model, lora_config(model, r=2))
    model.save_pretrained(folder / "tuned")
    return model, numbers(one for one in model.parameters() if one.requires_grad)


def test_an_adapter_and_the_checkpoint_that_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, count = tuned(tmp_path)
    assert main(["info", str(tmp_path / "tuned"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    adapter = facts["adapter"]
    assert (adapter["type"], adapter["rank"], adapter["of"]) == ("LORA", 2, str(tmp_path / "eyes"))
    assert adapter["parameters"] == count and adapter["bytes"] == 4 * count and adapter["with"] == ["connector"]
    assert facts["parents"]["text"]["name_or_path"] == str(tmp_path / "words")
    assert facts["bytes of weights"] == 4 * facts["connector"]["parameters"] > 0
    assert main(["info", str(tmp_path / "tuned")]) == 0
    said = capsys.readouterr().out
    assert f"adapter         LORA of rank 2, with connector, {count:,} parameters, {4 * count:,} bytes" in said
    assert f"on              {tmp_path / 'eyes'}\n" in said and "language model" in said
    # One that says of no checkpoint what it belongs to is told of alone.
    path = tmp_path / "tuned" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    assert main(["info", str(tmp_path / "tuned")]) == 0
    said = capsys.readouterr().out
    assert "LORA of rank 2" in said and "on              a checkpoint that it does not name" in said and "tower" not in said


def test_an_adapter_that_transformers_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("peft")
    skip_where_peft_is_too_old()
    from modeling_frozen.training.lora import lora_config

    join(tmp_path)[0].save_pretrained(tmp_path / "eyes")
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    model.add_adapter(lora_config(model, r=2))
    model.save_pretrained(tmp_path / "adapter")
    assert main(["info", str(tmp_path / "adapter"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    count = numbers(one for one in model.parameters() if one.requires_grad)
    assert facts["adapter"]["parameters"] == count and facts["adapter"]["of"] == str(tmp_path / "eyes")
    assert facts["bytes of weights"] == 4 * facts["connector"]["parameters"] > 0


def test_two_towers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tower, words = save_parents(tmp_path)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained([tower, tower], words)
    model.save_pretrained(tmp_path / "eyes")
    assert main(["info", str(tmp_path / "eyes")]) == 0
    said = capsys.readouterr().out
    assert f"vision tower    {tower} (" in said and f"second vision tower  {tower} (" in said


@pytest.mark.hub
def test_one_on_the_hub_is_told_of_without_fetching_its_weights(hub: Hub) -> None:
    home = hub.new_home()
    facts = hub.run_json(
        """
import json, pathlib
from huggingface_hub import HfApi, constants
from modeling_frozen import FrozenPrefixForConditionalGeneration as Model
from modeling_frozen.cli.info import describe
from tests.helpers import tiny

model, _ = tiny.join(pathlib.Path("."))
folders = {"small": {}, "whole": {"include_base_models": True}}
folders["shards"] = {**folders["whole"], "max_shard_size": "20KB"}
for name, options in folders.items():
    model.save_pretrained(name, **options)
    HfApi().create_repo(f"me/{name}")
    HfApi().upload_folder(repo_id=f"me/{name}", folder_path=name)
facts = {name: {"hub": describe(f"me/{name}"), "folder": describe(name)} for name in folders}
fetched = [path.name for path in pathlib.Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]
Model.from_pretrained("me/shards")
print(json.dumps({"facts": facts, "fetched": fetched}))
""",
        home,
    )
    assert facts["fetched"] == []
    for name, both in facts["facts"].items():
        assert both["hub"] == {**both["folder"], "model": f"me/{name}"}
    assert facts["facts"]["shards"]["hub"]["bytes of weights"] > facts["facts"]["small"]["hub"]["bytes of weights"] > 0
    later = """
import json
from modeling_frozen.cli.info import describe
print(json.dumps(describe("me/shards")))
"""
    assert hub.run_json(later, home, offline=True) == facts["facts"]["shards"]["hub"]


def test_what_is_no_checkpoint_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, words = save_parents(tmp_path)
    assert main(["info", words]) == 1
    assert f"{words} is a checkpoint of 'llama', not of frozen-prefix." in capsys.readouterr().err
    done = fresh_python.run("-m", "modeling_frozen.cli", "info", str(tmp_path / "gone"), env=fresh_python.environment())
    assert done.returncode == 1 and done.stderr.startswith("frozen-prefix info: ") and "Traceback" not in done.stderr
