"""Checkpoints of every released config version: they load, and say what they said when they were written.

`python -m tests.test_old_checkpoints` adds one for the version at hand; do so once, at its release.
"""

import json
from pathlib import Path

import pytest
import torch

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.configuration_frozen_prefix import VERSION
from tests.tiny import rows, text_config, tokenizer, vision_config


FOLDER = Path(__file__).parent / "checkpoints"
VERSIONS = sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


def say(folder: Path) -> dict:
    """Logits at the end of a prompt about a picture, and what is generated."""
    model = FrozenPrefixForConditionalGeneration.from_pretrained(folder)
    processor = FrozenPrefixProcessor.from_pretrained(folder)
    inputs = processor(images=rows(1)[0]["image"], text="<image> what colour ?", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
    return {"logits": logits, "ids": model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()}


def write(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = FrozenPrefixConfig.from_vision_text_configs(
        vision_config(**sizes),
        text_config(**sizes, num_key_value_heads=2),
        connector_type="resampler",
        prefix_length=3,
        connector_config={"hidden_size": 8, "num_heads": 2, "num_layers": 1},
        image_token_id=len(tokenizer()),
    )
    FrozenPrefixForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    FrozenPrefixProcessor(image_processor, tokenizer(), 3).save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # today's package is to load it
    (folder / "expected.json").write_text(json.dumps(say(folder)) + "\n")


def test_there_is_one_of_this_version() -> None:
    assert VERSION in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_checkpoint_says_what_it_said(version: str) -> None:
    expected, now = json.loads((FOLDER / version / "expected.json").read_text()), say(FOLDER / version)
    torch.testing.assert_close(torch.tensor(now["logits"]), torch.tensor(expected["logits"]), atol=1e-4, rtol=1e-4)
    assert now["ids"] == expected["ids"]


def test_a_newer_checkpoint_says_which_version_wrote_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((FOLDER / VERSION / "config.json").read_text())
    assert config["frozen_prefix_version"] == VERSION
    (tmp_path / "config.json").write_text(json.dumps({**config, "frozen_prefix_version": "99.0", "third_eye": 1}))
    FrozenPrefixConfig.from_pretrained(tmp_path)
    assert "`third_eye`" in caplog.text and "written by 99.0: upgrade" in caplog.text


if __name__ == "__main__":
    write(FOLDER / VERSION)
    print(f"wrote {FOLDER / VERSION}")
