"""Ten times the data: time and memory of a run by Trainer, from a dataset in memory order and from a stream.

    python -m benchmarks.scale [--rows 400] [--factor 10] [--repeats 3]

Each run is a fresh process with tiny random parents; pictures are made as they are asked for, so that memory is the
training's own. *Peak* is what resident memory rose above its state after the tenth step; Linux counts it. Seconds are the
processor's, of `trainer.train()` alone, on one thread; the bound is 1.05 times the factor.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Features, Image, IterableDataset, Value
from PIL import Image as Picture
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import parents
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixProcessor


SIZES = parents.Sizes(
    vision_width=32, vision_layers=2, image_size=16, patch_size=8, text_width=32, text_layers=2, vocab_size=40
)


class LazyRows(torch.utils.data.Dataset):
    """Pictures made when they are asked for, with texts of three lengths."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Picture.new("RGB", (20, 18), (index % 256, 30, 200)), "text": "w0 w1 w2 w3 " * (1 + index % 3)}


def streamed(count: int) -> IterableDataset:
    """The same rows, one after another."""

    def generate() -> Iterator[dict[str, Any]]:
        lazy = LazyRows(count)
        for index in range(count):
            yield lazy[index]

    return IterableDataset.from_generator(generate, features=Features({"image": Image(), "text": Value("string")}))


def one(source: str, count: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    class AfterTheTenth(TrainerCallback):
        before = 0

        def on_step_end(self, arguments, state, control, **kwargs) -> None:
            if state.global_step == 10:
                Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
                self.before = memory("VmRSS")

    with tempfile.TemporaryDirectory() as folder:
        model = parents.join(folder, SIZES, connector_type="mlp", prefix_length=None)
        processor = FrozenPrefixProcessor.from_model(model)
        start = AfterTheTenth()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, per_device_train_batch_size=8, max_steps=count // 8, logging_steps=10, report_to="none",
                remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=LazyRows(count) if source == "map" else streamed(count),
            data_collator=DataCollatorForFrozenPrefix(processor),
            callbacks=[start],
        )  # fmt: skip
        began = time.process_time()
        trainer.train()
        return {"seconds": time.process_time() - began, "peak": memory("VmHWM") - start.before, "steps": count // 8}


def measure(source: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", "--one", source, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sources", nargs="+", default=["map", "stream"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one[0], int(options.one[1]))))
        return
    for source in options.sources:
        pairs = [[measure(source, options.rows * times) for times in (1, options.factor)] for _ in range(options.repeats)]
        few_peaks, more_peaks = ([round(pair[i]["peak"] / 2**20, 1) for pair in pairs] for i in (0, 1))
        ratios = [more["seconds"] / few["seconds"] for few, more in pairs]
        print(
            f"{source:<7} {options.rows} rows {statistics.median(few['seconds'] for few, _ in pairs):6.2f} s, "
            f"{options.rows * options.factor} rows {statistics.median(more['seconds'] for _, more in pairs):6.2f} s: "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f}-{max(ratios):.2f}); peak above the tenth step "
            f"{few_peaks} and {more_peaks} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
