# SPDX-License-Identifier: Apache-2.0
"""Rows of a stream beside a store of features, in shards that each lie in one file: `store_rows` writes them, on one machine
or many, and `load_image_text(folder, streaming=True)` reads them.

    folder/<hash of the key>/…                     the `FeatureStore`
    folder/rows/part-00003-of-00016/00000012.arrow the thirteenth shard of what the fourth of 16 machines wrote

A shard gets its name when it is whole and its images are in the store. It says what stream it is of, where that stood behind
its last row, and whether that was the end, so that a part that was stopped goes on there, and one that is unfinished is never
taken for a whole one. A row is JSON, with a checksum.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .feature_cache import VisionFeatures
from .feature_store import FeatureStore
from .rows import RowError
from .sources import Shards, Source
from .whole_files import DISK, temporary_path


_FORMAT = 1
_CHUNK = 64  # rows that are read at a time
_NOTE = b"frozen-prefix"


def part_folder(folder: Path, part: int, parts: int) -> Path:
    return folder / "rows" / f"part-{part:05d}-of-{parts:05d}"


def shards_of(part: Path) -> list[Path]:
    return sorted(part.glob("[0-9]*.arrow"))


def write_shard(target: Path, rows: list[str], images: list[list[bytes]], note: dict[str, Any]) -> None:
    """
    Writes a shard whole.

    Args:
        rows: JSON of each, without its images.
        images: of each, as [`VisionFeatures`] encodes them.
        note: `setup`, `workers`, `state`, `done`; see [`read_note`].

    Raises:
        OSError: if it can't be written.
    """
    import pyarrow as pa

    table = pa.table(
        {
            "row": pa.array(rows, pa.large_string()),
            "images": pa.array(images, pa.list_(pa.binary())),
            "checksum": pa.array(list(map(_checksum, rows, images)), pa.binary(8)),
        }
    ).replace_schema_metadata({_NOTE: json.dumps({"format": _FORMAT, **note})})
    temporary = temporary_path(target.parent)
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"`{target}` could not be written ({error}). {DISK}. [errors.md#stored-features]") from error


def _checksum(row: str, images: list[bytes]) -> bytes:
    import xxhash

    checksum = xxhash.xxh3_64(row.encode())
    for one in images:
        checksum.update(one)
    return checksum.digest()


def _open(path: Path) -> Any:
    """The shard's reader. Its footer is the last that is written: half a file has none.

    Raises:
        ValueError: if it is damaged.
    """
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise ValueError(
            f"`{path}` is damaged ({error}): delete it and those after it, and run `store_rows` again."
            " [errors.md#stored-features]"
        ) from error


def read_note(path: Path) -> dict[str, Any]:
    """What a shard says of itself: `setup` (of what it is), `workers` that read the stream, its `state` behind the last row,
    and whether that is `done`.

    Raises:
        ValueError: if it is damaged, or of another version.
    """
    note = json.loads((_open(path).schema.metadata or {}).get(_NOTE, b"{}"))
    if note.get("format") != _FORMAT:
        raise ValueError(
            f"`{path}` is no shard of `store_rows`, or of another version: give another folder. [errors.md#stored-features]"
        )
    return note


class StoredRows(Shards):
    """
    Of a folder that `store_rows` filled.

    Args:
        folder (`Path`): that was given to it, wherever it lies now.

    Raises:
        ValueError: if a part is missing, unfinished, damaged or of another stream.
    """

    def __init__(self, folder: Path):
        parts: dict[Path, dict[str, Any]] = {}
        self.paths: list[Path] = []
        for part in sorted(folder.glob("rows/part-*-of-*")):
            paths = shards_of(part)
            if [int(path.stem) for path in paths] != list(range(len(paths))):
                raise ValueError(
                    f"Of `{part}` shards are missing (there are {len(paths)}): delete it, and store it again."
                    " [errors.md#stored-features]"
                )
            notes = list(map(read_note, paths))
            if not notes or not notes[-1]["done"]:
                raise ValueError(
                    f"`{part}` is not finished ({len(paths)} shards): run `store_rows` with this part again; it goes on there."
                    " [errors.md#stored-features]"
                )
            if any(note["setup"] != notes[0]["setup"] for note in notes):
                raise ValueError(
                    f"`{part}` has shards of several streams: delete it, and store it again. [errors.md#stored-features]"
                )
            parts[part] = notes[0]["setup"]
            self.paths += paths
        setup = next(iter(parts.values()))
        if other := next((part for part, own in parts.items() if own != setup), None):
            raise ValueError(
                f"`{other}` is of another stream or store than those before it: each needs its own folder."
                " [errors.md#stored-features]"
            )
        wanted = [part_folder(folder, number, setup["parts"]) for number in range(setup["parts"])]
        if missing := [part.name for part in wanted if part not in parts]:
            raise ValueError(
                f"`{folder}` lacks {len(missing)} of {len(wanted)} parts, the first `{missing[0]}`: store them."
                " [errors.md#stored-features]"
            )
        self.count = len(self.paths)
        store = FeatureStore(folder / setup["store"])
        self._feature = VisionFeatures(str(store.folder), store.views)

    def read(self, number: int, skip: int = 0) -> Iterator[Any]:
        table = _open(self.paths[number]).read_all()
        for start in range(skip, len(table), _CHUNK):
            columns = table.slice(start, _CHUNK).to_pydict()
            for row, images, checksum in zip(columns["row"], columns["images"], columns["checksum"], strict=True):
                if _checksum(row, images) != checksum:
                    raise ValueError(
                        f"`{self.paths[number]}` is damaged (its bytes are not those that were written)"
                        " [errors.md#stored-features]"
                    )
                yield {**json.loads(row), "images": list(map(self._feature.decode_example, images))}

    def name(self, number: int, index: int) -> str:
        return f"row {index} of {self.paths[number].parent.name}/{self.paths[number].name}"


class StoredSource(Source):
    """Whose rows are canonical."""

    def canonical(self, row: Any) -> list[dict[str, Any]] | RowError:
        return row if isinstance(row, RowError) else [row]


def open_stored_rows(folder: Path) -> Source:
    return StoredSource(str(folder), StoredRows(folder), folder, "stored", "stored")


__all__ = ["StoredRows", "open_stored_rows", "part_folder", "read_note", "shards_of", "write_shard"]
