# SPDX-License-Identifier: Apache-2.0
"""Fills a store of features from a stream, on one machine or on many that share a folder, each with a part of its own.

They need not meet, and none waits for another: a part is read, encoded and written shard by shard, in memory that does not
grow with its length, and one that was stopped goes on behind its last shard.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from .feature_cache import VisionFeatures, Work, prepare_work, tower_of
from .feature_store import StoredImage
from .image_reading import Prepare, digest_of_image
from .processes import Processes
from .rows import MEDIA
from .stored_rows import part_folder, read_note, shards_of, write_shard
from .streaming import RowStream
from .whole_files import remove_leftovers


logger = logging.get_logger(__name__)

_REMEMBERED = 4096  # images that a worker knows it has made ready before
_PREFETCH = 2  # batches that a worker makes before they are used


def store_rows(
    stream: RowStream,
    model: FrozenPrefixPreTrainedModel,
    processor: Any,
    folder: str | Path,
    *,
    part: tuple[int, int] | None = None,
    rows_per_shard: int = 1000,
    batch_size: int = 32,
    num_workers: int | None = None,
    dtype: str = "bfloat16",
    views: int = 1,
    augment: Callable[[Any], Any] | None = None,
    plain_view: bool = False,
    seed: int = 0,
    pool: bool = False,
    device: str | torch.device | None = None,
) -> None:
    """
    Runs the frozen vision tower over the images of a stream, and writes its rows with their features into a folder that
    `load_image_text(folder, streaming=True)` then reads, without a tower and in memory that does not grow with it.

    A run that was stopped goes on behind the last shard that it had written. Each machine, or task of a queue, writes a part;
    under `torchrun` each process does. An image is known by its pixels: one that is in the store is not encoded again, but two
    parts that come upon it at the same time both do it.

    Args:
        stream: of [`load_image_text`] with `streaming=True`: JSON lines, parquet, WebDataset tars, a set of the Hub, a stream
            of `datasets`. Its files are dealt out to the parts, or its rows, where there are fewer. It is passed over once, in
            the order of its `seed`, `buffer_size` and epoch; `on_error="skip"` leaves bad rows out, and a warning tells.
        model: a frozen-prefix model with its tower loaded.
        processor ([`FrozenPrefixProcessor`]): its image processor makes the tower's input.
        folder (`str`): that all parts share; it can be moved when it is finished.
        part (`tuple[int, int]`, *optional*): which part this is, of how many. Defaults to rank and number of the processes.
        rows_per_shard (`int`, defaults to 1000): rows a file; what a killed run does again.
        batch_size (`int`, defaults to 32): rows whose images go through the tower at a time.
        num_workers (`int`, *optional*): processes that read and decode; as [`cache_vision_features`]. A run that goes on takes
            as many as it began with.
        dtype, views, augment, plain_view, seed, pool, device: as [`cache_vision_features`] takes them.

    Raises:
        ValueError: for what is no such stream, or holds stored features, videos or audio; for a folder that holds the rows of
            another stream, model, options or number of parts; for tiles and several vision towers; and as
            [`cache_vision_features`] does.
        OSError: if a shard can't be written.

    Example:

    ```python
    >>> stream = load_image_text("shards/*.tar", streaming=True, on_error="skip")
    >>> store_rows(stream, model, processor, "/shared/features", part=(3, 16))
    >>> rows = load_image_text("/shared/features", streaming=True)  # when all 16 are there
    ```"""
    if not isinstance(stream, RowStream):
        raise ValueError(
            f"store_rows reads the streams of `load_image_text(…, streaming=True)`, got a {type(stream).__name__}: give that "
            "what you have. A dataset with a length is stored by `cache_vision_features`. [errors.md#stored-features]"
        )
    processes = Processes(alone=part is not None)
    number, parts = part or (processes.rank, processes.count)
    if not 0 <= number < parts or rows_per_shard < 1:
        raise ValueError(
            f"part={part} must be (which, of how many), from 0 on; rows_per_shard={rows_per_shard} at least 1."
            " [errors.md#stored-features]"
        )
    folder = Path(folder).expanduser()
    own = part_folder(folder, number, parts)
    if processor.crop_to_patches:
        raise ValueError(
            "`store_rows` stores features of whole images, and this processor cuts them into tiles (crop_to_patches=True): "
            "store a dataset by `cache_vision_features`, which takes tiles, or train from the images."
            " [errors.md#stored-features]"
        )
    work, *further = prepare_work(
        model, processor, folder, dtype=dtype, views=views, augment=augment, plain_view=plain_view, seed=seed, pool=pool,
        batch_size=batch_size, num_workers=num_workers, images_per_shard=max(1, rows_per_shard), device=device,
    )  # fmt: skip
    if further:
        raise ValueError(
            f"This model has {1 + len(further)} vision towers, and `store_rows` stores the features of one: store a dataset "
            "by `cache_vision_features`, which takes several, or train from the images. [errors.md#stored-features]"
        )
    setup = {
        "parts": parts,
        "store": work.store.folder.name,
        "stream": stream.source.name,
        "shards": stream.source.shards.count,
        "buffer_size": stream.buffer_size,
        "seed": stream.seed,
        "epoch": int(stream.epoch),
        "on_error": stream.on_error,
    }
    if other := next((one for one in own.parent.glob("part-*") if not one.name.endswith(own.name[-9:])), None):
        raise ValueError(
            f"`{own.parent}` holds `{other.name}`, of another number of parts than {parts}: give another folder."
            " [errors.md#stored-features]"
        )
    own.mkdir(parents=True, exist_ok=True)
    remove_leftovers(own)
    stream = stream.shard(parts, number)
    done = shards_of(own)
    if done:
        last = read_note(done[-1])
        if last["setup"] != setup:
            changed = {
                name: (last["setup"].get(name), value) for name, value in setup.items() if last["setup"].get(name) != value
            }
            raise ValueError(
                f"`{own}` holds rows of another stream or store; what differs (there, here): {changed}. Give it as it was, or "
                "another folder. [errors.md#stored-features]"
            )
        if last["done"]:
            return
        if num_workers not in (None, last["workers"]):
            raise ValueError(
                f"`{own}` was begun with num_workers={last['workers']}: go on with as many. [errors.md#stored-features]"
            )
        work.workers = last["workers"]
        stream.load_state_dict(last["state"])
    if tower_of(work.model, work.part) is None:
        raise ValueError(
            'The vision tower is not loaded, and there are rows to store: `model.load_base_model("vision")`.'
            " [errors.md#stored-features]"
        )
    _fill(work, stream, own, len(done), rows_per_shard, batch_size, setup)


def _fill(
    work: Work, stream: RowStream, own: Path, first: int, rows_per_shard: int, batch_size: int, setup: dict[str, Any]
) -> None:
    tower: Any = tower_of(work.model, work.part)
    feature = VisionFeatures(str(work.store.folder), work.store.views)
    stream.track(batch_size, work.workers, _PREFETCH + 2)
    with work.tower_in_place(tower) as device, tqdm(desc=own.name, unit="row", disable=work.processes.rank != 0) as bar:
        loader: DataLoader[Any] = DataLoader(
            stream, batch_size, num_workers=work.workers, collate_fn=_Ready(work.prepare),
            pin_memory=device.type == "cuda", prefetch_factor=_PREFETCH if work.workers else None,
        )  # fmt: skip
        batches, taken, done, shard = iter(loader), 0, False, first
        while not done:
            rows: list[str] = []
            digests: list[list[bytes]] = []
            stored, pending = work.store.indices(), set[bytes]()

            def ready(
                rows: list[str] = rows,
                digests: list[list[bytes]] = digests,
                stored: Any = stored,
                pending: set[bytes] = pending,
            ) -> Iterator[tuple[list[bytes], list[str], dict[str, torch.Tensor]]]:
                """What the tower has to see for this shard."""
                nonlocal taken, done
                while len(rows) < rows_per_shard and not done:
                    if (batch := next(batches, None)) is None:
                        done = True
                        return
                    taken += 1
                    rows += batch[0]
                    digests.extend(batch[1])
                    lacking = [place for place, one in enumerate(batch[2]) if one not in stored and one not in pending]
                    if lacking:
                        new = [batch[2][place] for place in lacking]
                        pending.update(new)
                        views = [place * work.store.views + view for place in lacking for view in range(work.store.views)]
                        yield new, [f"image {one.hex()}" for one in new], {key: all_[views] for key, all_ in batch[3].items()}

            with work.store.writer(work.images_per_shard) as writer:
                for new, names, features, mask, grids in work.run(tower, ready(), device):
                    writer.add(new, features, mask, names, grids)
            places = work.store.indices()
            images = [
                [feature.encode_example(StoredImage("", one, index=places[one])) or b"" for one in of_row]
                for of_row in digests
            ]
            state = stream.state_after(taken)
            done = done or state["epoch"] != stream.epoch
            write_shard(
                own / f"{shard:08d}.arrow", rows, images,
                {"setup": setup, "workers": work.workers, "state": state, "done": done},
            )  # fmt: skip
            bar.update(len(rows))
            shard += 1
    count, names = stream.left_out_after(taken)
    if count:
        logger.warning(f"{own.name}: {count} row(s) were left out, the first: {'; '.join(names)}")


class _Ready:
    """Rows as JSON, the digests of their images, and the tower's input for those that this worker sees for the first time.
    Runs in worker processes, whose batches come in order: what it left out of a later one has come before."""

    def __init__(self, prepare: Prepare):
        self.prepare = prepare
        self.seen: OrderedDict[bytes, None] = OrderedDict()

    def __call__(
        self, batch: list[dict[str, Any]]
    ) -> tuple[list[str], list[list[bytes]], list[bytes], dict[str, torch.Tensor]]:
        rows, digests = [], []
        new: dict[bytes, Any] = {}
        for row in batch:
            if any(isinstance(image, StoredImage) for image in row["images"]):
                raise ValueError("The stream holds stored features already. [errors.md#stored-features]")
            if others := [name for name in MEDIA.values() if name != "images" and row.get(name)]:
                raise ValueError(
                    f"A row has {' and '.join(others)}, and only images are stored: train from the files."
                    " [errors.md#stored-features]"
                )
            own = [digest_of_image(image) for image in row["images"]]
            digests.append(own)
            new |= {digest: image for digest, image in zip(own, row["images"], strict=True) if digest not in self.seen}
            rows.append(json.dumps({name: value for name, value in row.items() if name != "images"}))
        self.seen.update(dict.fromkeys(new))
        while len(self.seen) > _REMEMBERED:
            self.seen.popitem(last=False)
        inputs = self.prepare(list(new.values()), list(new)) if new else {}
        return rows, digests, list(new), inputs


__all__ = ["store_rows"]
