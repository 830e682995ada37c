"""Runs the frozen tower once per image and trains from the store: it would only repeat itself, epoch by epoch.

`cache_vision_features` gives a dataset whose images are replaced by what the tower made of them, for `Trainer` and
`DataCollatorForFrozenPrefix` as they are. An image is known by its content, not by its row: five captions of one image are
one image, and a second run, or another dataset with the same images, has them. Decoding and preprocessing happen in
worker processes, while the tower runs on the batch before. Needs the package `datasets`.
"""

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..connectors import CONNECTORS, Connector
from ..modeling_frozen_prefix import FrozenPrefixModel
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from ..parts import PARTS
from ..vision_towers import VARIABLE, encode_images
from ..weights import weights_digest
from . import columns
from .columns import as_list
from .draws import draw
from .feature_store import DTYPES, FeatureStore, StoredImage
from .image_reading import Batches, Digests, Hashing, HeldImages, Images, Prepare, inner_feature, load_in_workers, name_of
from .processes import Processes
from .whole_files import remove_leftovers, temporary_path, write_whole


try:
    import pyarrow as pa
    from datasets.features.features import register_feature
except ImportError:
    pa = register_feature = None

# Raise it when what is stored for the same key changes.
_FORMAT = 2
_STREAM = 1024  # rows of a stream whose images are held at a time


@dataclass
class VisionFeatures:
    """Feature type of `datasets`: a column of it holds digests of images, with their places in a store, and reads as
    [`StoredImage`]. Of several views each read draws one ([`draw`]).

    Args:
        store: folder of the [`FeatureStore`].
        views: how many views each image has there.
        further: folders of the stores of further vision towers.
    """

    store: str
    views: int = 1
    further: list[str] = field(default_factory=list)
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "StoredImage"
    pa_type: ClassVar[Any] = None if pa is None else pa.binary()  # 16 bytes of digest, and 8 of index for each store
    _type: str = field(default="VisionFeatures", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> bytes | None:
        if not isinstance(value, StoredImage):
            return value
        return value.digest + b"".join(one.index.to_bytes(8, "little") for one in (value, *value.further))

    def decode_example(self, value: bytes, token_per_repo_id: Any = None) -> StoredImage:
        if not isinstance(value, bytes):
            raise ValueError(
                f"This column of stored features was made by an earlier version, which kept a mere index ({value!r}) that may "
                "point to another image by now: run `cache_vision_features` again, on the dataset with the images."
                " [errors.md#stored-features]"
            )
        view = draw(self.views, "view", value[:16]) if self.views > 1 else 0
        stored: tuple[StoredImage, ...] = ()
        for number, store in reversed(list(enumerate([self.store, *self.further]))):
            index = int.from_bytes(value[16 + 8 * number : 24 + 8 * number], "little")
            stored = (StoredImage(store, value[:16], view, index, further=stored if number == 0 else ()), *stored)
        return stored[0]


if register_feature is not None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental")
        register_feature(VisionFeatures, "VisionFeatures")


def cache_vision_features(
    dataset: Any,
    model: FrozenPrefixPreTrainedModel,
    processor: Any,
    *,
    image_column: str | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    dtype: str = "bfloat16",
    views: int = 1,
    augment: Callable[[Any], Any] | None = None,
    plain_view: bool = False,
    seed: int = 0,
    pool: bool = False,
    images_per_shard: int = 1000,
    device: str | torch.device | None = None,
) -> Any:
    """
    Runs the frozen vision tower over each distinct image of a dataset, once, and replaces the images by their features.

    What is done is kept: a run that was killed goes on where it was, and a run over images that are all there needs no
    tower. Under `accelerate launch` or `torchrun` each process does its part and all read all.

    Args:
        dataset (`datasets.Dataset`, `IterableDataset`, or a dict of them):
            With a column of images, of lists of images, or of paths; `None` for none. A stream is passed over once, to its
            end, and becomes a `Dataset`: its other columns are written to `cache_dir` as well.
        model: a frozen-prefix model. Of several vision towers each has a store of its own, the same as a model of this
            tower alone would have, and is loaded or not by itself.
        processor ([`FrozenPrefixProcessor`]): its image processor makes the tower's input.
        image_column (`str`, *optional*): defaults to `image`, else `images`.
        cache_dir (`str`, *optional*): holds a folder per key. Defaults to `frozen-prefix` in the cache of `datasets`.
        batch_size (`int`, defaults to 32): views per call of the tower.
        num_workers (`int`, *optional*):
            Processes that decode and preprocess. Defaults to the cores of this machine, at most 8, shared by its processes.
        dtype (`"bfloat16"`, `"float16"`, `"float32"` or `"int8"`):
            Of what is stored; `"int8"` with a scale (float32) for each position, and read as float32.
        views (`int`, defaults to 1):
            Augmented views stored of each image. Each read draws one: in `Trainer` by image and epoch, so that a resumed
            training draws the same; elsewhere from torch's global generator.
        augment (`Callable`, *optional*):
            Random change of an image: takes and gives a PIL image in RGB. Its draws (of `random`, numpy's and torch's
            global generators) depend on `seed`, the image and the number of the view alone.
        plain_view (`bool`, defaults to `False`): the first of the views is the image as it is.
        seed (`int`, defaults to 0): of the augmentation.
        pool (`bool`, defaults to `False`):
            Store the means that the connector `avg_pool` reads, in place of all positions: `prefix_length` vectors
            an image. Only connectors with the same pooling can train from such a store.
        images_per_shard (`int`, defaults to 1000): images per file; what a killed run may have to do again.
        device (*optional*):
            Where the tower runs. Defaults to where it is, or to the accelerator where there is one and the tower is on the
            CPU; it is put back.

    Returns:
        `datasets.Dataset`: the same rows. In the image column stand [`StoredImage`]s (indices into a memory map), which
        [`DataCollatorForFrozenPrefix`] turns into `vision_features`. `select`, `shuffle`, `train_test_split`, pickling and
        dataloader workers work as ever. A format (`with_format("torch")`) is taken off, for stored images are no tensors yet.
        On disk an image takes positions * vision_width values per view (with `pool`, prefix_length * vision_width), and so
        does each of its tiles, where the processor cuts them.

    Raises:
        ValueError: for a tower that trains; for `pool` with another connector, or several towers; for an augmentation without
            views, or views without augmentation; for images that are missing from the store where the tower is not loaded; for
            an image that can't be opened, that changes meanwhile, or whose features are not finite, with its row.
        OSError: if a shard can't be written.

    Example:

    ```python
    >>> rows = cache_vision_features(load_dataset("…", split="train"), model, processor)
    >>> model.unload_base_model("vision")
    >>> Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForFrozenPrefix(processor)).train()
    ```"""
    if register_feature is None:
        raise ImportError("`cache_vision_features` needs the package `datasets`: `pip install datasets`. [errors.md#extra]")
    import datasets

    if isinstance(dataset, dict):
        options = dict(locals())
        shared = {name: options[name] for name in cache_vision_features.__kwdefaults__ or ()}
        return type(dataset)({key: cache_vision_features(one, model, processor, **shared) for key, one in dataset.items()})
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"A dataset of type {type(dataset).__name__} can't be stored: give a `datasets.Dataset` or `IterableDataset`; "
            "`Dataset.from_list(rows)` makes one. [errors.md#stored-features]"
        )
    cache_dir = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "frozen-prefix").expanduser()
    work = prepare_work(
        model, processor, cache_dir, dtype=dtype, views=views, augment=augment, plain_view=plain_view, seed=seed, pool=pool,
        batch_size=batch_size, num_workers=num_workers, images_per_shard=images_per_shard, device=device,
    )  # fmt: skip
    column = _image_column(dataset, image_column)
    if isinstance(dataset, datasets.IterableDataset):
        return _from_stream(dataset, column, work, cache_dir)
    return _from_rows(dataset, column, work)


def prepare_work(
    model: FrozenPrefixPreTrainedModel,
    processor: Any,
    cache_dir: Path,
    *,
    dtype: str,
    views: int,
    augment: Callable[[Any], Any] | None,
    plain_view: bool,
    seed: int,
    pool: bool,
    batch_size: int,
    num_workers: int | None,
    images_per_shard: int,
    device: str | torch.device | None,
) -> "list[Work]":
    """For each vision tower the store of it and of these options, and who fills it. Arguments and errors are those of
    [`cache_vision_features`]."""
    _check_choices(dtype, views, augment, plain_view, min(batch_size, images_per_shard))
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT's
    _refuse_trained_tower(model)
    work = []
    for number, part in enumerate(model.config.vision_parts):
        own = processor.of_tower(number)
        tower_digest = _tower_digest(model, part, cache_dir)
        choices = (dtype, views, augment, plain_view, seed, pool)
        store = FeatureStore.for_key(cache_dir, store_key(model, own, *choices, part=part, tower_digest=tower_digest))
        prepare = Prepare(own, views, augment, plain_view, seed)
        work.append(Work(model, part, prepare, store, batch_size, num_workers, images_per_shard, device))
    return work


def _check_choices(dtype: str, views: int, augment: Any, plain_view: bool, smallest: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: features are stored in one of {', '.join(DTYPES)}. [errors.md#stored-features]")
    if views < 1 or smallest < 1:
        raise ValueError(f"views={views}, batch_size and images_per_shard must be at least 1. [errors.md#stored-features]")
    if augment is not None and views == 1:
        raise ValueError(
            "`augment` draws another image at each epoch, but a store holds what the tower saw once, so both together "
            "would train on one draw for ever: pass `views=k` to store k draws of each image, or leave `augment` out."
            " [errors.md#stored-features]"
        )
    if augment is None and views > 1:
        raise ValueError(
            f"views={views} without `augment` would be {views} equal copies: pass what draws them. [errors.md#stored-features]"
        )
    if plain_view and augment is None:
        raise ValueError(
            "`plain_view=True` sets the image itself beside augmented views: pass `augment` and `views`."
            " [errors.md#stored-features]"
        )


def tower_of(model: FrozenPrefixPreTrainedModel, part: str) -> PreTrainedModel | None:
    return cast(PreTrainedModel | None, getattr(model.base_model, PARTS[part].attribute))


def _refuse_trained_tower(model: FrozenPrefixPreTrainedModel) -> None:
    if model.config.vision_config is None:
        raise ValueError("This model has no vision tower, so there are no features to store. [errors.md#stored-features]")
    for part in model.config.vision_parts:
        tower = tower_of(model, part)
        trained = tower is not None and any(parameter.requires_grad for parameter in tower.parameters())
        if part in model.config.trainable or trained:
            raise ValueError(
                f'The {PARTS[part].description} trains ("{part}" in `config.trainable`, or adapters in it), so its features '
                "change at each step and can't be stored: train from the images, or freeze it. [errors.md#stored-features]"
            )


def _image_column(dataset: Any, image_column: str | None) -> str:
    column = columns.image_column(dataset.column_names or list(next(iter(dataset), {})), image_column)
    if dataset.features is not None and isinstance(inner_feature(dataset.features[column]), VisionFeatures):
        raise ValueError(f"The column {column!r} holds stored features already. [errors.md#stored-features]")
    if getattr(dataset, "format", {}).get("type") == "custom":
        raise ValueError(
            "The dataset has a transform of its own (`set_transform`), which may change or draw images at each read. Give the "
            "dataset without it (`dataset.with_format(None)`), and what draws as `augment` with `views=k`."
            " [errors.md#stored-features]"
        )
    return column


# ------------------------------------------------------------------------------------------------------------- the key


def store_key(
    model: FrozenPrefixPreTrainedModel,
    processor: Any,
    dtype: str,
    views: int = 1,
    augment: Any = None,
    plain_view: bool = False,
    seed: int = 0,
    pool: bool = False,
    *,
    part: str = "vision",
    tower_digest: str,
) -> dict[str, Any]:
    """All that features depend on beside the image: the tower (id, commit, fingerprint, dtype, all its weights), layer and
    selection, what the image processor does, the stored dtype, the augmentation, and the pooling."""
    config, image_processor = model.config, processor.image_processor
    geometry = config.geometry_of(part)
    key = {
        "format": _FORMAT,
        "tower": {**_tower_record(model, part), "weights": tower_digest},
        "layer": getattr(config, f"{part}_feature_layer"),
        "select_strategy": config.vision_feature_select_strategy,
        "num_leading_tokens": geometry["num_leading_tokens"],
        "vision_width": geometry["vision_width"],
        "image_processor": {"type": type(image_processor).__name__, **image_processor.to_dict()},
        "dtype": dtype,
        "views": views,
    }
    if config.vision_grid == VARIABLE:
        key["grids"] = True  # earlier stores know none
    if processor.crop_to_patches:
        key["tiles"] = processor.tile_options()
    if pool:
        key["pool"] = list(_pooling_connector(model).output_size)
    if augment is not None:
        key["augment"] = {"function": _digest_of_function(augment), "plain_view": plain_view, "seed": seed}
    return key


def _pooling_connector(model: FrozenPrefixPreTrainedModel) -> Any:
    connector = cast(FrozenPrefixModel, model.base_model).connector
    if CONNECTORS[model.config.connector_type].read is Connector.read:
        raise ValueError(
            f"`pool=True` stores the means that the connector 'avg_pool' reads, and this model's connector is "
            f"{model.config.connector_type!r}, which reads every position: leave `pool` out. [errors.md#stored-features]"
        )
    if len(model.config.vision_parts) > 1:
        raise ValueError(
            f"`pool=True` stores means of one tower's positions, and those of {len(model.config.vision_parts)} towers are "
            "taken when they were joined on the grid of the first: leave `pool` out. [errors.md#stored-features]"
        )
    return connector


def _tower_record(model: FrozenPrefixPreTrainedModel, part: str) -> dict[str, Any]:
    tower, record = tower_of(model, part), dict(getattr(model.config, f"{part}_base_model") or {})
    if tower is not None:
        record["dtype"] = str(tower.dtype).removeprefix("torch.")
    return {name: record.get(name) for name in ("name_or_path", "revision", "fingerprint", "dtype", "quantization")}


def _tower_digest(model: FrozenPrefixPreTrainedModel, part: str, cache_dir: Path) -> str:
    """The digest of the tower's weights. One that is not loaded is as its repository has it: it is loaded for a moment, and a
    note in `cache_dir` remembers its digest."""
    record = json.dumps(_tower_record(model, part), sort_keys=True).encode()
    note = cache_dir / f"tower-{hashlib.sha256(record).hexdigest()[:32]}"
    if (tower := tower_of(model, part)) is not None:
        return weights_digest(tower)
    if not note.is_file():
        model.load_base_model(part)
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_whole(note, weights_digest(cast(PreTrainedModel, tower_of(model, part))).encode())
        model.unload_base_model(part)
    return note.read_text(encoding="utf-8")


def _digest_of_function(function: Any) -> str:
    """By its state and its source, for an importable function's pickle is but its name."""
    from datasets.fingerprint import Hasher

    sources = []
    for part in (function, type(function)):
        try:
            sources.append(inspect.getsource(part))
        except (OSError, TypeError):
            continue
    return Hasher.hash([function, sources])


# ---------------------------------------------------------------------------------------------------------- the tower


class Work:
    """A tower, its store, and who does what."""

    def __init__(
        self,
        model: FrozenPrefixPreTrainedModel,
        part: str,
        prepare: Prepare,
        store: FeatureStore,
        batch_size: int,
        num_workers: int | None,
        images_per_shard: int,
        device: Any,
    ):
        self.model, self.part, self.prepare, self.store = model, part, prepare, store
        self.images_per_shard = images_per_shard
        self.processes = Processes()
        self.images_per_batch = max(1, batch_size // store.views)
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = max(1, min(8, cores // self.processes.here))
        self.workers = num_workers
        self.device = device

    def _device(self, tower: PreTrainedModel) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if tower.device.type == "cpu" and not os.environ.get("ACCELERATE_USE_CPU") and torch.accelerator.is_available():
            local = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
            return torch.device(str(torch.accelerator.current_accelerator()), local)
        return tower.device

    def encode(self, images: Any, places: dict[bytes, tuple[int, int]], title: str = "Vision features") -> None:
        """Encodes and stores the images at `places` (row and position in its list, by digest) that are this process's and not
        there yet."""
        done = self.store.indices()
        lacking = [(digest, *place) for digest, place in places.items() if digest not in done]
        tower = tower_of(self.model, self.part)
        if not lacking:
            return
        if tower is None:
            raise ValueError(
                f"{len(lacking)} of {len(places)} images are not in the store `{self.store.folder}` (the first: "
                f"{name_of(*lacking[0][1:])}), and the {PARTS[self.part].description} is not loaded: load it by "
                f'`model.load_base_model("{self.part}")`. [errors.md#stored-features]'
            )
        own = [place for place in lacking if self.processes.does(place[0])]
        if not own:
            return
        batches = Batches(images, self.prepare, own, self.images_per_batch)
        with (
            self.tower_in_place(tower) as device,
            self.store.writer(self.images_per_shard) as writer,
            tqdm(total=len(own), desc=title, unit="image", disable=self.processes.rank != 0) as bar,
        ):
            loader = load_in_workers(batches, self.workers, pin_memory=device.type == "cuda")
            for digests, names, features, mask, grids in self.run(tower, loader, device):
                writer.add(digests, features, mask, names, grids)
                bar.update(len(digests))

    @contextmanager
    def tower_in_place(self, tower: PreTrainedModel) -> Iterator[torch.device]:
        """Inside, the tower is where it runs, which is given."""
        device, home = self._device(tower), tower.device
        moves = device != home and not hasattr(tower, "hf_device_map")
        if moves:
            tower.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
        try:
            yield device if moves else home
        finally:
            if moves:
                tower.to(home)  # type: ignore[arg-type]

    @torch.no_grad()
    def run(
        self, tower: PreTrainedModel, loader: Iterable[Any], device: torch.device
    ) -> Iterator[tuple[list[bytes], list[str], torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Features on the host; those of a batch come when a GPU is at work on the next."""
        config, waiting = self.model.config, None
        for digests, names, inputs in loader:
            grids = inputs.get("spatial_shapes") if config.vision_grid == VARIABLE else None
            tiles = inputs.pop("tiles", None)
            inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
            features, mask, _ = encode_images(
                tower,
                inputs.pop("pixel_values"),
                layer=getattr(config, f"{self.part}_feature_layer"),
                select_strategy=config.vision_feature_select_strategy,
                num_leading_tokens=config.geometry_of(self.part)["num_leading_tokens"],
                **inputs,
            )
            if "pool" in self.store.key:
                features, mask, grids = _pooling_connector(self.model).read(features.float(), grids), None, None
            if tiles is not None:
                features, mask, grids = _by_image(features, tiles)
            features, mask = features.to(self.store.dtype), None if mask is None else mask.cpu()
            if device.type != "cuda":
                yield digests, names, features.cpu(), mask, grids
                continue
            on_host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            if waiting is not None:
                waiting[1].synchronize()
                yield waiting[0]
            waiting = (digests, names, on_host, mask, grids), event
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]

    def indices(self, wanted: Iterable[bytes]) -> Mapping[bytes, int]:
        """Where the images are, when every process has done its part."""
        self.processes.gather(None)  # waits
        indices = self.store.indices()
        lacking = sum(digest not in indices for digest in wanted)
        if lacking:
            raise RuntimeError(
                f"{lacking} images are not in `{self.store.folder}`: did another process fail? [errors.md#stored-features]"
            )
        return indices


def _by_image(features: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of tiles, (tiles of all images, positions, width), as one row an image: padded to the longest, with the mask of
    real positions, and each one's tiles and positions of a tile."""
    positions = features.shape[1]
    rows = [own.flatten(0, 1) for own in features.split(tiles.tolist())]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1])[None] < (tiles * positions)[:, None]
    return padded, mask, torch.stack([tiles, torch.full_like(tiles, positions)], dim=1)


# ------------------------------------------------------------------------------------------------------ two kinds of data


def _from_rows(dataset: Any, column: str, work: list[Work]) -> Any:
    images = Images(dataset, column)
    digests = _hash_rows(images, work[0])
    places: dict[bytes, tuple[int, int]] = {}
    for row, own in enumerate(digests):
        _note_places(places, row, own)
    for one in work:
        one.encode(images, places)
    return _replace(dataset, column, digests, places, work)


def _note_places(places: dict[bytes, tuple[int, int]], row: int, digests: Digests) -> None:
    for position, digest in enumerate(as_list(digests)):
        if digest is not None:
            places.setdefault(digest, (row, position))


def _hash_rows(images: Images, work: Work) -> list[Digests]:
    """What images each row has; the rows are shared among the processes."""
    hashing, processes = Hashing(images), work.processes
    part = torch.utils.data.Subset(hashing, range(processes.rank, len(hashing), processes.count))
    few = len(part) < 16  # hashed before workers would have started
    own = list(tqdm(load_in_workers(part, 0 if few else work.workers), "Distinct images", disable=few or processes.rank != 0))
    parts = processes.gather(own)
    return [one for chunk in range(len(hashing)) for one in parts[chunk % processes.count][chunk // processes.count]]


def _replace(dataset: Any, column: str, digests: list[Digests], wanted: Iterable[bytes], work: list[Work]) -> Any:
    import datasets

    indices = [one.indices(wanted) for one in work]
    folders = [str(one.store.folder) for one in work]
    feature = VisionFeatures(folders[0], work[0].store.views, folders[1:])

    def encode(digest: bytes | None) -> bytes | None:
        if digest is None:
            return None
        first, *further = [own[digest] for own in indices]
        others = tuple(StoredImage("", digest, index=index) for index in further)
        return feature.encode_example(StoredImage("", digest, index=first, further=others))

    values = [[encode(one) for one in own] if isinstance(own, list) else encode(own) for own in digests]
    column_type = [feature] if any(isinstance(own, list) for own in digests) else feature
    rest = dataset.with_format(None).remove_columns(column)
    if not rest.column_names:  # nothing to stand beside
        features = datasets.Features({column: column_type})
        return datasets.Dataset.from_dict({column: values}, features=features, split=dataset.split)
    return rest.add_column(column, values, feature=column_type)


def _from_stream(stream: Any, column: str, work: list[Work], cache_dir: Path) -> Any:
    """One pass: the images of a piece are encoded, its other columns written; all processes pass over all of it."""
    import datasets

    decoder = None
    if stream.features is not None and isinstance(inner_feature(stream.features[column]), datasets.Image):
        decoder = inner_feature(stream.features[column])
        if isinstance(stream.features[column], datasets.Image):
            stream = stream.cast_column(column, datasets.Image(mode=decoder.mode, decode=False))
    hashing = Hashing(HeldImages([], decoder))
    digests: list[Digests] = []
    known: set[bytes] = set()

    def rest() -> Iterator[dict[str, Any]]:
        for rows in _pieces(stream):
            start, values = len(digests), [row.pop(column) for row in rows]
            places: dict[bytes, tuple[int, int]] = {}
            for row, value in enumerate(values, start):
                digests.append(hashing.of(row, value))
                _note_places(places, row, digests[-1])
            places = {digest: place for digest, place in places.items() if digest not in known}
            known.update(places)
            for one in work:
                one.encode(HeldImages(values, decoder, start), places, f"{len(digests)} rows")
            yield from rows

    others = [name for name in stream.column_names or [] if name != column]
    features = None
    if stream.features is not None and others:
        features = datasets.Features({name: stream.features[name] for name in others})
    path = None
    processes = work[0].processes
    if processes.rank == 0:
        path = _write_rows(rest(), features, cache_dir / "rows")
    else:
        for _ in rest():
            pass
    path = processes.gather(path)[0]
    empty = [None] * len(digests)
    if path is None:
        written = datasets.Dataset.from_dict({column: empty})
    else:
        written = datasets.Dataset.from_file(path).add_column(column, empty)
    return _replace(written, column, digests, known, work)


def _pieces(stream: Any) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in stream:
        rows.append(dict(row))
        if len(rows) == _STREAM:
            yield rows
            rows = []
    if rows:
        yield rows


def _write_rows(rows: Iterator[dict[str, Any]], features: Any, folder: Path) -> str | None:
    """Writes the rows as one Arrow file, named by its content, so that the same stream has one. Returns its path; `None`
    where there is nothing in them."""
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = temporary_path(folder)
    row: dict[str, Any] = {}
    with ArrowWriter(path=str(temporary), features=features) as writer:
        for row in rows:
            if row:
                writer.write(row)
        if row:
            writer.finalize()
    if not row:
        temporary.unlink(missing_ok=True)
        return None
    with open(temporary, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return str(temporary.replace(folder / f"{digest.hexdigest()[:32]}.arrow"))


__all__ = ["StoredImage", "VisionFeatures", "Work", "cache_vision_features", "prepare_work", "store_key", "tower_of"]
