"""Rows a second and peak memory of a stream, over sets of growing length: memory is to be flat.

    python -m benchmarks.rows                   # 10^3, 10^4 and 10^5 rows
    python -m benchmarks.rows --rows 1000000    # one length; may be given several times

Rows (an image of 32 x 24 pixels in PNG, a question and an answer) lie in parquet files of at most 2000 rows, 16 or more. They
are read by `load_image_text(…, streaming=True)` through a data loader, images opened, nothing collated. Each round is a Python
of its own, so that peak memory is of that length alone; it is what the process and all its workers hold in memory of their own
(see `benchmarks.memory`), above what there is before the first row. The machine's load is printed, for others may be at work
on it.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks.timing import Report, Timing, quartiles


FILES, MOST_ROWS = 16, 2000  # files at least, rows of one at most: pyarrow holds a good part of the file that it reads
ENCODED = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
SCHEMA = pyarrow.schema([("image", ENCODED), ("prompt", pyarrow.string()), ("answer", pyarrow.string())])

READ = """
import multiprocessing, time
from torch.utils.data import DataLoader
from benchmarks.memory import Peak, copy_what_is_shared
from modeling_frozen import load_image_text

def start_alone(worker):
    starts[worker] = copy_what_is_shared()

rows = load_image_text({source!r}, streaming=True, buffer_size={buffer})
starts = multiprocessing.Array("q", max(1, {workers}))
loader = DataLoader(rows, batch_size=32, num_workers={workers}, collate_fn=list, worker_init_fn=start_alone)
with Peak() as peak:
    count, start = 0, time.perf_counter()
    for batch in loader:
        count += len(batch)
        {use}
    seconds = time.perf_counter() - start
assert count == {rows}, count
print(count / seconds, (peak.bytes - sum(starts)) / 2**20)
"""


def some_images() -> Callable[[int], bytes]:
    """Of a row: enough for decoding not to be of one picture; each row has bytes of its own in the file."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return lambda row: images[row % 64]


def write(folder: Path, rows: int, image_of: Callable[[int], bytes]) -> str:
    """The files of a set, and the pattern of their names."""
    files = max(FILES, rows // MOST_ROWS)
    for number in range(files):
        own = range(number * rows // files, (number + 1) * rows // files)
        with pyarrow.parquet.ParquetWriter(folder / f"{number:05}.parquet", SCHEMA, use_dictionary=False) as file:
            for start in range(own.start, own.stop, 1000):
                part = range(start, min(start + 1000, own.stop))
                columns = {
                    "image": [{"bytes": image_of(row), "path": None} for row in part],
                    "prompt": [f"What is number {row}?" for row in part],
                    "answer": [f"It is picture {row % 64}." for row in part],
                }
                file.write_table(pyarrow.table(columns, schema=SCHEMA))
    return str(folder / "*.parquet")


def run(code: str, numbers: int = 2) -> list[float]:
    """In a Python of its own: rows a second and peak memory (MiB) of each step, the last numbers that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The measured process failed:\n{done.stderr}")
    return [float(value) for value in done.stdout.split()[-numbers:]]


def add_figures(report: Report, timings: Sequence[Timing], rows: int) -> None:
    """Of rows a second and peak memory, in turn."""
    for timing, unit in zip(timings, ("rows/s", "MiB") * (len(timings) // 2), strict=True):
        low, high = quartiles(timing.rounds)
        name = f"{timing.name}, {rows:,} rows ({min(timing.rounds):,.0f}-{max(timing.rounds):,.0f})"
        report.figure(name, statistics.median(timing.rounds), unit)
        report.rows[-1] |= {"rounds": len(timing.rounds), "ours_rounds": timing.rounds, "quartiles": [low, high]}


def parse(description: str | None, rounds: int, *further: tuple[str, int, str]) -> argparse.Namespace:
    """The arguments of a benchmark over sets of growing length; `further` numbers: name, default, what it is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="length of a set (default: 1000, 10000 and 100000)")
    numbers = (
        ("rounds", rounds, "runs of each length"),
        ("workers", 2, "of the data loader that reads"),
        ("buffer", 500, "rows of a shuffle buffer"),
        *further,
    )
    for name, default, what in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--output", help="file that the figures are written to, as JSON")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or [1000, 10_000, 100_000]
    return arguments


@contextmanager
def reported(title: str, output: str | None, **settings: int) -> Iterator[Report]:
    """Prints the figures that are added, and the machine's load before and after."""
    print("load of the machine (1, 5, 15 minutes):", *(f"{load:.2f}" for load in os.getloadavg()))
    report = Report(title, **settings)
    yield report
    report.print()
    print("load of the machine at the end:", *(f"{load:.2f}" for load in os.getloadavg()))
    report.save(output)


def main() -> None:
    arguments = parse(__doc__, rounds=3)
    settings = {"workers": arguments.workers, "buffer": arguments.buffer}
    with reported("A stream of rows, images opened", arguments.output, **settings) as report:
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory() as folder:
                source = write(Path(folder), rows, some_images())
                code = READ.format(source=source, rows=rows, use="pass", **settings)
                timings = [Timing("rows a second"), Timing("peak memory")]
                for _ in range(arguments.rounds):
                    for timing, value in zip(timings, run(code), strict=True):
                        timing.rounds.append(value)
            add_figures(report, timings, rows)


if __name__ == "__main__":
    main()
