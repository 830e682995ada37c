"""Runs the frozen tower once per image and trains from the store: it would only repeat itself, epoch by epoch.

`cache_vision_features` gives a dataset whose images are replaced by what the tower made of them, for `Trainer` and
`DataCollatorForFrozenPrefix` as they are. An image is known by its content, not by its row: five captions of one picture are
one image, and a second run, or another dataset with the same pictures, finds them. Decoding and preprocessing happen in
worker processes, while the tower runs on the batch before. Needs the package `datasets`.
"""

import hashlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..checkpoints import parts_with_home
from ..vision_towers import encode_images
from .feature_store import DTYPES, FeatureStore, StoredImage
from .image_reading import Batches, Found, Hashing, HeldImages, Images, Prepare, as_list, inner_feature, load_in_workers


try:
    import pyarrow as pa
    from datasets.features.features import register_feature
except ImportError:
    pa = register_feature = None

# Raise it when what is stored for the same key changes.
_FORMAT = 1
_STREAM = 1024  # rows of a stream whose images are held at a time


@dataclass
class VisionFeatures:
    """Feature type of `datasets`: a column of it holds indices into a store and reads as [`StoredImage`]. Each read of an
    image with several views draws one from torch's global generator.

    Args:
        store: folder of the [`FeatureStore`].
        views: how many views each image has there.
    """

    store: str
    views: int = 1
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "StoredImage"
    pa_type: ClassVar[Any] = None if pa is None else pa.int64()
    _type: str = field(default="VisionFeatures", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> int | None:
        return value.index if isinstance(value, StoredImage) else value

    def decode_example(self, value: int, token_per_repo_id: Any = None) -> StoredImage:
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        return StoredImage(self.store, value, view)


if register_feature is not None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental")
        register_feature(VisionFeatures, "VisionFeatures")


def cache_vision_features(
    dataset: Any,
    model: nn.Module,
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
        model: a frozen-prefix model.
        processor ([`FrozenPrefixProcessor`]): its image processor makes the tower's input.
        image_column (`str`, *optional*): defaults to `image`, else `images`.
        cache_dir (`str`, *optional*): holds a folder per key. Defaults to `frozen-prefix` in the cache of `datasets`.
        batch_size (`int`, defaults to 32): views per call of the tower.
        num_workers (`int`, *optional*):
            Processes that decode and preprocess. Defaults to the cores of this machine, at most 8, shared by its processes.
        dtype (`"bfloat16"`, `"float16"` or `"float32"`): of what is stored.
        views (`int`, defaults to 1): augmented views stored of each image; each read draws one.
        augment (`Callable`, *optional*):
            Random change of an image: takes and gives a PIL image in RGB. The draws (of `random`, numpy's and torch's
            global generators) depend on `seed`, the image and the number of the view alone.
        plain_view (`bool`, defaults to `False`): the first of the views is the image as it is.
        seed (`int`, defaults to 0): of the augmentation.
        images_per_shard (`int`, defaults to 1000): images per file; what a killed run may have to do again.
        device (*optional*):
            Where the tower runs. Defaults to where it is, or to the accelerator where there is one and the tower is on the
            CPU; it is put back.

    Returns:
        `datasets.Dataset`: the same rows. In the image column stand [`StoredImage`]s (indices into a memory map), which
        [`DataCollatorForFrozenPrefix`] turns into `vision_features`. `select`, `shuffle`, `train_test_split`, pickling and
        dataloader workers work as ever. A format (`with_format("torch")`) is taken off, for stored images are no tensors yet.
        On disk an image takes positions * vision_width values per view.

    Raises:
        ValueError: for a tower that trains; for an augmentation without views, or views without augmentation; for images
            that are missing from the store where the tower is not loaded.

    Example:

    ```python
    >>> rows = cache_vision_features(load_dataset("…", split="train"), model, processor)
    >>> model.unload_base_model("vision")
    >>> Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForFrozenPrefix(processor)).train()
    ```"""
    if register_feature is None:
        raise ImportError("`cache_vision_features` needs the package `datasets`: `pip install datasets`.")
    import datasets

    _check_choices(dtype, views, augment, plain_view, min(batch_size, images_per_shard))
    if isinstance(dataset, dict):
        options = dict(locals())
        names = cache_vision_features.__kwdefaults__
        shared = {name: options[name] for name in names}
        return type(dataset)({key: cache_vision_features(one, model, processor, **shared) for key, one in dataset.items()})
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"A dataset of type {type(dataset).__name__} can't be stored: give a `datasets.Dataset` or `IterableDataset`; "
            "`Dataset.from_list(rows)` makes one."
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = model.base_model
    _refuse_trained_tower(base)
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "frozen-prefix"
    store = FeatureStore.for_key(cache_dir, store_key(model, processor, dtype, views, augment, plain_view, seed))
    prepare = Prepare(processor, views, augment, plain_view, seed)
    work = _Work(base, prepare, store, batch_size, num_workers, images_per_shard, device)
    column = _image_column(dataset, image_column)
    if isinstance(dataset, datasets.IterableDataset):
        return _from_stream(dataset, column, work, Path(cache_dir))
    return _from_rows(dataset, column, work)


def _check_choices(dtype: str, views: int, augment: Any, plain_view: bool, smallest: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: features are stored in one of {', '.join(DTYPES)}.")
    if views < 1 or smallest < 1:
        raise ValueError(f"views={views}, batch_size and images_per_shard must be at least 1.")
    if augment is not None and views == 1:
        raise ValueError(
            "`augment` draws another picture at each epoch, but a store holds what the tower saw once, so both together "
            "would train on one draw for ever: pass `views=k` to store k draws of each image, or leave `augment` out."
        )
    if augment is None and views > 1:
        raise ValueError(f"views={views} without `augment` would be {views} equal copies: pass what draws them.")
    if plain_view and augment is None:
        raise ValueError("`plain_view=True` sets the image itself beside augmented views: pass `augment` and `views`.")


def _refuse_trained_tower(base: nn.Module) -> None:
    tower = base.vision_tower
    if base.config.vision_config is None:
        raise ValueError("This model has no vision tower, so there are no features to store.")
    trained = tower is not None and any(parameter.requires_grad for parameter in tower.parameters())
    if "vision" in base.config.trainable or trained:
        raise ValueError(
            'The vision tower trains ("vision" in `config.trainable`, or adapters in it), so its features change at each '
            "step and can't be stored: train from the images, or freeze it."
        )


def _image_column(dataset: Any, image_column: str | None) -> str:
    names = (image_column,) if image_column else ("image", "images")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ValueError(
            f"The dataset has no column {' or '.join(map(repr, names))}, but {columns}: name its images by `image_column`."
        )
    if dataset.features is not None and isinstance(inner_feature(dataset.features[found]), VisionFeatures):
        raise ValueError(f"The column {found!r} holds stored features already.")
    if getattr(dataset, "format", {}).get("type") == "custom":
        raise ValueError(
            "The dataset has a transform of its own (`set_transform`), which may change or draw images at each read. Give the "
            "dataset without it (`dataset.with_format(None)`), and what draws as `augment` with `views=k`."
        )
    return found


# ------------------------------------------------------------------------------------------------------------- the key


def store_key(
    model: nn.Module,
    processor: Any,
    dtype: str,
    views: int = 1,
    augment: Any = None,
    plain_view: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """All that features depend on beside the image: the tower (id, commit, fingerprint, dtype), layer and selection, what the
    image processor does, the stored dtype, and the augmentation. Of the tower the config's record is enough, so that it need
    not be loaded."""
    base, config = model.base_model, model.config
    tower, record = base.vision_tower, dict(config.vision_base_model or {})
    if tower is not None:
        record["dtype"] = str(tower.dtype).removeprefix("torch.")
        homeless = "vision" not in parts_with_home(model) or record.get("fingerprint") is None
        if homeless or "vision" in model.changed_parts():
            record["fingerprint"] = _digest_of_weights(tower)
    image_processor = processor.image_processor
    key = {
        "format": _FORMAT,
        "tower": {name: record.get(name) for name in ("name_or_path", "revision", "fingerprint", "dtype", "quantization")},
        "layer": config.vision_feature_layer,
        "select_strategy": config.vision_feature_select_strategy,
        "num_leading_tokens": config.num_leading_tokens,
        "vision_width": config.vision_width,
        "image_processor": {"type": type(image_processor).__name__, **image_processor.to_dict()},
        "dtype": dtype,
        "views": views,
    }
    if augment is not None:
        key["augment"] = {"function": _digest_of_function(augment), "plain_view": plain_view, "seed": seed}
    return key


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


def _digest_of_weights(tower: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- the tower


class _Processes:
    """This process among those that run the same program, whether or not they met already."""

    def __init__(self) -> None:
        ours = torch.distributed
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (ours.is_available() and ours.is_initialized()):
            from accelerate import PartialState

            PartialState()
        together = ours.is_available() and ours.is_initialized()
        self.rank, self.count = (ours.get_rank(), ours.get_world_size()) if together else (0, 1)
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def mine(self, digest: bytes) -> bool:
        # By content: what is done already may look different to each process, while others write.
        return int.from_bytes(digest[:8], "little") % self.count == self.rank


class _Work:
    """The tower, the store, and who does what."""

    def __init__(
        self,
        base: nn.Module,
        prepare: Prepare,
        store: FeatureStore,
        batch_size: int,
        num_workers: int | None,
        images_per_shard: int,
        device: Any,
    ):
        self.base, self.prepare, self.store, self.images_per_shard = base, prepare, store, images_per_shard
        self.processes = _Processes()
        self.images_per_batch = max(1, batch_size // store.views)
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = max(1, min(8, cores // self.processes.here))
        self.workers = num_workers
        self.device = device

    def _device(self, tower: nn.Module) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if tower.device.type == "cpu" and not os.environ.get("ACCELERATE_USE_CPU") and torch.accelerator.is_available():
            local = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
            return torch.device(torch.accelerator.current_accelerator().type, local)
        return tower.device

    def encode(self, images: Any, places: Iterable[tuple[bytes, int, int]], title: str = "Vision features") -> None:
        """Encodes and stores the images at `places` that are this process's and not there yet."""
        places = list(places)
        done = self.store.indices()
        lacking = [place for place in places if place[0] not in done]
        tower = self.base.vision_tower
        if lacking and tower is None:
            raise ValueError(
                f"{len(lacking)} of {len(places)} images are not in the store `{self.store.folder}`, and the vision tower is "
                'not loaded: load it by `model.load_base_model("vision")`.'
            )
        mine = [place for place in lacking if self.processes.mine(place[0])]
        if not mine:
            return
        device, home = self._device(tower), tower.device
        moves = device != home and not hasattr(tower, "hf_device_map")
        if moves:
            tower.to(device)
        device = device if moves else home
        batches = Batches(images, self.prepare, mine, self.images_per_batch)
        loader = load_in_workers(batches, self.workers, pin_memory=device.type == "cuda")
        try:
            with (
                torch.no_grad(),
                self.store.writer(self.images_per_shard) as writer,
                tqdm(total=len(mine), desc=title, unit="image", disable=self.processes.rank != 0) as bar,
            ):
                for digests, features, mask in self._run(tower, loader, device):
                    writer.add(digests, features, mask)
                    bar.update(len(digests))
        finally:
            if moves:
                tower.to(home)

    def _run(
        self, tower: nn.Module, loader: Iterable[Any], device: torch.device
    ) -> Iterator[tuple[list[bytes], torch.Tensor, torch.Tensor | None]]:
        """Features on the host; those of a batch come when a GPU is at work on the next."""
        config, waiting = self.base.config, None
        for digests, inputs in loader:
            inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
            features, mask, _ = encode_images(
                tower,
                inputs.pop("pixel_values"),
                layer=config.vision_feature_layer,
                select_strategy=config.vision_feature_select_strategy,
                num_leading_tokens=config.num_leading_tokens,
                **inputs,
            )
            features, mask = features.to(self.store.dtype), None if mask is None else mask.cpu()
            if device.type != "cuda":
                yield digests, features.cpu(), mask
                continue
            on_host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            if waiting is not None:
                waiting[1].synchronize()
                yield waiting[0]
            waiting = (digests, on_host, mask), event
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]

    def indices(self, wanted: Iterable[bytes]) -> dict[bytes, int]:
        """Where the images are, when every process has done its part."""
        self.processes.wait()
        found = self.store.indices()
        lacking = sum(digest not in found for digest in wanted)
        if lacking:
            raise RuntimeError(f"{lacking} images are not in `{self.store.folder}`: did another process fail?")
        return found


# ------------------------------------------------------------------------------------------------------ two kinds of data


def _from_rows(dataset: Any, column: str, work: _Work) -> Any:
    images = Images(dataset, column)
    found = _hash_rows(images, work)
    places: dict[bytes, tuple[int, int]] = {}
    for row, one in enumerate(found):
        for position, digest in enumerate(as_list(one)):
            if digest is not None:
                places.setdefault(digest, (row, position))
    work.encode(images, ((digest, *place) for digest, place in places.items()))
    return _replace(dataset, column, found, work.indices(places), work.store)


def _hash_rows(images: Images, work: _Work) -> list[Found]:
    """What images each row has; the rows are shared among the processes."""
    hashing, processes = Hashing(images), work.processes
    chunks = range(processes.rank, len(hashing), processes.count)
    part = torch.utils.data.Subset(hashing, chunks)
    few = len(part) < 16  # hashed before workers would have started
    own = list(tqdm(load_in_workers(part, 0 if few else work.workers), "Distinct images", disable=few or processes.rank != 0))
    parts = processes.gather(own)
    return [one for chunk in range(len(hashing)) for one in parts[chunk % processes.count][chunk // processes.count]]


def _replace(dataset: Any, column: str, found: list[Found], indices: dict[bytes, int], store: FeatureStore) -> Any:
    import datasets

    def index(one: bytes | None) -> int | None:
        return None if one is None else indices[one]

    nested = any(isinstance(one, list) for one in found)
    values = [[index(digest) for digest in one] if isinstance(one, list) else index(one) for one in found]
    feature: Any = VisionFeatures(str(store.folder), store.views)
    feature = [feature] if nested else feature
    rest = dataset.with_format(None).remove_columns(column)
    if not rest.column_names:  # nothing to stand beside
        return datasets.Dataset.from_dict({column: values}, features=datasets.Features({column: feature}), split=dataset.split)
    return rest.add_column(column, values, feature=feature)


def _from_stream(stream: Any, column: str, work: _Work, cache_dir: Path) -> Any:
    """One pass: the images of a piece are encoded, its other columns written; all processes pass over all of it."""
    import datasets

    decoder = None
    if stream.features is not None and isinstance(inner_feature(stream.features[column]), datasets.Image):
        decoder = inner_feature(stream.features[column])
        if isinstance(stream.features[column], datasets.Image):
            stream = stream.cast_column(column, datasets.Image(mode=decoder.mode, decode=False))
    hashing = Hashing(HeldImages([], decoder))
    found: list[Found] = []
    wanted: set[bytes] = set()

    def rest() -> Iterator[dict[str, Any]]:
        for rows in _pieces(stream):
            values = [row.pop(column) for row in rows]
            places: dict[bytes, tuple[int, int]] = {}
            for number, value in enumerate(values):
                found.append(hashing.of(value))
                for position, digest in enumerate(as_list(found[-1])):
                    if digest is not None and digest not in wanted:
                        places.setdefault(digest, (number, position))
            wanted.update(places)
            work.encode(
                HeldImages(values, decoder), ((digest, *place) for digest, place in places.items()), f"{len(found)} rows"
            )
            yield from rows

    others = [name for name in stream.column_names or [] if name != column]
    features = None
    if stream.features is not None and others:
        features = datasets.Features({name: stream.features[name] for name in others})
    path = None
    if work.processes.rank == 0:
        path = _write_rows(rest(), features, cache_dir / "rows")
    else:
        for _ in rest():
            pass
    indices = work.indices(wanted)
    path = work.processes.gather(path)[0]
    written = datasets.Dataset.from_dict({column: [None] * len(found)}) if path is None else datasets.Dataset.from_file(path)
    if path is not None:
        written = written.add_column(column, [None] * len(found))
    return _replace(written, column, found, indices, work.store)


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
    temporary = folder / f"writing-{os.getpid()}-{time.time_ns()}"
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
    digest = hashlib.sha256()
    with open(temporary, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(temporary.replace(folder / f"{digest.hexdigest()[:32]}.arrow"))


__all__ = ["StoredImage", "VisionFeatures", "cache_vision_features", "store_key"]
