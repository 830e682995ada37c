# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses by name, for pairs of an image and a text, over the batches of all processes together.

Each process computes the loss of its own rows against everybody's columns, so no process holds the whole square of
similarities; the columns are gathered *with gradient* (without it, every process would train its own texts against frozen
copies of the others' images). Averaged over processes, as distributed training does, values and gradients are those of
one process with the whole batch. Several captions of one image are not negatives of each other.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _Gathered(torch.autograd.Function):
    """All processes' rows one after another. Backward: the sum over processes of the gradients for one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes, longest = sizes, max(sizes)
        padded = nn.functional.pad(rows, (0, 0, 0, longest - len(rows))).contiguous()  # equal shapes for every process
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.sizes[: dist.get_rank()])
        return gradient[start : start + ctx.sizes[dist.get_rank()]], None


def process_rank() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_with_gradient(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The rows of all processes, in the order of their ranks.

    Args:
        rows (`torch.Tensor` of shape `(rows, width)`): this process's; their number may differ between processes.

    Returns:
        `(torch.Tensor of shape (all rows, width), int)`: the second says where this process's begin.
    """
    rank, num_processes = process_rank()
    if num_processes == 1:
        return rows, 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(num_processes)]
    dist.all_gather(counts, own)
    sizes: list[int] = torch.cat(counts).tolist()
    with torch.set_grad_enabled(torch.is_grad_enabled() and rows.is_floating_point()):
        return _Gathered.apply(rows, sizes), sum(sizes[:rank])


class _Square:
    """This process's rows of the square of all pairs: similarities both ways, which are positives, which negatives."""

    def __init__(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_ids: torch.Tensor | None):
        if image_embeds.shape != text_embeds.shape:
            raise ValueError(
                f"A contrastive loss takes pairs: {len(image_embeds)} images and {len(text_embeds)} texts of widths "
                f"{image_embeds.shape[-1]} and {text_embeds.shape[-1]} are none. Where several texts show one image, say by "
                "`image_index` which. [errors.md#shape]"
            )
        images, texts = image_embeds.float(), text_embeds.float()
        both, start = gather_with_gradient(torch.cat([images, texts], dim=-1))
        all_images, all_texts = both.chunk(2, dim=-1)
        # Half precision has too few digits for a softmax over many candidates.
        with torch.autocast(images.device.type, enabled=False):
            self.image_to_text = images @ all_texts.T
            self.text_to_image = texts @ all_images.T
        columns = torch.arange(len(both), device=images.device)
        self.targets = columns[start : start + len(images)]
        self.is_pair = self.targets[:, None] == columns
        self.is_negative = ~self.is_pair
        if image_ids is not None:
            if image_ids.shape != (len(images),):
                raise ValueError(
                    f"`image_ids` of shape {tuple(image_ids.shape)} must name the image of {len(images)} pairs."
                    " [errors.md#shape]"
                )
            all_ids = gather_with_gradient(image_ids.to(images.device).long()[:, None])[0][:, 0]
            self.is_negative = self.is_negative & (image_ids.to(images.device)[:, None] != all_ids)
        # Such that the mean over processes is the mean over all rows, however they are spread.
        self.weight = process_rank()[1] / len(both)


def clip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    image_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3): each image is to find its text among all, each text its image.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(batch, dim)`): of length 1; row n of both is a pair.
        logit_scale (`torch.Tensor` of shape `()`): by which cosines are multiplied (the inverse temperature itself).
        logit_bias (`torch.Tensor` of shape `()`, *optional*): has no influence here.
        image_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Equal numbers say that two pairs show the same image, in whichever process: the one's text is then left out of
            the other's candidates.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    square = _Square(image_embeds, text_embeds, image_ids)
    left_out = ~(square.is_pair | square.is_negative)
    loss: Any = 0.0
    for similarities in (square.image_to_text, square.text_to_image):
        logits = (similarities * logit_scale.float()).masked_fill(left_out, float("-inf"))
        loss = loss + nn.functional.cross_entropy(logits, square.targets, reduction="sum") / 2
    return loss * square.weight + _idle(logit_bias)


def siglip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    image_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    Pairwise sigmoid (SigLIP, arXiv 2303.15343, equation 1): every image with every text is a binary decision by itself,
    `-1/|B| sum_i sum_j log sigmoid(z_ij (t x_i.y_j + b))`, z being 1 for pairs and -1 for negatives.

    The arguments are those of [`clip_loss`]; `logit_bias` is b. Texts of the same image are left out.
    """
    square = _Square(image_embeds, text_embeds, image_ids)
    logits = square.image_to_text * logit_scale.float()
    if logit_bias is not None:
        logits = logits + logit_bias.float()
    signs = square.is_pair.float() - square.is_negative.float()
    log_likelihood = nn.functional.logsigmoid(signs * logits) * (signs != 0)
    return -log_likelihood.sum() * square.weight


def triplet_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    logit_scale: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    image_ids: torch.LongTensor | None = None,
    margin: float = 0.2,
    negatives: str = "hardest",
) -> torch.Tensor:
    """
    Hinge on triples (VSE++, arXiv 1707.05612, equations 5 and 6): `max(0, margin - s(anchor, own) + s(anchor, other))`,
    s being the cosine, the anchor an image and then a text, the mean of both.

    The sign: a triple costs nothing once its own is nearer than the other by the margin. The formula that this project
    began with had the two similarities exchanged, as is right for distances alone; with cosines it drives pairs apart.

    Args:
        image_embeds, text_embeds, image_ids (`torch.Tensor`): as of [`clip_loss`].
        logit_scale, logit_bias (`torch.Tensor`, *optional*): have no influence here.
        margin (`float`, defaults to 0.2): in units of the cosine.
        negatives (`"hardest"` or `"all"`, defaults to `"hardest"`):
            Which others of the batch count: for each anchor the nearest, or the mean over all.
    """
    if negatives not in ("hardest", "all"):
        raise ValueError(f'`negatives="{negatives}"` is unknown: choose "hardest" or "all". [errors.md#choices]')
    square = _Square(image_embeds, text_embeds, image_ids)
    has_others = square.is_negative.any(-1)
    loss: Any = 0.0
    for similarities in (square.image_to_text, square.text_to_image):
        own = similarities.gather(1, square.targets[:, None])
        costs = (margin - own + similarities).clamp(min=0).masked_fill(~square.is_negative, 0.0)
        if negatives == "hardest":  # the cost grows with similarity, so the nearest other costs most
            costs = costs.amax(-1)
        else:
            costs = costs.sum(-1) / square.is_negative.sum(-1).clamp(min=1)
        loss = loss + (costs * has_others).sum() / 2
    return loss * square.weight + _idle(logit_scale) + _idle(logit_bias)


def _idle(parameter: torch.Tensor | None) -> torch.Tensor | float:
    """Zero, with a zero gradient: distributed training waits for every parameter."""
    return 0.0 if parameter is None or not parameter.requires_grad else parameter.float() * 0.0


# Name in the config -> loss, its own options, and where scale (its logarithm) and bias start.
CONTRASTIVE_LOSSES = {"clip": clip_loss, "siglip": siglip_loss, "triplet": triplet_loss}
LOSS_OPTIONS: dict[str, dict[str, Any]] = {"clip": {}, "siglip": {}, "triplet": {"margin": 0.2, "negatives": "hardest"}}
LOGIT_SCALE_STARTS = {"clip": 2.6592, "siglip": 2.302585, "triplet": 2.6592}
LOGIT_BIAS_STARTS: dict[str, float | None] = {"clip": None, "siglip": -10.0, "triplet": None}


def check_contrastive_loss(loss_type: str, options: dict[str, Any]) -> None:
    """
    Checks a loss's specification without computing anything.

    Raises:
        ValueError: for an unknown loss or option, or a value that it can't have; lists the choices.
    """
    if loss_type not in CONTRASTIVE_LOSSES:
        raise ValueError(
            f"`loss_type={loss_type!r}` is unknown: choose one of {sorted(CONTRASTIVE_LOSSES)}. [errors.md#choices]"
        )
    for name, value in options.items():
        if name not in LOSS_OPTIONS[loss_type]:
            raise ValueError(
                f"`loss_config` holds {name!r}, which the loss {loss_type!r} does not take; its options are "
                f"{LOSS_OPTIONS[loss_type] or 'none'}. [errors.md#choices]"
            )
        if name == "negatives" and value not in ("hardest", "all"):
            raise ValueError(f"`loss_config` says negatives={value!r}: choose 'hardest' or 'all'. [errors.md#choices]")
        if name == "margin" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2):
            raise ValueError(
                f"`loss_config` says margin={value!r}: cosines differ by 2 at most, so it must be in (0, 2]. [errors.md#range]"
            )


__all__ = [
    "CONTRASTIVE_LOSSES",
    "check_contrastive_loss",
    "clip_loss",
    "gather_with_gradient",
    "process_rank",
    "siglip_loss",
    "triplet_loss",
]
