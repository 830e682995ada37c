"""`frozen-prefix check`: what is wrong with a source of image-text data, before the first step of a training.

Everything is counted, nothing is raised: the first ten of each kind of fault are named. Images are opened only where
asked for.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ..processors import load_rgb_image, load_video, load_waveform
from .columns import as_list
from .formats import open_source
from .image_reading import Images
from .rows import MARKS, MEDIA, PLACEHOLDER, MissingFile, NothingToLearn, RowError, count_unplaced, name_of_row
from .sources import Source


_FIRST = 10
_RATE = 16000  # of audio that are opened
_BATCH = 256  # rows that are tokenised at a time


@dataclass
class Faults:
    """Of one kind: how many, and the first ones."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.count += 1
        if len(self.first) < _FIRST:
            self.first.append(what)


@dataclass
class Check:
    """
    What [`check_image_text`] found.

    Args:
        name (`str`), format (`str`): the source, and what it was read as.
        rows (`int`): in the source; those of questions about one image are counted as one.
        images (`Counter`), others (`dict`): how many rows have so many images; so many of the others, by column.
        unplaced (`int`): chats with an image and no `<image>`, which the processor then puts.
        missing, broken ([`Faults`]): files that aren't there; images that can't be opened, where they were.
        unreadable ([`Faults`]): rows of a wrong type, kind or count.
        nothing_to_learn ([`Faults`]): rows without a text to learn.
        lengths (`list[int]`): tokens of each row, placeholders included; empty without a model.
        positions (`int`, *optional*): of the model, where it says so; `max_length` (`int`, *optional*): of its tokenizer.
        too_long ([`Faults`]): rows that have more tokens than positions.
        drawn (`str`): a row as the model will read it, what is learnt in « ».
    """

    name: str
    format: str
    rows: int = 0
    images: Counter[int] = field(default_factory=Counter)
    others: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in list(MEDIA.values())[1:]})
    unplaced: int = 0
    missing: Faults = field(default_factory=Faults)
    broken: Faults = field(default_factory=Faults)
    unreadable: Faults = field(default_factory=Faults)
    nothing_to_learn: Faults = field(default_factory=Faults)
    lengths: list[int] = field(default_factory=list)
    positions: int | None = None
    max_length: int | None = None
    too_long: Faults = field(default_factory=Faults)
    drawn: str = ""

    @property
    def fails(self) -> bool:
        """Whether a training on it would fail."""
        faults = (self.missing, self.broken, self.unreadable, self.nothing_to_learn, self.too_long)
        return any(one.count for one in faults) or not self._has_media

    @property
    def _has_media(self) -> bool:
        return any(any(counts) for counts in (self.images, *self.others.values()))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.format}", f"rows: {self.rows}"]
        lines += [f"  with {number} images: {count}" for number, count in sorted(self.images.items())]
        for column, counts in self.others.items():
            lines += [f"  with {number} {column}: {count}" for number, count in sorted(counts.items()) if any(counts)]
        if not self._has_media:
            lines.append("  no row has an image: is their column called 'image' or 'images'?")
        if self.unplaced:
            lines.append(f"  with an image and no {PLACEHOLDER}, which the processor then puts: {self.unplaced}")
        if self.lengths:
            ordered = sorted(self.lengths)
            middle, high = ordered[len(ordered) // 2], ordered[-1 - len(ordered) // 100]
            lengths = f"median {middle}, 99 % at most {high}, longest {ordered[-1]}"
            lines.append(f"tokens of a row: {lengths}; positions: {self.positions}")
        names = {
            "files that are not there": self.missing,
            "images that can't be opened": self.broken,
            "rows that can't be read": self.unreadable,
            "rows with nothing to learn": self.nothing_to_learn,
            "rows longer than the model's positions": self.too_long,
        }
        for name, faults in names.items():
            lines += [f"{name}: {faults.count}", *(f"  {what}" for what in faults.first)]
        lines += ["a row as it will be read, what is learnt in « »:", self.drawn] if self.drawn else []
        return "\n".join([*lines, "Training on it would fail." if self.fails else "Nothing found that would stop a training."])


def check_image_text(
    source: Any,
    *,
    format: str = "auto",
    image_root: str | Path | None = None,
    split: str | None = None,
    model: str | Path | None = None,
    open_images: bool = False,
) -> Check:
    """
    Reads all rows of a source and says what is wrong with them.

    Args:
        source, format, image_root, split: as [`load_image_text`] takes them.
        model (`str` or `Path`, *optional*): a checkpoint, for the lengths in its tokens. Its weights aren't read.
        open_images (`bool`): opens every image; without it none is, and files are only looked for.

    Returns:
        [`Check`]

    Raises:
        ValueError: a source whose format can't be found. FileNotFoundError: one that isn't there.
    """
    opened = open_source(source, format, image_root, split)
    check = Check(opened.name, opened.described)
    reader = None if model is None else _Reader(check, model)
    batch: list[tuple[str, dict[str, Any]]] = []
    for index, read, row in _with_progress(opened.read(), opened, open_images):
        check.rows += 1
        name = name_of_row(opened.name, index, row)
        if isinstance(read, RowError):
            _count(check, name, read)
            continue
        check.images[max(len(one["images"]) for one in read)] += 1
        for column, counts in check.others.items():
            counts[max(len(one.get(column, ())) for one in read)] += 1
        check.unplaced += count_unplaced(read)
        check.drawn = check.drawn or _drawn(read[0])
        if open_images:
            for image in _images(opened, index, read):
                _open(check, "image", image, name)
            for modality, column in MEDIA.items():
                for media in [media for one in read for media in one.get(column, ()) if modality != "image"]:
                    _open(check, modality, media, name)
        if reader is not None:
            batch += [(name, one) for one in read]
            if len(batch) >= _BATCH:
                reader.measure(batch)
                batch = []
    if reader is not None and batch:
        reader.measure(batch)
    return check


def _with_progress(rows: Iterator[Any], source: Source, shown: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    total = len(source.held.dataset) if source.held is not None else None
    return iter(tqdm(rows, desc="opening images", unit="rows", total=total, disable=not shown))


def _count(check: Check, name: str, error: RowError) -> None:
    if isinstance(error, MissingFile):
        for path in error.paths:
            check.missing.add(f"{name}: {path}")
    elif isinstance(error, NothingToLearn):
        check.nothing_to_learn.add(f"{name}: {error}")
    else:
        check.unreadable.add(f"{name}: {error}")


def _images(source: Source, index: int, read: list[dict[str, Any]]) -> list[Any]:
    images = [image for one in read for image in one["images"]]
    held = source.held
    if held is None:
        return images
    return [image for image in as_list(Images(held.dataset, held.column).rows(index, index + 1)[0]) if image is not None]


def _open(check: Check, modality: str, media: Any, name: str) -> None:
    what = f"{'an' if modality == 'image' else 'a'} {modality} of {name}"
    try:
        if modality == "image":
            load_rgb_image(media, what)
        elif modality == "video":
            load_video(media, 2, what)  # the first frame and the last
        else:
            load_waveform(media, _RATE, what)
    except ValueError as error:
        check.broken.add(str(error))


def _drawn(row: Mapping[str, Any]) -> str:
    """A row without a tokenizer at hand."""
    if "messages" not in row:
        text = next(as_list(row[name])[0] for name in ("completion", "text") if name in row)
        prompt = row.get("prompt", "")
        media = [mark * len(row.get(MEDIA[name], ())) for name, mark in MARKS.items() if mark not in prompt + text]
        return f"{''.join(media)}{prompt}«{text}»"
    lines = []
    for turn in row["messages"]:
        text = "".join(MARKS.get(item["type"], item["text"]) for item in turn["content"])
        learnt = turn["role"] == "assistant" and turn.get("loss", True)
        lines.append(f"{turn['role']}: {f'«{text}»' if learnt else text}")
    return "\n".join(lines)


class _Reader:
    """Rows in a model's tokens, as the collator reads them; no image is opened for it."""

    def __init__(self, check: Check, model: str | Path):
        from transformers import AutoConfig

        from ..processors import FrozenPrefixProcessor
        from .collator import DataCollatorForFrozenPrefix

        self.check = check
        processor = FrozenPrefixProcessor.from_pretrained(model)
        self.collator = DataCollatorForFrozenPrefix(processor, prefix_length=processor.prefix_length)
        check.positions = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
        check.max_length = self.collator.max_length
        self.limit = min((one for one in (check.positions, check.max_length) if one is not None), default=None)
        self.has_drawn = False

    def measure(self, rows: list[tuple[str, dict[str, Any]]]) -> None:
        examples, names = [], []
        for name, row in rows:
            try:
                row = {**row, **{key: as_list(row[key])[0] for key in ("text", "completion") if key in row}}
                examples.append(self.collator._read(0, row))
            except ValueError as error:
                self.check.unreadable.add(f"{name}: {str(error).removeprefix('Row 0: ')}")
            else:
                names.append(name)
        self.collator._encode(examples)
        self.check.lengths += [len(one.ids) for one in examples]
        for name, example in zip(names, examples, strict=True):
            if self.limit is not None and len(example.ids) > self.limit:
                self._try_cutting(name, example)
            elif not self.has_drawn:
                self.check.drawn, self.has_drawn = self._draw(example), True

    def _try_cutting(self, name: str, example: Any) -> None:
        """A row that is cut to the model's positions can be trained on; one that nobody cuts can't."""
        length, positions = len(example.ids), self.check.positions
        if positions is not None and (self.check.max_length is None or self.check.max_length > positions):
            what = f"pass max_length={positions} to the collator, as the tokenizer does not say it"
            self.check.too_long.add(f"{name}: {length} tokens, positions {positions}: {what}")
            return
        try:
            self.collator._truncate(0, example)
        except ValueError as error:
            self.check.too_long.add(f"{name}: {str(error).removeprefix('Row 0: ')}")

    def _draw(self, example: Any) -> str:
        processor = self.collator.processor
        names = {getattr(processor, f"{modality}_token_id"): token for modality, token in processor.tokens.items()}
        parts = []
        pairs = zip(example.ids, example.learn, strict=True)
        for (learnt, token), run in groupby(pairs, lambda pair: (pair[1], names.get(pair[0]))):
            ids = [i for i, _ in run]
            text = f"{token}×{len(ids)}" if token else processor.tokenizer.decode(ids)
            parts.append(f"«{text}»" if learnt else text)
        return " ".join([*parts, *([f"«{example.target}»"] if example.target is not None else [])])


__all__ = ["Check", "Faults", "check_image_text"]
