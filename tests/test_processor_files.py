"""A backbone's tokenizer and image processor belong to its record: one that changed is noticed."""

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoTokenizer

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.backbones import load_base_model
from tests.helpers.tiny import join, save_parents


load = FrozenPrefixForConditionalGeneration.from_pretrained


def edit(file: Path, old: str, new: str) -> str:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return text


CHANGES = {
    "a word": ("text", "words/tokenizer.json", '"colour"', '"color"'),
    "what its tokenizer adds": ("text", "words/tokenizer_config.json", '"</s>"', '"<s>"'),
    "image values": ("vision", "tower/preprocessor_config.json", '"do_normalize": true', '"do_normalize": false'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_by_the_processor_and_said_by_the_model(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part, name, old, new = CHANGES[change]
    model, processor = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    whole = tmp_path / "with its processor"
    model.save_pretrained(whole)
    processor.save_pretrained(whole)
    folder, file = (tmp_path / name).parent, (tmp_path / name).name
    before = edit(tmp_path / name, old, new)
    with pytest.raises(ValueError, match=rf"{folder}.*\['{file}'\] changed.*from_model\(model.*{part}_base_model="):
        FrozenPrefixProcessor.from_model(model)
    with pytest.raises(ValueError, match=rf"\['{file}'\] changed"):
        AutoProcessor.from_pretrained(tmp_path / "eyes")
    with caplog.at_level("WARNING"):
        again = load(tmp_path / "eyes")
    assert f"['{file}'] changed" in caplog.text and f"{part}_base_model=" in caplog.text
    assert again.config.to_dict()[f"{part}_base_model"] == model.config.to_dict()[f"{part}_base_model"]
    assert AutoProcessor.from_pretrained(whole).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    caplog.clear()
    knowingly = load(tmp_path / "eyes", **{f"{part}_base_model": str(folder)})
    FrozenPrefixProcessor.from_model(knowingly)
    assert "changed" not in caplog.text
    (tmp_path / name).write_text(before)
    FrozenPrefixProcessor.from_model(model)


def test_a_file_more_or_less_is_a_change(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    template = tmp_path / "words" / "chat_template.jinja"
    template.write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"\['chat_template.jinja'\] changed"):
        FrozenPrefixProcessor.from_model(model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words", padding_side="left")
    FrozenPrefixProcessor.from_model(model, tokenizer=tokenizer)
    template.unlink()
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"\['preprocessor_config.json'\] changed"):
        FrozenPrefixProcessor.from_model(model)


def test_records_of_earlier_versions_load_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    join(tmp_path)[0].save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "config.json"
    config = json.loads(file.read_text())
    for part in ("vision", "text"):
        del config[f"{part}_base_model"]["processor_files"]
    file.write_text(json.dumps(config))
    edit(tmp_path / "words" / "tokenizer_config.json", '"</s>"', '"<s>"')
    with caplog.at_level("WARNING"):
        model = load(tmp_path / "eyes")
    assert "changed" not in caplog.text
    assert set(model.config.text_base_model["processor_files"]) == {"tokenizer.json", "tokenizer_config.json"}


def test_only_what_the_processor_is_made_of_is_recorded(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    (tmp_path / "words" / "README.md").write_text("words")
    assert set(load_base_model("text", words)[1]["processor_files"]) == {"tokenizer.json", "tokenizer_config.json"}
    assert set(load_base_model("vision", tower)[1]["processor_files"]) == {"preprocessor_config.json"}
