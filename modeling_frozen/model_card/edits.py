"""When an older model card gives way to a new one, and what of it stays.

A generated card ends in a hidden marker with digests of its text and of each metadata key. Where they still fit, no
one has touched it; where the text's does not, a person wrote it, and only missing keys are added. The cards that
transformers and PEFT write by themselves are nobody's words.
"""

import hashlib
import json
import re
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


# All that is ever added to a card that a person wrote; without them the Hub can't file the repository.
ESSENTIAL = ("base_model", "base_model_relation", "pipeline_tag", "library_name")

_MARKER = re.compile(r"\n*<!-- frozen-prefix-card (\{.*?\})\n[^>]*-->[ \t]*\n?", re.DOTALL)
_HINT = "This card was generated. Edit it as you like: then it is never written over."


def split_card(content: str) -> tuple[dict[str, Any] | None, str]:
    """Metadata (None where there is no block) and text, with plain line ends.

    Raises:
        ValueError: if the metadata can't be read.
    """
    content = content.replace("\r\n", "\n")
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return None, content
    try:
        metadata = yaml.safe_load(block.group(2)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the card's metadata is no YAML: {error} [errors.md#cards]") from error
    if not isinstance(metadata, dict):
        raise ValueError("the card's metadata is not a table of keys and values [errors.md#cards]")
    return metadata, content[block.end() :]


def _digest(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def key_digest(value: Any) -> str:
    """A short digest of one metadata value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def make_marker(text: str, metadata: dict[str, str], weights: str | None) -> str:
    """The comment that ends a generated card: digests of its text and metadata, and its weights' fingerprint."""
    record = json.dumps({"text": _digest(text), "metadata": metadata, "weights": weights}, sort_keys=True)
    return f"<!-- frozen-prefix-card {record}\n{_HINT} -->"


def read_marker(body: str) -> dict[str, Any] | None:
    """What the marker of a generated card says, if its text is still what was generated."""
    marker = _MARKER.search(body)
    if marker is None:
        return None
    try:
        record = json.loads(marker.group(1))
    except ValueError:
        return None
    rest = body[: marker.start()] + "\n" + body[marker.end() :]
    return record if record.get("text") == _digest(rest) else None


def section(body: str, title: str, level: int = 2) -> str | None:
    """The text under a heading of that level, up to the next of it or above; None if there is none."""
    marks = "#" * level
    match = re.search(rf"^{marks} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", body, re.DOTALL | re.MULTILINE)
    return match.group(1).strip() if match and match.group(1).strip() else None


def is_automatic(body: str) -> bool:
    """Whether a card is one that transformers or PEFT write by themselves, and no one has filled in."""
    if "the Trainer had access to" in body:
        blanks = ("Model description", "Intended uses & limitations", "Training and evaluation data")
        return all(section(body, title) == "More information needed" for title in blanks)
    match = re.search(r"^This is the model card of a .* transformers model .* automatically generated\.$", body, re.M)
    fresh = ModelCard.from_template(ModelCardData(), model_description=match.group() if match else None)
    text = re.sub(r"### Framework versions\s+- PEFT \S+\s*$", "", body)  # which PEFT adds to it
    return _digest(text) == _digest(fresh.text)


def merge(old: dict[str, Any], digests: dict[str, str], new: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
    """New metadata, but for keys that a person changed, added or took away since `digests` were taken. `chosen` are
    keys that the caller chose just now."""
    merged = {}
    for key, value in new.items():
        if key in old and key not in chosen and digests.get(key) != key_digest(old[key]):
            merged[key] = old[key]
        elif key in old or key in chosen or key not in digests or key in ESSENTIAL:
            merged[key] = value
    for key, value in old.items():
        if key not in new and digests.get(key) != key_digest(value):
            merged[key] = value
    return merged


def merge_automatic(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New metadata, with what a caller passed to transformers for its card: language, tags, data and results."""
    kept = {key: value for key, value in old.items() if value not in (None, [], "")}
    if not any(entry.get("results") for entry in kept.get("model-index", [])):
        kept.pop("model-index", None)
    tags = [*new["tags"], *(tag for tag in kept.get("tags", []) if tag not in new["tags"])]
    return {**kept, **new, "tags": tags}


def add_essentials(content: str, metadata: dict[str, Any] | None, new: dict[str, Any]) -> str:
    """A person's card with the missing essential keys, all else byte for byte as it was."""
    missing = {key: new[key] for key in ESSENTIAL if key in new and key not in (metadata or {})}
    if "base_model" in (metadata or {}):
        missing.pop("base_model_relation", None)  # it speaks of that list, which is not ours
    if not missing:
        return content
    newline = "\r\n" if "\r\n" in content else "\n"
    lines = yaml_dump(missing, sort_keys=False, line_break=newline).strip()
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return f"---{newline}{lines}{newline}---{newline}{content}"
    at = block.end(2)
    between = newline if block.group(2).strip() else ""
    added = f"{content[:at]}{between}{lines}{content[at:]}"
    try:
        if split_card(added)[0] == {**(metadata or {}), **missing}:
            return added
    except ValueError:
        pass  # written in a style that lines can't be added to
    return content


def is_edited(content: str) -> bool:
    """Whether a card holds a person's words: neither this package wrote it so, nor do transformers and PEFT."""
    try:
        _, body = split_card(content)
    except ValueError:
        return True
    return bool(body.strip()) and read_marker(body) is None and not is_automatic(body)


def edited_metadata(content: str) -> dict[str, Any]:
    """Of a card with generated text, the keys that differ from what was generated, None for those taken away."""
    try:
        metadata, body = split_card(content)
    except ValueError:
        return {}
    record, metadata = read_marker(body), metadata or {}
    if record is None:
        return {}
    digests = record["metadata"]
    edited = {key: value for key, value in metadata.items() if digests.get(key) != key_digest(value)}
    return edited | {key: None for key in digests if key not in metadata}


__all__ = [
    "add_essentials", "edited_metadata", "is_automatic", "is_edited", "key_digest", "make_marker", "merge",
    "merge_automatic", "read_marker", "section", "split_card",
]  # fmt: skip
