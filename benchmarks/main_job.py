"""Rows a second and peak memory of the main job, over data sets of growing length: memory is to be flat.

    python -m benchmarks.main_job                   # 10^3, 10^4 and 10^5 rows
    python -m benchmarks.main_job --rows 1000000    # one length; may be given several times

The main job is what README's first script does: `load_image_text` opens parquet files as a data set, `cache_vision_features`
runs the tower over every image, and `Trainer` trains a connector for one epoch from what was stored. Each row has an image of
its own (16 x 16 pixels, uncompressed), a question and an answer; the parents are tiny, so that memory is the job's own and
not theirs. Each length is a Python of its own; memory is as in `benchmarks.rows`, above what there is when the model is
joined and some rows have been stored and trained on. Files that are mapped, the data set and the store, are not counted: the
system takes their pages back when it needs the room.
"""

import tempfile
from pathlib import Path

from benchmarks.rows import add_figures, parse, reported, run, write
from benchmarks.stored_rows import image_of_its_own
from benchmarks.timing import Timing


STEPS = ("opening", "storing", "an epoch of training")

JOB = """
import os
import time
os.environ["HF_DATASETS_CACHE"] = {folder!r} + "/opened"
from PIL import Image
from transformers import Trainer, TrainingArguments
from benchmarks import parents
from benchmarks.memory import Peak
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixProcessor, cache_vision_features, load_image_text

model = parents.join({folder!r} + "/parents", parents.TINY)
processor = FrozenPrefixProcessor.from_model(model)

def store(rows, name):
    return cache_vision_features(
        rows, model, processor, cache_dir={folder!r} + "/" + name, num_workers=0, batch_size=64
    )

def train(rows):
    arguments = TrainingArguments(
        {folder!r} + "/training", num_train_epochs=1, per_device_train_batch_size={batch}, logging_steps=10, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForFrozenPrefix(processor)).train()

few = [{{"image": Image.new("RGB", (16, 16), (row, 9, 9)), "prompt": "What?", "answer": "It."}} for row in range(128)]
train(store(load_image_text(few), "few"))
figures = []

def measured(step, *arguments):
    with Peak() as peak:
        start = time.perf_counter()
        result = step(*arguments)
        seconds = time.perf_counter() - start
    figures.extend([{rows} / seconds, peak.bytes / 2**20])
    return result

rows = measured(load_image_text, {source!r})
stored = measured(store, rows, "store")
measured(train, stored)
print(*figures)
"""


def main() -> None:
    arguments = parse(__doc__, 1, ("batch", 64, "rows of a training step"))
    settings = {"batch": arguments.batch}
    with reported("The main job: data set, store, an epoch of training", arguments.output, **settings) as report:
        for rows in arguments.rows:
            timings = [Timing(f"{what}{name}") for what in STEPS for name in ("", ": peak memory")]
            for _ in range(arguments.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "rows").mkdir()
                    source = write(Path(folder) / "rows", rows, image_of_its_own)
                    figures = run(JOB.format(folder=folder, source=source, rows=rows, **settings), len(timings))
                for timing, value in zip(timings, figures, strict=True):
                    timing.rounds.append(value)
            add_figures(report, timings, rows)


if __name__ == "__main__":
    main()
