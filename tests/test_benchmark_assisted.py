"""benchmarks/assisted.py in small: candidates change no word, and what is accepted is counted."""

import json
from pathlib import Path

from PIL import Image

from benchmarks import assisted, parents
from modeling_frozen import FrozenPrefixProcessor


SIZES = parents.Sizes(
    vision_width=32, vision_layers=1, image_size=16, patch_size=8, text_width=32, text_layers=1, vocab_size=64, prefix_length=4
)


def test_candidates_change_no_word_and_are_counted(tmp_path: Path) -> None:
    model = parents.join(str(tmp_path / "parents"), SIZES)
    # A language model that writes the same whatever it reads: what an assistant foretells of it without the image is right.
    model.model.language_model.lm_head.weight.data.zero_()
    model.model.language_model.save_pretrained(model.config.text_base_model["name_or_path"])
    model = parents.join(str(tmp_path / "parents"), SIZES)
    model.save_pretrained(tmp_path / "model")
    FrozenPrefixProcessor.from_model(model).save_pretrained(tmp_path / "model")
    for index in range(2):
        Image.new("RGB", (20, 16), (90 * index, 9, 9)).save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "text": "w1"} for index in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), "--prompt", "w3"]
    arguments += ["--assistant", model.config.text_base_model["name_or_path"], "--candidates", "3"]
    found = assisted.main([*arguments, "--new-tokens", "9", "--rounds", "1"])["rows"]
    by_name = {row["name"]: row for row in found}
    assert by_name["alone: tokens a call"]["ours"] == 1
    assert by_name["assistant, 3 at a time: tokens a call"]["ours"] > 2
    assert all(row["ours"] == 2 for name, row in by_name.items() if name.endswith("captions that are the same"))
    assert by_name["assistant, 3 at a time, to writing alone"]["ratio"] > 0
