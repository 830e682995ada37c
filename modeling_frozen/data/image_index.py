# SPDX-License-Identifier: Apache-2.0
"""Where the images of a store lie, by digest: one sorted file that is mapped, and in memory only what came since, so that
memory does not grow with the store.

The file is derived from the shards and can be deleted at any time. It says of which shards it is (size, time of writing), and
has a checksum: one that is half-written, or of shards that are no longer there, is never read but made anew. Processes that
write side by side each replace it whole; what one of them did not know, it reads from the shards.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .whole_files import temporary_path


_LOOSE = 1 << 16  # images in memory, some 10 MB, before they go into the file
_BLOCK = 1 << 16  # entries of it that are copied at a time
_DIGEST, _PLACE = np.dtype("S16"), np.dtype("<i8")


class ImageIndex(Mapping):
    """
    Index of each image by the digest of its content; of one that lies there twice the first that was found.

    Args:
        path: of the file.
        anew (`bool`, defaults to `False`): what the file holds is not read.

    Attributes:
        shards (`dict`): of what it holds the images; name -> (size, time of writing in ns).
    """

    def __init__(self, path: Path, anew: bool = False):
        self.path = path
        self.shards: dict[str, list[int]] = {}
        self._loose: dict[bytes, int] = {}
        self._digests, self._places = np.empty(0, _DIGEST), np.empty(0, _PLACE)
        if not anew:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                self._open()

    def _open(self) -> None:
        data = np.memmap(self.path, np.uint8, mode="r")
        length = int(data[-8:].view("<u8")[0])
        end = len(data) - 8 - length
        facts = json.loads(data[end:-8].tobytes())
        count = facts["count"]
        if end != count * (_DIGEST.itemsize + _PLACE.itemsize) or _checksum(data[:end]) != facts["checksum"]:
            raise ValueError("damaged")
        middle = count * _DIGEST.itemsize
        self._digests, self._places = data[:middle].view(_DIGEST), data[middle:end].view(_PLACE)
        self.shards = facts["shards"]

    def add(self, shard: str, stamp: list[int], digests: list[bytes], first: int) -> None:
        """The images of a shard, whose indices follow each other from `first` on."""
        for place, digest in enumerate(digests, first):
            if digest not in self:
                self._loose[digest] = place
        self.shards[shard] = stamp
        if len(self._loose) >= _LOOSE:
            with contextlib.suppress(OSError):  # a folder that is only read: it stays in memory
                self._settle()

    def _settle(self) -> None:
        """Writes what is in memory into the file, which is copied block by block."""
        order = sorted(self._loose)
        digests = np.array(order, _DIGEST)
        places = np.array([self._loose[digest] for digest in order], _PLACE)
        before = np.searchsorted(self._digests, digests)
        temporary = temporary_path(self.path.parent)
        try:
            with open(temporary, "w+b") as file:
                for old, new in ((self._digests, digests), (self._places, places)):
                    for start in range(0, len(old) + 1, _BLOCK):
                        here = (before >= start) & (before < start + _BLOCK)
                        file.write(np.insert(old[start : start + _BLOCK], before[here] - start, new[here]).tobytes())
                file.flush()
                checksum = _checksum(np.memmap(file, np.uint8, mode="r"))
                facts = {"count": len(self), "shards": self.shards, "checksum": checksum}
                text = json.dumps(facts).encode()
                file.seek(0, os.SEEK_END)
                file.write(text + len(text).to_bytes(8, "little"))
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._open()
        self._loose = {}

    def _row(self, digest: bytes) -> int:
        """Its place in the file, or -1. numpy's strings end at a zero byte when they are read, not when they are compared."""
        row = int(np.searchsorted(self._digests, np.array(digest, _DIGEST)))
        return row if row < len(self._digests) and self._digests[row : row + 1].tobytes() == digest else -1

    def __getitem__(self, digest: bytes) -> int:
        if digest in self._loose:
            return self._loose[digest]
        row = self._row(digest)
        if row < 0:
            raise KeyError(digest)
        return int(self._places[row])

    def __contains__(self, digest: Any) -> bool:
        return digest in self._loose or self._row(digest) >= 0

    def __len__(self) -> int:
        return len(self._digests) + len(self._loose)

    def __iter__(self) -> Iterator[bytes]:
        for row in range(len(self._digests)):
            yield self._digests[row : row + 1].tobytes()
        yield from self._loose


def _checksum(data: Any) -> str:
    import xxhash

    checksum = xxhash.xxh3_64()
    for start in range(0, len(data), 1 << 20):
        checksum.update(memoryview(data[start : start + (1 << 20)]))
    return checksum.hexdigest()


__all__ = ["ImageIndex"]
