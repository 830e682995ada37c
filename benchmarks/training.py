"""A training step from stored features against the limit: the bare frozen language model, forward and backward to its
`inputs_embeds`, with logits at the labels alone.

    python -m benchmarks.training --output training.json

Ours does the same and more: connector, merging, loss by the model, backward into the connector, optimizer. Three rows per
vocabulary and prefix: each text with a picture of its own; the same behind a system prompt, which ours reads once for all
rows, without gradient; and several captions a picture, where ours reads the picture once for all of them and the limit reads
it with each. The connector is ClipCap's (an MLP from the pooled tower to the whole
prefix), and LLaVA's (an MLP per position) where the prefix is as long as the tower's positions.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import parents, timing
from modeling_frozen.losses import IGNORE_INDEX, shift_for_causal_model


def join(folder: Path, sizes: parents.Sizes) -> Any:
    positions = (sizes.image_size // sizes.patch_size) ** 2
    if sizes.prefix_length == positions:
        return parents.join(folder, sizes, connector_type="mlp", prefix_length=None)
    return parents.join(folder, sizes, connector_type="mlp", vision_feature_select_strategy="pooled")


def batch_of(
    model: Any, sizes: parents.Sizes, rows: int, device: Any, captions: int = 1, system: int = 0
) -> dict[str, torch.Tensor]:
    """A batch as the collator makes it from the store: one picture and one text a row, labels on the text, each picture in so
    many rows, and so many words before all pictures, the same in all rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows // captions, model.config.num_positions, model.config.vision_width)
    words = parents.words(sizes, rows=rows)
    ids = parents.prompt(model.cpu(), words)
    ids = torch.cat([torch.arange(system).expand(rows, -1) + 4, ids], dim=1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - words.shape[1]] = IGNORE_INDEX
    batch = {
        "vision_features": torch.randn(shape, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }
    if captions > 1 or system:
        batch["image_index"] = torch.arange(rows) // captions
    return {name: tensor.to(device) for name, tensor in batch.items()}


def step_of(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Forward, backward and update of what is not frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # as Trainer does
    model.train()

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    return step_of(model, lambda: model(**batch).loss)


def limit_step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    language_model = model.model.language_model
    with torch.no_grad():
        embeds = language_model.get_input_embeddings()(batch["input_ids"].clamp(max=model.config.text_config.vocab_size - 1))
    embeds.requires_grad_(True)
    targets = shift_for_causal_model(batch["labels"])
    at_labels = targets != IGNORE_INDEX

    def step() -> float:
        embeds.grad = None
        logits = language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], logits_to_keep=at_labels, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets[at_labels])
        loss.backward()
        return loss.item()

    return step


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parents.add_arguments(parser)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--prefix-lengths", type=int, nargs="+", default=[10, 32, 196])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--captions", type=int, default=5, help="of each of the two pictures of the second row")
    parser.add_argument("--system", type=int, default=24, help="words of the system prompt (SmolLM2's has 24)")
    parser.add_argument("--bar", type=float, default=1.05)
    timing.add_arguments(parser, rounds=9)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = timing.Report("training step from stored features, against the bare language model", **vars(args))
    for vocab_size in args.vocab_sizes:
        with tempfile.TemporaryDirectory() as folder:
            for prefix_length in args.prefix_lengths:
                sizes = dataclasses.replace(parents.sizes_of(args), vocab_size=vocab_size, prefix_length=prefix_length)
                model = join(Path(folder), sizes)
                kinds = ((1, args.batch_size, 0), (1, args.batch_size, args.system), (args.captions, 2 * args.captions, 0))
                for captions, rows, system in kinds:
                    batch = batch_of(model, sizes, rows, device, captions, system)
                    model.to(device)
                    calls = {"ours": our_step(model, batch), "limit": limit_step(model, batch)}
                    timings = timing.alternate(calls, rounds=args.rounds)
                    name = f"vocabulary {vocab_size:,}, prefix {prefix_length}, text {sizes.text_length}, batch {rows}"
                    name += "" if captions == 1 else f" of {captions} captions a picture"
                    name += f" behind {system} words" if system else ""
                    report.compare(name, timings["ours"], timings["limit"], bar=args.bar)
    report.print()
    report.save(args.output)
    return {"rows": report.rows}


if __name__ == "__main__":
    main()
