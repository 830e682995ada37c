"""Where a connector starts from."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def start_as_words(model: Any, processor: Any, texts: Sequence[str]) -> bool:
    """
    Starts the constant part of the prefix as words of texts, and halves what the image adds to it: prompt tuning that starts
    at words learns faster than from noise (Lester et al. 2021, arXiv 2104.08691).

    Args:
        model: with a connector that writes the whole prefix at once (`mlp` or `linear` on pooled features), which holds its
            constant part in its output's bias; any other stays as it is.
        processor: its `FrozenPrefixProcessor`.
        texts: of the training rows, as they are learnt (leading space and all); drawn from by torch's global generator.

    Returns:
        `bool`: whether the connector could be started so.
    """
    output: Any = getattr(model.model.connector, "output", None)
    bias, length = getattr(output, "bias", None), model.config.prefix_length
    if bias is None or bias.numel() != length * model.config.embedding_dim:
        return False
    text = "".join(texts[index] for index in torch.randperm(len(texts))[:length].tolist())
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(
            f"{len(texts)} texts hold {ids.shape[1]} tokens, and a prefix of {length} is to start as them: give more."
            " [errors.md#range]"
        )
    bias.copy_(model.model.embed_words(ids.to(bias.device)).flatten())
    output.weight.mul_(0.5)  # the image then moves the words, and does not drown them
    return True


__all__ = ["start_as_words"]
