"""Trainer's checkpoints: which one was written to its end, and that a strict load takes what a checkpoint holds."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_frozen.training.checkpoints import last_whole_checkpoint
from tests.helpers.tiny import join


def write(folder: Path, step: int, processes: int = 2) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in names:
        torch.save({"cpu": torch.get_rng_state()}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def test_the_newest_is_taken_whatever_the_number_of_digits(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "none") is None
    for step in (900, 1000):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path, processes=2) == str(tmp_path / "checkpoint-1000")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda path: (path / "trainer_state.json").unlink(), "no trainer_state.json"),
        (lambda path: cut(path / "trainer_state.json"), "half of trainer_state.json"),
        (lambda path: (path / "rng_state_1.pth").unlink(), "rng_state of 1 processes, not 2"),
        (lambda path: cut(path / "rng_state_0.pth"), "rng_state of 1 processes, not 2"),
    ],
)
def test_what_a_killed_run_left_is_passed_over(
    harm: object, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("modeling_frozen"), "propagate", True)
    write(tmp_path, 10)
    harm(write(tmp_path, 20))  # type: ignore[operator]
    assert last_whole_checkpoint(tmp_path, processes=2) == str(tmp_path / "checkpoint-10")
    assert f"checkpoint-20` was not written to its end ({why})" in caplog.text


def test_a_strict_load_takes_what_a_checkpoint_holds(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "small")
    held = {name: tensor + 1 for name, tensor in load_file(tmp_path / "small" / "model.safetensors").items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not model.load_state_dict(held, strict=True).missing_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[name] if name in held else before[name])
    with pytest.raises(RuntimeError, match=r"missing keys \['model.connector"):
        model.load_state_dict(dict(list(held.items())[1:]), strict=True)
    with pytest.raises(RuntimeError, match=r"unexpected keys \['other'\]"):
        model.load_state_dict({**held, "other": torch.zeros(1)}, strict=True)
