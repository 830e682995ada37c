"""Peak memory and time of a training step's loss: full logits, the head where a label is, and in chunks.

    python -m benchmarks.loss_memory [--repeats 3] [--json FILE] [--chunks 16 64 …]

Two vocabularies, two shapes of batch: 64 short captions behind a prefix of 32 vectors, and 4 long texts. Each step is
measured in a fresh process: the peak of its resident memory above what was resident before the step (Linux counts it),
after a step on one row that has everything loaded. Beside it stands how many rows of logits the largest tensor with a
vocabulary axis had. Seconds are the processor's, of one thread, which neighbours on the machine disturb least. The
language model is small (random, hidden size 256, 4 layers), its head as large as real ones; the tower is tiny. With
`--chunks`, by chunk size instead.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


VOCABULARIES = (32_000, 151_936)
BATCHES = {"64 captions": (64, 14), "4 long texts": (4, 480)}
WAYS = ("full", "labels", "chunked")
PREFIX = 32


def peak_above(call) -> tuple[int, float]:
    """Bytes that the peak of resident memory rose above its present state during a call, and the call's seconds."""
    status = Path("/proc/self/status")

    def read(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = read("VmRSS"), time.process_time()
    call()
    return read("VmHWM") - before, time.process_time() - start


def one(vocab_size: int, batch: str, way: str, chunk_size: int | None) -> dict[str, float]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration

    torch.set_num_threads(1)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "intermediate_size": 768}
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    words = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=1024, **sizes)
    config = FrozenPrefixConfig.from_vision_text_configs(
        tower,
        words,
        connector_type="resampler",
        prefix_length=PREFIX,
        connector_config={"hidden_size": 64, "num_heads": 2, "num_layers": 1},
        loss_config={"chunk_size": chunk_size} if chunk_size else None,
    )
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration(config).train()
    if way == "labels":  # something that looks at the whole model's output makes it the plain way
        model.model.language_model.register_forward_hook(lambda module, args, output: None)
    options = {"skip_logits": False} if way == "full" else {}

    def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, vocab_size, (rows, PREFIX + length))
        ids[:, :PREFIX] = config.image_token_id
        labels = ids.clone()
        labels[:, :PREFIX] = -100
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(rows, 3, 32, 32)}

    def step(data: dict[str, torch.Tensor]) -> None:
        model(**data, **options).loss.backward()

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == vocab_size and out.is_contiguous():
                self.rows = max(self.rows, out.numel() // vocab_size)
            return out

    step(inputs(1, 4))
    rows, length = BATCHES[batch]
    data = inputs(rows, length)
    peak, seconds = peak_above(lambda: step(data))
    with Largest() as largest:
        step(data)
    places = {"rows": largest.rows, "labels": rows * length, "positions": data["labels"].numel()}
    return {"peak": peak, "seconds": seconds, **places}


def measure(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--chunks", type=int, nargs="+")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        vocab_size, batch, way, chunk_size = options.one
        print(json.dumps(one(int(vocab_size), batch, way, int(chunk_size) or None)))
        return
    cases = [(way, 0) for way in WAYS] if not options.chunks else [("chunked", size) for size in options.chunks]
    table = []
    print("vocabulary  batch         way      chunk  rows of logits  peak MiB           seconds            peak  time")
    for vocab_size, batch in itertools.product(options.vocabularies, options.batches):
        first: dict[str, float] = {}
        for way, chunk in cases:
            runs = [measure(vocab_size, batch, way, chunk) for _ in range(options.repeats)]
            peaks, seconds = [run["peak"] / 2**20 for run in runs], [run["seconds"] for run in runs]
            middle = {"peak": statistics.median(peaks), "seconds": statistics.median(seconds)}
            first = first or middle
            table.append({"vocabulary": vocab_size, "batch": batch, "way": way, "chunk_size": chunk, "runs": runs})
            print(
                f"{vocab_size:>10}  {batch:<12}  {way:<8} {chunk or 'auto':>5}  "
                + f"{runs[0]['rows']:>6} of {runs[0]['positions']:<5}  "
                + f"{middle['peak']:.0f} ({min(peaks):.0f}-{max(peaks):.0f})".ljust(19)
                + f"{middle['seconds']:.2f} ({min(seconds):.2f}-{max(seconds):.2f})".ljust(17)
                + f"{middle['peak'] / first['peak']:6.2f}{middle['seconds'] / first['seconds']:6.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
