"""All that a GPU is asked, in one run of at most eight minutes: steps, a training in bfloat16, memory, generation under load.

    python -m benchmarks.gpu --output gpu.json
    python -m benchmarks.gpu --small              # seconds, on a CPU too: to see that it runs

Language models of each attention that is installed (`sdpa`, `flash_attention_2`; in bfloat16, beside a connector in float32):
a training step from stored features against the bare language model's own, with an image to each text and with several
captions an image; its peak memory above the weights; how often a step makes the host wait for the device; a training by
Trainer, whose loss must fall; and `generate` at 1, 8 and 32 images at once, against the bare language model. What is absent is
left out, and said. A language model of 1.1 billion parameters by default; on a CPU the figures say nothing.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, logging

from benchmarks import parents, timing, training


LARGE = parents.Sizes(vision_width=1024, vision_layers=24, image_size=336, patch_size=14, text_width=2048, text_layers=16,
    vocab_size=151_936, prefix_length=32, text_length=32, dtype="bfloat16")  # fmt: skip
SMALL = parents.Sizes(vision_width=64, vision_layers=1, image_size=32, patch_size=16, text_width=64, text_layers=2,
    vocab_size=300, prefix_length=4, text_length=8, dtype="bfloat16")  # fmt: skip
# What waits for the device, as the host sees it: the value of a tensor, or a size that its values say.
_WAITS = ("cudaStreamSynchronize", "aten::_local_scalar_dense", "aten::nonzero", "aten::unique_dim", "aten::_unique2")


def attentions(device: str) -> Iterator[tuple[str, str | None]]:
    """Each attention, and why it is left out."""
    yield "sdpa", None
    missing = None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"
    yield "flash_attention_2", missing if device == "cuda" else "it needs a GPU"


def count_waits(step: Any, device: str) -> int:
    """How often a step makes the host wait for the device (on a CPU: how often it would)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    names = _WAITS[:1] if device == "cuda" else _WAITS[1:]
    return sum(event.count for event in profile.key_averages() if event.key in names)


@contextlib.contextmanager
def peak(device: str) -> Iterator[dict[str, float]]:
    """Fills in the most memory in MiB that is taken inside above what is taken at its start; nothing on a CPU."""
    found: dict[str, float] = {}
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    yield found
    if device == "cuda":
        found["MiB"] = (torch.cuda.max_memory_allocated() - start) / 2**20


class _Rows(torch.utils.data.Dataset):
    """The same batch again and again, as rows that need no collating."""

    def __init__(self, batch: dict[str, torch.Tensor], steps: int):
        self.batch, self.steps = {name: tensor.cpu() for name, tensor in batch.items()}, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batch


def train(model: Any, batch: dict[str, torch.Tensor], steps: int, folder: str, device: str) -> tuple[float, float, float]:
    """By Trainer, in bfloat16: seconds a step, the loss at the start and at the end."""
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=1, bf16=True, logging_steps=1,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=device == "cpu",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=_Rows(batch, steps), data_collator=lambda rows: rows[0])
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds / steps, losses[0], losses[-1]


def measure(report: timing.Report, folder: Path, sizes: parents.Sizes, attention: str, args: Any, device: str) -> None:
    model = parents.join(
        folder, sizes, connector_type="mlp", vision_feature_select_strategy="pooled", text_attn_implementation=attention
    )
    for captions, rows in ((1, args.batch_size), (args.captions, 2 * args.captions)):
        batch = training.batch_of(model, sizes, rows, device, captions)
        model.to(device)
        ours, limit = training.our_step(model, batch), training.limit_step(model, batch)
        name = f"{attention}, step, batch {rows}" + ("" if captions == 1 else f" of {captions} captions an image")
        timings = timing.alternate({"ours": ours, "limit": limit}, rounds=args.rounds)
        report.compare(name, timings["ours"], timings["limit"], bar=1.05)
        with peak(device) as memory:
            ours()
        if memory:
            with peak(device) as least:
                limit()
            report.figure(f"{name}: peak memory above the weights", memory["MiB"], "MiB", limit=least["MiB"])
        report.figure(f"{name}: waits for the device", count_waits(ours, device), "waits")
    batch = training.batch_of(model, sizes, args.batch_size, device)
    model.to(device)
    seconds, first, last = train(model, batch, args.steps, str(folder / "run"), device)
    report.figure(f"{attention}, Trainer in bfloat16, {args.steps} steps: a step", 1e3 * seconds, "ms")
    report.figure(f"{attention}, Trainer in bfloat16: the last loss, beside the first", last, "nats", limit=first, bar=first)
    generate(report, model.eval(), sizes, attention, args, device)


@torch.inference_mode()
def generate(report: timing.Report, model: Any, sizes: parents.Sizes, attention: str, args: Any, device: str) -> None:
    bare = model.model.language_model
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
    for rows in args.loads:
        asked = parents.prompt(model, parents.words(sizes, rows=rows, device=device))
        plain = parents.words(sizes, asked.shape[1], rows=rows, device=device)
        images = parents.pictures(sizes, rows, device).to(model.model.vision_tower.dtype)
        calls = {
            "ours": lambda asked=asked, images=images: model.generate(asked, pixel_values=images, **options),
            "limit": lambda plain=plain: bare.generate(plain, **options),
        }
        timings = timing.alternate(calls, rounds=args.rounds, warmup=1)
        name = f"{attention}, generate, {rows} images, tower included"
        report.compare(name, timings["ours"], timings["limit"])
        report.figure(f"{attention}, generate, {rows} images", rows * args.new_tokens / timings["ours"].median, "tokens/s")


def main(arguments: list[str] | None = None) -> timing.Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models: whether it runs")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--captions", type=int, default=5, help="of each of two images")
    parser.add_argument("--steps", type=int, default=30, help="of the training")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 8, 32], help="images at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="file that the figures are written to, as JSON")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SMALL if args.small else LARGE
    report = timing.Report("a GPU" if device == "cuda" else "no GPU: figures of a CPU", **dataclasses.asdict(sizes))
    with tempfile.TemporaryDirectory() as folder:
        for attention, missing in attentions(device):
            if missing:
                print(f"{attention} is left out: {missing}")
            else:
                measure(report, Path(folder), sizes, attention, args, device)
    report.print()
    report.save(args.output)
    return report


if __name__ == "__main__":
    main()
