"""Epochs and peak memory of training a connector, against transformers' LLaVA with the same parents, connector and data.

    python -m benchmarks.llava --output llava.json

Both train the same two-layer MLP on the same frozen tower and language model, from the same start, on the same rows in the
same order, by `Trainer`, so both end at the same loss (printed). LLaVA reads every picture again for every caption of every
epoch. Ours runs the tower once per picture into the store (its first epoch holds that too) and trains from there. Each picture
has five captions. They stand together, so that those of one batch share what the language model reads of the picture; with
`--shuffled` they don't, and then nothing but tower and head is spared. Peak memory is each process's own high-water mark, and
that above its weights and libraries. With `--compile BACKEND` (`inductor`, `aot_eager`) ours is trained once more, by
Trainer's `torch_compile=True`; its first epoch holds the compiling.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks import parents, timing
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)


CAPTIONS = 5  # of each picture
IGNORE_INDEX = -100


def make_dataset(folder: Path, sizes: parents.Sizes, pictures: int) -> Dataset:
    """Noisy JPEGs of about the size of web photos, with five captions each, a row per caption."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"image": [], "text": []}
    for index in range(pictures):
        coarse = rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        path = folder / f"{index}.jpg"
        PILImage.fromarray(coarse).resize((640, 480)).save(path, quality=90)
        for _ in range(CAPTIONS):
            words = rng.integers(4, sizes.vocab_size - 16, sizes.text_length - 1)
            rows["image"].append(str(path))
            rows["text"].append(" ".join(f"w{word - 4}" for word in words))
    return Dataset.from_dict(rows).cast_column("image", Image())


def join(tower: str, words: str) -> FrozenPrefixForConditionalGeneration:
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower, words, connector_type="mlp", connector_config={"input_norm": False}, vision_feature_layer=-2
    )


def llava(tower: str, words: str, start: dict[str, torch.Tensor], image_token_id: int) -> LlavaForConditionalGeneration:
    """transformers' model around the same parents, frozen, with the connector's own start."""
    vision, text = CLIPVisionModel.from_pretrained(tower), AutoModelForCausalLM.from_pretrained(words)
    config = LlavaConfig(
        vision_config=vision.config, text_config=text.config, image_token_id=image_token_id, vision_feature_layer=-2
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, text.model, text.lm_head
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    projector.load_state_dict(
        {
            "linear_1.weight": start["hidden.0.weight"],
            "linear_1.bias": start["hidden.0.bias"],
            "linear_2.weight": start["output.weight"],
            "linear_2.bias": start["output.bias"],
        }
    )
    model.requires_grad_(False)
    projector.requires_grad_(True)
    return model


class LlavaCollator:
    """Pictures and captions as LLaVA's own collators make them: placeholders, then the text with its end."""

    def __init__(self, tower: str, words: str, positions: int, image_token_id: int):
        self.image_processor, self.tokenizer = AutoImageProcessor.from_pretrained(tower), AutoTokenizer.from_pretrained(words)
        self.placeholders = [image_token_id] * positions

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = self.tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
        ids = [[*self.placeholders, *text, self.tokenizer.eos_token_id] for text in texts]
        length, skip = max(map(len, ids)), len(self.placeholders)
        padded = torch.tensor([one + [0] * (length - len(one)) for one in ids])
        mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids])
        labels = padded.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, :skip] = IGNORE_INDEX
        pixels = self.image_processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")
        return {"input_ids": padded, "attention_mask": mask, "labels": labels, **pixels}


class EpochTimes(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(kind: str, folder: Path, sizes: parents.Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one of the two in this process. Returns seconds of each epoch, the losses, and bytes of peak memory."""
    tower, words = parents.save_parents(folder, sizes)
    data = folder / f"data-{sizes.vocab_size}-{sizes.text_length}"
    data.mkdir(exist_ok=True)
    rows = make_dataset(data, sizes, args.pictures)
    torch.manual_seed(0)
    ours = join(tower, words)
    processor = FrozenPrefixProcessor.from_model(ours)
    start = {name: tensor.clone() for name, tensor in ours.model.connector.state_dict().items()}
    before = 0.0
    if kind == "llava":
        token, positions = ours.config.image_token_id, ours.config.num_positions
        del ours
        model, collator = llava(tower, words, start, token), LlavaCollator(tower, words, positions, token)
    else:
        model, collator = ours, DataCollatorForFrozenPrefix(processor)
    weights = peak_bytes()
    if kind != "llava":
        begin = time.perf_counter()
        rows = cache_vision_features(
            rows, model, processor, cache_dir=tempfile.mkdtemp(dir=folder), dtype="float32", batch_size=args.batch_size
        )
        before = time.perf_counter() - begin
    times = EpochTimes()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder / kind),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            train_sampling_strategy="random" if args.shuffled else "sequential",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            torch_compile=kind == "compiled",
            torch_compile_backend=args.compile if kind == "compiled" else None,
        ),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[times],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [times.seconds[0] + before, *times.seconds[1:]]
    return {"epochs": seconds, "losses": losses, "peak": peak_bytes(), "weights": weights}


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_limit() -> int:
    """What a worker may take: most of the machine's memory, so that one which needs more ends by itself."""
    return int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def run_apart(kind: str, folder: str, sizes: parents.Sizes, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """[`train`] in a process of its own: memory's high-water mark never falls within one."""
    settings = {**vars(args), **sizes.as_dict(), **changes}
    command = [sys.executable, "-m", "benchmarks.llava", "--worker", kind, "--folder", folder]
    for name in (*sizes.as_dict(), "pictures", "epochs", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(settings[name])]
    command += ["--shuffled"] if args.shuffled else []
    command += ["--compile", args.compile] if args.compile else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode and "DefaultCPUAllocator" in done.stderr:
        return {"peak": memory_limit(), "ran_out": True}
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    name: str,
    report: timing.Report,
    results: dict[str, list[dict[str, Any]]],
    memory: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """The rows of one vocabulary."""
    first = {kind: timing.Timing(kind, [one["epochs"][0] for one in runs]) for kind, runs in results.items()}
    later = {kind: timing.Timing(kind, [s for one in runs for s in one["epochs"][1:]]) for kind, runs in results.items()}
    above = {kind: timing.Timing(kind, [one["peak"] - one["weights"] for one in runs]) for kind, runs in results.items()}
    peak = {kind: timing.Timing(kind, [one["peak"] for one in runs]) for kind, runs in results.items()}
    report.compare(f"{name}: first epoch, store included", first["ours"], first["llava"], bar=1.0, unit="s", scale=1)
    report.compare(f"{name}: later epochs", later["ours"], later["llava"], bar=1 / 3, unit="s", scale=1)
    for what, taken in (("peak memory", peak), ("peak above weights", above)):
        report.compare(f"{name}: {what}", taken["ours"], taken["llava"], unit="MB", scale=1e-6)
    if args.compile:
        by = f"{name}, compiled by {args.compile}"
        report.compare(f"{by}: later epochs, to ours as it is", later["compiled"], later["ours"], bar=1.0, unit="s", scale=1)
        report.compare(f"{by}: peak memory", peak["compiled"], peak["llava"], bar=0.5, unit="MB", scale=1e-6)
        report.compare(f"{by}: peak above weights", above["compiled"], above["llava"], bar=0.5, unit="MB", scale=1e-6)
    if memory:
        values = {kind: timing.Timing(kind, [one["peak"]]) for kind, one in memory.items()}
        what = f"{name}: peak memory, batch {args.short_batch} of short captions"
        what += " (LLaVA ran out of it)" if memory["llava"].get("ran_out") else ""
        report.compare(what, values["ours"], values["llava"], unit="MB", scale=1e-6)
    loss = {kind: runs[0]["losses"][-1] for kind, runs in results.items()}
    report.figure(f"{name}: loss of the last epoch", loss["ours"], "nats", limit=loss["llava"], bar=loss["llava"] * 1.001)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parents.add_arguments(parser)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--short-batch", type=int, default=64, help="batch of the memory figure with short captions; 0: none")
    parser.add_argument("--shuffled", action="store_true", help="a picture's captions in any order among the others")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile: ours compiled as well")
    parser.add_argument("--worker", choices=["ours", "compiled", "llava"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    timing.add_arguments(parser, rounds=2)
    args = parser.parse_args(arguments)
    if args.worker:
        if not torch.cuda.is_available():  # a GPU's driver reserves more addresses than there is memory
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit(), memory_limit()))
        print(json.dumps(train(args.worker, Path(args.folder), parents.sizes_of(args), args)))
        return {}
    report = timing.Report(
        "training a connector, against transformers' LLaVA with the same parents, data and connector", **vars(args)
    )
    for vocab_size in args.vocab_sizes:
        sizes = dataclasses.replace(parents.sizes_of(args), vocab_size=vocab_size)
        kinds = ["ours", "llava", *(["compiled"] if args.compile else [])]
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        with tempfile.TemporaryDirectory() as folder:
            parents.save_parents(folder, sizes)
            for turn in range(args.rounds):
                for kind in kinds if turn % 2 else kinds[::-1]:
                    results[kind].append(run_apart(kind, folder, sizes, args))
            memory = {}
            if args.short_batch:
                short = {
                    "text_length": 12,
                    "batch_size": args.short_batch,
                    "epochs": 1,
                    "pictures": 2 * args.short_batch // CAPTIONS,
                }
                small = dataclasses.replace(sizes, text_length=12)
                memory = {kind: run_apart(kind, folder, small, args, **short) for kind in ("ours", "llava")}
        compare(f"vocabulary {vocab_size:,}", report, results, memory, args)
        report.save(args.output)
    report.print()
    report.save(args.output)
    return {"rows": report.rows}


if __name__ == "__main__":
    main()
