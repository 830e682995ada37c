"""Contrastive losses against plain loops over pairs, alone and over two processes."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_frozen.contrastive_losses import CONTRASTIVE_LOSSES, check_contrastive_loss, triplet_loss
from tests.helpers import fresh_python


IDS = [7, 3, 7, 5, 9, 3]
CASES = [("clip", {}), ("siglip", {}), ("triplet", {"negatives": "hardest"}), ("triplet", {"negatives": "all", "margin": 0.5})]


def plain(name: str, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, ids, **options):
    """The papers' sums, written out pair by pair."""
    count, total = len(images), 0.0
    strangers = [[ids is None or ids[i] != ids[j] for j in range(count)] for i in range(count)]
    for i in range(count):
        for anchors, others in ((images, texts), (texts, images)):
            own = anchors[i] @ others[i]
            rest = [anchors[i] @ others[j] for j in range(count) if j != i and strangers[i][j]]
            if name == "clip":
                candidates = torch.stack([own, *rest]) * scale
                total = total - (candidates[0] - candidates.logsumexp(0)) / 2
            elif name == "triplet" and rest:
                costs = torch.stack([(options.get("margin", 0.2) - own + one).clamp(min=0) for one in rest])
                total = total + (costs.max() if options["negatives"] == "hardest" else costs.mean()) / 2
        if name == "siglip":
            for j in range(count):
                if i == j or strangers[i][j]:
                    sign = 1.0 if i == j else -1.0
                    total = total - torch.log(torch.sigmoid(sign * (scale * (images[i] @ texts[j]) + bias)))
    return total / count


def inputs(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(count, 5, generator=generator) for name in ("images", "texts")}
    values |= {"scale": torch.tensor(1.3), "bias": torch.tensor(-0.7)}
    return {name: value.requires_grad_() for name, value in values.items()}


def run(loss, values: dict[str, torch.Tensor], ids, rows: slice = slice(None), **options):
    """Loss and gradients, by way of normalising and of the scale's logarithm, as in the model."""
    images, texts = (nn.functional.normalize(values[name], dim=-1)[rows] for name in ("images", "texts"))
    ids = None if ids is None else torch.tensor(ids)[rows]
    value = loss(images, texts, logit_scale=values["scale"].exp(), logit_bias=values["bias"], image_ids=ids, **options)
    return value, torch.autograd.grad(value, list(values.values()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_losses_and_their_gradients_are_those_of_the_formulas(name: str, options: dict, ids: list[int] | None) -> None:
    def by_hand(images, texts, *, logit_scale, logit_bias, image_ids, **options):
        return plain(name, images, texts, logit_scale, logit_bias, ids, **options)

    values = inputs()
    loss, gradients = run(CONTRASTIVE_LOSSES[name], values, ids, **options)
    expected, expected_gradients = run(by_hand, values, ids, **options)
    torch.testing.assert_close(loss, expected)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right)
    assert gradients[0].abs().sum() > 0


def test_clip_without_duplicates_is_that_of_transformers() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    values = inputs()
    images, texts = (nn.functional.normalize(values[name], dim=-1) for name in ("images", "texts"))
    scale = values["scale"].exp()
    loss = CONTRASTIVE_LOSSES["clip"](images, texts, logit_scale=scale)
    torch.testing.assert_close(loss, image_text_contrastive_loss(texts @ images.T * scale))


def test_the_triplet_loss_draws_pairs_together() -> None:
    """With the sign of a distance it would rise with the likeness of a pair."""
    images = torch.eye(4)
    texts = torch.eye(4).roll(1, 0)
    near, far = triplet_loss(images, images), triplet_loss(images, texts)
    assert near == 0 and math.isclose(far, 1.2, rel_tol=1e-6)  # margin - 0 + 1
    assert triplet_loss(images, images, image_ids=torch.zeros(4)) == 0  # nobody is a stranger


def test_captions_of_one_image_cost_each_other_nothing() -> None:
    """Five captions of one image and their image five times: nothing is left to tell apart."""
    same = nn.functional.normalize(torch.randn(1, 8), dim=-1).expand(5, -1)
    ids, scale = torch.zeros(5).long(), torch.tensor(10.0)
    assert CONTRASTIVE_LOSSES["clip"](same, same, logit_scale=scale, image_ids=ids) == 0
    assert CONTRASTIVE_LOSSES["clip"](same, same, logit_scale=scale) > 1
    with_bias = {"logit_scale": scale, "logit_bias": torch.tensor(-10.0)}
    alone = CONTRASTIVE_LOSSES["siglip"](same[:1], same[:1], **with_bias)
    torch.testing.assert_close(CONTRASTIVE_LOSSES["siglip"](same, same, **with_bias, image_ids=ids), alone)


def process(rank: int, folder: str, size: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(0, size) if rank == 0 else slice(size, None)
    results = []
    for name, options in CASES:
        for ids in (None, IDS):
            values = inputs()
            loss, gradients = run(CONTRASTIVE_LOSSES[name], values, ids, rows, **options)
            averaged = [loss.detach(), *gradients]  # over processes, as distributed training does
            for value in averaged:
                torch.distributed.all_reduce(value)
                value.div_(2)
            results.append(averaged)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [3, 4], ids=["equal", "of four and two"])
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path, size: int) -> None:
    """Values and every gradient: without a gradient through the gathering they would be off."""
    fresh_python.run_side_by_side(process, str(tmp_path), size)
    results = iter(torch.load(tmp_path / "results.pt"))
    for name, options in CASES:
        for ids in (None, IDS):
            loss, gradients = run(CONTRASTIVE_LOSSES[name], inputs(), ids, **options)
            for value, right in zip(next(results), (loss.detach(), *gradients), strict=True):
                torch.testing.assert_close(value, right)


def test_what_is_no_pair_or_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="takes pairs: 3 images and 4 texts"):
        CONTRASTIVE_LOSSES["clip"](torch.eye(4)[:3], torch.eye(4), logit_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match="`image_ids` of shape"):
        CONTRASTIVE_LOSSES["clip"](torch.eye(4), torch.eye(4), logit_scale=torch.tensor(1.0), image_ids=torch.zeros(3))
    for wrong in (("clp", {}), ("clip", {"margin": 0.2}), ("triplet", {"margin": 0}), ("triplet", {"negatives": "some"})):
        with pytest.raises(ValueError, match="choose one of|options are|says margin|says negatives"):
            check_contrastive_loss(*wrong)
