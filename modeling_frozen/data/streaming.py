"""Rows as a stream ([`load_image_text`] with `streaming=True`): shuffled within a buffer, dealt out over processes and data
loader workers, each row once, with images that are opened (or left out) just before their batch, and with a place that a
resumed training goes on from.

What `datasets` gives by itself falls short in three ways: its shuffle buffer is lost when a stream is resumed, an image that
can't be opened ends the iterator, and one file keeps one worker busy however many there are.
"""

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..processors import load_rgb_image
from .feature_store import StoredImage
from .rows import RowError, count_unplaced
from .sources import ListedRows, Source


logger = logging.get_logger(__name__)

_MOST_READERS = 1024
_NAMED = 5  # rows left out that are named at the end of an epoch
_NAME_LENGTH = 200  # characters of such a name
_NAME_BYTES = 4 * _NAME_LENGTH

# A row, or why there is none, with the number of its shard among the reader's and of the row in its shard.
_Item: TypeAlias = "tuple[int, int, dict[str, Any] | _Broken]"


class RowStream(IterableDataset):
    """
    A stream of rows as the collators read them; [`load_image_text`] makes it.

    `map`, `filter`, `take` and their like give plain streams of `datasets` over the rows in their order: change rows first,
    then call [`load_image_text`] on what comes of it.

    Attributes:
        epoch_offset (`int`): added to what `set_epoch` is given; for a trainer that counts epochs anew when it resumes.
    """

    def __init__(self, source: Source, buffer_size: int, seed: int, on_error: str):
        if buffer_size < 0:
            raise ValueError(f"buffer_size={buffer_size} must be at least 0 (0: no shuffling). [errors.md#streams]")
        if isinstance(source.shards, ListedRows):
            source.shards = source.shards.packed()
        self.source, self.buffer_size, self.seed, self.on_error = source, buffer_size, seed, on_error
        self.epoch_offset = 0
        super().__init__(ExamplesIterable(_in_order, {"source": source}))
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
        return max(self.source.shards.count, _MOST_READERS)

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> "RowStream":
        """Its share of one of `num_shards` processes; each row is in one of them. accelerate's data loaders call it."""
        if not 0 <= index < num_shards:
            raise ValueError(f"index={index} is not in 0..{num_shards - 1}. [errors.md#streams]")
        part, (count, own) = object.__new__(type(self)), self._process
        part.__dict__ = dict(self.__dict__)  # `copy.copy` of what `datasets` makes shares it
        part._process = (count * num_shards, own + count * index)
        return part

    def set_epoch(self, epoch: int) -> None:
        """Rows come in another order in each epoch."""
        super().set_epoch(epoch + self.epoch_offset)

    def _parts(self, role: int, workers: int) -> tuple[list[tuple[int, int]], int]:
        """The (shard, remainder) of a worker, in the order in which it reads them: of a shard the rows whose number has that
        remainder after division by the second value, which is 1 where there are shards for all."""
        processes, process = self._process
        readers, shards = processes * workers, self.source.shards.count
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
            raise ValueError(
                f"The stream's state is of {len(roles)} readers, and {workers} read it: use as many workers."
                " [errors.md#streams]"
            )
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
                    yield _opened(content)
                except _Broken as broken:
                    what = f"{self.source.name}: {self.source.shards.name(parts[part][0], index)}{broken}"
                    if self.on_error == "raise":
                        raise ValueError(
                            f'{what}. on_error="skip" leaves such rows out, and counts them. [errors.md#source]'
                        ) from broken.__cause__
                    state["left_out"] += 1
                    state["first"] = [*state["first"], what[:_NAME_LENGTH]][:_NAMED]
            passed = 0

    def _blocks(self, parts: list[tuple[int, int]], stride: int, first: int, skip: int) -> Iterator[list[_Item]]:
        """What is shuffled at a time: `buffer_size` rows of successive shards, or one."""
        block: list[_Item] = []
        for part in range(first, len(parts)):
            for item in self._read(part, *parts[part], stride, skip if part == first else 0):
                if len(block) >= max(self.buffer_size, 1) and item[:2] != block[-1][:2]:  # a row may be several
                    yield block
                    block = []
                block.append(item)
        if block:
            yield block

    def _read(self, part: int, shard: int, rest: int, stride: int, skip: int) -> Iterator[_Item]:
        index = skip
        try:
            for row in self.source.shards.read(shard, skip):
                if index % stride == rest:
                    read = self.source.canonical(row)
                    if isinstance(read, RowError):
                        own = _own_name(row) if isinstance(row, Mapping) else ""
                        yield part, index, _Broken(f"{own}: {read}")
                    else:
                        if count_unplaced(read):
                            logger.warning_once(
                                f"{self.source.name}: rows have an image and no <image> that says where it stands; the "
                                "processor puts it in the first user turn."
                            )
                        for one in read:
                            yield part, index, one
                index += 1
        except Exception as error:  # readers, fsspec and the network raise what they like
            broken = _Broken(f": its file can't be read further: {str(error) or type(error).__name__}")
            broken.__cause__ = error
            yield part, index, broken

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
        taken, turn = [0] * workers, 0

        def is_over(worker: int) -> bool:
            end = ends[worker]
            return end is not None and taken[worker] >= end[1]

        for _ in range(batches):  # as a data loader takes them: in turn, past those that have ended
            while is_over(turn % workers):
                turn += 1
            taken[turn % workers] += 1
            turn += 1
        places = []
        for worker in (number % workers for number in range(turn, turn + workers)):
            state = copy.deepcopy(first[worker])
            place = ends[worker] if is_over(worker) else None
            if place is None and taken[worker]:
                place = self._places[worker, taken[worker] % (slots - 1)].tolist()
                if place[:2] != [self.epoch, taken[worker]]:
                    raise RuntimeError(
                        f"Worker {worker} has read more than {slots - 2} batches ahead: track more of them."
                        " [errors.md#streams]"
                    )
            if place is not None:
                names = [bytes(name[name != 0].tolist()).decode(errors="ignore") for name in self._names[worker]]
                state |= dict(zip(("part", "row", "passed", "left_out"), place[2:6], strict=True)) | {"done": bool(place[6])}
                state["first"] = names[: min(place[5], _NAMED)]
            places.append(state)
        return places


class _Broken(Exception):
    """Why there is no row."""


def _opened(content: dict[str, Any] | _Broken) -> dict[str, Any]:
    if isinstance(content, _Broken):
        raise content
    images = list(content["images"])
    for number, image in enumerate(images):
        if isinstance(image, StoredImage):
            continue
        try:
            images[number] = load_rgb_image(image, f"image {number}")
        except Exception as error:  # PIL raises some twenty kinds, ZeroDivisionError for one
            path = image.get("path") if isinstance(image, Mapping) else None
            reason = str(error).partition(" [errors.md#")[0].rstrip(".") or type(error).__name__
            named = f" ({path})" if path and path not in reason else ""
            raise _Broken(f"{_own_name(content)}: {reason}{named}") from error
    return {**content, "images": images}


def _own_name(row: Mapping[str, Any]) -> str:
    return "".join(f", {key} {row[key]!r:.60}" for key in ("id", "question_id", "__key__") if row.get(key) is not None)


def _in_order(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, read, _ in source.read():
        if isinstance(read, RowError):
            raise read
        for row in read:
            yield index, row


def _first_place(role: int) -> dict[str, Any]:
    """The start of what a worker reads: which shard of its own and which row of it the block begins with, how many of the
    block are passed, and what was left out."""
    return {"role": role, "part": 0, "row": 0, "passed": 0, "left_out": 0, "first": [], "done": False}


__all__ = ["RowStream"]
