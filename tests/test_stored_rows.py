# ruff: noqa: F811 (fixtures are imported by name)
"""A store that is filled from a stream, in parts: each row once with its own features, killed and resumed anywhere, nothing
half-written or of another stream read; and training from it, which resumes exactly."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, load_image_text, store_rows
from modeling_frozen.data import image_index, stored_rows
from modeling_frozen.data.feature_store import FeatureStore
from modeling_frozen.data.image_index import ImageIndex
from modeling_frozen.data.streaming import RowStream
from modeling_frozen.training.streaming import StreamCallback
from tests.helpers import fresh_python
from tests.helpers.feature_stores import noise, pair, parents, seen, tower_features  # noqa: F401
from tests.helpers.formats import write_tars
from tests.helpers.streaming_run import Stop
from tests.helpers.tiny import join
from tests.helpers.training import arguments


ROWS, IMAGES = 23, 9


def tars(folder: Path, files: int = 3) -> str:
    """WebDataset shards: rows of a caption, an id and an image, which several of them have in common."""
    rows = [{"id": number, "text": f"a picture {number} .", "image": noise(number % IMAGES)} for number in range(ROWS)]
    return write_tars(folder, [rows[part::files] for part in range(files)])


def stream(pattern: Any, **options: Any) -> RowStream:
    return load_image_text(pattern, streaming=True, **{"buffer_size": 4, **options})


def store(pair: tuple[Any, Any], rows: Any, folder: Path, **options: Any) -> None:
    defaults = {"num_workers": 0, "dtype": "float32", "rows_per_shard": 4, "batch_size": 2}
    store_rows(rows, *pair, folder, **{**defaults, **options})


def check(pair: tuple[Any, Any], folder: Path, wanted: set[int] = frozenset(range(ROWS))) -> None:
    """Each row is there once, as it was, with what the tower makes of its own image."""
    rows = list(load_image_text(folder, streaming=True, buffer_size=0))
    assert sorted(row["id"] for row in rows) == sorted(wanted)
    right = tower_features(pair, [noise(number) for number in range(IMAGES)])
    for row in rows:
        assert row["text"] == f"a picture {row['id']} ."
        torch.testing.assert_close(row["images"][0].load()[0], right[row["id"] % IMAGES])


# ---------------------------------------------------------------------------------------------------------- filling


@pytest.mark.parametrize(("parts", "workers"), [(1, 0), (1, 2), (2, 1), (5, 0)])
def test_each_row_once_with_its_own_features(parts: int, workers: int, pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows = stream(tars(tmp_path))
    with seen(pair[0]) as counts:
        for part in range(parts):
            store(pair, rows, tmp_path / "store", part=(part, parts), num_workers=workers)
        assert sum(counts) == IMAGES, "an image that was there was encoded again"
        for part in range(parts):  # all is there
            store(pair, rows, tmp_path / "store", part=(part, parts), num_workers=workers)
        assert sum(counts) == IMAGES
    check(pair, tmp_path / "store")
    shutil.move(tmp_path / "store", tmp_path / "moved")
    check(pair, tmp_path / "moved")


@pytest.mark.parametrize("kind", ["stream of datasets", "a list"])
def test_other_streams(kind: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows: Any = [{"id": number, "text": f"a picture {number} .", "image": noise(number % IMAGES)} for number in range(ROWS)]
    if kind == "stream of datasets":
        rows = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_iterable_dataset(num_shards=2)
    store(pair, stream(rows), tmp_path / "store")
    check(pair, tmp_path / "store")


class Killed(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_any_shard_it_goes_on_there(
    workers: int, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a shard of rows gets its name, when its images are in the store already."""
    rows, write = stream(tars(tmp_path)), stored_rows.write_shard
    store(pair, rows, tmp_path / "whole", num_workers=workers)
    whole = [row["id"] for row in load_image_text(tmp_path / "whole", streaming=True, buffer_size=0)]
    for stop in itertools.count():
        written = itertools.count()

        def write_or_die(*args: Any, written: Any = written, stop: int = stop) -> None:
            if next(written) == stop:
                raise Killed
            write(*args)

        monkeypatch.setattr("modeling_frozen.data.store_filling.write_shard", write_or_die)
        folder = tmp_path / f"stopped-{stop}"
        try:
            store(pair, rows, folder, num_workers=workers)
            break
        except Killed:
            pass
        if stop:
            with pytest.raises(ValueError, match="part-00000-of-00001` is not finished"):
                load_image_text(folder, streaming=True)
        monkeypatch.setattr("modeling_frozen.data.store_filling.write_shard", write)
        with seen(pair[0]) as counts:
            store(pair, rows, folder, num_workers=None if stop else workers)
            assert sum(counts) < IMAGES, "what was in the store was made again"
        assert [row["id"] for row in load_image_text(folder, streaming=True, buffer_size=0)] == whole
    assert stop >= 6


RUN = """
import sys, time
from pathlib import Path
from modeling_frozen import load_image_text, store_rows
from tests.helpers.tiny import join

if __name__ == "__main__":
    parents, pattern, folder, part, pause = sys.argv[1:]
    model, processor = join(Path(parents))
    def call(module, args, kwargs):
        time.sleep(float(pause))
    model.model.vision_tower.register_forward_pre_hook(call, with_kwargs=True)
    store_rows(
        load_image_text(pattern, streaming=True, buffer_size=4), model, processor, folder, part=(int(part), 2),
        rows_per_shard=2, batch_size=2, num_workers=1, dtype="float32",
    )
"""


def test_one_of_two_is_killed_and_goes_on(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    pattern = tars(tmp_path)
    (tmp_path / "run.py").write_text(RUN)

    def launch(part: int, pause: float) -> fresh_python.Running:
        arguments = (str(tmp_path / "run.py"), str(parents), pattern, str(tmp_path / "store"), str(part), str(pause))
        return fresh_python.start(*arguments, env=fresh_python.environment(ACCELERATE_USE_CPU="true"))

    both = [launch(0, 0.0), launch(1, 0.3)]
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("store/rows/part-00001*/0*.arrow")) and both[1].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    both[1].send_signal(signal.SIGKILL)
    both[1].communicate()
    assert both[1].returncode == -signal.SIGKILL
    errors = both[0].communicate()[1]
    assert both[0].returncode == 0, errors[-2000:]
    with pytest.raises(ValueError, match="part-00001-of-00002` is not finished"):
        load_image_text(tmp_path / "store", streaming=True)
    (tmp_path / "store/rows/part-00001-of-00002/writing-elsewhere-1-1").write_bytes(b"half")  # another machine's
    again = launch(1, 0.0)
    errors = again.communicate()[1]
    assert again.returncode == 0, errors[-2000:]
    check(pair, tmp_path / "store")


def test_processes_that_run_together_each_write_a_part(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN.replace("part=(int(part), 2),", ""))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = [str(tmp_path / "run.py"), str(parents), tars(tmp_path), str(tmp_path / "store"), "", "0"]
    environment = fresh_python.environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run([*command, *own], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("store/rows/part-*-of-00002"))) == 2
    check(pair, tmp_path / "store")


TASKS = """
import os, signal, sys
from pathlib import Path

import ray

parents, pattern, folder, died = map(Path, sys.argv[1:])

@ray.remote(num_cpus=1, max_retries=1)
def fill(part):
    from modeling_frozen import load_image_text, store_rows
    from tests.helpers.tiny import join

    model, processor = join(parents)
    def call(module, args, kwargs):
        if part and not died.exists() and list(folder.glob("rows/part-00001*/0*.arrow")):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    model.model.vision_tower.register_forward_pre_hook(call, with_kwargs=True)
    rows = load_image_text(str(pattern), streaming=True, buffer_size=4)
    options = {"rows_per_shard": 2, "batch_size": 2, "num_workers": 0, "dtype": "float32"}
    store_rows(rows, model, processor, folder, part=(part, 2), **options)
    return part

ray.init(num_cpus=2, include_dashboard=False)
print(ray.get([fill.remote(part) for part in range(2)]))
"""


@pytest.mark.slow
def test_tasks_of_ray_each_write_a_part(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    """One worker is killed after its first shard; Ray starts the task again, which goes on behind it."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    (tmp_path / "run.py").write_text(TASKS)
    own = [str(tmp_path / name) for name in ("run.py", "store", "died")]
    command = [sys.executable, own[0], str(parents), tars(tmp_path), *own[1:]]
    environment = fresh_python.environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[0, 1]" in done.stdout and (tmp_path / "died").exists()
    check(pair, tmp_path / "store")


# -------------------------------------------------------------------------------------------- what is never read


def test_what_is_of_another_stream_or_number_of_parts_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows, folder = stream(tars(tmp_path)), tmp_path / "store"
    store(pair, rows, folder, part=(0, 2))
    with pytest.raises(ValueError, match="lacks 1 of 2 parts, the first `part-00001-of-00002`"):
        load_image_text(folder, streaming=True)
    with pytest.raises(ValueError, match="of another number of parts than 3"):
        store(pair, rows, folder, part=(0, 3))
    assert not list(folder.glob("rows/*-of-00003"))
    with pytest.raises(ValueError, match=r"what differs \(there, here\): \{'seed': \(0, 1\)\}"):
        store(pair, stream(str(tmp_path / "shard-*.tar"), seed=1), folder, part=(0, 2))
    with pytest.raises(ValueError, match="what differs .*'store'"):
        store(pair, rows, folder, part=(0, 2), dtype="int8")
    store(pair, stream(str(tmp_path / "shard-*.tar"), seed=1), folder, part=(1, 2))
    with pytest.raises(ValueError, match="part-00001-of-00002` is of another stream or store"):
        load_image_text(folder, streaming=True)


def test_shards_that_are_damaged_or_missing_are_named(pair: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store(pair, stream(tars(tmp_path)), folder)
    first, second, *_, last = sorted(folder.glob("rows/*/0*.arrow"))
    whole = {path: path.read_bytes() for path in (second, last)}
    second.write_bytes(whole[second][: len(whole[second]) // 2])
    with pytest.raises(ValueError, match=r"00000001.arrow` is damaged"):
        load_image_text(folder, streaming=True)
    second.write_bytes(whole[second].replace(b"a picture", b"a picturf"))
    with pytest.raises(ValueError, match=r"00000001.arrow` is damaged \(its bytes"):
        list(load_image_text(folder, streaming=True))
    second.unlink()
    with pytest.raises(ValueError, match="shards are missing"):
        load_image_text(folder, streaming=True)
    second.write_bytes(whole[second])
    last.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        load_image_text(folder, streaming=True)


def test_what_cant_be_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    pattern = tars(tmp_path)
    with pytest.raises(ValueError, match="got a list: give that"):
        store(pair, [], tmp_path / "store")
    with pytest.raises(ValueError, match=r"part=\(2, 2\) must be"):
        store(pair, stream(pattern), tmp_path / "store", part=(2, 2))
    store(pair, stream(pattern), tmp_path / "store")
    with pytest.raises(ValueError, match="give streaming=True"):
        load_image_text(tmp_path / "store")
    with pytest.raises(ValueError, match="holds stored features already"):
        store(pair, stream(tmp_path / "store"), tmp_path / "again")


def test_rows_that_are_left_out_are_told(pair: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: Any = [{"id": number, "text": f"a picture {number} .", "image": noise(number % IMAGES)} for number in range(ROWS)]
    rows[5]["image"] = {"bytes": b"no image", "path": "5.png"}
    with pytest.raises(ValueError, match="id 5"):
        store(pair, stream(rows), tmp_path / "raised")
    with caplog.at_level("WARNING"):
        store(pair, stream(rows, on_error="skip"), tmp_path / "store")
    assert "1 row(s) were left out" in caplog.text and "id 5" in caplog.text
    check(pair, tmp_path / "store", set(range(ROWS)) - {5})


# ------------------------------------------------------------------------------------------------------- the index


def test_the_index_holds_what_a_dict_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros at the end of a digest, images that come twice, and a file of many blocks."""
    monkeypatch.setattr(image_index, "_LOOSE", 50)
    monkeypatch.setattr(image_index, "_BLOCK", 16)
    draws = torch.Generator().manual_seed(0)
    index, right = ImageIndex(tmp_path / "images.index"), dict[bytes, int]()
    for shard in range(40):
        digests = [bytes(torch.randint(0, 3, (2,), generator=draws).tolist()).ljust(15, b"\0") + bytes([shard % 20])] + [
            bytes(torch.randint(0, 256, (16,), generator=draws).tolist()) for _ in range(9)
        ]
        index.add(f"{shard}.arrow", [shard, shard], digests, shard * 100)
        for place, digest in enumerate(digests, shard * 100):
            right.setdefault(digest, place)
    assert len(index._loose) < 50 and len(index._digests) > 300
    assert dict(index) == right and len(index) == len(right)
    assert b"\1" * 16 not in index and b"" not in index
    again = ImageIndex(tmp_path / "images.index")
    assert set(again) == set(right) - set(index._loose) and again.shards.keys() < index.shards.keys()
    data = bytearray((tmp_path / "images.index").read_bytes())
    data[100] ^= 1
    (tmp_path / "images.index").write_bytes(data)
    assert not ImageIndex(tmp_path / "images.index")
    (tmp_path / "images.index").write_bytes(data[:500])
    assert not ImageIndex(tmp_path / "images.index")


def test_an_index_of_shards_that_are_gone_is_made_anew(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_index, "_LOOSE", 2)
    folder = tmp_path / "store"
    store(pair, stream(tars(tmp_path)), folder)
    shelf = FeatureStore(next(folder.glob("*/key.json")).parent)
    assert len(shelf.indices()) == IMAGES and (shelf.folder / "images.index").is_file()
    assert not FeatureStore(shelf.folder)._tables and not shelf._tables, "shards that were passed over are held in memory"
    gone = sorted(shelf.folder.glob("0*.arrow"))[-1]
    gone.unlink()
    left = len(FeatureStore(shelf.folder).indices())
    assert left < IMAGES and len(shelf.indices()) == left
    shutil.rmtree(folder / "rows")
    store(pair, stream(str(tmp_path / "shard-*.tar")), folder)
    check(pair, folder)


# -------------------------------------------------------------------------------------------------- training from it


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_it_resumes_exactly(workers: int, pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Without the tower, over two and a half epochs, stopped in the first and in the second."""
    for part in range(2):
        store(pair, stream(tars(tmp_path)), tmp_path / "store", part=(part, 2))
    model, processor = join(tmp_path)
    model.unload_base_model("vision")
    start = {name: tensor.clone() for name, tensor in model.model.connector.state_dict().items()}

    def train(name: str, stop: int = 0, resume: str | None = None) -> dict[str, torch.Tensor]:
        model.model.connector.load_state_dict(start)
        trainer = Trainer(
            model,
            arguments(tmp_path / name, max_steps=14, dataloader_num_workers=workers),
            train_dataset=stream(tmp_path / "store"),
            data_collator=DataCollatorForFrozenPrefix(processor),
            callbacks=[Stop(stop), StreamCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(tmp_path / name / "last"))
        return load_file(tmp_path / name / "last" / "model.safetensors")

    whole = train("whole")
    for stop in (4, 9):
        stopped = train("stopped", stop)
        assert any(not torch.equal(stopped[name], whole[name]) for name in whole)
        resumed = train(f"resumed-{stop}", resume=str(tmp_path / f"stopped/checkpoint-{stop}"))
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_benchmark_prints_speed_and_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.stored_rows", "--rows", "200", "--rounds", "1", "--rows-per-shard", "50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    for what in ("filling", "reading"):
        assert re.search(rf"{what}, 200 rows .*rows/s", done.stdout), done.stdout
        assert f"{what}: peak memory, 200 rows" in done.stdout
