"""Rows a second and peak memory of a stream, over sets of growing length: memory is to be flat.

    python -m benchmarks.rows                   # 10^3, 10^4 and 10^5 rows
    python -m benchmarks.rows --rows 1000000    # one length; may be given several times

Rows (an image of 32 x 24 pixels in PNG, a question and an answer) lie in parquet files of at most 2000 rows, 16 or more. They
are read by `load_image_text(…, streaming=True)` through a data loader, images opened, nothing collated. Each round is a Python
of its own, so that peak memory is of that length alone; it is what the process and all its workers hold in memory of their own
(Linux's Pss_Anon: what they share is counted once), above what there is before the first row. A forked worker copies the
modules that it shares with its parent little by little, as it counts references to them, whatever it reads: here each copies
them all before its first row, so that they aren't taken for memory of rows. The machine's load is printed, for others may be
at work on it.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
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
import ctypes, mmap, multiprocessing, threading, time
import psutil
from torch.utils.data import DataLoader
from modeling_frozen import load_image_text

def resident(*processes):
    held = 0
    for one in processes:
        try:
            lines = open(f"/proc/{{one.pid}}/smaps_rollup").read().splitlines()
        except (psutil.NoSuchProcess, OSError):  # it has ended
            continue
        held += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return held

def copy_what_is_shared(worker):
    for line in open("/proc/self/maps").read().splitlines():
        span, mode = line.split()[:2]
        if mode == "rw-p":
            start, end = (int(address, 16) for address in span.split("-"))
            for address in range(start, end, mmap.PAGESIZE):
                byte = ctypes.c_ubyte.from_address(address)
                byte.value = byte.value  # written, if to what it was: the page is the worker's own now
    starts[worker] = resident(psutil.Process())

rows = load_image_text({files!r}, streaming=True, buffer_size={buffer})
starts = multiprocessing.Array("q", max(1, {workers}))
loader = DataLoader(rows, batch_size=32, num_workers={workers}, collate_fn=list, worker_init_fn=copy_what_is_shared)
process = psutil.Process()
before, peak, stop = resident(process), [0], threading.Event()

def watch():
    while not stop.wait(0.1):
        peak[0] = max(peak[0], resident(process, *process.children(recursive=True)))

watcher = threading.Thread(target=watch)
watcher.start()
count, start = 0, time.perf_counter()
for batch in loader:
    count += len(batch)
seconds = time.perf_counter() - start
stop.set()
watcher.join()
assert count == {rows}, count
print(count / seconds, (peak[0] - before - sum(starts)) / 2**20)
"""


def write(folder: Path, rows: int) -> str:
    """The files of a set, and the pattern of their names."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(64):  # enough for decoding not to be of one picture; each row has bytes of its own in the file
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    files = max(FILES, rows // MOST_ROWS)
    for number in range(files):
        own = range(number * rows // files, (number + 1) * rows // files)
        with pyarrow.parquet.ParquetWriter(folder / f"{number:05}.parquet", SCHEMA, use_dictionary=False) as file:
            for start in range(own.start, own.stop, 1000):
                part = range(start, min(start + 1000, own.stop))
                columns = {
                    "image": [{"bytes": images[row % 64], "path": None} for row in part],
                    "prompt": [f"What is number {row}?" for row in part],
                    "answer": [f"It is picture {row % 64}." for row in part],
                }
                file.write_table(pyarrow.table(columns, schema=SCHEMA))
    return str(folder / "*.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="length of a set (default: 1000, 10000 and 100000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each length (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader (default: %(default)s)")
    parser.add_argument("--buffer", type=int, default=500, help="rows of the shuffle buffer (default: %(default)s)")
    parser.add_argument("--output", help="file that the figures are written to, as JSON")
    arguments = parser.parse_args()
    print("load of the machine (1, 5, 15 minutes):", *(f"{load:.2f}" for load in os.getloadavg()))
    settings = {"workers": arguments.workers, "buffer": arguments.buffer}
    report = Report("A stream of rows, images opened", **settings)
    for rows in arguments.rows or (1000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            code = READ.format(files=write(Path(folder), rows), rows=rows, workers=arguments.workers, buffer=arguments.buffer)
            speed, memory = Timing("rows a second"), Timing("peak memory")
            for _ in range(arguments.rounds):
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"The measured process failed:\n{done.stderr}")
                for timing, value in zip((speed, memory), done.stdout.split()[-2:], strict=True):
                    timing.rounds.append(float(value))
        for timing, unit in ((speed, "rows/s"), (memory, "MiB")):
            low, high = quartiles(timing.rounds)
            name = f"{timing.name}, {rows:,} rows ({min(timing.rounds):,.0f}-{max(timing.rounds):,.0f})"
            report.figure(name, statistics.median(timing.rounds), unit)
            report.rows[-1] |= {"rounds": len(timing.rounds), "ours_rounds": timing.rounds, "quartiles": [low, high]}
    report.print()
    print("load of the machine at the end:", *(f"{load:.2f}" for load in os.getloadavg()))
    report.save(arguments.output)


if __name__ == "__main__":
    main()
