"""Images of a dataset by their content, read, hashed and preprocessed in worker processes: what `feature_cache` feeds to the
tower.

Nothing is decoded to tell images apart where their files are at hand. Decoding is left to the dataset's own feature, so that
the tower sees what it would see in training.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..processors import load_rgb_image


# What a row has of images: nothing, one, or a list with gaps.
Found = bytes | list[bytes | None] | None

_CHUNK = 64  # rows that a worker hashes at a time


def digest_of_image(value: Any, mode: str | None, known: dict[str, bytes]) -> bytes | None:
    """16 bytes that tell an image by its content: by its file, which is not decoded, else by its pixels."""
    if value is None:
        return None
    data = path = None
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        path = value
    elif isinstance(value, bytes):
        data = value
    if data is None and path is not None:
        if path in known:
            return known[path]
        if os.path.isfile(path):
            data = Path(path).read_bytes()
    else:
        path = None  # a mere name, which others may bear too
    if data is not None:
        digest = hashlib.blake2b(f"file {mode} ".encode(), digest_size=16)
        digest.update(data)
    else:
        image = load_rgb_image(value)
        digest = hashlib.blake2b(f"pixels {mode} {image.size} ".encode(), digest_size=16)
        digest.update(image.tobytes())
    if path is not None:
        known[path] = digest.digest()
    return digest.digest()


def inner_feature(feature: Any) -> Any:
    """The feature of a list's elements, or the feature itself."""
    while isinstance(feature, list | tuple) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list | tuple) else feature.feature
    return feature


class Images:
    """Images of a dataset by row, as they lie there, encoded where that is so."""

    def __init__(self, dataset: Any, column: str):
        import datasets

        feature = dataset.features[column]
        self.decoder = inner_feature(feature) if isinstance(inner_feature(feature), datasets.Image) else None
        text = getattr(inner_feature(feature), "dtype", None) in ("string", "large_string", "binary", "large_binary")
        self.raw = self.decoder is not None or text
        self.dataset = dataset.select_columns([column]).with_format("arrow" if self.raw else None)
        self.column = column

    def rows(self, start: int, end: int) -> list[Any]:
        values = self.dataset[start:end]
        return values.column(self.column).to_pylist() if self.raw else list(values[self.column])

    def row(self, index: int) -> Any:
        return self.rows(index, index + 1)[0]

    def __len__(self) -> int:
        return len(self.dataset)


class HeldImages:
    """Images of a piece of a stream, in memory."""

    def __init__(self, values: list[Any], decoder: Any):
        self.values, self.decoder = values, decoder

    def row(self, index: int) -> Any:
        return self.values[index]


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class Hashing(Dataset):
    """Digests of the images of a chunk of rows; runs in worker processes."""

    def __init__(self, images: Images):
        self.images, self.known = images, {}
        self.mode = getattr(images.decoder, "mode", None)

    def __len__(self) -> int:
        return -(-len(self.images) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[Found]:
        values = self.images.rows(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.images)))
        return [self.of(value) for value in values]

    def of(self, value: Any) -> Found:
        if isinstance(value, list | tuple):
            return [digest_of_image(one, self.mode, self.known) for one in value]
        return digest_of_image(value, self.mode, self.known)


class Prepare:
    """From an image as it lies in the dataset to the tower's input, all views of it; runs in worker processes."""

    def __init__(self, processor: Any, views: int, augment: Any, plain_view: bool, seed: int):
        self.processor, self.views, self.augment = processor, views, augment
        self.plain_view, self.seed = plain_view, seed

    def __call__(self, values: list[Any], digests: list[bytes], decoder: Any) -> dict[str, torch.Tensor]:
        if decoder is not None:
            values = [decoder.decode_example(value) if isinstance(value, Mapping) else value for value in values]
        if self.augment is not None:
            values = [
                self._view(image, digest, view)
                for image, digest in zip(map(load_rgb_image, values), digests, strict=True)
                for view in range(self.views)
            ]
        return dict(self.processor(images=values, return_tensors="pt"))

    def _view(self, image: Any, digest: bytes, view: int) -> Any:
        if self.plain_view and view == 0:
            return image
        drawn = hashlib.blake2b(digest + f"{self.seed} {view}".encode(), digest_size=4).digest()
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            number = int.from_bytes(drawn, "little")
            random.seed(number), np.random.seed(number), torch.manual_seed(number)
            changed = self.augment(image.copy())
        random.setstate(states[0]), np.random.set_state(states[1])
        return changed


class Batches(Dataset):
    """Preprocessed batches of images, by their places (row, position in the row's list)."""

    def __init__(self, images: Any, prepare: Prepare, places: list[tuple[bytes, int, int]], size: int):
        self.images, self.prepare = images, prepare
        self.batches = [places[start : start + size] for start in range(0, len(places), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[bytes], dict[str, torch.Tensor]]:
        batch = self.batches[index]
        values = [as_list(self.images.row(row))[position] for _, row, position in batch]
        digests = [digest for digest, _, _ in batch]
        return digests, self.prepare(values, digests, self.images.decoder)


def _first(items: list[Any]) -> Any:
    return items[0]


def load_in_workers(dataset: Dataset, workers: int, **options: Any) -> Iterable[Any]:
    workers = min(workers, len(dataset)) if len(dataset) > 1 else 0
    if workers:
        options["prefetch_factor"] = 4
    return DataLoader(dataset, batch_size=1, collate_fn=_first, num_workers=workers, **options)


__all__ = ["Batches", "Found", "Hashing", "HeldImages", "Images", "Prepare", "as_list", "inner_feature", "load_in_workers"]
