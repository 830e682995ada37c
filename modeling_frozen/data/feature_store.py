"""A folder of tower features on disk: memory-mapped Arrow shards, found by the content of their image, read lazily.

`FeatureStore` is the folder, `StoredImage` one image in it, which stands in a row where its image stood. `feature_cache` fills
the folder. What is read is checked: that it is of the image that was asked for, and that its bytes are those written.

A shard is written under another name and renamed when it is whole, so that a killed run leaves no half of one, and its number
is claimed by creating the file, so that many processes can write at once.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .image_index import ImageIndex
from .whole_files import DISK, remove_leftovers, temporary_path, write_whole


# What features are stored as: how they are read. int8 has a scale for each position, a float32.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.float32}

_KEY_FILE, _INDEX_FILE = "key.json", "images.index"
_ROWS = 1 << 24  # an index is shard * _ROWS + row
# In a mask, where each image has its own grid, or tiles: a real position that begins a row of it, or a tile. Other real ones
# are 1.
_FIRST_OF_ROW = 2
_SECONDS = 120  # a slow tower's shards are closed after so long, or a killed run would lose hours
_OPEN = 256  # shards that are held open, some 0.1 MB each
_AGAIN = "Run `cache_vision_features` again, on the dataset with the images"


class StoredImage:  # no dataclass: in the turns of a chat transformers makes dicts of those
    """One image in a store, or one of its views; equal ones are the same, wherever their rows were made.

    Args:
        store: folder of the [`FeatureStore`].
        digest: of the image's content.
        view: which of the image's views.
        index: where it was when the row was made, which spares a search.
        further: the same view of the same image in the stores of further vision towers, in their order.
    """

    __slots__ = ("digest", "further", "index", "store", "view")

    def __init__(
        self, store: str, digest: bytes, view: int = 0, index: int = -1, further: tuple["StoredImage", ...] = ()
    ) -> None:
        self.store, self.digest, self.view, self.index, self.further = store, digest, view, index, further

    def _same(self) -> tuple[Any, ...]:
        return self.store, self.digest, self.view, self.further

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredImage) and self._same() == other._same()

    def __hash__(self) -> int:
        return hash(self._same())

    def __repr__(self) -> str:
        return f"StoredImage({self.store!r}, {self.digest!r}, {self.view}, {self.index}, {self.further})"

    def load(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads `features` (positions, vision_width), in the dtype of the store, and `mask` (positions,), bool, or `None`
        where all positions are real."""
        return open_store(self.store).read(self.digest, self.view, self.index)

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the positions, where each image has its own (NaFlex); of an image in tiles the number of these
        and of the positions in each."""
        return open_store(self.store).grid(self.digest, self.view, self.index)

    @property
    def tile_options(self) -> dict[str, Any] | None:
        """How images were cut into tiles before the tower read them; `None` where they weren't."""
        return open_store(self.store).key.get("tiles")

    def count_tiles(self) -> int:
        """How many tiles of it are stored; one where none were cut."""
        grid = None if self.tile_options is None else self.grid()
        return 1 if grid is None else grid[0]

    @staticmethod
    def stack(images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Several of them as the model takes them: `vision_features` (images, positions, vision_width), padded to the longest,
        and, where positions vary, `vision_features_mask` (images, positions), and `spatial_shapes` (images, 2) of those that
        are grids. Of images in tiles there is a row for each tile, as the tower reads them. Of several vision towers
        `vision_features_2` and `vision_features_3` too.

        Raises:
            ValueError: if one is no stored image, or can't be read, with its number among `images`; if they are of several
                stores.
        """
        stored = [isinstance(image, StoredImage) for image in images]
        if not all(stored):
            raise ValueError(
                f"{sum(stored)} of {len(images)} images are stored features, the others images: take rows of one kind, by "
                "`cache_vision_features` on all. [errors.md#stored-features]"
            )
        if len({len(image.further) for image in images}) > 1:
            raise ValueError(
                "A batch holds features of one vision tower and of several: take rows of one kind. [errors.md#stored-features]"
            )
        batch = _stack(images)
        for number, further in enumerate(zip(*(image.further for image in images), strict=True), 2):
            batch[f"vision_features_{number}"] = _stack(further)["vision_features"]
        return batch


def _stack(images: Sequence[StoredImage]) -> dict[str, torch.Tensor]:
    """Those of one vision tower."""
    loaded, grids = [], []
    for number, image in enumerate(images):
        try:
            loaded.append(image.load())
            grids.append(None if loaded[-1][1] is None else image.grid())
        except ValueError as error:
            raise ValueError(f"Image {number} of the batch: {error}") from error
    features = [one for one, _ in loaded]
    kinds = {(one.shape[1], str(one.dtype), str(image.tile_options)) for one, image in zip(features, images, strict=True)}
    if len(kinds) > 1:
        raise ValueError(
            f"A batch holds features of several widths, dtypes or tiles, {sorted(kinds)}: of several stores."
            " [errors.md#stored-features]"
        )
    if images[0].tile_options is not None:
        real = [one if mask is None else one[mask] for one, mask in loaded]
        tiles = [one.unflatten(0, (image.count_tiles(), -1)) for one, image in zip(real, images, strict=True)]
        return {"vision_features": torch.cat(tiles)}
    length = max(len(one) for one in features)
    if all(mask is None and len(one) == length for one, mask in loaded):
        return {"vision_features": torch.stack(features)}
    masks = [torch.ones(len(one), dtype=torch.bool) if mask is None else mask for one, mask in loaded]
    known = [grid for grid in grids if grid is not None]
    return {
        **({"spatial_shapes": torch.tensor(known)} if len(known) == len(images) else {}),
        "vision_features": torch.stack([nn.functional.pad(one, (0, 0, 0, length - len(one))) for one in features]),
        "vision_features_mask": torch.stack([nn.functional.pad(mask, (0, length - len(mask))) for mask in masks]),
    }


@functools.lru_cache(maxsize=64)
def open_store(folder: str) -> "FeatureStore":
    """The store of a folder, opened once per process.

    Raises:
        ValueError: if there is none.
    """
    if not (Path(folder) / _KEY_FILE).is_file():
        raise ValueError(
            f"There is no store of features at `{folder}`: it was moved or deleted. {_AGAIN}. [errors.md#stored-features]"
        )
    return FeatureStore(folder)


class FeatureStore:
    """
    Features by image: `read` by the digest of its content, `writer` to add some.

    Args:
        folder: where it lies.

    Attributes:
        key (`dict`): all that the features depend on beside the image; the folder's name is its hash.

    Raises:
        ValueError: if the key was changed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        text = (self.folder / _KEY_FILE).read_bytes()
        if _hash(text) != self.folder.name:
            raise ValueError(
                f"`{self.folder / _KEY_FILE}` was changed: delete the folder, and its features are made anew."
                " [errors.md#stored-features]"
            )
        self.key: dict[str, Any] = json.loads(text)
        self.dtype = DTYPES[self.key["dtype"]]
        self.width, self.views = self.key["vision_width"], self.key["views"]
        self.is_scaled = self.key["dtype"] == "int8"
        self.bytes_of_position = self.width + 4 if self.is_scaled else self.width * self.dtype.itemsize
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._index: ImageIndex | None = None

    @classmethod
    def for_key(cls, cache_dir: str | Path, key: dict[str, Any]) -> "FeatureStore":
        """The store of this key under `cache_dir`, made where there is none. Another key has another folder, so that what
        was made by another tower, layer or preprocessing is never read."""
        text = json.dumps(key, sort_keys=True, indent=1).encode()
        folder = Path(cache_dir).expanduser().resolve() / _hash(text)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if not (folder / _KEY_FILE).exists():
            write_whole(folder / _KEY_FILE, text)
        open_store.cache_clear()  # the folder may be another than when it was opened
        return open_store(str(folder))

    # --------------------------------------------------------------------------------------------------- reading

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:08d}.arrow"

    def _opened(self, shard: int) -> Any:
        from datasets.table import MemoryMappedTable

        return MemoryMappedTable.from_file(str(self._path(shard)))

    def _table(self, shard: int) -> Any:
        """Of a shard, which is then held open."""
        if shard not in self._tables:
            self._tables[shard] = self._opened(shard)
            if len(self._tables) > _OPEN:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _damaged(self, shard: int, why: object) -> ValueError:
        return ValueError(
            f"`{self._path(shard)}` is damaged ({why}): delete this file. {_AGAIN}: what it held is made anew."
            " [errors.md#stored-features]"
        )

    def indices(self) -> ImageIndex:
        """Index of every image that is there, by the digest of its content.

        Raises:
            ValueError: if a shard is damaged.
        """
        stamps = {}
        for entry in os.scandir(self.folder):
            # An empty file is a number that was claimed and not filled (yet).
            if entry.name.endswith(".arrow") and entry.name[0].isdigit() and (stat := entry.stat()).st_size:
                stamps[entry.name] = [stat.st_size, stat.st_mtime_ns]
        index = self._index or ImageIndex(self.folder / _INDEX_FILE)
        if any(stamps.get(name) != stamp for name, stamp in index.shards.items()):  # a shard was deleted, or made anew
            with contextlib.suppress(OSError):  # a folder that is only read
                (self.folder / _INDEX_FILE).unlink(missing_ok=True)
            self._tables.clear()
            index = ImageIndex(self.folder / _INDEX_FILE, anew=True)
        self._index = index
        for name in sorted(stamps.keys() - index.shards.keys()):
            shard = int(name.removesuffix(".arrow"))
            try:
                # Not held open: what fills a store passes over each shard once.
                digests = self._opened(shard).column("digest")
                digests.validate(full=True)
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(shard, error) from error
            index.add(name, stamps[name], digests.to_pylist(), shard * _ROWS)
        return index

    def read(self, digest: bytes, view: int = 0, index: int = -1) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Features of one view of one image.

        Args:
            digest: of the image's content.
            view: which of its views.
            index: where it probably is. What lies there is another image's, or nothing, where the store was made anew.

        Returns:
            `features` (positions, vision_width) and `mask` (positions,), bool, or `None` where all positions are real; what
            is masked is zero.

        Raises:
            ValueError: if the image is not in the store, or its shard is damaged.
        """
        index, record = self._find(digest, view, index)
        data = record["features"]
        mask = None if record["mask"] is None else record["mask"].reshape(self.views, -1).astype(bool)
        if mask is None:
            ends = np.arange(self.views + 1) * (len(data) // self.views)
        else:
            ends = np.cumsum([0, *mask.sum(-1)]) * self.bytes_of_position
        data = data[ends[view] : ends[view + 1]]
        if _checksum(digest, record["mask"], data) != record["checksums"][8 * view : 8 * view + 8].tobytes():
            raise self._damaged(index // _ROWS, f"the bytes of image {digest.hex()} are not those that were written")
        copy = torch.empty(len(data), dtype=torch.uint8)  # numpy promises no address; products depend on it
        copy.numpy()[:] = data
        values = self._unpack(copy)
        if mask is None:
            return values, None
        valid = torch.from_numpy(mask[view])
        features = torch.zeros(len(valid), self.width, dtype=self.dtype)
        features[valid] = values
        return features, valid

    def pack(self, features: torch.Tensor) -> torch.Tensor:
        """(positions, vision_width) in the dtype that is read, to (positions, bytes)."""
        if not self.is_scaled:
            return features.contiguous().view(torch.uint8)
        scales = features.abs().amax(dim=-1, keepdim=True) / 127
        numbers = (features / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return torch.cat([scales.contiguous().view(torch.uint8), numbers.view(torch.uint8)], dim=-1)

    def _unpack(self, data: torch.Tensor) -> torch.Tensor:
        if not self.is_scaled:
            return data.view(self.dtype).view(-1, self.width)
        data = data.view(-1, self.bytes_of_position)
        scales = data[:, :4].contiguous().view(torch.float32)
        return data[:, 4:].contiguous().view(torch.int8).to(torch.float32) * scales

    def grid(self, digest: bytes, view: int = 0, index: int = -1) -> tuple[int, int] | None:
        """As [`StoredImage.grid`]; the arguments and errors are those of `read`."""
        mask = self._find(digest, view, index)[1]["mask"]
        rows = 0 if mask is None else int((mask.reshape(self.views, -1)[view] == _FIRST_OF_ROW).sum())
        return (rows, int(mask.reshape(self.views, -1)[view].astype(bool).sum()) // rows) if rows else None

    def _find(self, digest: bytes, view: int, index: int) -> tuple[int, dict[str, Any]]:
        record = self._record(index) if index >= 0 else None
        if record is None or record["digest"] != digest:
            index = self.indices().get(digest, -1)
            record = self._record(index) if index >= 0 else None
        if record is None or record["digest"] != digest or not 0 <= view < self.views:
            what = f"View {view} of image {digest.hex()}" if self.views > 1 else f"Image {digest.hex()}"
            raise ValueError(f"{what} is not in the store `{self.folder}`. {_AGAIN}. [errors.md#stored-features]")
        return index, record

    def _record(self, index: int) -> dict[str, Any] | None:
        """What is stored at an index, where it lies in the memory map; `None` if there is nothing."""
        shard, row = divmod(index, _ROWS)
        if shard not in self._tables and not self._path(shard).is_file():
            return None
        try:
            table = self._table(shard)
            if row >= len(table):
                return None
            table = table.fast_slice(row, 1)
            table.validate(full=True)  # where a length is damaged, reading would end the process
            record: dict[str, Any] = {}
            for name in ("digest", "features", "mask", "checksums"):
                value = table.column(name).chunk(0)[0]
                record[name] = np.frombuffer(value.as_buffer(), np.uint8) if value.is_valid else None
            return {**record, "digest": record["digest"].tobytes()}
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise self._damaged(shard, error) from error

    # --------------------------------------------------------------------------------------------------- writing

    def writer(self, images_per_shard: int) -> "ShardWriter":
        return ShardWriter(self, images_per_shard)


class ShardWriter:
    """Adds images to a store, in shards of so many; a context manager. Leaving it, by an error too, publishes what there is; a
    shard that could not be written is dropped whole."""

    def __init__(self, store: FeatureStore, images_per_shard: int):
        self.store, self.images_per_shard = store, min(images_per_shard, _ROWS)
        self._path: Path | None = None
        self._file: Any = None
        self._stream: Any = None
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def add(
        self,
        digests: list[bytes],
        features: torch.Tensor,
        mask: torch.Tensor | None,
        names: list[str] | None = None,
        grids: torch.Tensor | None = None,
    ) -> None:
        """
        Writes images with all their views.

        Args:
            digests: of the images' contents.
            features: (images * views, positions, vision_width), on the host; stored as the store's key says.
            mask: (images * views, positions), true at real positions; others are not stored.
            names: what errors call the images. Defaults to their digests.
            grids: (images * views, 2), rows and columns of the real positions, where each image has its own.

        Raises:
            ValueError: if a feature is not finite.
            OSError: if they can't be written.
        """
        import pyarrow as pa

        store, images = self.store, len(digests)
        names = names or [f"image {digest.hex()}" for digest in digests]
        features = features.to(store.dtype).contiguous()
        if mask is None:
            counts = np.full(images * store.views, features.shape[1])
        else:
            counts = mask.sum(-1).numpy()
            features = features[mask]
        data = store.pack(features.flatten(0, -2)).numpy().reshape(-1)
        ends = np.cumsum([0, *counts]) * store.bytes_of_position
        if not features.isfinite().all():
            finite = features.flatten(0, -2).isfinite().all(-1).split(counts.tolist())
            name = names[next(i for i, one in enumerate(finite) if not one.all()) // store.views]
            too_large = store.dtype is torch.float16 and not features.isnan().any()
            raise ValueError(
                f'The features of {name} are too large for float16: store them with `dtype="bfloat16"`.'
                " [errors.md#stored-features]"
                if too_large
                else f"The tower gives NaN or infinity for {name}, and nothing can be learnt from that: leave it out, or run "
                "the tower in float32. [errors.md#stored-features]"
            )
        masks = [None] * images if mask is None else list(_with_rows(mask, grids).view(images, -1).numpy())
        sums = [
            _checksum(digests[i // store.views], masks[i // store.views], data[ends[i] : ends[i + 1]])
            for i in range(images * store.views)
        ]
        offsets = pa.py_buffer(ends[:: store.views].astype(np.int64).tobytes())
        columns = {
            "digest": pa.array(digests, pa.binary(16)),
            "features": pa.LargeBinaryArray.from_buffers(pa.large_binary(), images, [None, offsets, pa.py_buffer(data)]),
            "mask": pa.array([None if one is None else one.tobytes() for one in masks], pa.large_binary()),
            "checksums": pa.array(
                [b"".join(sums[start : start + store.views]) for start in range(0, len(sums), store.views)],
                pa.binary(8 * store.views),
            ),
        }
        batch = pa.record_batch(columns)
        try:
            if self._stream is None:
                self._path, self._since = temporary_path(store.folder), time.monotonic()
                self._file = pa.OSFile(str(self._path), "wb")
                self._stream = pa.ipc.new_stream(self._file, batch.schema)
            self._stream.write_batch(batch)
        except OSError as error:
            self._drop(error)
        self._count += images
        if self._count >= self.images_per_shard or time.monotonic() - self._since > _SECONDS:
            self.close()

    def close(self) -> None:
        """Publishes the shard that is being written, if any."""
        if self._stream is None or self._path is None:
            return
        try:
            self._stream.close()
            self._file.close()
        except OSError as error:
            self._drop(error)
        number = max((int(path.stem) for path in self.store.folder.glob("[0-9]*.arrow")), default=-1) + 1
        while True:
            target = self.store._path(number)
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                number += 1
        self._path.replace(target)
        self._stream, self._path, self._count = None, None, 0

    def _drop(self, error: OSError) -> None:
        path, count = self._path, self._count
        self._stream, self._path, self._count = None, None, 0
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if path is not None:
            path.unlink(missing_ok=True)
        raise OSError(
            f"A shard of features could not be written to `{self.store.folder}` ({error}). It was dropped, with {count} "
            f"images in it; finished shards are kept. {DISK}. [errors.md#stored-features]"
        ) from error


def _with_rows(mask: torch.Tensor, grids: torch.Tensor | None) -> torch.Tensor:
    """A mask in bytes, with the beginnings of rows marked."""
    marked = mask.to(torch.uint8)
    for one, real, (_, columns) in zip(marked, mask, [] if grids is None else grids.tolist(), strict=grids is not None):
        places = real.nonzero()[:, 0]
        one[places[::columns]] = _FIRST_OF_ROW
    return marked


def _checksum(digest: bytes, mask: np.ndarray | None, data: np.ndarray) -> bytes:
    """Of one view, with whose it is. `datasets` brings the package."""
    import xxhash

    checksum = xxhash.xxh3_64(digest)
    if mask is not None:
        checksum.update(mask.data)
    checksum.update(data.data)
    return checksum.digest()


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]


__all__ = ["DTYPES", "FeatureStore", "ShardWriter", "StoredImage", "open_store"]
