"""What loading costs: parents are read once, straight to their dtype, and nothing is drawn at random to be overwritten."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.fresh_python import ROOT
from tests.helpers.tiny import join, save_parents


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}])
def test_loading_draws_no_random_number(tmp_path: Path, options: dict) -> None:
    """Weights that are about to be filled are never initialised; nor is the connector."""
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    before = torch.get_rng_state()
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes", **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    expected = options.get("dtype", torch.float32)
    assert {again.model.vision_tower.dtype, again.model.language_model.dtype} == {expected}
    assert {parameter.dtype for parameter in again.model.connector.parameters()} == {torch.float32}


def test_joining_switches_no_initialiser_of_torch_off(tmp_path: Path) -> None:
    """transformers' own way of it replaces the functions of `torch.nn.init`, for all threads."""
    from transformers.initialization import no_init_weights

    entered = []

    def look(frame: Any, event: str, _: Any) -> None:
        if frame.f_code is no_init_weights.__wrapped__.__code__:
            entered.append(frame.f_back)

    # Sizes that no other test has: what is probed is kept.
    save_parents(tmp_path, vision={"hidden_size": 24}, text={"hidden_size": 40})
    sys.setprofile(look)
    try:
        model, _ = join(tmp_path, connector_type="resampler", prefix_length=3, fusion="cross_attention")
        model.save_pretrained(tmp_path / "eyes")
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
        while_joining = len(entered)
        with no_init_weights():
            pass
    finally:
        sys.setprofile(None)
    assert while_joining == 0 and entered


MEASURED = """
import json, resource, sys
import torch, transformers
from modeling_frozen import FrozenPrefixForConditionalGeneration
from transformers import AutoModelForCausalLM, CLIPVisionModel
CLIPVisionModel.from_pretrained(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if sys.argv[1] == "ours":
    model = FrozenPrefixForConditionalGeneration.from_pretrained(sys.argv[4])
else:
    model = CLIPVisionModel.from_pretrained(sys.argv[2]), AutoModelForCausalLM.from_pretrained(sys.argv[3])
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory in kilobytes")
def test_loading_takes_the_memory_of_the_parents(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path, text={"vocab_size": 200_000, "hidden_size": 256, "intermediate_size": 512})
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    parents = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    taken = {}
    for what in ("ours", "both"):
        command = [sys.executable, "-c", MEASURED, what, tower, words, str(tmp_path / "eyes")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        taken[what] = json.loads(done.stdout.splitlines()[-1])
    # The file is mapped and then copied, so a parent counts twice at most, by itself as with us.
    assert taken["ours"] < taken["both"] + 0.1 * parents
