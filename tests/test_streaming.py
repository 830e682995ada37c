"""Streams: each row once among workers and processes, bad images and files left out by name, and resumed anywhere."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, load_image_text
from modeling_frozen.data.streaming import RowStream
from modeling_frozen.training.streaming import StreamCallback
from tests.helpers import fresh_python
from tests.helpers.streaming_run import Stop
from tests.helpers.tiny import COLOURS, join, save_parents


ROWS = 23


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (18, 20), list(COLOURS.values())[number % len(COLOURS)]).save(buffer, "PNG")
    return buffer.getvalue()


def make_row(number: int, bad: tuple[int, ...] = ()) -> dict[str, Any]:
    data = b"no image" if number in bad else png(number)
    texts = ["a red square .", "what is that ?", "a green picture that is black .", "blue", "is a square"]
    return {"id": number, "image": {"bytes": data, "path": f"{number}.png"}, "text": texts[number % 5 : number % 5 + 2]}


def source(files: int = 4, rows: int = ROWS, bad: tuple[int, ...] = ()) -> datasets.IterableDataset:
    """Rows dealt out over files of unequal length."""
    table = datasets.Dataset.from_list([make_row(number, bad) for number in range(rows)])
    return table.cast_column("image", datasets.Image()).to_iterable_dataset(num_shards=files)


def stream_rows(rows: Any, **options: Any) -> RowStream:
    return load_image_text(rows, streaming=True, **options)


def ids(stream: Any, workers: int = 0, batch_size: int = 2, **options: Any) -> list[int]:
    loader = DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=list, **options)
    return [row["id"] for batch in loader for row in batch]


def of_format(kind: str, folder: Path) -> str:
    """The same rows in files of a format, three of them."""
    rows = [make_row(number) for number in range(ROWS)]
    for part in range(3):
        own = rows[part::3]
        if kind == "jsonl":
            for row in own:
                (folder / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
            lines = [json.dumps({**row, "image": f"{row['id']}.png"}) for row in own]
            (folder / f"part-{part}.jsonl").write_text("\n".join(lines))
        elif kind == "json":
            (folder / "rows.json").write_text(json.dumps([{**row, "image": f"{row['id']}.png"} for row in rows]))
            for row in own:
                (folder / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
        elif kind == "parquet":
            datasets.Dataset.from_list(own).to_parquet(folder / f"part-{part}.parquet")
        else:
            with tarfile.open(folder / f"part-{part}.tar", "w") as tar:
                for row in own:
                    fields = json.dumps({"id": row["id"], "text": row["text"]}).encode()
                    for name, data in (("png", row["image"]["bytes"]), ("json", fields)):
                        member = tarfile.TarInfo(f"{row['id']:04}.{name}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return str(folder / f"*.{kind}")


# -------------------------------------------------------------------------------------------------------- each row once
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("files", [1, 2, 5])
def test_each_row_comes_once(files: int, workers: int) -> None:
    assert sorted(ids(stream_rows(source(files), buffer_size=4), workers)) == list(range(ROWS))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tar"])
def test_each_row_of_a_format_comes_once_and_is_resumed(kind: str, tmp_path: Path) -> None:
    source = of_format(kind, tmp_path)
    stream = stream_rows(source, buffer_size=4)
    assert stream.source.shards.count == (1 if kind == "json" else 3)
    for workers in (0, 2):
        assert sorted(ids(stream, workers)) == list(range(ROWS))
    rows = {row["id"]: row for row in stream}
    for number, row in rows.items():
        assert row["text"] == make_row(number)["text"] and row["images"][0].size == (18, 20)
    whole, states = [], []
    for row in stream:
        whole.append(row["id"])
        states.append(json.loads(json.dumps(stream.state_dict())))
    for count in (1, 7, 12, 22):
        again = stream_rows(source, buffer_size=4)
        again.load_state_dict(states[count - 1])
        assert ids(again) == whole[count:]


def test_a_row_of_several_questions_is_several_rows_and_resumed_within(tmp_path: Path) -> None:
    make = lambda: stream_rows(  # noqa: E731
        [
            {"image": Image.new("RGB", (8, 8)), "question": list("abc"), "answer": [f"{n}{one}" for one in "xyz"]}
            for n in "123"
        ],
        buffer_size=2,
    )
    whole, states, stream = [], [], make()
    for row in stream:
        whole.append(row["completion"])
        states.append(stream.state_dict())
    assert sorted(whole) == sorted(f"{n}{one}" for n in "123" for one in "xyz")
    for count, state in enumerate(states, start=1):
        again = make()
        again.load_state_dict(state)
        assert [row["completion"] for row in again] == whole[count:]


def test_workers_that_outlive_an_epoch_read_the_next_one_as_others_do() -> None:
    orders = []
    for lasting in (False, True):
        loader = DataLoader(
            stream_rows(source(), buffer_size=4), batch_size=2, collate_fn=list, num_workers=2, persistent_workers=lasting
        )
        loader = prepare_data_loader(loader, put_on_device=False)
        orders.append([[row["id"] for batch in loader for row in batch] for _ in range(3)])
    assert orders[0] == orders[1] and len(set(map(tuple, orders[0]))) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("files", [1, 2, 3, 8])
def test_two_processes_see_each_row_once(files: int, workers: int) -> None:
    seen = []
    for process in range(2):
        loader = DataLoader(stream_rows(source(files), buffer_size=4), batch_size=2, collate_fn=list, num_workers=workers)
        loader = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        if not isinstance(loader.dataset, RowStream):
            pytest.skip("this release of accelerate has each process read the whole stream, and fills its last batch up")
        seen.append([row["id"] for batch in loader for row in batch])
    assert sorted(seen[0] + seen[1]) == list(range(ROWS)) and min(map(len, seen)) > 4


def test_a_share_leaves_the_stream_as_it_is() -> None:
    rows = stream_rows(source(3), buffer_size=0)
    shares = [ids(rows.shard(2, index)) for index in (0, 1)]
    assert sorted(sum(shares, [])) == list(range(ROWS)) and ids(rows) == ids(rows) and len(ids(rows)) == ROWS


def test_rows_are_shuffled_anew_in_each_epoch_and_by_the_seed() -> None:
    stream = stream_rows(source(), buffer_size=8)
    orders = [ids(stream)]
    for epoch in (1, 2):
        stream.set_epoch(epoch)
        orders.append(ids(stream))
    stream.set_epoch(0)
    assert ids(stream) == orders[0]
    orders.append(ids(stream_rows(source(), buffer_size=8, seed=1)))
    assert len(set(map(tuple, [*orders, range(ROWS)]))) == 5
    stream = stream_rows(source(), buffer_size=0)
    stream.set_epoch(3)
    assert ids(stream) == list(range(ROWS))


def test_images_stay_encoded_in_the_buffer_and_are_opened_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    iterator = iter(stream_rows(source(), buffer_size=16))
    for count in range(1, 9):
        next(iterator)
        assert len(opened) == count


# ---------------------------------------------------------------------------------------------------------- bad rows
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_left_out_and_ends_nothing(workers: int) -> None:
    stream = stream_rows(source(bad=(5, 17)), buffer_size=4, on_error="skip")
    stream.track(2, workers, 8)
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list)
    batches = [[row["id"] for row in batch] for batch in loader]
    assert sorted(itertools.chain(*batches)) == [number for number in range(ROWS) if number not in (5, 17)]
    count, names = stream.left_out_after(len(batches))
    assert count == len(names) == 2
    for number in (5, 17):
        assert any(f"id {number}:" in name and "image 0" in name and f"{number}.png" in name for name in names), names


def test_a_row_that_can_not_be_read_is_left_out_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # long paths are cut off names
    of_format("jsonl", tmp_path)
    lines = (tmp_path / "part-1.jsonl").read_text().splitlines()
    lines[1], lines[2] = lines[1][:-5], json.dumps({**json.loads(lines[2]), "text": 7})
    lines[4] = json.dumps({**json.loads(lines[4]), "image": "gone.png"})
    (tmp_path / "part-1.jsonl").write_text("\n".join(lines))
    stream = stream_rows("*.jsonl", buffer_size=4, on_error="skip")
    stream.track(2, 0, 8)
    assert sorted(ids(stream)) == [number for number in range(ROWS) if number not in (4, 7, 13)]
    count, names = stream.left_out_after(10)
    assert count == 3 and all("of part-1.jsonl" in name for name in names)
    for part in ("line 2 is not JSON", "id 7: field 'text' must be a string, got 7", "id 13: field 'image' names an image"):
        assert any(part in name for name in names), names
    with pytest.raises(ValueError, match=r"row \d of part-1\.jsonl"):
        ids(stream_rows(str(tmp_path / "*.jsonl"), buffer_size=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named(workers: int) -> None:
    with pytest.raises(ValueError, match=r"row \d of shard \d, id 5: Can't open image 0 .*5\.png.*on_error=\"skip\""):
        ids(stream_rows(source(bad=(5,)), buffer_size=4), workers)


def test_the_image_of_several_is_named_and_missing_ones_are_left_out() -> None:
    good, bad = {"bytes": png(1), "path": None}, {"bytes": b"x", "path": None}
    table = [{"images": [good, None, bad], "text": "a"}, {"images": [], "text": "b"}, {"images": None, "text": "c"}]
    rows = datasets.Dataset.from_list(table).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 0 of shard 0: Can't open image 1"):
        list(stream_rows(rows, buffer_size=0))
    left = list(stream_rows(rows, buffer_size=0, on_error="skip"))
    assert [row["text"] for row in left] == ["b", "c"] and left[0]["images"] == left[1]["images"] == []


def test_a_file_that_breaks_off_costs_its_rest_alone(tmp_path: Path) -> None:
    source = of_format("tar", tmp_path)
    path = tmp_path / "part-1.tar"
    path.write_bytes(path.read_bytes()[:6000])
    stream = stream_rows(source, buffer_size=4, on_error="skip")
    stream.track(2, 0, 8)
    seen = ids(stream)
    assert {number for number in range(ROWS) if number % 3 != 1} <= set(seen) and len(seen) == len(set(seen)) < ROWS
    count, names = stream.left_out_after(-(-len(seen) // 2))
    assert count == 1 and "of part-1.tar: its file can't be read further" in names[0]
    with pytest.raises(ValueError, match="of part-1.tar: its file can't be read further"):
        ids(stream_rows(source))


def test_what_cant_be_is_refused() -> None:
    with pytest.raises(ValueError, match="on_error='ignore'"):
        stream_rows(source(), on_error="ignore")
    with pytest.raises(ValueError, match="buffer_size=-1"):
        stream_rows(source(), buffer_size=-1)
    with pytest.raises(ValueError, match="index=2"):
        stream_rows(source()).shard(2, 2)


# ------------------------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("buffer_size", [0, 1, 4, 7, 100])
def test_an_iterator_resumes_after_each_row(buffer_size: int) -> None:
    for files, epoch in ((1, 0), (4, 1)):
        make = lambda: stream_rows(source(files, bad=(5,)), buffer_size=buffer_size, on_error="skip")  # noqa: E731, B023
        stream = make()
        stream.set_epoch(epoch)
        whole, states = [], [stream.state_dict()]
        for row in stream:
            whole.append(row["id"])
            states.append(json.loads(json.dumps(stream.state_dict())))
        assert len(whole) == ROWS - 1
        for count, state in enumerate(states):
            other = make()
            other.set_epoch(epoch)
            other.load_state_dict(state)
            assert ids(other) == whole[count:]


@pytest.mark.parametrize(("files", "workers"), [(1, 2), (4, 1), (3, 2), (4, 3)])
def test_a_loader_with_workers_resumes_after_each_batch(files: int, workers: int) -> None:
    def loader(state: dict | None = None, epoch: int = 1) -> tuple[Any, RowStream]:
        stream = stream_rows(source(files, bad=(5,)), buffer_size=4, on_error="skip")
        stream.track(2, workers, 12)
        stream.set_epoch(epoch)
        if state is not None:
            stream.load_state_dict(state)
            stream.set_epoch(state["epoch"])
        return DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=lambda rows: [r["id"] for r in rows]), stream

    whole, stream = loader()
    whole = list(whole)
    states = [stream.state_after(count) for count in range(len(whole) + 1)]
    assert states[-1]["epoch"] == 2 and {state["epoch"] for state in states[:-1]} == {1}
    following = list(loader(epoch=2)[0])
    for count, state in enumerate(states):
        resumed, other = loader(json.loads(json.dumps(state)))
        rest = list(resumed)
        assert rest == (whole[count:] if count < len(whole) else following), count
        assert other.left_out_after(len(rest))[0] == 1
        if count % 4 == 1:  # stopped for the second time
            assert list(loader(other.state_after(1))[0]) == (rest[1:] or following)


def train(
    folder: Path, model: Any, processor: Any, stop: int | None = None, resume: Path | None = None, **options: Any
) -> dict:
    """Two and a half epochs of a stream in which one image can't be opened."""
    files = options.pop("files", 3)
    stream = stream_rows(source(files, bad=(5,)), buffer_size=4, on_error="skip")
    defaults = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 30, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    callbacks = [] if stop is None else [Stop(stop)]
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    collator = DataCollatorForFrozenPrefix(processor, augment=lambda image: image.rotate(int(torch.randint(360, ()))))
    trainer = Trainer(model, arguments, train_dataset=stream, data_collator=collator, callbacks=[*callbacks, StreamCallback()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "connector" in name}


def check_resumes(stops: list[int], folder: Path, **options: Any) -> None:
    model, processor = join(folder)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = train(folder / "whole", model, processor, **options)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    for stop in stops:
        model.load_state_dict(start)
        train(folder / f"run-{stop}", model, processor, stop, **options)
        model.load_state_dict(start)
        torch.manual_seed(99)
        resumed = train(folder / f"run-{stop}", model, processor, resume=folder / f"run-{stop}/checkpoint-{stop}", **options)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), stop


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 2}, {"workers": 2, "persistent_workers": True}])
def test_training_resumes_in_mid_epoch_at_its_end_and_in_the_second(options: dict[str, Any], tmp_path: Path) -> None:
    named = {"workers": "dataloader_num_workers", "persistent_workers": "dataloader_persistent_workers"}
    check_resumes([4, 11, 17], tmp_path, **{named[name]: value for name, value in options.items()})


def test_training_resumes_with_accumulated_gradients(tmp_path: Path) -> None:
    check_resumes([3, 9], tmp_path, dataloader_num_workers=2, gradient_accumulation_steps=2, max_steps=14)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_training_resumes_wherever_it_is_stopped(workers: int, tmp_path: Path) -> None:
    check_resumes(list(range(1, 31)), tmp_path, dataloader_num_workers=workers, max_steps=31)


@pytest.mark.slow
def test_training_on_two_processes_resumes_in_mid_epoch(tmp_path: Path) -> None:
    """Of 23 rows each process has six batches or so: an epoch ends between the two places where it is stopped."""
    save_parents(tmp_path)
    of_format("jsonl", tmp_path)
    (tmp_path / "5.png").write_bytes(b"no image")

    def run(name: str, stop: int = 0, resume: str = "") -> dict[str, torch.Tensor]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *launcher, "-m", "tests.helpers.streaming_run", str(tmp_path), name, str(stop), resume]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(tmp_path / name / "last" / "model.safetensors")

    whole = run("whole")
    for stop in (4, 9):
        stopped = run("stopped", stop)
        assert any(not torch.equal(stopped[name], whole[name]) for name in whole)
        resumed = run(f"resumed-{stop}", resume=str(tmp_path / f"stopped/checkpoint-{stop}"))
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_training_names_what_it_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = join(tmp_path)
    train(tmp_path, model, processor, dataloader_num_workers=2, max_steps=26)
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 2 and "1 row(s) left out of epoch 0" in told[0] and "5.png" in told[0] and "id 5" in told[0]


def test_a_checkpoint_without_a_place_or_of_another_stream_is_refused(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    train(tmp_path, model, processor, stop=4)
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match="'shards': 3.*'shards': 2"):
        train(tmp_path, model, processor, resume=checkpoint, files=2)
    with pytest.raises(ValueError, match="'workers': 0.*'workers': 2"):
        train(tmp_path, model, processor, resume=checkpoint, dataloader_num_workers=2)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["StreamCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="step 4 holds no place in the stream"):
        train(tmp_path, model, processor, resume=checkpoint)
    with pytest.raises(ValueError, match="dataloader_in_order=False"):
        train(tmp_path, model, processor, dataloader_in_order=False)


def test_the_page_on_streams_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs/streaming.md").read_text(encoding="utf-8")
    (tmp_path / "shards").mkdir()
    of_format("parquet", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    names = dict(zip(("model", "processor"), join(tmp_path), strict=True))
    first, resume, store = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(first, names)
    shutil.rmtree(tmp_path / "run/checkpoint-20")  # stopped after 15 steps
    exec(resume, names)
    assert names["trainer"].state.global_step == 20 and (tmp_path / "run/checkpoint-20").is_dir()
    exec(store, names)
    assert sorted(row["id"] for row in names["stored"]) == list(range(ROWS))


HELD = """
import sys
import time
import pyarrow
from modeling_frozen import load_image_text
rows = load_image_text(sys.argv[1], streaming=True, buffer_size=4)
for number, _ in enumerate(rows, start=1):
    if number % 100 == 0:
        time.sleep(0.1)  # what is read ahead comes meanwhile
assert number == 400
print(pyarrow.default_memory_pool().max_memory())
"""


def test_of_a_long_parquet_file_a_row_group_is_held(tmp_path: Path) -> None:
    folder = tmp_path / "of"
    folder.mkdir()
    image = io.BytesIO()
    Image.frombytes("RGB", (100, 100), os.urandom(30000)).save(image, "PNG")
    rows = {"image": [{"bytes": image.getvalue(), "path": None}] * 400, "text": ["a square"] * 400}
    table = pyarrow.table({**rows, "image": pyarrow.array(rows["image"])})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=20, use_dictionary=False, compression="none")
    group = 20 * len(image.getvalue())
    done = fresh_python.run("-c", HELD, str(folder / "rows.parquet"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 6 * group < (folder / "rows.parquet").stat().st_size / 3


def test_the_benchmark_prints_speed_and_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.rows", "--rows", "200", "--rounds", "2", "--buffer", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert re.search(r"rows a second, 200 rows .*rows/s +2$", done.stdout, flags=re.MULTILINE), done.stdout
    assert "peak memory, 200 rows" in done.stdout and "load of the machine" in done.stdout
