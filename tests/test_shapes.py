"""modeling_frozen.shapes: what is held out, and the folders of parents and data that scripts train on."""

from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_frozen import load_image_text
from modeling_frozen.processors import load_rgb_image
from modeling_frozen.shapes.__main__ import main
from modeling_frozen.shapes.scenes import QUESTIONS, split_scenes


def test_held_out_scenes_are_new_and_their_pairs_are_not() -> None:
    known, held_out = split_scenes()
    assert len(held_out) >= 90 and not set(known) & set(held_out)
    properties = ("size", "colour", "shape", "place")
    for first in properties:
        for second in properties:
            pairs = {(getattr(scene, first), getattr(scene, second)) for scene in known}
            assert {(getattr(scene, first), getattr(scene, second)) for scene in held_out} <= pairs


def test_the_command_writes_parents_and_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--tower_steps", "1", "--language_model_steps", "1", "--pictures", "500", "--test_pictures", "96"]
    main(["--output_dir", str(tmp_path), *few])
    assert f"--vision {tmp_path / 'tower'} --text {tmp_path / 'language_model'}" in capsys.readouterr().out
    AutoModel.from_pretrained(tmp_path / "tower")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "language_model")) == model.config.vocab_size
    known, held_out = split_scenes()
    sentences = {split: load_image_text(str(tmp_path / "captions"), split=split) for split in ("train", "test")}
    assert set(sentences["train"]["text"]) == {scene.sentence for scene in known} and len(sentences["train"]) == 500
    assert sorted(sentences["test"]["text"]) == sorted(scene.sentence for scene in held_out)
    asked = load_image_text(str(tmp_path / "questions"), split="test")
    assert len(asked) == 4 * 96 and set(asked["prompt"]) == set(QUESTIONS)
    assert load_rgb_image(asked[0]["image"], "image").size == (64, 64)
    before = (tmp_path / "tower" / "model.safetensors").stat().st_mtime_ns
    main(["--output_dir", str(tmp_path), *few])  # parents that are there are kept
    assert (tmp_path / "tower" / "model.safetensors").stat().st_mtime_ns == before
