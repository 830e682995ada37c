"""A step of locked-image tuning from stored features against its limit: the text side's own step.

    python -m benchmarks.lit_step --output lit_step.json

The limit embeds the same texts with the same text model, takes the same loss against image embeddings that lie there, and
updates the text model alone. Ours does that and reads features, runs and trains connector, projections and scale as well.
The connector of the first row reads the tower's pooled vector, as LiT does; that of the second all its positions.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import parents, timing
from modeling_frozen import FrozenPrefixForImageTextRetrieval


CONNECTORS = {
    "pooled tower, mlp": {"connector_type": "mlp", "vision_feature_select_strategy": "pooled", "prefix_length": 1},
    "all positions, resampler": {"connector_type": "resampler", "prefix_length": 8},
}


def our_step(model: FrozenPrefixForImageTextRetrieval, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> float:
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def limit_step(model: FrozenPrefixForImageTextRetrieval, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    reader = model.model.language_model.base_model
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-5)
    projection = model.text_projection.weight.detach().clone()
    rows = len(batch["input_ids"])
    images = nn.functional.normalize(torch.randn(rows, len(projection), device=projection.device), dim=-1)
    targets = torch.arange(rows, device=projection.device)

    def step() -> float:
        states = reader(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        texts = nn.functional.normalize(states.last_hidden_state[:, -1] @ projection.T, dim=-1)
        logits = 14.3 * texts @ images.T
        loss = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parents.add_arguments(parser, text_width=384, text_layers=6, vocab_size=8000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bar", type=float, default=1.1)
    timing.add_arguments(parser, rounds=9)
    args = parser.parse_args(arguments)
    sizes = parents.sizes_of(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = timing.Report("a step of locked-image tuning from stored features, against the text side's own", **vars(args))
    with tempfile.TemporaryDirectory() as folder:
        tower, words = parents.save_parents(Path(folder), sizes)
        for name, options in CONNECTORS.items():
            model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
                tower, words, trainable=("connector", "text"), **options
            ).to(device)
            shape = (args.batch_size, model.config.num_positions, model.config.vision_width)
            ids = parents.words(sizes, rows=args.batch_size, device=device)
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "vision_features": torch.randn(shape, device=device),
            }
            timings = timing.alternate({"ours": our_step(model, batch), "limit": limit_step(model, batch)}, rounds=args.rounds)
            first = name == next(iter(CONNECTORS))
            report.compare(name, timings["ours"], timings["limit"], bar=args.bar if first else None)
    report.print()
    report.save(args.output)
    return {"rows": report.rows}


if __name__ == "__main__":
    main()
