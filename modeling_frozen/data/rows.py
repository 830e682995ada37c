"""The canonical row, and the reading of one row of each format that image-text data is kept in.

A canonical row has `images` (a list; each unopened, `{"bytes", "path"}`) and one of three kinds of text:

- `messages`: turns of `role` and `content`, a list of `{"type": "image"}` and `{"type": "text", "text"}`; where the source has
  it, `loss` says whether an assistant turn is learnt;
- `prompt` and `completion`, strings; where several people answered, `answers` holds what each of them said;
- `text`: a caption, or a list of them.

`id`, `image_id` and `question_id` are kept. Everything else that a row had is left out.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..processors import load_rgb_image
from .columns import as_list, find_column
from .feature_store import StoredImage


PLACEHOLDER = "<image>"
KEPT = ("id", "image_id", "question_id")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_QUESTIONS = ("prompt", "question", "questions", "query", "instruction", "input", "problem")
_ANSWERS = ("multiple_choice_answer", "answer", "answers", "response", "output", "target", "targets", "solution", "completion")
_CAPTIONS = ("text", "caption", "captions", "sentences", "sentence")
_NUMBERED = re.compile(r"caption_\d+$")
_SOURCES = ("image", "image_url", "url", "path", "base64", "bytes")  # what a content item keeps its image under
_ADDRESS = re.compile(r"(?:https?://|data:)", re.IGNORECASE)
_LONGEST_NAME = 255  # of a file; a longer string without a slash is an image written out as base64


class RowError(ValueError):
    """What is wrong with a field of a row; whoever knows the row's number says the rest."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"field {field!r} {reason}")


class NothingToLearn(RowError):
    """A row without a text that is learnt."""


class MissingImage(RowError):
    """Files of a row that are not there."""

    def __init__(self, field: str, paths: list[str]):
        names = ", ".join(map(repr, paths))
        super().__init__(field, f"names an image that is not there: {names} (the folder of relative paths is `image_root=`)")
        self.paths = paths


class HeldImage:
    """Stands for an image that stays where it is, in a column of a dataset."""


# ------------------------------------------------------------------------------------------------------------- images
def locate(image: Any, root: Path, field: str) -> Any:
    """
    An image unopened, as Arrow keeps it, or as it is where it is open.

    Args:
        image: path (relative to `root`, or absolute), URL, data URI, base64, bytes, `{"bytes", "path"}`, PIL image or array.
        root: the folder of relative paths.
        field: what an error calls it.

    Raises:
        RowError: a file that isn't there, or what is no image.
    """
    if isinstance(image, HeldImage):
        return image
    named = None
    if isinstance(image, Mapping):
        data, named = image.get("bytes"), image.get("path")
        image = data if data is not None else named or image.get("url")
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, bytes):
        return {"bytes": image, "path": named}
    if isinstance(image, str) and image:
        if _ADDRESS.match(image) or len(image.rpartition("/")[2]) > _LONGEST_NAME:
            return {"bytes": None, "path": image}
        path = os.path.join(root, image.removeprefix("file://"))
        if not os.path.isfile(path):
            raise MissingImage(field, [path])
        return {"bytes": None, "path": path}
    if isinstance(image, StoredImage) or _is_open(image):
        return image
    raise RowError(field, f"must be a path, a URL, bytes or an image, or a list of them, got {image!r:.80}")


def _is_open(image: Any) -> bool:
    """Whether it is of PIL, or an array of numpy or torch."""
    return hasattr(image, "getbands") or (hasattr(image, "shape") and hasattr(image, "dtype"))


def encoded(image: Any) -> Any:
    """As Arrow keeps it, where it is open."""
    if not _is_open(image):
        return image
    import datasets

    return datasets.Image().encode_example(image if hasattr(image, "getbands") else load_rgb_image(image))


def _images(row: Mapping[str, Any], *, required: bool) -> tuple[str, list[Any]]:
    column = find_column([name for name in row if row[name] is not None]) or find_column(row)
    if column is None and required:
        raise RowError("image", f"(or 'images') is not there; null in it says that a row has none. Its fields: {sorted(row)}")
    return column or "images", [] if column is None else [one for one in as_list(row[column]) if one is not None]


# --------------------------------------------------------------------------------------------------------------- texts
def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"must be a string, got {value!r:.80}")
    return value


def _strings(value: Any, field: str) -> list[str]:
    """Of a string, a list of them, or of `{"answer"}` or `{"raw"}` as VQA v2 and Karpathy write them."""
    texts = []
    for place, one in enumerate(as_list(value)):
        if isinstance(one, Mapping):
            one = next((one[name] for name in ("answer", "raw", "caption", "text") if name in one), None)
        if one is not None:
            texts.append(_string(one, f"{field}[{place}]" if isinstance(value, list | tuple) else field))
    return texts


def _check_count(placeholders: int, images: int, field: str) -> None:
    if placeholders and placeholders != images:
        raise RowError(
            field, f"holds {placeholders} {PLACEHOLDER} but the row has {images} images: as many of both are needed"
        )


def _items(content: Any, field: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Content as a list of items, and for each image in it the image itself, or `None` where it is in the image column."""
    items: list[dict[str, Any]] = []
    own: list[Any] = []
    for place, item in enumerate([content] if isinstance(content, str) else content):
        name = field if isinstance(content, str) else f"{field}[{place}]"
        item = {"type": "text", "text": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            raise RowError(name, f"must be a string, or have a 'type', got {item!r:.80}")
        if item.get("type") == "text":
            for number, text in enumerate(_string(item.get("text"), f"{name}.text").split(PLACEHOLDER)):
                if number:
                    items.append({"type": "image", "text": None})
                    own.append(None)
                items += [{"type": "text", "text": text}] if text else []
        elif item.get("type") in ("image", "image_url"):
            source = next((item[key] for key in _SOURCES if item.get(key) is not None), None)
            items.append({"type": "image", "text": None})
            own.append(source)
        else:
            raise RowError(f"{name}.type", f"must be 'text', 'image' or 'image_url', got {item.get('type')!r}")
    return items, own


def _conversation(row: Mapping[str, Any], turns: Any, field: str, *, put_first: bool = False) -> dict[str, Any]:
    """A chat, with its images in order of their turns; `put_first`: where no turn says where they are, before the first."""
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(field, f"must be a list of turns, got {turns!r:.80}")
    messages: list[dict[str, Any]] = []
    places: list[Any] = []
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise RowError(name, f"must be a turn with role and content, got {turn!r:.80}")
        role_key, key = next(
            (one for one in (("role", "content"), ("from", "value")) if turn.get(one[0]) is not None), ("role", "content")
        )
        role, content = turn.get(role_key), turn.get(key)
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{name}.{role_key}", f"must be one of {sorted(ROLES)}, got {role!r}")
        if not isinstance(content, str | list | tuple):
            raise RowError(f"{name}.{key}", f"must be a string or a list, got {content!r:.80}")
        items, own = _items(content, f"{name}.{key}")
        places += own
        message: dict[str, Any] = {"role": ROLES[role], "content": items}
        if turn.get("loss") is not None:
            if turn["loss"] not in (True, False):
                raise RowError(f"{name}.loss", f"must be true or false, got {turn['loss']!r:.80}")
            message["loss"] = bool(turn["loss"])
        messages.append(message)
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": _string(row["system"], "system")}]})
    if not any(turn["role"] == "assistant" and turn.get("loss", True) and _has_text(turn) for turn in messages):
        raise NothingToLearn(field, "has no assistant turn with a text to learn, so there is nothing to learn from it")
    column, images = _images(row, required=False)
    missing = sum(one is None for one in places)
    if missing or images:
        if missing != len(images) and (places or len(images) > 1) and not (put_first and not places):
            raise RowError(
                field, f"holds {missing} {PLACEHOLDER} but {column!r} has {len(images)} images: as many of both are needed"
            )
        if not places and put_first:
            first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
            first["content"] = [{"type": "image", "text": None}] * len(images) + first["content"]
    rest = iter(images)
    images = [next(rest) if one is None else one for one in places] or images
    return {"images": images, "messages": messages}


def _has_text(turn: Mapping[str, Any]) -> bool:
    return any((item.get("text") or "").strip() for item in turn["content"])


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_conversation(row, row.get("messages"), "messages")]


def _conversations(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_conversation(row, row.get("conversations"), "conversations")]


def _prompt_completion(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _question_answer(
            {name: value for name, value in row.items() if name in ("image", "images", "prompt", "completion")}
        )
    turns: list[Mapping[str, Any]] = []
    for name, own in (("prompt", prompt), ("completion", completion)):
        if not isinstance(own, list | tuple) or not all(isinstance(turn, Mapping) for turn in own):
            raise RowError(name, f"must be a string, or a list of turns as the other one is, got {own!r:.80}")
        is_prompt = name == "prompt"
        turns += [{**turn, "loss": False} if is_prompt and turn.get("role") == "assistant" else turn for turn in own]
    return [_conversation(row, turns, "prompt+completion")]


def _cauldron(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if not isinstance(row.get("texts"), list | tuple):
        raise RowError("texts", f"must be a list of turns, got {row.get('texts')!r:.80}")
    for number, pair in enumerate(row["texts"]):
        if not isinstance(pair, Mapping):
            raise RowError(f"texts[{number}]", f"must have 'user' and 'assistant', got {pair!r:.80}")
        turns += [
            {"role": role, "content": _string(pair.get(role), f"texts[{number}].{role}")} for role in ("user", "assistant")
        ]
    return [_conversation(row, turns, "texts", put_first=True)]


def _question_answer(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = next((name for name in _QUESTIONS if row.get(name) is not None), "question")
    said = next((name for name in _ANSWERS if row.get(name) is not None), "answer")
    question, answer = row.get(asked), row.get(said)
    column, images = _images(row, required=True)
    if isinstance(question, list | tuple):  # several questions about an image: a row for each
        if not isinstance(answer, list | tuple) or len(answer) != len(question):
            raise RowError(said, f"must be a list as long as {asked!r} ({len(question)}), got {answer!r:.80}")
        several = zip(question, answer, strict=True)
        return [_question_answer({column: row.get(column), "question": one, "answer": other})[0] for one, other in several]
    question = _string(question, asked)
    if asked == "instruction" and row.get("input"):  # Alpaca's
        question += "\n" + _string(row["input"], "input")
    texts = _strings(answer, said)
    if not any(text.strip() for text in texts):
        raise NothingToLearn(said, "is empty, so there is nothing to learn from it")
    _check_count(question.count(PLACEHOLDER), len(images), asked)
    people = _strings(row["answers"], "answers") if isinstance(row.get("answers"), list | tuple) else None
    if said == "answers":  # of several people: what most of them said
        texts = [Counter(texts).most_common(1)[0][0]]
    read = {
        "images": images,
        "prompt": question,
        "completion": texts if isinstance(answer, list | tuple) and said != "answers" else texts[0],
    }
    return [read if people is None else {**read, "answers": people}]


def _captions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in _CAPTIONS if row.get(name) is not None][:1]
    names = names or sorted((name for name in row if _NUMBERED.match(name)), key=lambda name: int(name[8:]))
    if not names:
        raise RowError("text", f"(or one of {list(_CAPTIONS[1:])}) is not there. Its fields: {sorted(row)}")
    _, images = _images(row, required=True)
    texts = [text for name in names for text in _strings(row[name], name)]
    if not any(text.strip() for text in texts):
        raise NothingToLearn(names[0], "is empty, so there is nothing to learn from it")
    for text in texts:
        _check_count(text.count(PLACEHOLDER), len(images), names[0])
    return [{"images": images, "text": texts[0] if isinstance(row[names[0]], str) and len(names) == 1 else texts}]


# Format of a row -> what reads it.
ROW_FORMATS: dict[str, Callable[[Mapping[str, Any]], list[dict[str, Any]]]] = {
    "messages": _messages,
    "sharegpt": _conversations,
    "llava": _conversations,
    "cauldron": _cauldron,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "captions": _captions,
}


def find_format(row: Mapping[str, Any], name: str) -> str:
    """
    The format of a row, by its fields.

    Raises:
        ValueError: if it is none of [`ROW_FORMATS`].
    """
    fields = {field for field, value in row.items() if value is not None}
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt" if "images" in fields else "llava"
    if "texts" in fields:
        return "cauldron"
    if {"prompt", "completion"} <= fields:
        return "prompt_completion"
    if fields.intersection(_QUESTIONS) and fields.intersection(_ANSWERS):
        return "question_answer"
    if fields.intersection(_CAPTIONS) or any(map(_NUMBERED.match, fields)):
        return "captions"
    raise ValueError(
        f"{name}: no known format has the fields {sorted(row)}. Rename them to those of one: 'messages', 'conversations', "
        "'texts', 'prompt' and 'completion', 'question' and 'answer', or 'text', each beside 'image' or 'images'."
    )


def read_row(row: Any, format: str, root: Path) -> list[dict[str, Any]]:
    """
    The canonical rows of a row: one, or one for each of several questions.

    Args:
        row (`Mapping`): as it lies in its file.
        format (`str`): of [`ROW_FORMATS`].
        root (`Path`): the folder of relative paths.

    Raises:
        RowError: with the field, and what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise RowError("row", f"must be an object with fields, got {row!r:.80}")
    kept = {name: row[name] for name in KEPT if row.get(name) is not None}
    column, missing = find_column(row) or "messages", list[str]()
    rows = [{**kept, **read, "images": list(read["images"])} for read in ROW_FORMATS[format](row)]
    for images in (read["images"] for read in rows):
        for place, image in enumerate(images):
            try:
                images[place] = locate(image, root, column)
            except MissingImage as error:
                missing += error.paths
    if missing:
        raise MissingImage(column, list(dict.fromkeys(missing)))
    return rows


def kind_of(row: Mapping[str, Any]) -> str:
    return next(name for name in ("messages", "completion", "text") if name in row)


def name_of_row(name: str, index: int, row: Any) -> str:
    """What an error calls a row."""
    own = (
        next(
            (f" ({key} {row[key]!r:.60})" for key in ("id", "question_id", "image_id", "__key__") if row.get(key) is not None),
            "",
        )
        if isinstance(row, Mapping)
        else ""
    )
    return f"{name}: row {index}{own}"


def count_unplaced(rows: Iterable[Mapping[str, Any]]) -> int:
    """Chats with an image that no turn has a place for."""
    return sum(
        bool(row["images"]) and not any(item["type"] == "image" for turn in row["messages"] for item in turn["content"])
        for row in rows
        if "messages" in row
    )


__all__ = [
    "KEPT",
    "PLACEHOLDER",
    "ROLES",
    "ROW_FORMATS",
    "HeldImage",
    "MissingImage",
    "NothingToLearn",
    "RowError",
    "count_unplaced",
    "encoded",
    "find_format",
    "kind_of",
    "locate",
    "name_of_row",
    "read_row",
]
