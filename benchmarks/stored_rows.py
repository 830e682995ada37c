"""Rows a second and peak memory of filling a store of features from a stream, and of reading it, over growing lengths:
memory is to be flat.

    python -m benchmarks.stored_rows                   # 10^3, 10^4 and 10^5 rows
    python -m benchmarks.stored_rows --rows 1000000    # one length; may be given several times

Each row has an image of its own (16 x 16 pixels, uncompressed), a question and an answer, in parquet files as
`benchmarks.rows` writes them. `store_rows` runs a tower of one layer and width 32 over them, in one process without workers,
for what is measured is the way to the store and not the tower. What it wrote is read by `load_image_text` through a data
loader with workers, every image's features loaded. Each is a Python of its own; memory is as in `benchmarks.rows`, after
some rows that have everything imported. Mapped files are not counted: the system takes them back when it needs the room.
"""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.rows import READ, add_figures, parse, reported, run, write
from benchmarks.timing import Timing


FILL = """
import time
from pathlib import Path
from benchmarks import parents
from benchmarks.memory import Peak
from modeling_frozen import FrozenPrefixProcessor, load_image_text, store_rows

model = parents.join({folder!r} + "/parents", parents.TINY)
processor = FrozenPrefixProcessor.from_model(model)
rows = load_image_text({source!r}, streaming=True, buffer_size={buffer})
options = dict(num_workers=0, rows_per_shard={rows_per_shard})
some = load_image_text([{{"image": __import__("PIL.Image").Image.new("RGB", (16, 16)), "text": "a"}}] * 64, streaming=True)
store_rows(some, model, processor, {folder!r} + "/some", **options)
with Peak() as peak:
    start = time.perf_counter()
    store_rows(rows, model, processor, {folder!r} + "/store", **options)
    seconds = time.perf_counter() - start
print({rows} / seconds, peak.bytes / 2**20)
"""


def image_of_its_own(row: int) -> bytes:
    pixels = np.random.default_rng(row).integers(0, 255, 16 * 16 * 3, dtype=np.uint8)
    return b"P6 16 16 255\n" + pixels.tobytes()


def main() -> None:
    arguments = parse(__doc__, 1, ("rows-per-shard", 1000, "rows of a file of the store"))
    settings = {"workers": arguments.workers, "buffer": arguments.buffer, "rows_per_shard": arguments.rows_per_shard}
    with reported("A store filled from a stream, and read", arguments.output, **settings) as report:
        for rows in arguments.rows:
            timings = [Timing(f"{what}{name}") for what in ("filling", "reading") for name in ("", ": peak memory")]
            for _ in range(arguments.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "rows").mkdir()
                    source = write(Path(folder) / "rows", rows, image_of_its_own)
                    filled = run(FILL.format(folder=folder, source=source, rows=rows, **settings))
                    use = "[image.load() for row in batch for image in row['images']]"
                    read = run(READ.format(source=f"{folder}/store", rows=rows, use=use, **settings))
                for timing, value in zip(timings, [*filled, *read], strict=True):
                    timing.rounds.append(value)
            add_figures(report, timings, rows)


if __name__ == "__main__":
    main()
