"""Images by their content: the one digest that tells them apart everywhere, and their reading, hashing and preprocessing in
worker processes for the feature cache.

Nothing is decoded to tell images apart where their files are at hand. What is opened goes through the processor's own loader.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..processors import load_rgb_image
from .columns import as_list, is_list
from .draws import seeded
from .feature_store import StoredImage


# What a row has of images, by digest: none, one, or a list with gaps.
Digests: TypeAlias = bytes | list[bytes | None] | None

_CHUNK = 64  # rows that a worker hashes at a time


def read_image(value: Any, decoder: Any = None, name: str = "image") -> Any:
    """
    An image as it is hashed and decoded, read once.

    Args:
        value: what [`load_rgb_image`] takes.
        decoder (`datasets.Image`, *optional*): of the column, for places that only `datasets` can open.
        name (`str`): what an error calls it.

    Returns:
        `{"bytes", "path"}` of an encoded image, a local file's included; an array of floats as it is, for its range is not
        known here; else a PIL image in RGB.

    Raises:
        ValueError: if it can't be opened, with its name.
    """
    if isinstance(value, bytes | str | os.PathLike):
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": os.fspath(value)}
    if not isinstance(value, Mapping):
        return value if _is_float(value) else load_rgb_image(value, name)
    data, path = value.get("bytes"), value.get("path")
    if data is not None:
        return {"bytes": data, "path": path}
    if path is not None and len(path) < 4096 and os.path.isfile(path):
        return {"bytes": Path(path).read_bytes(), "path": path}
    if decoder is not None and path is not None and "://" in path:
        value = _decode(decoder, {"bytes": None, "path": path}, name)
    return load_rgb_image(value, name)


def digest_of_image(image: Any, decoder: Any = None, known: dict[str, bytes] | None = None, name: str = "image") -> bytes:
    """
    16 bytes by which an image is known, in stores, splits, batches of pairs and evaluation: by its file, which is not decoded,
    else by its upright RGB pixels (an image that is a file here and decoded there has two).

    Args:
        image: what [`load_rgb_image`] or [`read_image`] takes, or a [`StoredImage`].
        decoder (`datasets.Image`, *optional*): of the column; its `mode` is what the image is converted to.
        known (`dict`, *optional*): digests by path, of files that don't change meanwhile; added to.
        name (`str`): what an error calls it.

    Raises:
        ValueError: if it can't be opened, with its name.
    """
    if isinstance(image, StoredImage):
        return image.digest
    path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
    if known is None or not isinstance(path, str):
        path = None
    elif path in known:
        return known[path]
    content = read_image(image, decoder, name)
    if isinstance(content, Mapping):
        kind, data = "file", content["bytes"]
    elif _is_float(content):
        kind, data = f"floats {tuple(content.shape)}", torch.as_tensor(content).detach().cpu().double().numpy().tobytes()
    else:
        kind, data = f"pixels {content.size}", content.tobytes()
    digest = hashlib.blake2b(f"{kind} {getattr(decoder, 'mode', None)} ".encode(), digest_size=16)
    digest.update(data)
    if known is not None and path is not None:
        known[path] = digest.digest()
    return digest.digest()


def digest_of_media(media: Any, read: Callable[[Any], Any], known: dict[str, bytes]) -> bytes:
    """
    16 bytes by which a video or audio is known: by its file, which is not decoded, else by what the model sees of it.

    Args:
        media: what `load_video` or `load_waveform` takes.
        read: gives its frames or its waveform.
        known (`dict`): digests by path, of files that don't change meanwhile; added to.

    Raises:
        ValueError: if it can't be opened.
    """
    encoded = isinstance(media, Mapping) and media.get("array") is None
    data, path = (media.get("bytes"), media.get("path")) if encoded else (None, media)
    data = media if isinstance(media, bytes | bytearray | memoryview) else data
    path = os.fspath(path) if isinstance(path, str | os.PathLike) and len(os.fspath(path)) < 4096 else None
    if data is None and path in known:
        return known[path]
    digest = hashlib.blake2b(digest_size=16)
    if data is None and path is not None and os.path.isfile(path):
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        return known.setdefault(path, digest.digest())
    if data is not None:
        digest.update(data)
        return digest.digest()
    seen = read(media)
    for part in seen if isinstance(seen, list) else [seen]:
        digest.update(f"{getattr(part, 'size', None)} ".encode() + part.tobytes())
    return digest.digest()


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else getattr(value, "dtype", np.dtype("O")).kind == "f"


def _decode(decoder: Any, value: Mapping[str, Any], name: str) -> Any:
    try:
        return decoder.decode_example(value)
    except Exception as error:  # PIL, fsspec and the network raise some twenty kinds
        raise ValueError(
            f"Can't open {name} ({value['path']!r}): {error or type(error).__name__}. [errors.md#media]"
        ) from error


def inner_feature(feature: Any) -> Any:
    """The feature of a list's elements, or the feature itself."""
    while isinstance(feature, list | tuple) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list | tuple) else feature.feature
    return feature


def unopened(feature: Any, kinds: Any = object) -> Any:
    """A column's type, with the bytes of images and audio (of `kinds`, where they are named) left as they are."""
    if isinstance(feature, Mapping):
        return {name: unopened(inner, kinds) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [unopened(inner, kinds) for inner in feature]
    feature = copy.copy(feature)
    if isinstance(feature, kinds) and getattr(feature, "decode", None) is True:
        feature.decode = False
    if hasattr(feature, "feature"):
        feature.feature = unopened(feature.feature, kinds)
    return feature


class Images:
    """Images of a dataset by row, as they lie there, encoded where that is so."""

    def __init__(self, dataset: Any, column: str):
        import datasets

        feature = inner_feature(dataset.features[column])
        self.decoder = feature if isinstance(feature, datasets.Image) else None
        text = getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary")
        self.raw = self.decoder is not None or text
        self.dataset = dataset.select_columns([column]).with_format("arrow" if self.raw else None)
        self.column = column

    def rows(self, start: int, end: int) -> list[Any]:
        values = self.dataset[start:end]
        return values.column(self.column).to_pylist() if self.raw else list(values[self.column])

    def __len__(self) -> int:
        return len(self.dataset)


class HeldImages:
    """Images of a piece of a stream, in memory; `start` is the number of its first row."""

    def __init__(self, values: list[Any], decoder: Any, start: int = 0):
        self.values, self.decoder, self.start = values, decoder, start

    def rows(self, start: int, end: int) -> list[Any]:
        return self.values[start - self.start : end - self.start]


class Hashing(Dataset):
    """Digests of the images of a chunk of rows; runs in worker processes."""

    def __init__(self, images: Any):
        self.images = images
        self.known: dict[str, bytes] = {}

    def __len__(self) -> int:
        return -(-len(self.images) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[Digests]:
        start = chunk * _CHUNK
        return [self.of(start + i, value) for i, value in enumerate(self.images.rows(start, start + _CHUNK))]

    def of(self, row: int, value: Any) -> Digests:
        """Of what a row has in its image column."""
        digests = [
            None if one is None else digest_of_image(one, self.images.decoder, self.known, name_of(row, place))
            for place, one in enumerate(as_list(value))
        ]
        return digests if is_list(value) else digests[0]


def name_of(row: int, place: int = 0) -> str:
    return f"image {place} of row {row}"


class Prepare:
    """From images to the tower's input, all views of them; runs in worker processes."""

    def __init__(self, processor: Any, views: int, augment: Any, plain_view: bool, seed: int):
        self.processor, self.views, self.augment = processor, views, augment
        self.plain_view, self.seed = plain_view, seed

    def __call__(self, images: list[Any], digests: list[bytes]) -> dict[str, torch.Tensor]:
        if self.augment is not None:
            images = [
                self._view(image, digest, view)
                for image, digest in zip(map(load_rgb_image, images), digests, strict=True)
                for view in range(self.views)
            ]
        inputs = dict(self.processor(images=images, return_tensors="pt"))
        if self.processor.crop_to_patches:
            inputs["tiles"] = torch.tensor([self.processor.count_tiles(image) for image in images])
        return inputs

    def _view(self, image: Any, digest: bytes, view: int) -> Any:
        if self.plain_view and view == 0:
            return image
        with seeded(self.seed, digest, view):
            return self.augment(image.copy())


class Batches(Dataset):
    """Preprocessed batches of images, by their places (digest, row, position in the row's list); of each image the digest and
    the name."""

    def __init__(self, images: Any, prepare: Prepare, places: list[tuple[bytes, int, int]], size: int):
        self.images, self.prepare = images, prepare
        self.batches = [places[start : start + size] for start in range(0, len(places), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[bytes], list[str], dict[str, torch.Tensor]]:
        batch = self.batches[index]
        digests, names = [digest for digest, _, _ in batch], [name_of(row, place) for _, row, place in batch]
        images = [self._open(*place, name) for place, name in zip(batch, names, strict=True)]
        return digests, names, self.prepare(images, digests)

    def _open(self, digest: bytes, row: int, place: int, name: str) -> Any:
        decoder = self.images.decoder
        content = read_image(as_list(self.images.rows(row, row + 1)[0])[place], decoder, name)
        if digest_of_image(content, decoder) != digest:
            raise ValueError(
                f"{name.capitalize()} is another than a moment ago: its file was replaced while features were made. Run "
                "`cache_vision_features` again; what is stored already is kept. [errors.md#stored-features]"
            )
        if isinstance(content, Mapping) and getattr(decoder, "mode", None) is not None:
            content = _decode(decoder, content, name)
        return content if _is_float(content) else load_rgb_image(content, name)


def load_in_workers(dataset: Any, workers: int, **options: Any) -> Iterable[Any]:
    """The items of a map-style dataset, in order."""
    workers = min(workers, len(dataset)) if len(dataset) > 1 else 0
    if workers:
        options["prefetch_factor"] = 4
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


__all__ = ["Batches", "Digests", "Hashing", "HeldImages", "Images", "Prepare", "digest_of_image", "digest_of_media",
    "inner_feature", "load_in_workers", "name_of", "read_image", "unopened"]  # fmt: skip
