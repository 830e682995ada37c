"""docs/errors.md has an entry for every message that the package raises, and the message names it: one without fails here."""

import re
from pathlib import Path

import pytest
from error_messages import ROOT, SUFFIX, kinds, messages
from PIL import Image

from modeling_frozen import FrozenPrefixConfig, load_image_text
from modeling_frozen.processors.image_loading import load_rgb_image
from modeling_frozen.processors.media_loading import load_video


PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = kinds(PAGE)
MESSAGES = list(messages())
# Phrases that another error completes and names the kind of, and errors that go on with the whole of another one of ours.
COMPLETED = {
    "processors/image_loading.py": r"it is |its |there is no such file|expected a |it ",
    "processors/media_loading.py": r"there is no such file|expected a ",
    "modeling_frozen/data/image_index.py": "damaged",
    "modeling_frozen/data/feature_store.py": "the bytes of image|Image … of the batch: …$",
    "modeling_frozen/configuration_frozen_prefix.py": "Of the audio connector",
}


def test_every_message_names_its_kind() -> None:
    assert len(MESSAGES) > 400
    without = [
        f"{one.file}:{one.line}: {one.text}"
        for one in MESSAGES
        if one.kind not in KINDS and not re.match(COMPLETED.get(one.file, "(?!)"), one.text)
    ]
    assert not without, "end these by their kind of docs/errors.md, as ` [errors.md#range]`, or write a new kind there"


def test_a_kind_stands_at_the_end_and_once() -> None:
    for folder in ("modeling_frozen", "processors"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(rf"{SUFFIX.pattern}(?!\"|')", path.read_text(encoding="utf-8")), path


def test_what_one_error_says_of_another_names_one_kind(tmp_path: Path) -> None:
    """A row, a file that another function opens, a config in a config."""
    (tmp_path / "rows.json").write_text(
        '[{"image": "gone.png", "conversations": [{"from": "human", "value": "<image> a ?"}]}]'
    )
    stream = load_image_text(str(tmp_path / "rows.json"), streaming=True)
    audio = {"audio_connector_type": "resampler", "audio_prefix_length": 0, "audio_width": 8, "embedding_dim": 8}
    for kind, ask in {
        "row": lambda: load_image_text(tmp_path / "rows.json"),
        "source": lambda: list(stream),
        "image": lambda: load_rgb_image(Image.new("RGB", (0, 4))),
        "media": lambda: load_video(str(tmp_path / "gone.mp4"), 2, "a video"),
        "connector-fit": lambda: FrozenPrefixConfig(vision_config={"model_type": "clip_vision_model"}, **audio),
    }.items():
        with pytest.raises((ValueError, RuntimeError)) as caught:
            ask()
        assert SUFFIX.findall(str(caught.value)) == [kind] and str(caught.value).endswith(f" [errors.md#{kind}]"), caught.value


def test_every_kind_has_messages_and_says_what_to_do() -> None:
    assert sorted(KINDS) == sorted({one.kind for one in MESSAGES if one.kind})
    assert len(KINDS) == len(set(KINDS)) == len(re.findall(r"^## ", PAGE, flags=re.MULTILINE))
    for section in re.split(r"(?=^## )", PAGE, flags=re.MULTILINE)[1:]:
        assert len(section.split()) >= 15, section[:60]


def test_messages_are_read_as_they_are_said() -> None:
    texts = {one.text: one.kind for one in MESSAGES}
    assert texts["`image_token_id=…` is negative; token ids start at 0."] == "range"
    start = "The … at `…` has fingerprint …, but the connector was trained with …"
    assert {kind for text, kind in texts.items() if text.startswith(start)} == {"another-parent"}


@pytest.mark.parametrize("raised", ["raise ValueError(f'A new {rule} that nobody described.')", "raise TypeError('Neither.')"])
def test_a_message_without_a_kind_is_found(raised: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    folder = tmp_path / "modeling_frozen"
    folder.mkdir()
    (folder / "new.py").write_text(f"def check(rule):\n    {raised}\n")
    monkeypatch.setattr("error_messages.ROOT", tmp_path)
    (message,) = messages()
    assert message.line == 2 and message.kind is None
