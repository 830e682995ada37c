"""Losses. The language-modelling loss is the library's own; here is only what lets the head run where a label is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


IGNORE_INDEX = -100


def shift_for_causal_model(labels: torch.LongTensor) -> torch.LongTensor:
    """Labels moved one to the left: position n holds what is to be predicted there. Shape `(batch, sequence)`."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def language_modeling_loss(
    loss_function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    targets: torch.LongTensor,
    **kwargs: Any,
) -> torch.Tensor:
    """
    Cross-entropy of `logits` against `targets` that stand at the same places, by the library's loss function, which
    honours `num_items_in_batch` (so that gradient accumulation is exact).

    Args:
        loss_function (`Callable`): the model's `loss_function`.
        logits (`torch.Tensor` of shape `(..., vocabulary)`).
        targets (`torch.LongTensor` of shape `(...)`): already shifted; `-100` is ignored.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return loss_function(
        logits=logits, labels=targets, shift_labels=targets.contiguous(), vocab_size=logits.shape[-1], **kwargs
    )
