"""Text pooling: one vector from a text's hidden states, the same whichever side the batch is padded on.

Classification and retrieval both read a text through it, and both with towers of their own: so it stands by itself.
"""

from typing import Literal

import torch


TextPooling = Literal["last", "mean", "cls"]
TEXT_POOLINGS: tuple[str, ...] = ("last", "mean", "cls")


def pool_text(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, pooling: str = "last"
) -> torch.Tensor:
    """
    One vector per text.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of any layer.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
            1 for words, 0 for padding, on either side or both. `None`: no padding.
        pooling (`"last"`, `"mean"` or `"cls"`, defaults to `"last"`):
            `"last"`: the last word, which in a causal model has read all the others. `"mean"`: the mean of all words,
            summed in fp32. `"cls"`: the first word, which in encoders such as BERT stands for the whole text.

    Returns:
        `torch.Tensor` of shape `(batch, hidden_size)`, of the dtype of `hidden_states`.

    Raises:
        ValueError: for an unknown pooling, a mask of another shape, or a text without a single word.
    """
    if pooling not in TEXT_POOLINGS:
        raise ValueError(f"`{pooling}` is no way of pooling a text: choose one of {list(TEXT_POOLINGS)}.")
    batch, length = hidden_states.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.long, device=hidden_states.device)
    mask = attention_mask.to(hidden_states.device) != 0
    if mask.shape != (batch, length):
        raise ValueError(
            f"The attention mask has shape {tuple(mask.shape)}, but the hidden states are of {batch} texts of {length} "
            "positions: pass the 2-D mask that the tokenizer made for them."
        )
    if not torch.compiler.is_compiling() and mask.device.type != "meta" and not mask.any(-1).all():
        empty = int((~mask.any(-1)).nonzero()[0])
        raise ValueError(f"Text {empty} of the batch is all padding, so there is no word to pool: leave such rows out.")
    if pooling == "mean":
        # Padding may hold NaN (fully masked rows of attention), which a product with zero would keep.
        words = hidden_states.float().masked_fill(~mask[..., None], 0.0)
        return (words.sum(1) / mask.sum(1, keepdim=True)).to(hidden_states.dtype)
    if pooling == "last":
        index = (torch.arange(length, device=mask.device) * mask).amax(-1)
    else:
        index = mask.int().argmax(-1)
    return hidden_states[torch.arange(batch, device=mask.device), index]


__all__ = ["TEXT_POOLINGS", "TextPooling", "pool_text"]
