"""Rows as a stream: shuffled within a buffer, dealt out over processes and data loader workers, each row once, with images
that are opened (or left out) just before their batch, and with a place that a resumed training goes on from.

What `datasets` gives by itself falls short in three ways: its shuffle buffer is lost when a stream is resumed, an image that
can't be opened ends the iterator, and one file keeps one worker busy however many there are.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from datasets import Features, Image, IterableDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..processors import load_rgb_image
from .columns import as_list, find_column, is_list
from .feature_store import StoredImage
from .image_reading import unopened


logger = logging.get_logger(__name__)

_CHUNK = 16  # rows that are asked of the source at a time
_MOST_READERS = 1024
_NAMED = 5  # rows left out that are named at the end of an epoch
_NAME_LENGTH = 200  # characters of such a name
_NAME_BYTES = 4 * _NAME_LENGTH

# A row, or why there is none, with the number of its shard among the reader's and of the row in its shard.
_Item: TypeAlias = tuple[int, int, dict[str, Any] | Exception]


class RowStream(IterableDataset):
    """
    A stream of rows as the collators read them; [`stream_rows`] makes it.

    `map`, `filter`, `take` and their like give plain streams of `datasets` over the rows as they lie: change rows first, then
    call [`stream_rows`].

    Attributes:
        epoch_offset (`int`): added to what `set_epoch` is given; for a trainer that counts epochs anew when it resumes.
    """

    def __init__(self, rows: IterableDataset, buffer_size: int, seed: int, on_error: str, image_column: str | None):
        self.__dict__.update(vars(rows.shard(num_shards=1, index=0)))  # a copy of it, with an epoch of its own
        self.source, self.buffer_size, self.seed, self.on_error = rows, buffer_size, seed, on_error
        self.image_column, self.epoch_offset = image_column, 0
        self._process = (1, 0)  # how many, which
        self._start: dict[str, Any] | None = None
        self._places: torch.Tensor | None = None
        self._names: torch.Tensor | None = None
        self._batch_size = 0
        self._current: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------- who reads what
    @property
    def num_shards(self) -> int:
        """Into how many the stream can be split: more than its files, for the rows of one file can be dealt out too."""
        return max(self.source.num_shards, _MOST_READERS)

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "RowStream":
        """Its share of one of `num_shards` processes; each row is in one of them. accelerate's data loaders call it."""
        if not 0 <= index < num_shards:
            raise ValueError(f"index={index} is not in 0..{num_shards - 1}.")
        part, (count, own) = copy.copy(self), self._process
        part._process = (count * num_shards, own + count * index)
        return part

    def set_epoch(self, epoch: int) -> None:
        """Rows come in another order in each epoch."""
        super().set_epoch(epoch + self.epoch_offset)

    def _parts(self, role: int, workers: int) -> tuple[list[tuple[int, int]], int]:
        """The (shard, remainder) of a worker, in the order in which it reads them: of a shard the rows whose number has that
        remainder after division by the second value, which is 1 where there are shards for all."""
        processes, process = self._process
        readers, shards = processes * workers, self.source.num_shards
        stride = -(-readers // shards) if shards < readers else 1
        order = list(range(shards))
        if self.buffer_size:
            random.Random(repr((self.seed, self.epoch))).shuffle(order)
        parts = [(shard, rest) for shard in order for rest in range(stride)]
        return parts[process + processes * role :: readers], stride

    # ------------------------------------------------------------------------------------------------------- iterating
    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self._start if self._start is not None and self._start["epoch"] == self.epoch else None
        roles = start["roles"] if start else [_first_place(one) for one in range(workers)]
        if len(roles) != workers:
            raise ValueError(f"The stream's state is of {len(roles)} readers, and {workers} read it: use as many workers.")
        state = copy.deepcopy(roles[number])
        self._current = {"epoch": self.epoch, "roles": [state]}
        if state["done"]:
            self._publish(number, 0, state)
            return
        count = 0
        for row in self._rows(state, *self._parts(state["role"], workers)):
            count += 1
            if self._batch_size and count % self._batch_size == 0:
                self._publish(number, count // self._batch_size, state)
            yield row
        state["done"] = True
        if self._batch_size:
            self._publish(number, -(-count // self._batch_size), state)

    def _rows(self, state: dict[str, Any], parts: list[tuple[int, int]], stride: int) -> Iterator[dict[str, Any]]:
        """Rows from where `state` stands, which is moved on before each is given."""
        passed = state["passed"]
        for block in self._blocks(parts, stride, state["part"], state["row"]):
            state["part"], state["row"] = block[0][:2]
            order = list(range(len(block)))
            if self.buffer_size > 1:
                random.Random(repr((self.seed, self.epoch, *parts[state["part"]], state["row"]))).shuffle(order)
            for place in range(passed, len(order)):
                part, index, content = block[order[place]]
                block[order[place]] = (part, index, {})  # its bytes go as soon as it has been read
                state["passed"] = place + 1
                try:
                    yield self._opened(content)
                except _Broken as broken:
                    what = f"Row {index} of shard {parts[part][0]}{broken}"
                    if self.on_error == "raise":
                        raise ValueError(
                            f'{what}. on_error="skip" leaves such rows out, and counts them.'
                        ) from broken.__cause__
                    state["left_out"] += 1
                    state["first"] = [*state["first"], what[:_NAME_LENGTH]][:_NAMED]
            passed = 0

    def _blocks(self, parts: list[tuple[int, int]], stride: int, first: int, skip: int) -> Iterator[list[_Item]]:
        """What is shuffled at a time: `buffer_size` rows of successive shards, or one."""
        block: list[_Item] = []
        for part in range(first, len(parts)):
            for item in self._read(part, *parts[part], stride, skip if part == first else 0):
                block.append(item)
                if len(block) >= max(self.buffer_size, 1):
                    yield block
                    block = []
        if block:
            yield block

    def _read(self, part: int, shard: int, rest: int, stride: int, skip: int) -> Iterator[_Item]:
        rows = self.source.shard(num_shards=self.source.num_shards, index=shard)
        index = skip
        try:
            # `iter`, which, unlike iteration, does not deal shards out over workers once more.
            for chunk in (rows.skip(skip) if skip else rows).iter(batch_size=_CHUNK):
                for values in zip(*chunk.values(), strict=True):
                    if index % stride == rest:
                        yield part, index, dict(zip(chunk, values, strict=True))
                    index += 1
        except Exception as error:  # readers, fsspec and the network raise what they like
            yield part, index, error

    def _opened(self, content: dict[str, Any] | Exception) -> dict[str, Any]:
        if isinstance(content, Exception):
            raise _Broken(f": its file can't be read further: {str(content) or type(content).__name__}") from content
        column = find_column(content, self.image_column)
        if column is None or content[column] is None:
            return content
        images = as_list(content[column])
        for number, image in enumerate(images):
            if image is None or isinstance(image, StoredImage):
                continue
            try:
                images[number] = load_rgb_image(image, f"image {number}")
            except Exception as error:  # PIL raises some twenty kinds, ZeroDivisionError for one
                path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
                named = "".join(f", {key} {content[key]!r}" for key in ("id", "__key__") if content.get(key) is not None)
                reason = str(error).rstrip(".") or type(error).__name__
                raise _Broken(f"{named}: {reason}{f' ({path})' if path and path not in reason else ''}") from error
        return {**content, column: images if is_list(content[column]) else images[0]}

    # ------------------------------------------------------------------------------------ its place, in this process
    def state_dict(self) -> dict[str, Any]:
        """Where the iterator of this process stands, after the row that it gave last. Of a data loader's workers
        [`RowStream.state_after`] tells."""
        if self._current is None or self._current["epoch"] != self.epoch:
            return {"epoch": self.epoch, "roles": [_first_place(0)]}
        return copy.deepcopy(self._current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration of that epoch starts from there: the rows are those of a stream that was never stopped."""
        self._start = copy.deepcopy(state_dict)

    # -------------------------------------------------------------------------------------- its place, in all workers
    def track(self, batch_size: int, num_workers: int, read_ahead: int) -> None:
        """
        From now on, have workers write down where they stand after each batch.

        Args:
            batch_size (`int`): rows of a batch.
            num_workers (`int`): of the data loader; 0 for none.
            read_ahead (`int`): how many batches, at most, a worker makes before they are used.
        """
        self._batch_size = batch_size
        # For each worker: places after its last batches, by the batch's number, and at last the one at the end of the epoch.
        self._places = torch.zeros((max(num_workers, 1), read_ahead + 2, 7), dtype=torch.int64).share_memory_()
        self._names = torch.zeros((max(num_workers, 1), _NAMED, _NAME_BYTES), dtype=torch.uint8).share_memory_()

    def _publish(self, worker: int, batches: int, state: dict[str, Any]) -> None:
        if self._places is None or self._names is None:
            return
        for number, name in enumerate(state["first"]):
            written = name.encode()[:_NAME_BYTES]
            self._names[worker, number] = 0
            self._names[worker, number, : len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
        slot = self._places.shape[1] - 1 if state["done"] else batches % (self._places.shape[1] - 1)
        self._places[worker, slot] = torch.tensor(
            [self.epoch, batches, *(state[key] for key in ("part", "row", "passed", "left_out")), state["done"]]
        )

    def state_after(self, batches: int) -> dict[str, Any]:
        """
        Where the stream stands after so many batches of this epoch, since it was started or resumed. Needs
        [`RowStream.track`].

        Returns:
            `dict` for [`RowStream.load_state_dict`], of plain numbers and strings: it survives JSON. After the last batch
            of an epoch it is the start of the next one.
        """
        places = self._places_after(batches)
        if all(place["done"] for place in places):
            return {"epoch": self.epoch + 1, "roles": [_first_place(number) for number in range(len(places))]}
        return {"epoch": self.epoch, "roles": places}

    def left_out_after(self, batches: int) -> tuple[int, list[str]]:
        """How many rows were left out of this epoch up to there, and the first by name. As [`RowStream.state_after`]."""
        places = self._places_after(batches)
        return sum(place["left_out"] for place in places), [name for place in places for name in place["first"]][:_NAMED]

    def _places_after(self, batches: int) -> list[dict[str, Any]]:
        assert self._places is not None and self._names is not None
        workers, slots, _ = self._places.shape
        start = self._start if self._start is not None and self._start["epoch"] == self.epoch else None
        first = start["roles"] if start else [_first_place(number) for number in range(workers)]
        ends = [place if place[0] == self.epoch and place[6] else None for place in self._places[:, -1].tolist()]
        given, turn = [0] * workers, 0

        def is_over(worker: int) -> bool:
            end = ends[worker]
            return end is not None and given[worker] >= end[1]

        for _ in range(batches):  # as a data loader takes them: in turn, past those that have ended
            while is_over(turn % workers):
                turn += 1
            given[turn % workers] += 1
            turn += 1
        places = []
        for worker in (number % workers for number in range(turn, turn + workers)):
            state = copy.deepcopy(first[worker])
            place = ends[worker] if is_over(worker) else None
            if place is None and given[worker]:
                place = self._places[worker, given[worker] % (slots - 1)].tolist()
                if place[:2] != [self.epoch, given[worker]]:
                    raise RuntimeError(f"Worker {worker} has read more than {slots - 2} batches ahead: track more of them.")
            if place is not None:
                names = [bytes(name[name != 0].tolist()).decode(errors="ignore") for name in self._names[worker]]
                state |= dict(zip(("part", "row", "passed", "left_out"), place[2:6], strict=True)) | {"done": bool(place[6])}
                state["first"] = names[: min(place[5], _NAMED)]
            places.append(state)
        return places


class _Broken(Exception):
    pass


def _first_place(role: int) -> dict[str, Any]:
    """The start of what a worker reads: which shard of its own and which row of it the block begins with, how many of the
    block are passed, and what was left out."""
    return {"role": role, "part": 0, "row": 0, "passed": 0, "left_out": 0, "first": [], "done": False}


def stream_rows(
    rows: IterableDataset, *, buffer_size: int = 1000, seed: int = 0, on_error: str = "raise", image_column: str | None = None
) -> RowStream:
    """
    A stream to train on, of rows as they come.

    Each process and each worker of a data loader reads its own files, or, where there are fewer files than readers, its own
    rows of one; each row comes once in an epoch. Files, and rows within `buffer_size`, are shuffled anew in every epoch.
    Images stay encoded until their row comes.

    Args:
        rows (`datasets.IterableDataset`): with the columns that [`DataCollatorForFrozenPrefix`] reads.
        buffer_size (`int`, *optional*, defaults to 1000): rows that are held, undecoded, and shuffled among themselves, in
            each worker; 0 leaves rows and files in their order.
        seed (`int`, *optional*, defaults to 0): of the shuffle.
        on_error (`str`, *optional*, defaults to `"raise"`): what is done where an image can't be opened, or a file can't be
            read further: `"raise"` names the row; `"skip"` leaves it out. [`StreamCallback`] tells how many, and the first.
        image_column (`str`, *optional*): defaults to `image`, else `images`.

    Returns:
        [`RowStream`], a `datasets.IterableDataset`.

    Raises:
        ValueError: an unknown `on_error`, a negative `buffer_size`.
        TypeError: `rows` that are no stream.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from modeling_frozen.data.streaming import stream_rows

    >>> rows = load_dataset("parquet", data_files="shards/*.parquet", split="train", streaming=True)
    >>> stream = stream_rows(rows, buffer_size=1000, on_error="skip")
    ```"""
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r} is unknown: "raise" or "skip".')
    if buffer_size < 0:
        raise ValueError(f"buffer_size={buffer_size} must be at least 0 (0: no shuffling).")
    if not isinstance(rows, IterableDataset):
        raise TypeError(f"stream_rows takes a datasets.IterableDataset, got {type(rows).__name__}: `to_iterable_dataset()`.")
    if rows.features is not None:
        features = Features(unopened(rows.features, Image))
        rows = rows.cast(features) if features != rows.features else rows
    return RowStream(rows, buffer_size, seed, on_error, image_column)


__all__ = ["RowStream", "stream_rows"]
