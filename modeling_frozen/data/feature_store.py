"""A folder of tower features on disk: memory-mapped Arrow shards, found by the content of their image, read lazily.

`FeatureStore` is the folder, `StoredImage` one image in it, which stands in a row where its picture stood. Who fills the
folder is `feature_cache`. A shard is written under another name and renamed when it is whole, so that a killed run leaves
no half of one, and its number is claimed by creating the file, so that many processes can write at once. A number, once
given, never changes: rows keep them.
"""

import functools
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_KEY_FILE = "key.json"
_ROWS = 1 << 24  # an index is shard * _ROWS + row
_SECONDS = 120  # a slow tower's shards are closed after so long, or a killed run would lose hours


@dataclass(frozen=True)
class StoredImage:
    """One image in a store, or one of its views; equal ones are the same.

    Args:
        store: folder of the [`FeatureStore`].
        index: of the image in it.
        view: which of the image's views.
    """

    store: str
    index: int
    view: int = 0

    def load(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads `features` (positions, vision_width), in the dtype of the store, and `mask` (positions,), bool, or `None`
        where all positions are real."""
        return open_store(self.store).read(self.index, self.view)


@functools.lru_cache(maxsize=64)
def open_store(folder: str) -> "FeatureStore":
    """The store of a folder, opened once per process.

    Raises:
        ValueError: if there is none.
    """
    if not (Path(folder) / _KEY_FILE).is_file():
        raise ValueError(
            f"There is no store of features at `{folder}`: it was moved or deleted. Run `cache_vision_features` again, on the "
            "dataset with the images."
        )
    return FeatureStore(folder)


class FeatureStore:
    """
    Features by image: `read` by index, `indices` by content, `writer` to add some.

    Args:
        folder: where it lies.

    Attributes:
        key (`dict`): all that the features depend on beside the image; the folder's name is its hash.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.key: dict[str, Any] = json.loads((self.folder / _KEY_FILE).read_text(encoding="utf-8"))
        self.dtype = DTYPES[self.key["dtype"]]
        self.width, self.views = self.key["vision_width"], self.key["views"]
        self._tables: dict[int, Any] = {}
        self._found: dict[bytes, int] = {}
        self._read: set[int] = set()

    @classmethod
    def for_key(cls, cache_dir: str | Path, key: dict[str, Any]) -> "FeatureStore":
        """The store of this key under `cache_dir`, made where there is none. Another key has another folder, so that what
        was made by another tower, layer or preprocessing is never read."""
        text = json.dumps(key, sort_keys=True, indent=1)
        folder = Path(cache_dir).expanduser().resolve() / hashlib.sha256(text.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _KEY_FILE).exists():
            _publish(text.encode(), folder / _KEY_FILE)
        open_store.cache_clear()  # the folder may be another than when it was opened
        store = open_store(str(folder))
        if store.key != json.loads(text):
            raise ValueError(f"`{folder / _KEY_FILE}` was changed: delete the folder, and its features are made anew.")
        return store

    # --------------------------------------------------------------------------------------------------- reading

    def _shards(self) -> list[int]:
        """Numbers of the whole shards; an empty file is a number that was claimed and not filled (yet)."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.arrow") if path.stat().st_size)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:08d}.arrow"

    def _table(self, shard: int) -> Any:
        if shard not in self._tables:
            from datasets.table import MemoryMappedTable

            self._tables[shard] = MemoryMappedTable.from_file(str(self._path(shard)))
        return self._tables[shard]

    def indices(self) -> dict[bytes, int]:
        """Index of every image that is there, by the digest of its content."""
        for shard in self._shards():
            if shard not in self._read:
                for row, digest in enumerate(self._table(shard).column("digest").to_pylist()):
                    self._found.setdefault(digest, shard * _ROWS + row)
                self._read.add(shard)
        return self._found

    def read(self, index: int, view: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Features of one view of one image.

        Returns:
            `features` (positions, vision_width) and `mask` (positions,), bool, or `None` where all positions are real; what
            is masked is zero.
        """
        shard, row = divmod(index, _ROWS)
        table = self._table(shard).fast_slice(row, 1)
        data, mask = (_buffer(table, name) for name in ("features", "mask"))
        size = self.width * self.dtype.itemsize
        if mask is None:
            start, count = divmod(view * len(data), self.views)[0], len(data) // self.views
            return self._tensor(data[start : start + count]), None
        valid = torch.from_numpy(mask.reshape(self.views, -1).astype(bool))
        ends = valid.sum(-1).cumsum(0).tolist()
        start = ends[view - 1] if view else 0
        features = torch.zeros(valid.shape[1], self.width, dtype=self.dtype)
        features[valid[view]] = self._tensor(data[start * size : ends[view] * size])
        return features, valid[view]

    def _tensor(self, data: np.ndarray) -> torch.Tensor:
        copy = torch.empty(len(data), dtype=torch.uint8)  # numpy promises no address; products depend on it
        copy.numpy()[:] = data
        return copy.view(self.dtype).view(-1, self.width)

    # --------------------------------------------------------------------------------------------------- writing

    def writer(self, images_per_shard: int) -> "ShardWriter":
        return ShardWriter(self, images_per_shard)


class ShardWriter:
    """Adds images to a store, in shards of so many; a context manager. Leaving it, by an error too, publishes what there
    is."""

    def __init__(self, store: FeatureStore, images_per_shard: int):
        self.store, self.images_per_shard = store, min(images_per_shard, _ROWS)
        self._file = self._stream = None
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def add(self, digests: list[bytes], features: torch.Tensor, mask: torch.Tensor | None) -> None:
        """
        Writes images with all their views.

        Args:
            digests: of the images' contents.
            features: (images * views, positions, vision_width), on the host; stored in the store's dtype.
            mask: (images * views, positions), true at real positions; others are not stored.
        """
        import pyarrow as pa

        store, images = self.store, len(digests)
        features = features.to(store.dtype).contiguous()
        if store.dtype is torch.float16 and not features.isfinite().all():
            raise ValueError('Features of this tower are too large for float16: store them with `dtype="bfloat16"`.')
        if mask is None:
            counts = [features[0].numel() * store.views] * images
        else:
            counts = (mask.view(images, -1).sum(-1) * store.width).tolist()
            features = features[mask]
        ends = np.cumsum([0, *counts]) * store.dtype.itemsize
        data = features.flatten().view(torch.uint8).numpy()
        column = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), images, [None, pa.py_buffer(ends.astype(np.int64).tobytes()), pa.py_buffer(data)]
        )
        masks = [None] * images
        if mask is not None:
            masks = [one.numpy().astype(np.uint8).tobytes() for one in mask.view(images, -1)]
        batch = pa.record_batch([pa.array(digests, pa.binary()), column, pa.array(masks, pa.large_binary())], _schema())
        if self._stream is None:
            self._temporary = store.folder / f"writing-{os.getpid()}-{time.time_ns()}"
            self._file = pa.OSFile(str(self._temporary), "wb")
            self._stream, self._since = pa.ipc.new_stream(self._file, _schema()), time.monotonic()
        self._stream.write_batch(batch)
        self._count += images
        if self._count >= self.images_per_shard or time.monotonic() - self._since > _SECONDS:
            self.close()

    def close(self) -> None:
        """Publishes the shard that is being written, if any."""
        if self._stream is None:
            return
        self._stream.close()
        self._file.close()
        self._file = self._stream = None
        self._count = 0
        number = max((int(path.stem) for path in self.store.folder.glob("[0-9]*.arrow")), default=-1) + 1
        while True:
            target = self.store._path(number)
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                number += 1
        self._temporary.replace(target)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema({"digest": pa.binary(), "features": pa.large_binary(), "mask": pa.large_binary()})


def _buffer(table: Any, name: str) -> np.ndarray | None:
    """Bytes of a one-row column, where they lie in the memory map."""
    value = table.column(name).chunk(0)[0]
    return np.frombuffer(value.as_buffer(), np.uint8) if value.is_valid else None


def _publish(data: bytes, target: Path) -> None:
    temporary = target.with_name(f"writing-{os.getpid()}-{time.time_ns()}")
    temporary.write_bytes(data)
    temporary.replace(target)


__all__ = ["DTYPES", "FeatureStore", "ShardWriter", "StoredImage", "open_store"]
