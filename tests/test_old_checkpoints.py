"""Checkpoints written by earlier versions, under several releases of transformers: they load, and say what they said when
they were written; by this package, and, where their code lies with them, by that code where the package is not installed.

`python -m tests.test_old_checkpoints` adds one for the versions at hand; do so once, at a release.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.configuration_frozen_prefix import VERSION
from modeling_frozen.hub import write_code
from tests.helpers.hub_fixtures import HIDE_PACKAGE
from tests.helpers.tiny import rows, text_config, tokenizer, vision_config


FOLDER = Path(__file__).parent / "checkpoints"
CHECKPOINTS = sorted(path.name for path in FOLDER.iterdir())
WITH_CODE = [name for name in CHECKPOINTS if (FOLDER / name / "code.zip").is_file()]
# By the checkpoint's own code, as someone who never installed the package loads it.
BY_ITS_OWN_CODE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(picture), text="<image> what colour ?", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1].tolist()
print(json.dumps({"logits": logits, "ids": model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()}))
"""


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
    with zipfile.ZipFile(folder / "code.zip", "w", zipfile.ZIP_DEFLATED) as code:
        for file in write_code(folder):
            code.write(file, file.name)
    for file in folder.glob("*.py"):
        file.unlink()  # there the package is to load it
    (folder / "expected.json").write_text(json.dumps(say(folder)) + "\n")


def check(name: str, now: dict) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_text())
    torch.testing.assert_close(torch.tensor(now["logits"]), torch.tensor(expected["logits"]), atol=1e-4, rtol=1e-4)
    assert now["ids"] == expected["ids"]


def test_there_is_one_of_this_version() -> None:
    assert any(name.split("+")[0] == VERSION for name in CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_says_what_it_said(name: str) -> None:
    check(name, say(FOLDER / name))


@pytest.mark.parametrize("name", WITH_CODE)
def test_an_old_checkpoint_says_by_its_own_code_what_it_said(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / name, tmp_path / "checkpoint")
    with zipfile.ZipFile(folder / "code.zip") as code:
        code.extractall(folder)
    rows(1)[0]["image"].save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGE + BY_ITS_OWN_CODE, str(folder), str(tmp_path / "picture.png")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(name, json.loads(done.stdout.splitlines()[-1]))


def test_a_newer_checkpoint_says_which_version_wrote_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((FOLDER / "0.1.0" / "config.json").read_text())
    assert config["frozen_prefix_version"] == "0.1.0"
    (tmp_path / "config.json").write_text(json.dumps({**config, "frozen_prefix_version": "99.0", "third_eye": 1}))
    FrozenPrefixConfig.from_pretrained(tmp_path)
    assert "`third_eye`" in caplog.text and "written by 99.0: upgrade" in caplog.text


if __name__ == "__main__":
    made = FOLDER / f"{VERSION}+transformers{transformers.__version__}"
    write(made)
    print(f"wrote {made}")
