"""docs/errors.md has an entry for every message that the package raises: a new one that is of no known kind fails here."""

import re
from collections import Counter

import pytest
from error_messages import KIND, ROOT, kind_of, kinds, messages


PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = kinds(PAGE)
MESSAGES = list(messages())


def test_every_message_is_of_a_kind() -> None:
    assert len(MESSAGES) > 400
    without = [f"{one.file}:{one.line}: {one.text}" for one in MESSAGES if kind_of(one, KINDS) is None]
    assert not without, "docs/errors.md finds none of its kinds in these: widen an expression there, or write a new kind"


def test_every_kind_has_messages_and_says_what_to_do() -> None:
    found = Counter(kind_of(one, KINDS) for one in MESSAGES)
    assert sorted(KINDS) == sorted(anchor for anchor in found if anchor)
    assert len(KINDS) == len(re.findall(r"^## ", PAGE, flags=re.MULTILINE)), "two kinds share an anchor, or one has none"
    for section in re.split(r"(?=^## )", PAGE, flags=re.MULTILINE)[1:]:
        assert len(KIND.sub("", section).split()) >= 10, section[:60]


def test_messages_are_read_as_they_are_said() -> None:
    texts = {one.text for one in MESSAGES}
    assert "`image_token_id=…` is negative; token ids start at 0." in texts
    assert any(text.startswith("The … at `…` has fingerprint …, but the connector was trained with …") for text in texts)
    unread = [f"{one.file}:{one.line}" for one in MESSAGES if not re.search(r"\w", one.text)]
    assert len(unread) <= 7, unread  # those that carry on what another error said


@pytest.mark.parametrize("raised", ["raise ValueError(f'A new {rule} that nobody described.')", "raise TypeError('Neither.')"])
def test_a_message_that_nobody_described_is_found(raised: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    folder = tmp_path / "modeling_frozen"
    folder.mkdir()
    (folder / "new.py").write_text(f"def check(rule):\n    {raised}\n")
    monkeypatch.setattr("error_messages.ROOT", tmp_path)
    (message,) = messages()
    assert message.line == 2 and kind_of(message, KINDS) is None
