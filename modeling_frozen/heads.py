"""Heads: what stands behind the two parents and trains with the connector, in every respect as a part of it.

`Head` is the mark by which freezing, saving and loading know it; `ContrastiveHead` is what matching pictures and texts needs,
`ClassificationHead` what telling classes needs.
"""

import math

import torch
from torch import nn
from transformers import initialization as init


class Head(nn.Module):
    """Small modules that train by the word "connector" of `config.trainable`, in fp32, and lie in every small checkpoint."""

    def reset_parameters(self) -> None:
        """(Re)initialises every parameter; tensors marked as loaded are left as they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.lecun_normal_(module.weight)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        self._reset_own()
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():  # or the library's own pass would overwrite them with its N(0, 0.02)
                module._is_hf_initialized = True

    def _reset_own(self) -> None:
        """For parameters that are no layer's."""

    def set_output_norm(self, norm: float) -> None:
        """For what is to stand among words, whose norm this is; other heads have nothing to scale."""


class ContrastiveHead(Head):
    """
    Two projections into one space, and how sharply likeness is counted there (CLIP, arXiv 2103.00020).

    Args:
        embedding_dim (`int`): width of the prefix, whose mean stands for the image.
        text_width (`int`): width of a pooled text.
        projection_dim (`int`): width of the shared space.
        logit_scale (`float`): logarithm of the inverse temperature at the start.
        logit_bias (`float`, *optional*): what is added to the scaled likeness at the start (SigLIP); `None`: nothing, ever.
        ret (`bool`): holds a learnt vector `[RET]` of width `embedding_dim`, to be read behind the words (FROMAGe).
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        text_width: int,
        projection_dim: int,
        logit_scale: float,
        logit_bias: float | None = None,
        ret: bool = False,
    ):
        super().__init__()
        self.visual_projection = nn.Linear(embedding_dim, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.empty(()))
        self.ret = nn.Parameter(torch.empty(embedding_dim)) if ret else None
        self._starts = (logit_scale, logit_bias)

    def _reset_own(self) -> None:
        scale, bias = self._starts
        init.constant_(self.logit_scale, scale)
        if self.logit_bias is not None:
            init.constant_(self.logit_bias, bias)
        if self.ret is not None:
            init.normal_(self.ret, std=1 / math.sqrt(len(self.ret)))

    @torch.no_grad()
    def set_output_norm(self, norm: float) -> None:
        """Gives `[RET]` the norm of a word, so that the language model reads it as one."""
        if self.ret is not None:
            self.ret.mul_(norm / self.ret.norm())


class ClassificationHead(Head):
    """
    Logits of a vector of norm 1, by a linear layer, GELU, dropout and another linear layer.

    Args:
        in_features (`int`): width of the vector.
        num_labels (`int`): how many logits.
        hidden_size (`int`, *optional*, defaults to 512): width between the two layers; `None` for a single linear layer.
        dropout (`float`, defaults to 0.1): before the last layer.
    """

    def __init__(self, in_features: int, num_labels: int, *, hidden_size: int | None = 512, dropout: float = 0.1):
        super().__init__()
        self.in_features, self.num_labels = in_features, num_labels
        self.dense = None if hidden_size is None else nn.Linear(in_features, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size or in_features, num_labels)

    def _reset_own(self) -> None:
        # A vector of norm 1 has parts of about 1/sqrt(width): by weights of variance 1 its activations have variance 1.
        init.normal_((self.dense or self.out_proj).weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(batch, in_features)`, of norm 1, to logits `(batch, num_labels)`."""
        features = features.to(self.out_proj.weight)
        if self.dense is not None:
            features = nn.functional.gelu(self.dense(features))
        return self.out_proj(self.dropout(features))


__all__ = ["ClassificationHead", "ContrastiveHead", "Head"]
