"""Padding and time of an epoch: rows at random, grouped by length, and packed several to a sequence.

    python -m benchmarks.batching --dataset captions/flickr8k_1k --text lm/tinystories_instruct_3m_chat [--prefix 10 49]

One caption per row behind a prefix; forward and backward of the whole model from stored features (random ones: their
values don't matter here), every batch of the epoch, the three ways in turn, the whole repeated. *Packed* is an estimate
in its favour: first-fit-decreasing into sequences as long as `--packed_length`, as many of them per step as hold the same
number of rows, causal attention over the whole sequence and neither block mask nor reset of positions computed, both of
which real packing must have (or rows read each other). Seconds are the processor's, of one thread, which neighbours on
the machine disturb least.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig
from transformers.trainer_pt_utils import get_length_grouped_indices

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
)
from modeling_frozen.data.lengths import add_lengths


def join(text: str, prefix_length: int) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=32
    )
    tokenizer = AutoTokenizer.from_pretrained(text)
    config = FrozenPrefixConfig.from_vision_text_configs(
        tower, AutoConfig.from_pretrained(text), connector_type="resampler", prefix_length=prefix_length,
        connector_config={"hidden_size": 64, "num_heads": 2, "num_layers": 1},
    )  # fmt: skip
    model = FrozenPrefixForConditionalGeneration(config)
    model.model.language_model.load_state_dict(AutoModelForCausalLM.from_pretrained(text).state_dict())
    processor = FrozenPrefixProcessor(CLIPImageProcessorPil(), tokenizer, prefix_length=prefix_length)
    config.image_token_id = processor.image_token_id
    return model.train(), processor


def packed(lengths: list[int], size: int) -> list[list[int]]:
    """First fit decreasing: rows by bin, each at most `size` long together."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if at is None:
            bins.append([])
            room.append(size)
            at = len(bins) - 1
        bins[at].append(index)
        room[at] -= lengths[index]
    return bins


def step(model: FrozenPrefixForConditionalGeneration, batch: dict[str, torch.Tensor], images: int) -> float:
    config = model.config
    batch = {**batch, "vision_features": torch.zeros(images, config.num_positions, config.vision_width)}
    start = time.process_time()
    model(**batch).loss.backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--prefix", type=int, nargs="+", default=[10, 49])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--packed_length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=30, help="of one epoch")
    parser.add_argument("--every", type=int, default=1, help="time each so manieth batch alone, and take it for the rest")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = load_dataset(str(Path(options.dataset)), split="train").select_columns(["captions"])
    texts = [caption for row in split for caption in row["captions"]]
    random.Random(0).shuffle(texts)
    texts = texts[: options.batches * options.batch_size]
    print(f"{len(texts)} captions, batches of {options.batch_size}, packed into {options.packed_length}")
    for prefix_length in options.prefix:
        model, processor = join(options.text, prefix_length)
        collator = DataCollatorForFrozenPrefix(processor)
        rows = [{"image": None, "text": f"{processor.image_token}{text}"} for text in texts]
        collator.process_images = lambda images: {}
        for row in rows:
            row["image"] = "a picture"  # counted, never opened
        dataset = add_lengths(Dataset.from_list(rows), collator)
        lengths = list(dataset["length"])
        generator = torch.Generator().manual_seed(0)
        orders = {
            "random": torch.randperm(len(lengths), generator=generator).tolist(),
            "grouped": get_length_grouped_indices(lengths, options.batch_size, generator=generator),
        }
        batches = {
            way: [
                (collator([rows[i] for i in order[start : start + options.batch_size]]), options.batch_size)
                for start in range(0, len(order), options.batch_size)
            ]
            for way, order in orders.items()
        }
        bins = packed(lengths, options.packed_length)
        per_step = -(-len(bins) // options.batches)
        batches["packed"] = []
        for start in range(0, len(bins), per_step):
            chosen = bins[start : start + per_step]
            alone = [[collator([rows[i]]) for i in one] for one in chosen]
            names = ("input_ids", "attention_mask", "labels")
            ids, mask, labels = (
                torch.nn.utils.rnn.pad_sequence(
                    [torch.cat([row[name][0] for row in one]) for one in alone],
                    batch_first=True,
                    padding_value=-100 if name == "labels" else 0,
                )
                for name in names
            )
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            batches["packed"].append((batch, sum(map(len, chosen))))
        seconds: dict[str, list[float]] = {way: [] for way in batches}
        for way in batches:  # warm
            step(model, *batches[way][0])
        for _ in range(options.repeats):
            for way, epoch in batches.items():
                timed = epoch[options.every // 2 :: options.every]
                seconds[way].append(sum(step(model, *batch) for batch in timed) * len(epoch) / len(timed))
        print(f"prefix {prefix_length:>3}: rows of {min(lengths)}-{max(lengths)}, mean {statistics.mean(lengths):.1f}")
        for way, epoch in batches.items():
            places = sum(batch["input_ids"].numel() for batch, _ in epoch)
            real = sum(int(batch["attention_mask"].sum()) for batch, _ in epoch)
            ratios = [own / base for own, base in zip(seconds[way], seconds["grouped"], strict=True)]
            print(
                f"  {way:<8} {len(epoch):>3} steps  padding {1 - real / places:6.1%}  "
                f"epoch {statistics.median(seconds[way]):7.2f} s  "
                f"of grouped {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
