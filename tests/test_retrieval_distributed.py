"""A retrieval model in two processes: by `DistributedDataParallel` its gradients are those of one process with all pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modeling_frozen import DataCollatorForFrozenPrefixRetrieval, FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor
from tests.helpers import fresh_python
from tests.helpers.tiny import rows, save_parents


# Each way trains other parts; a parameter without a gradient would stop DistributedDataParallel.
WAYS: dict[str, dict[str, Any]] = {
    "locked image": {"trainable": ("connector", "text"), "text_pooling": "ret"},
    "sigmoid": {"contrastive_loss_type": "siglip"},
    "the tower itself": {"image_embedding": "tower"},
    "triplet": {"contrastive_loss_type": "triplet", "contrastive_loss_config": {"negatives": "all"}},
    "describing too": {"caption_loss_weight": 1.0, "text_pooling": "ret"},
}


def gradients(folder: Path, way: str, chosen: slice, wrap: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = FrozenPrefixForImageTextRetrieval.from_pretrained(folder / way)
    processor = FrozenPrefixProcessor.from_pretrained(folder / "processor")
    collate = DataCollatorForFrozenPrefixRetrieval(processor, captions=model.config.caption_loss_weight > 0)
    model.train()
    called = nn.parallel.DistributedDataParallel(model) if wrap else model
    # Eight pairs of four colours: each picture has its like in the other process, which is no negative.
    loss = called(**collate(rows(8)[chosen])).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {way: gradients(Path(folder), way, slice(4 * rank, 4 * rank + 4), wrap=True) for way in WAYS}
    torch.save(results, Path(folder) / f"gradients{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_would(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    for way, options in WAYS.items():
        model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(tower, words, projection_dim=16, **options)
        model.save_pretrained(tmp_path / way)
    FrozenPrefixProcessor.from_model(model).save_pretrained(tmp_path / "processor")
    fresh_python.run_side_by_side(process, str(tmp_path))
    first, second = (torch.load(tmp_path / f"gradients{rank}.pt") for rank in (0, 1))
    for way in WAYS:
        loss, expected = gradients(tmp_path, way, slice(None), wrap=False)
        assert (first[way][0] + second[way][0]) / 2 == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(first[way][1][name], gradient, atol=1e-5, rtol=1e-3, msg=f"{way}: {name}")
