"""The canonical row, and the reading of one row of each format that image-text data is kept in.

A canonical row has `images` (a list; each unopened, `{"bytes", "path"}`) and one of three kinds of text:

- `messages`: turns of `role` and `content`, a list of `{"type": "image"}` and `{"type": "text", "text"}`; where the source has
  it, `loss` says whether an assistant turn is learnt;
- `prompt` and `completion`, strings; where several people answered, `answers` holds what each of them said;
- `text`: a caption, or a list of them.

Where the source has videos or audio, `videos` and `audios` stand beside `images` (lists, unopened too), with
`{"type": "video"}` and `{"type": "audio"}` in the turns.

`id`, `image_id` and `question_id` are kept. Everything else that a row had is left out.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processors import load_rgb_image
from .columns import COLUMNS, as_list, find_column
from .feature_store import StoredImage


PLACEHOLDER = "<image>"
MARKS = {"image": PLACEHOLDER, "video": "<video>", "audio": "<audio>"}
MEDIA = {"image": "images", "video": "videos", "audio": "audios"}  # by modality, the column of a canonical row
KEPT = ("id", "image_id", "question_id")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_QUESTIONS = ("prompt", "question", "questions", "query", "instruction", "input", "problem")
_ANSWERS = ("multiple_choice_answer", "answer", "answers", "response", "output", "target", "targets", "solution", "completion")
_CAPTIONS = ("text", "caption", "captions", "sentences", "sentence")
_NUMBERED = re.compile(r"caption_\d+$")
_ITEMS = {  # the type of a content item, as TRL and OpenAI have them -> its modality
    "image": "image", "image_url": "image", "video": "video", "video_url": "video", "audio": "audio", "audio_url": "audio",
    "input_audio": "audio",
}  # fmt: skip
_SOURCES = (*_ITEMS, "url", "path", "base64", "bytes")  # what it keeps its image, video or audio under
_ALL_MEDIA = tuple(name for names in COLUMNS.values() for name in names)
_ADDRESS = re.compile(r"(?:https?://|data:)", re.IGNORECASE)
_LONGEST_NAME = 255  # of a file; a longer string without a slash is an image written out as base64


class RowError(ValueError):
    """What is wrong with a field of a row; whoever knows the row's number says the rest."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"field {field!r} {reason}")


class NothingToLearn(RowError):
    """A row without a text that is learnt."""


class MissingFile(RowError):
    """Files of a row that are not there."""

    def __init__(self, field: str, paths: list[str], modality: str = "image"):
        names, kind = (
            ", ".join(map(repr, paths)),
            {"image": "an image", "video": "a video", "audio": "an audio file"}[modality],
        )
        super().__init__(field, f"names {kind} that is not there: {names} (the folder of relative paths is `image_root=`)")
        self.paths = paths


class HeldImage:
    """Stands for an image that stays where it is, in a column of a dataset."""


# -------------------------------------------------------------------------------------------------------------- media
def locate(media: Any, root: Path, field: str, modality: str = "image") -> Any:
    """
    An image, video or audio input unopened, as Arrow keeps it, or as it is where it is open.

    Args:
        media: path (relative to `root`, or absolute), bytes, `{"bytes", "path"}`; of images and audio also URL, data URI
            or base64; a PIL image, an array, `{"array", "sampling_rate"}`.
        root: the folder of relative paths.
        field: what an error calls it.
        modality: "image", "video" or "audio".

    Raises:
        RowError: a file that isn't there, or what is none of these.
    """
    if isinstance(media, HeldImage | StoredImage) or _is_open(media):
        return media
    named, given = None, media
    if isinstance(media, Mapping):
        data, named = media.get("bytes"), media.get("path")
        if data is None and (media.get("array") is not None):
            return media
        media = data if data is not None else named or media.get("url") or media.get("data")
    if isinstance(media, os.PathLike):
        media = os.fspath(media)
    if isinstance(media, bytes):
        return {"bytes": media, "path": named}
    if isinstance(media, str) and media:
        if _ADDRESS.match(media) or len(media.rpartition("/")[2]) > _LONGEST_NAME:
            if modality == "video":
                raise RowError(field, f"must be a video's file or bytes: {media!r:.80} would have to be fetched first")
            return {"bytes": None, "path": media}
        path = os.path.join(root, media.removeprefix("file://"))
        if not os.path.isfile(path):
            raise MissingFile(field, [path], modality)
        return {"bytes": None, "path": path}
    kinds = {"image": "an image", "video": "frames in one array", "audio": "a waveform in one array"}[modality]
    raise RowError(field, f"must be a path, a URL, bytes or {kinds}, or a list of them, got {given!r:.80}")


def _is_open(image: Any) -> bool:
    """Whether it is of PIL, or an array of numpy or torch."""
    return hasattr(image, "getbands") or (hasattr(image, "shape") and hasattr(image, "dtype"))


def encoded(image: Any) -> Any:
    """As Arrow keeps it, where it is open."""
    if not _is_open(image):
        return image
    import datasets

    return datasets.Image().encode_example(image if hasattr(image, "getbands") else load_rgb_image(image))


@dataclass
class _Media:
    """What a row has of a modality in a column of its own."""

    modality: str
    column: str
    is_there: bool  # the column; its values may be none
    values: list[Any]


def _column(row: Mapping[str, Any], modality: str) -> str | None:
    """Of several, one that is not null."""
    filled = find_column([name for name in row if row[name] is not None], modality=modality)
    return filled or find_column(row, modality=modality)


def _media(row: Mapping[str, Any], *, required: bool = False) -> dict[str, _Media]:
    """By modality. `required`: a row without any of their columns is an error."""
    media = {}
    for modality, name in MEDIA.items():
        column = _column(row, modality)
        values = [] if column is None else [one for one in as_list(row[column]) if one is not None]
        media[modality] = _Media(modality, column or name, column is not None, values)
    if required and not any(one.is_there for one in media.values()):
        raise RowError("image", f"(or 'images') is not there; null in it says that a row has none. Its fields: {sorted(row)}")
    return media


def _values(media: Mapping[str, _Media]) -> dict[str, list[Any]]:
    """For a canonical row: images, and the others where the row has their column."""
    return {MEDIA[one.modality]: one.values for one in media.values() if one.modality == "image" or one.is_there}


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


def _check_counts(text: str, media: Mapping[str, _Media], field: str) -> None:
    """A text has a mark for each of its media, or none. Of videos and audio, only where the row has a column of them:
    `<video>` is HTML too."""
    for modality, own in media.items():
        if modality == "image" or own.is_there:
            marks = text.count(MARKS[modality])
            if marks and marks != len(own.values):
                raise _wrong_count(field, marks, modality, "the row", len(own.values))


def _wrong_count(field: str, marks: int, modality: str, owner: str, count: int) -> RowError:
    return RowError(
        field, f"holds {marks} {MARKS[modality]} but {owner} has {count} {MEDIA[modality]}: as many of both are needed"
    )


def _items(content: Any, field: str, marks: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Content as a list of items, and for each image, video and audio in it the modality and the thing itself, or `None` where
    it is in a column. `marks`: what stands for them in texts, and the modality."""
    items: list[dict[str, Any]] = []
    own: list[tuple[str, Any]] = []
    split = re.compile("(" + "|".join(marks) + ")")
    for place, item in enumerate([content] if isinstance(content, str) else content):
        name = field if isinstance(content, str) else f"{field}[{place}]"
        item = {"type": "text", "text": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            raise RowError(name, f"must be a string, or have a 'type', got {item!r:.80}")
        if item.get("type") == "text":
            for text in filter(None, split.split(_string(item.get("text"), f"{name}.text"))):
                modality = marks.get(text)
                items.append({"type": modality or "text", "text": None if modality else text})
                own += [(modality, None)] if modality else []
        elif modality := _ITEMS.get(item.get("type", "")):
            source = next((item[key] for key in _SOURCES if item.get(key) is not None), None)
            items.append({"type": modality, "text": None})
            own.append((modality, source))
        else:
            raise RowError(f"{name}.type", f"must be 'text' or one of {sorted(_ITEMS)}, got {item.get('type')!r}")
    return items, own


def _conversation(row: Mapping[str, Any], turns: Any, field: str, *, put_first: bool = False) -> dict[str, Any]:
    """A chat, with its images, videos and audio in order of their turns; `put_first`: where no turn says where they are,
    before the first."""
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(field, f"must be a list of turns, got {turns!r:.80}")
    media = _media(row)
    marks = {MARKS[modality]: modality for modality, one in media.items() if modality == "image" or one.is_there}
    if media["video"].values and not media["image"].values and not _mentions(turns, MARKS["video"]):
        marks[PLACEHOLDER] = "video"  # LLaVA's videos have the images' mark
    messages: list[dict[str, Any]] = []
    places: list[tuple[str, Any]] = []
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
        items, own = _items(content, f"{name}.{key}", marks)
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
    first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
    found = {}
    for modality in reversed(MEDIA):
        own, values = [source for kind, source in places if kind == modality], media[modality].values
        missing = sum(source is None for source in own)
        if missing != len(values) and (own or (len(values) > 1 and not put_first)):
            raise _wrong_count(field, missing, modality, repr(media[modality].column), len(values))
        if values and not own and (put_first or modality != "image"):
            first["content"] = [{"type": modality, "text": None}] * len(values) + first["content"]
        rest = iter(values)
        if own or values or modality == "image" or media[modality].is_there:
            found[MEDIA[modality]] = [next(rest) if source is None else source for source in own] or values
    return {**dict(reversed(found.items())), "messages": messages}


def _mentions(turns: Iterable[Any], mark: str) -> bool:
    """Whether a turn has that mark, or content that is a list."""
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    return any(not isinstance(content, str) or mark in content for content in contents)


def _has_text(turn: Mapping[str, Any]) -> bool:
    return any((item.get("text") or "").strip() for item in turn["content"])


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_conversation(row, row.get("messages"), "messages")]


def _conversations(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_conversation(row, row.get("conversations"), "conversations")]


def _prompt_completion(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _question_answer({name: value for name, value in row.items() if name in (*_ALL_MEDIA, "prompt", "completion")})
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
    media = _media(row, required=True)
    if isinstance(question, list | tuple):  # several questions about an image: a row for each
        if not isinstance(answer, list | tuple) or len(answer) != len(question):
            raise RowError(said, f"must be a list as long as {asked!r} ({len(question)}), got {answer!r:.80}")
        several = zip(question, answer, strict=True)
        shown = {one.column: row[one.column] for one in media.values() if one.is_there}
        return [_question_answer({**shown, "question": one, "answer": other})[0] for one, other in several]
    question = _string(question, asked)
    if asked == "instruction" and row.get("input"):  # Alpaca's
        question += "\n" + _string(row["input"], "input")
    texts = _strings(answer, said)
    if not any(text.strip() for text in texts):
        raise NothingToLearn(said, "is empty, so there is nothing to learn from it")
    _check_counts(question, media, asked)
    people = _strings(row["answers"], "answers") if isinstance(row.get("answers"), list | tuple) else None
    if said == "answers":  # of several people: what most of them said
        texts = [Counter(texts).most_common(1)[0][0]]
    read = {
        **_values(media),
        "prompt": question,
        "completion": texts if isinstance(answer, list | tuple) and said != "answers" else texts[0],
    }
    return [read if people is None else {**read, "answers": people}]


def _captions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in _CAPTIONS if row.get(name) is not None][:1]
    names = names or sorted((name for name in row if _NUMBERED.match(name)), key=lambda name: int(name[8:]))
    if not names:
        raise RowError("text", f"(or one of {list(_CAPTIONS[1:])}) is not there. Its fields: {sorted(row)}")
    media = _media(row, required=True)
    texts = [text for name in names for text in _strings(row[name], name)]
    if not any(text.strip() for text in texts):
        raise NothingToLearn(names[0], "is empty, so there is nothing to learn from it")
    for text in texts:
        _check_counts(text, media, names[0])
    return [{**_values(media), "text": texts[0] if isinstance(row[names[0]], str) and len(names) == 1 else texts}]


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
        "'texts', 'prompt' and 'completion', 'question' and 'answer', or 'text', each beside 'image' or 'images' ('videos', "
        "'audios'). [errors.md#row]"
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
    rows = [{**kept, **read} for read in ROW_FORMATS[format](row)]
    for modality, name in MEDIA.items():
        column, missing = _column(row, modality) or "messages", list[str]()
        for read in rows:
            if name in read:
                read[name] = list(read[name])
                for place, one in enumerate(read[name]):
                    try:
                        read[name][place] = locate(one, root, column, modality)
                    except MissingFile as error:
                        missing += error.paths
        if missing:
            raise MissingFile(column, list(dict.fromkeys(missing)), modality)
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
    "MARKS",
    "MEDIA",
    "PLACEHOLDER",
    "ROLES",
    "ROW_FORMATS",
    "HeldImage",
    "MissingFile",
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
