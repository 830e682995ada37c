"""Where rows lie: lists, datasets, files of lines, tars and streams of `datasets`, each as shards that are read from any row
on; and [`Source`], which knows how to read them.

A row that can't be read is given as the [`RowError`] that says why; where a shard can't be read further, its reader raises.
"""

import itertools
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .columns import COLUMNS
from .image_reading import unopened
from .rows import ROW_FORMATS, HeldImage, RowError, find_format, kind_of, read_row


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_CHUNK = 1000  # rows of a dataset, or 16 of a stream, that are asked for at a time
_STREAM_CHUNK = 16
_SHARDS, _LEAST = 64, 64  # into how many a list is split, and of how many rows each is at least


class UnreadableRow(RowError):
    """A row that can't even be looked at."""

    def __init__(self, reason: str):
        ValueError.__init__(self, reason)


class Shards:
    """
    Args:
        count (`int`): of shards.
    """

    count = 1

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The rows of a shard, without the first `skip`."""
        raise NotImplementedError

    def name(self, number: int, index: int) -> str:
        """What an error calls a row of a shard."""
        raise NotImplementedError

    def all(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(self.read, range(self.count)))


class ListedRows(Shards):
    """Of a list, or of a dataset that has a length."""

    def __init__(self, rows: "Sequence[Any] | PackedRows"):
        self.rows = rows
        self.count = max(1, min(_SHARDS, len(rows) // _LEAST))

    def packed(self) -> "ListedRows":
        """The same in two buffers: of a list, worker processes would copy all that they look at."""
        return ListedRows(PackedRows(self.rows)) if isinstance(self.rows, list) else self

    def _start(self, number: int) -> int:
        return number * len(self.rows) // self.count

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        own = range(self._start(number) + skip, self._start(number + 1))
        if hasattr(self.rows, "select"):
            yield from self.rows.select(own)
        else:
            yield from map(self.rows.__getitem__, own)

    def name(self, number: int, index: int) -> str:
        return f"row {self._start(number) + index}"


class PackedRows(Sequence):
    """A list whose rows are made when they are asked for."""

    def __init__(self, rows: Sequence[Any]):
        parts = list(map(pickle.dumps, rows))
        self.ends = np.cumsum([0, *map(len, parts)])
        self.data = b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return pickle.loads(self.data[self.ends[index] : self.ends[index + 1]])


class HeldRows(Shards):
    """
    Of a dataset whose images stay in their column; rows have a [`HeldImage`] for each.

    Args:
        dataset (`datasets.Dataset`), column (`str`): with images, one or a list.
        change (*optional*): made of each row.
    """

    def __init__(self, dataset: Any, column: str, change: Callable[[Any], Any] | None = None):
        self.dataset, self.column, self.change = dataset, column, change

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        texts = self.dataset.remove_columns(self.column).with_format(None)
        if (unread := type(texts.features)(unopened(texts.features))) != texts.features:  # audio and videos
            texts = texts.cast(unread)
        counts = self.dataset.select_columns([self.column]).with_format("arrow")
        held = HeldImage()
        for start in range(skip, len(self.dataset), _CHUNK):
            images = _lengths(counts[start : start + _CHUNK].column(self.column))
            some = texts[start : start + _CHUNK] if texts.column_names else {}
            for place, count in enumerate(images):
                row = {**{key: values[place] for key, values in some.items()}, self.column: [held] * count}
                yield row if self.change is None else self.change(row)

    def name(self, number: int, index: int) -> str:
        return f"row {index}"


def _lengths(values: Any) -> list[int]:
    """How many images each row of an Arrow column holds; nothing is read of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return [length or 0 for length in pc.list_value_length(values).to_pylist()]
    return [int(valid) for valid in pc.is_valid(values).to_pylist()]


class StreamedRows(Shards):
    """Of a stream of `datasets`."""

    def __init__(self, rows: Any):
        self.rows = rows
        self.count = rows.num_shards

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        rows = self.rows.shard(num_shards=self.count, index=number)
        # `iter`, which, unlike iteration, does not deal shards out over workers once more.
        for chunk in (rows.skip(skip) if skip else rows).iter(batch_size=_STREAM_CHUNK):
            for values in zip(*chunk.values(), strict=True):
                yield dict(zip(chunk, values, strict=True))

    def name(self, number: int, index: int) -> str:
        return f"row {index} of shard {number}"


class _Files(Shards):
    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.count = len(self.paths)

    def name(self, number: int, index: int) -> str:
        return f"row {index}{f' of {self.paths[number].name}' if self.count > 1 else ''}"


class Lines(_Files):
    """Of JSON lines."""

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        path = self.paths[number]
        with path.open("rb") as file:
            for place, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if place == 1 else line
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                try:
                    yield json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    yield UnreadableRow(f"{path}: line {place} is not JSON: {error}")


class Parquet(_Files):
    """Of parquet files, a part of one row group at a time. `datasets` has pyarrow read ahead as fast as it can: all of a long
    file, where rows are used more slowly than that."""

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.paths[number], pre_buffer=False, buffer_size=2**20) as file:
            for group in range(file.num_row_groups):
                if skip >= (count := file.metadata.row_group(group).num_rows):
                    skip -= count
                    continue
                for batch in file.iter_batches(_STREAM_CHUNK, row_groups=[group], use_threads=False):
                    yield from batch.slice(skip).to_pylist()
                    skip = max(0, skip - batch.num_rows)


class Tars(_Files):
    """Samples of tars as WebDataset writes them: neighbours that are called the same up to the first dot, with the fields of
    their JSON."""

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        return map(with_json, tar_rows(self.paths[number], skip))


def tar_rows(path: Path, skip: int = 0) -> Iterator[dict[str, Any]]:
    """Samples as they lie: `__key__`, `images`, `text`, `json` (a string)."""
    with tarfile.open(path) as tar:
        files = (member for member in tar if member.isfile())
        for index, (key, members) in enumerate(itertools.groupby(files, key=lambda member: _key(member.name))):
            if index < skip:
                continue
            row: dict[str, Any] = {"__key__": key}
            for member in members:
                suffix, data = member.name[len(key) :].lower(), tar.extractfile(member).read()  # type: ignore[union-attr]  # a file
                if suffix.endswith(_IMAGES):
                    row.setdefault("images", []).append({"bytes": data, "path": member.name})
                elif suffix == ".json":
                    row["json"] = data.decode("utf-8")
                elif suffix in (".txt", ".text", ".caption"):
                    row["text"] = data.decode("utf-8")
            yield row


def with_json(row: Mapping[str, Any]) -> Any:
    """A sample with the fields of its JSON; images are those of the tar."""
    try:
        fields = json.loads(row["json"]) if row.get("json") else {}
    except ValueError as error:
        return UnreadableRow(f"field 'json' of {row['__key__']!r} is not JSON: {error}")
    own = {name: value for name, value in row.items() if name != "json" and value is not None}
    return {**{name: value for name, value in fields.items() if name not in COLUMNS["image"]}, **own}


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}" if folder else file.partition(".")[0]


@dataclass
class Source:
    """Rows as they lie in a file, a folder or a dataset, and how each is read.

    Args:
        name: as errors call it.
        shards: which give the rows.
        root: the folder of relative paths.
        format: of `FORMATS`.
        row_format: of `ROW_FORMATS`; found by the first row where it is not said.
    """

    name: str
    shards: Shards
    root: Path
    format: str
    row_format: str = ""
    described: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.format in ROW_FORMATS:
            self.row_format = self.format
        if not self.row_format:
            first = next((row for row in self.shards.all() if not isinstance(row, RowError)), None)
            if first is None:
                raise ValueError(f"{self.name} has no rows. [errors.md#source]")
            if not isinstance(first, Mapping):
                raise ValueError(f"{self.name}: row 0 must be an object with fields, got {first!r:.80}. [errors.md#row]")
            self.row_format = find_format(first, self.name)
        if self.format == "auto":
            self.format = self.row_format
        self.described = self.format if self.format == self.row_format else f"{self.format}, rows of {self.row_format}"

    @property
    def held(self) -> HeldRows | None:
        """The rows, where their images stay in the column of a dataset."""
        return self.shards if isinstance(self.shards, HeldRows) else None

    def canonical(self, row: Any) -> list[dict[str, Any]] | RowError:
        """The canonical rows of a row, or what is wrong with it."""
        if isinstance(row, RowError):
            return row
        try:
            return read_row(row, self.row_format, self.root)
        except RowError as error:
            return error

    def read(self) -> Iterator[tuple[int, list[dict[str, Any]] | RowError, Any]]:
        """For each row its number, the canonical rows of it or what is wrong with it, and the row."""
        kind = None
        for index, row in enumerate(self.shards.all()):
            read = self.canonical(row)
            if not isinstance(read, RowError):
                kind = kind or kind_of(read[0])
                if kind_of(read[0]) != kind:
                    read = RowError(
                        kind, "is what the rows before this one have, and this one has not: rows of one kind are needed"
                    )
            yield index, read, row


__all__ = ["HeldRows", "Lines", "ListedRows", "PackedRows", "Parquet", "Shards", "Source", "StreamedRows", "Tars",
    "UnreadableRow", "tar_rows", "with_json"]  # fmt: skip
