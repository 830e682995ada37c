# SPDX-License-Identifier: Apache-2.0
"""Connectors: the small networks that write the visual prefix, and the one registry that names them.

A connector maps tower features (images, positions, vision_width) to a prefix (images, prefix_length, embedding_dim) in
the space of the language model's word embeddings. It is all that trains by default, and all that a checkpoint holds.

All but `identity` are one frame with another middle: features are masked, cast, normalised (so that any tower's
scale works), *mixed* by the subclass, and mapped to the prefix by one linear layer, which `set_output_norm` scales. Three
kinds of middle: those that keep the positions (identity, linear, mlp); those that read them all and write at
`prefix_length` learned queries (transformer, resampler, qformer, lstm); and those that read them as a grid and write a smaller
grid, row by row (avg_pool, pixel_shuffle, c_abstractor).
"""

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .vision_towers import VARIABLE
from .weights import brought


# No connector needs as many; a config that asks for millions would be built for hours.
MAX_LAYERS = 1000
# What a connector must know of its place, beside its own options; `grid` may be left out.
GEOMETRY = ("num_positions", "vision_width", "embedding_dim", "prefix_length", "grid")


class GroupedLayerNorm(nn.LayerNorm):
    """A LayerNorm over each of several parts of the width, so that none of several layers or towers rules: `groups` equal
    parts, or parts of these widths."""

    def __init__(self, width: int, groups: int | Sequence[int], eps: float):
        super().__init__(width, eps=eps)
        self.groups = groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(self.groups, int):
            parts = input.unflatten(-1, (self.groups, -1))
            normed = nn.functional.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        else:
            unequal = input.split(list(self.groups), dim=-1)
            normed = torch.cat([nn.functional.layer_norm(one, one.shape[-1:], eps=self.eps) for one in unequal], dim=-1)
        return normed * self.weight + self.bias


def fill_layers(module: nn.Module) -> None:
    """(Re)initialises linear layers, norms and attention; what is marked as loaded stays as it is."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            init.lecun_normal_(layer.weight)  # keeps the variance, whatever the widths
            if layer.bias is not None:
                init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            init.ones_(layer.weight)
            init.zeros_(layer.bias)
        elif isinstance(layer, nn.MultiheadAttention):
            init.lecun_normal_(layer.in_proj_weight)
            init.zeros_(layer.in_proj_bias)


def mark_filled(module: nn.Module) -> None:
    # transformers' own pass (`post_init`) would overwrite the values with its N(0, 0.02), and it never calls a custom model's
    # `_init_weights` for a module that holds no tensor of its own: the private mark alone stops it.
    if not any(parameter.is_meta for parameter in module.parameters()):
        for layer in module.modules():
            layer._is_hf_initialized = True  # type: ignore[assignment]  # modules take any attribute


class Connector(nn.Module):
    """
    What every connector shares. Build one with [`build_connector`], which checks the values first.

    Args:
        num_positions (`int`, *optional*): positions per image that the tower gives, 1 for a pooled vector, `None` where it
            varies.
        vision_width (`int`): width of the tower's features.
        embedding_dim (`int`): width of the language model's word embeddings.
        prefix_length (`int`, *optional*): prefix vectors per image; `None` means one per position, for connectors that keep
            positions.
        grid (`tuple[int, int]` or `"variable"`, *optional*):
            Rows and columns of the positions, for connectors that read a grid; `"variable"` where each image has its own.
        input_norm (`bool`, defaults to `True`): LayerNorm on the features; without it the tower's own scale comes through.
        input_norm_groups (`int` or `list[int]`, defaults to 1):
            Equal parts of the width that are normalised each for itself: as many as layers or towers are concatenated. A list
            gives their widths where these differ.
        position_embedding (`bool`, defaults to `False`): learned embeddings added to the features, for towers whose features
            do not hold their place (convolutional maps) before connectors that read positions as a set; needs
            `num_positions`.
        input_dropout (`float`, defaults to 0.0): dropout on the (normalised) features.
        output_dropout (`float`, defaults to 0.0): dropout on the prefix.
        separator (`bool`, defaults to `False`):
            A learned vector as the last of each prefix, `prefix_length` counting it, so that an image's tiles are told apart.
    """

    #: whether the prefix has its own length (learned queries, a smaller grid) or one vector per position
    reads_positions = False
    #: whether positions must be a grid
    reads_grid = False
    #: options that are two numbers, rows and columns
    pairs: tuple[str, ...] = ()
    #: whether it can write a shorter prefix than its own, by its first queries or a coarser grid
    takes_lengths = False
    _frozen_prefix_initialized = False

    def __init__(
        self,
        *,
        num_positions: int | None,
        vision_width: int,
        embedding_dim: int,
        prefix_length: int | None,
        grid: Sequence[int] | str | None = None,
        input_norm: bool = True,
        input_norm_groups: int | Sequence[int] = 1,
        position_embedding: bool = False,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        separator: bool = False,
    ):
        super().__init__()
        self.num_positions, self.vision_width, self.embedding_dim = num_positions, vision_width, embedding_dim
        self.grid = grid if grid is None or isinstance(grid, str) else (grid[0], grid[1])
        # From here on without the separator.
        self.prefix_length = prefix_length if prefix_length is None else prefix_length - separator
        self.separator = nn.Parameter(torch.empty(embedding_dim)) if separator else None
        self.input_norm: nn.Module = nn.Identity()
        if input_norm and input_norm_groups != 1:
            self.input_norm = GroupedLayerNorm(vision_width, input_norm_groups, eps=1e-6)
        elif input_norm:
            self.input_norm = nn.LayerNorm(vision_width, eps=1e-6)
        self.positions: nn.Parameter | None = None
        if position_embedding:
            self.positions = nn.Parameter(torch.empty(self._num_read(), vision_width))  # type: ignore[arg-type]  # see `check`
        self.input_dropout = nn.Dropout(input_dropout)
        self.output_dropout = nn.Dropout(output_dropout)

    def _num_read(self) -> int | None:
        """Positions behind `read`."""
        return self.num_positions

    def _add_output(self, hidden_size: int) -> None:
        """Last line but one of a subclass's constructor: the linear map from its middle to the embedding space."""
        # A pooled vector becomes all prefix vectors at once: Frozen's and ClipCap's form.
        vectors = 1 if self.reads_positions or self.num_positions != 1 else self.prefix_length
        self.output = nn.Linear(hidden_size, vectors * self.embedding_dim)  # type: ignore[operator]  # known with one position

    def _add_two_layers(self, width: int, dropout: float) -> None:
        """End of a subclass's constructor: a hidden layer with GELU, and the output."""
        self.hidden = nn.Sequential(nn.Linear(self.vision_width, width), nn.GELU(), nn.Dropout(dropout))
        self._add_output(width)
        self.reset_parameters()

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Names and defaults of the options that this connector takes in `connector_config`."""
        options: dict[str, Any] = {}
        for klass in reversed(cls.__mro__):
            if "__init__" in vars(klass) and issubclass(klass, Connector):
                for name, parameter in inspect.signature(klass.__init__).parameters.items():
                    if parameter.default is not inspect.Parameter.empty and name not in GEOMETRY:
                        options[name] = parameter.default
        return options

    @classmethod
    def resolve_prefix_length(
        cls, num_positions: int | None, prefix_length: int | None, grid: Any = None, options: dict[str, Any] | None = None
    ) -> int | None:
        """Prefix vectors per image; None only where the tower's positions vary and the connector keeps them.

        Raises:
            ValueError: the length can't be had with this connector.
        """
        if cls.reads_positions:
            if prefix_length is None:
                raise ValueError(
                    f"prefix_length=None: the connector {cls._name()!r} writes a prefix of its own length, so it "
                    "needs one; pass prefix_length=32, for example. [errors.md#connector-fit]"
                )
            return prefix_length
        if prefix_length is None or num_positions is None:
            return prefix_length or num_positions
        if prefix_length != num_positions and (num_positions > 1 or cls is IdentityConnector):
            raise ValueError(
                f"prefix_length={prefix_length}: the connector {cls._name()!r} writes one prefix vector per position, "
                f"and the tower gives num_positions={num_positions}; leave prefix_length out, pool the tower's output "
                "(vision_feature_select_strategy='pooled') before 'linear' or 'mlp', or choose a connector with a length of "
                f"its own: {', '.join(repr(name) for name, kind in CONNECTORS.items() if kind.reads_positions)}."
                " [errors.md#connector-fit]"
            )
        return prefix_length

    @classmethod
    def _name(cls) -> str:
        return next((name for name, klass in CONNECTORS.items() if klass is cls), cls.__name__)

    @classmethod
    def check(
        cls,
        *,
        num_positions: int | None,
        vision_width: int,
        embedding_dim: int,
        prefix_length: int | None,
        grid: Sequence[int] | str | None = None,
        **options: Any,
    ) -> int | None:
        """Checks all values together, without building anything, and returns the resolved prefix length.

        Raises:
            ValueError: lists every value that breaks a rule.
        """
        values = {**cls.options(), **options}
        problems = []
        sizes = {"num_positions": num_positions, "prefix_length": prefix_length}
        widths = {"vision_width": vision_width, "embedding_dim": embedding_dim}
        kinds = {**dict.fromkeys(sizes), **dict.fromkeys(widths, 1), **cls.options()}
        for name, default in kinds.items():  # the kind of a default is the kind of the value
            value = {**sizes, **widths, **values}[name]
            if name in cls.pairs:
                pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_positive_int, value))
                if not pair and value is not None:
                    problems.append(f"{name}={value!r} must be a pair of positive whole numbers, rows and columns")
            elif name == "input_norm_groups" and isinstance(value, (list, tuple)):
                if not value or not all(map(_is_positive_int, value)):
                    problems.append(f"{name}={value!r} must be a number of equal parts, or a list of positive widths")
            elif isinstance(default, bool):
                if not isinstance(value, bool):
                    problems.append(f"{name}={value!r} must be True or False")
            elif isinstance(default, float):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                    problems.append(f"{name}={value!r} must be a number from 0 up to, not including, 1")
            elif not (_is_positive_int(value) or (value is None and default is None)):
                problems.append(f"{name}={value!r} must be a positive whole number{' or None' * (default is None)}")
        if not problems:
            if values.get("num_layers", 0) > MAX_LAYERS:
                problems.append(f"num_layers={values['num_layers']} must be at most {MAX_LAYERS}")
            groups = values.get("input_norm_groups", 1)
            if not isinstance(groups, int):
                if sum(groups) != vision_width:
                    problems.append(
                        f"input_norm_groups={list(groups)} must have the features' width, {vision_width}, as its sum"
                    )
            elif vision_width % groups:
                problems.append(f"input_norm_groups={groups} must divide the features' width, {vision_width}")
            width, heads = values.get("hidden_size"), values.get("num_heads")
            if heads is not None and width % heads:
                problems.append(f"num_heads={heads} must divide hidden_size={width}; change one of the two")
            if values.get("position_embedding") and num_positions is None:
                problems.append(
                    "position_embedding=True needs a tower with a fixed number of positions, and this one's varies "
                    "(num_positions=None); leave the option out"
                )
            if values.get("separator") and (grid == VARIABLE or prefix_length == 1):
                problems.append(
                    "separator=True needs images of one size, and a prefix of at least one vector beside the separator: leave "
                    f"it out with prefix_length={prefix_length} or a tower whose positions vary (NaFlex)"
                )
            if cls is IdentityConnector and vision_width != embedding_dim:
                problems.append(
                    f"vision_width={vision_width} and embedding_dim={embedding_dim} must be equal, for nothing is "
                    "mapped; use 'linear' where they differ"
                )
        if problems:
            raise ValueError(f"The connector {cls._name()!r} can't be built: {'; '.join(problems)}. [errors.md#connector-fit]")
        separator = bool(values.get("separator"))
        written = prefix_length if prefix_length is None else prefix_length - separator
        resolved = cls.resolve_prefix_length(num_positions, written, grid, values)
        return resolved if resolved is None else resolved + separator

    def _prepare(
        self, features: torch.Tensor, attention_mask: torch.Tensor | None, frames: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if features.ndim != 3 or features.shape[-1] != self.vision_width:
            raise ValueError(
                f"Features of shape {tuple(features.shape)}: this connector takes (images, positions, "
                f"{self.vision_width}); give a pooled vector one position by `features.unsqueeze(1)`. [errors.md#tower]"
            )
        if attention_mask is not None:
            if attention_mask.shape != features.shape[:2]:
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask.shape)} must be (images, positions) of the "
                    f"features: {tuple(features.shape[:2])}. [errors.md#tower]"
                )
            attention_mask = attention_mask.bool()
            # Filled even where attention skips them: 0 * inf of a padded patch would be NaN.
            features = features.masked_fill(~attention_mask[..., None], 0)
        positions, one_size = features.shape[1], "give images of the size that the model was built for"
        if self.positions is not None and not self.reads_grid and positions != len(self.positions) * frames:
            raise ValueError(
                f"The tower gave {positions} positions where this connector has position embeddings for "
                f"{self.num_positions}; {one_size}. [errors.md#tower]"
            )
        if self.reads_grid and isinstance(self.grid, tuple) and positions not in (math.prod(self.grid), self._num_read()):
            raise ValueError(
                f"The tower gave {positions} positions where this connector reads a grid of {self.grid[0]} rows and "
                f"{self.grid[1]} columns; {one_size}. [errors.md#tower]"
            )
        expected = 1 if self.num_positions == 1 else self.prefix_length or positions
        if not self.reads_positions and positions != expected:
            raise ValueError(
                f"The tower gave {positions} positions where this connector keeps {expected}; {one_size}, or use a "
                "connector that reads any number of positions, such as 'resampler'. [errors.md#tower]"
            )
        return features, attention_mask

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: int = 1,
        spatial_shapes: torch.Tensor | None = None,
        prefix_length: int | None = None,
    ) -> torch.Tensor:
        """
        Writes the prefix.

        Args:
            features (`torch.Tensor` of shape `(images, positions, vision_width)`): of any floating dtype.
            attention_mask (`torch.BoolTensor` of shape `(images, positions)`, *optional*):
                True at valid positions, for towers that pad (NaFlex). The values at the others have no influence; connectors
                that keep positions write a learned constant there.
            frames (`int`, defaults to 1):
                How many frames of a video the positions hold, one after another, for connectors that read them.
            spatial_shapes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                Rows and columns of each image, for connectors that read a grid, where images differ in it (NaFlex).
            prefix_length (`int`, *optional*):
                A shorter prefix than the connector's own: its first queries, or a coarser grid. As from a connector of that
                length with the same weights.

        Returns:
            `torch.Tensor` of shape `(images, prefix_length, embedding_dim)`, in the connector's dtype.
        """
        features, attention_mask = self._prepare(features, attention_mask, frames)
        length = prefix_length or self.prefix_length
        if features.shape[0] == 0:  # attention can't reshape nothing
            vectors = (length or features.shape[1]) + (self.separator is not None)
            return self.output.weight.new_zeros(0, vectors, self.embedding_dim)
        hidden = self.input_norm(self.read(features.to(self.output.weight.dtype), spatial_shapes, length))
        if self.positions is not None:
            hidden = hidden + self.positions.repeat(frames, 1)
        if frames > 1:  # most connectors read positions as a set, which has no time in it
            hidden = hidden + _code_of_time(frames, hidden).repeat_interleave(hidden.shape[1] // frames, dim=0)
        hidden = self.input_dropout(hidden)
        if self.reads_grid:
            mixed = self._mix_grid(hidden, spatial_shapes, length)
        else:
            mixed = self._mix(hidden, attention_mask, length)
        prefix = self.output(mixed)
        # Not `len`: exported, it would make a constant of the number of images.
        prefix = self.output_dropout(prefix.reshape(features.shape[0], -1, self.embedding_dim))
        if self.separator is None:
            return prefix
        return torch.cat([prefix, self.separator.expand(features.shape[0], 1, -1)], dim=1)

    def read(
        self, features: torch.Tensor, spatial_shapes: torch.Tensor | None = None, length: int | None = None
    ) -> torch.Tensor:
        """What the connector makes of features before anything in it that trains: (images, positions, vision_width), as they
        are but for `avg_pool`, which needs no more than the means; the arguments are those of `forward`."""
        return features

    def _mix(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int | None) -> torch.Tensor:
        """The middle: (images, positions, vision_width) to (images, positions or prefix_length, any width)."""
        raise NotImplementedError

    def _mix_grid(self, hidden: torch.Tensor, spatial_shapes: torch.Tensor | None, length: int | None) -> torch.Tensor:
        """The same of connectors that read a grid."""
        raise NotImplementedError

    def origins_on_grid(self, rows: int, columns: int) -> torch.Tensor | None:
        """Of those: how much of each prefix vector comes from each place, (prefix_length, rows * columns); `None` where that
        can't be said."""
        return None

    def reset_parameters(self) -> None:
        """(Re)initialises every parameter, also after `to_empty()`; tensors marked as loaded are left as they are."""
        if all(parameter.is_meta for parameter in self.parameters()):
            return  # nothing to fill
        fill_layers(self)
        if self.positions is not None:
            init.normal_(self.positions, std=0.02)
        if self.separator is not None:
            init.normal_(self.separator, std=self.embedding_dim**-0.5)
        self._reset_own()
        mark_filled(self)

    def _reset_own(self) -> None:
        """For parameters that are no layer's, or start otherwise."""

    def grid_for(self, images: int, positions: int) -> dict[str, torch.Tensor]:
        """For features that are no image's: the keyword by which they have a grid, where each image has its own."""
        if not self.reads_grid or self.grid != VARIABLE:
            return {}
        rows = next(number for number in range(math.isqrt(positions), 0, -1) if positions % number == 0)
        return {"spatial_shapes": torch.tensor([[rows, positions // rows]]).expand(images, -1)}

    @torch.no_grad()
    def set_output_norm(self, norm: float) -> None:
        """Scales the output map so that prefix vectors have this mean L2 norm for features of unit variance.

        A prefix far from the norm of word embeddings is ignored or diverges. Deterministic; the global random state is
        not touched. Call it once, after initialisation. `identity` has nothing to scale: there it does nothing.

        Raises:
            ValueError: the norm is not a positive number, or the connector has no weights yet (meta device).
        """
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(
                f"norm={norm!r} must be a positive number: the mean L2 norm of the word embeddings. [errors.md#connector-fit]"
            )
        weight = self.output.weight
        if weight.is_meta:
            raise ValueError(
                "This connector has no weights yet (meta device): materialise and initialise it first."
                " [errors.md#connector-fit]"
            )
        positions = self.num_positions or (None if self.reads_positions else self.prefix_length) or 64
        modes = {module: module.training for module in self.modules()}
        generator = torch.Generator().manual_seed(0)
        shape = (max(16, 512 // positions), positions, self.vision_width)
        features = torch.randn(shape, generator=generator, device="cpu").to(weight.device)
        prefix = self.eval()(features, **self.grid_for(len(features), positions))
        prefix = prefix if self.separator is None else prefix[:, :-1]
        for module, training in modes.items():
            module.training = training
        scale = norm / prefix.float().norm(dim=-1).mean()
        for parameter in self.output.parameters():
            parameter.mul_(scale)
        if self.separator is not None:
            self.separator.mul_(norm / self.separator.float().norm())


def _code_of_time(frames: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the frame's number (arXiv 1706.03762, section 3.5): (frames, width)."""
    width = like.shape[-1]
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    angles = torch.arange(frames, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].to(like.dtype)


class IdentityConnector(Connector):
    """f(F) = F: for a tower whose features already live in the embedding space. No parameters, nothing to scale.

    Keeps the features' dtype; masked positions become zeros. Needs vision_width == embedding_dim.
    """

    def __init__(self, **geometry: Any):
        super().__init__(**geometry, input_norm=False)

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {}

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frames: int = 1,
        spatial_shapes: torch.Tensor | None = None,
        prefix_length: int | None = None,
    ) -> torch.Tensor:
        return self._prepare(features, attention_mask, frames)[0]

    def set_output_norm(self, norm: float) -> None:
        """Does nothing: there is no parameter to scale."""


class LinearConnector(Connector):
    """One linear map per position: LiMBeR (arXiv 2209.15162).

    From a pooled vector it writes `prefix_length` vectors at once: Frozen (arXiv 2106.13884, section 3).
    """

    def __init__(self, **common: Any):
        super().__init__(**common)
        self._add_output(self.vision_width)
        self.reset_parameters()

    def _mix(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int | None) -> torch.Tensor:
        return hidden


class MLPConnector(Connector):
    """Two layers with GELU per position: LLaVA-1.5 (arXiv 2310.03744).

    From a pooled vector it writes `prefix_length` vectors at once: ClipCap's MLP (arXiv 2111.09734).

    Args:
        hidden_size (`int`, *optional*): width of the hidden layer; `None` for `embedding_dim`, as in LLaVA.
        dropout (`float`, defaults to 0.0): after the GELU.
    """

    def __init__(self, *, hidden_size: int | None = None, dropout: float = 0.0, **common: Any):
        super().__init__(**common)
        self._add_two_layers(hidden_size or self.embedding_dim, dropout)

    def _mix(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int | None) -> torch.Tensor:
        return self.hidden(hidden)


class _Reader(Connector):
    """Connectors that read all positions and write at `prefix_length` learned queries."""

    reads_positions = takes_lengths = True
    prefix_length: int

    def _add_queries(self, hidden_size: int) -> None:
        self.queries = nn.Parameter(torch.empty(self.prefix_length, hidden_size))
        self._add_output(hidden_size)
        self.reset_parameters()

    def _reset_own(self) -> None:
        init.normal_(self.queries, std=1.0)  # smaller ones start as nearly the same vector, and part more slowly


class Attention(nn.MultiheadAttention):
    """torch's, with its output layer called as a module, so that hooks (of offloading, say) are run for it too."""

    def forward(  # type: ignore[override]  # torch's gives weights as well
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if need_weights or attn_mask is not None:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **kwargs)
        sizes = [self.embed_dim, 2 * self.embed_dim]
        (query_weight, weight), (query_bias, bias) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
        projected = (
            nn.functional.linear(query, query_weight, query_bias),
            *nn.functional.linear(key, weight, bias).chunk(2, dim=-1),
        )
        queries, keys, values = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in projected)
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        dropout = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


class TransformerLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):
    """torch's own, which activation checkpointing finds."""

    def __init__(self, hidden_size: int, num_heads: int, feedforward_size: int, dropout: float):
        super().__init__(
            hidden_size, num_heads, feedforward_size, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.self_attn = Attention(hidden_size, num_heads, dropout, batch_first=True)


class TransformerConnector(_Reader):
    """ClipCap's mapper (arXiv 2111.09734): learned constants beside the projected positions in a transformer encoder.

    The prefix is read off at the constants.

    Args:
        hidden_size (`int`, defaults to 512): width of the encoder.
        num_layers (`int`, defaults to 4): its layers (pre-norm).
        num_heads (`int`, defaults to 8): attention heads; must divide `hidden_size`.
        feedforward_size (`int`, *optional*): width of the feed-forward layers; `None` for twice `hidden_size`, as in ClipCap.
        dropout (`float`, defaults to 0.0): in attention and feed-forward.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 512,
        num_layers: int = 4,
        num_heads: int = 8,
        feedforward_size: int | None = None,
        dropout: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        self.project = nn.Linear(self.vision_width, hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_size, num_heads, feedforward_size or 2 * hidden_size, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self._add_queries(hidden_size)

    def _mix(  # type: ignore[override]  # has always a length
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        hidden = torch.cat([self.queries[:length].expand(hidden.shape[0], -1, -1), self.project(hidden)], dim=1)
        padding = None if attention_mask is None else nn.functional.pad(~attention_mask, (length, 0))
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return self.norm(hidden[:, :length])


class ResamplerLayer(GradientCheckpointingLayer):
    """Queries attend to positions and to each other in one step, then a feed-forward (Flamingo, arXiv 2204.14198)."""

    def __init__(self, hidden_size: int, num_heads: int, feedforward_size: int, dropout: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(hidden_size)
        self.context_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, feedforward_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(self, queries: torch.Tensor, context: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        normed = self.query_norm(queries)
        # With the queries among the keys an image that is all padding has something to attend to.
        keys = torch.cat([normed, self.context_norm(context)], dim=1)
        queries = queries + self.attention(normed, keys, keys, key_padding_mask=padding, need_weights=False)[0]
        return queries + self.feedforward(queries)


class ResamplerConnector(_Reader):
    """Perceiver resampler (Flamingo, arXiv 2204.14198; as the mapper of MAPL, arXiv 2210.07179).

    Learned queries read the projected positions by cross-attention, layer by layer.

    Args:
        hidden_size (`int`, defaults to 256): width of queries and keys.
        num_layers (`int`, defaults to 4): rounds of cross-attention and feed-forward.
        num_heads (`int`, defaults to 8): attention heads; must divide `hidden_size`.
        feedforward_size (`int`, *optional*): width of the feed-forward layers; `None` for four times `hidden_size`.
        dropout (`float`, defaults to 0.0): in attention and feed-forward.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        feedforward_size: int | None = None,
        dropout: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        self.project = nn.Linear(self.vision_width, hidden_size)
        self.layers = nn.ModuleList(
            ResamplerLayer(hidden_size, num_heads, feedforward_size or 4 * hidden_size, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self._add_queries(hidden_size)

    def _mix(  # type: ignore[override]  # has always a length
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        context, queries = self.project(hidden), self.queries[:length].expand(hidden.shape[0], -1, -1)
        padding = None if attention_mask is None else nn.functional.pad(~attention_mask, (length, 0))
        for layer in self.layers:
            queries = layer(queries, context, padding)
        return self.norm(queries)


class QFormerConnector(_Reader):
    """The Q-Former of BLIP-2 (arXiv 2301.12597), transformers' own module, without its text half.

    Args:
        hidden_size (`int`, defaults to 512): width of the Q-Former.
        num_layers (`int`, defaults to 4): its layers (post-norm).
        num_heads (`int`, defaults to 8): attention heads; must divide `hidden_size`.
        feedforward_size (`int`, *optional*): width of the feed-forward layers; `None` for four times `hidden_size`.
        cross_attention_frequency (`int`, defaults to 2): every how many layers the queries attend to
            the image, the first among them.
        dropout (`float`, defaults to 0.0): in attention and hidden states.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 512,
        num_layers: int = 4,
        num_heads: int = 8,
        feedforward_size: int | None = None,
        cross_attention_frequency: int = 2,
        dropout: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # here, for it is slow to import

        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=feedforward_size or 4 * hidden_size,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                cross_attention_frequency=cross_attention_frequency,
                encoder_hidden_size=self.vision_width,
            )
        )
        self._add_queries(hidden_size)

    def _mix(  # type: ignore[override]  # has always a length
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        return self.qformer(
            query_embeds=self.queries[:length].expand(hidden.shape[0], -1, -1),
            encoder_hidden_states=hidden,
            encoder_attention_mask=attention_mask,
        ).last_hidden_state

    def _reset_own(self) -> None:
        super()._reset_own()
        for name, module in self.qformer.named_modules():
            # transformers' N(0, 0.02) at width 768, carried over to any width: with more, post-norm layers start by
            # making all queries the same. Where the image comes in, less than that would start by making it small.
            if isinstance(module, nn.Linear) and "crossattention" not in name:
                init.normal_(module.weight, std=0.55 * module.in_features**-0.5)


class LSTMLayer(GradientCheckpointingLayer):
    """One LSTM whose gates' biases are the weights of one more input, 1 at valid positions and 0 at masked ones.

    So the state stays exactly zero over leading positions that are all zero. `torch.lstm` in place of `nn.LSTM`, which
    breaks the graph of torch.compile.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.input_gates = nn.Linear(hidden_size + 1, 4 * hidden_size, bias=False)
        self.state_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        state = hidden.new_zeros(1, hidden.shape[0], self.hidden_size)
        # input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
        weights = (brought(self.input_gates, "weight"), brought(self.state_gates, "weight"))
        inputs = torch.cat([hidden, valid], dim=-1)
        return torch.lstm(inputs, (state, state), weights, False, 1, 0.0, self.training, False, True)[0]


class LSTMConnector(_Reader):
    """A recurrent reader: an LSTM goes over the projected positions, then over the queries, where the prefix is read.

    Masked positions are moved to the front, where they leave the state at zero. Forget and input gates start at many
    time scales (chrono initialisation, arXiv 1804.11188), so that the first of hundreds of positions still has an
    influence at the end.

    Args:
        hidden_size (`int`, defaults to 512): width of the LSTM.
        num_layers (`int`, defaults to 1): LSTMs on top of each other.
        dropout (`float`, defaults to 0.0): after each of them.
    """

    def __init__(self, *, hidden_size: int = 512, num_layers: int = 1, dropout: float = 0.0, **common: Any):
        super().__init__(**common)
        self.project = nn.Linear(self.vision_width, hidden_size)
        self.layers = nn.ModuleList(LSTMLayer(hidden_size) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)
        self._add_queries(hidden_size)

    def _mix(  # type: ignore[override]  # has always a length
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        hidden = self.project(hidden)
        valid = hidden.new_ones(*hidden.shape[:2], 1)
        if attention_mask is not None:
            order = attention_mask.int().argsort(dim=1, stable=True)[..., None]
            valid = attention_mask[..., None].gather(1, order).to(hidden.dtype)
            hidden = hidden.gather(1, order.expand_as(hidden)) * valid
        hidden = torch.cat([hidden, self.queries[:length].to(hidden.dtype).expand(hidden.shape[0], -1, -1)], dim=1)
        valid = nn.functional.pad(valid, (0, 0, 0, length), value=1.0)
        for layer in self.layers:
            hidden = self.dropout(layer(hidden, valid))
        return self.norm(hidden[:, -length:])

    def _reset_own(self) -> None:
        super()._reset_own()
        steps = (self.num_positions or 256) + self.prefix_length
        for layer in self.modules():
            if isinstance(layer, LSTMLayer) and not getattr(layer.input_gates.weight, "_is_hf_initialized", False):
                weight, size = layer.input_gates.weight, layer.hidden_size
                spread = torch.linspace(1.0, steps, size, device=weight.device).log()
                with torch.no_grad():  # torch's order of gates: input, forget, cell, output
                    weight[:, -1] = torch.cat([-spread, spread, torch.zeros(2 * size, device=weight.device)])


class _GridConnector(Connector):
    """Connectors that read the positions as a grid and write a smaller grid, row by row."""

    reads_positions = reads_grid = True
    prefix_length: int

    @classmethod
    def _need_grid(cls, num_positions: int | None, grid: Any) -> None:
        if grid is None:
            raise ValueError(
                f"The connector {cls._name()!r} reads the tower's positions as a grid of rows and columns, and these "
                f"(num_positions={num_positions}) are none: a pooled vector, learned queries, or leading tokens kept among "
                "them by vision_feature_select_strategy='full'. Take 'default' as strategy, or a connector that needs no "
                "grid, such as 'resampler'. [errors.md#connector-fit]"
            )
        if grid != VARIABLE and math.prod(grid) != num_positions:
            raise ValueError(
                f"grid={tuple(grid)} has {math.prod(grid)} places, for num_positions={num_positions}."
                " [errors.md#connector-fit]"
            )

    def _grids(self, hidden: torch.Tensor, spatial_shapes: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Maps (images, rows, columns, width): one of all images, or where each has its own grid one of each."""
        if self.grid != VARIABLE:
            yield hidden.unflatten(1, self.grid)  # type: ignore[arg-type]  # a pair: checked when it was built
            return
        if spatial_shapes is None or spatial_shapes.shape != (hidden.shape[0], 2):
            shape = None if spatial_shapes is None else tuple(spatial_shapes.shape)
            raise ValueError(
                f"spatial_shapes of shape {shape}: this connector reads grids, which differ by image, so it needs "
                f"({hidden.shape[0]}, 2) of them, rows and columns: pass what the image processor gives by this name."
                " [errors.md#tower]"
            )
        for one, (rows, columns) in zip(hidden, spatial_shapes.tolist(), strict=True):
            if rows * columns > hidden.shape[1]:
                raise ValueError(
                    f"spatial_shapes holds {rows} rows and {columns} columns, more than the {hidden.shape[1]} positions."
                    " [errors.md#tower]"
                )
            yield one[: rows * columns].unflatten(0, (rows, columns))[None]


class _Pool(_GridConnector):
    """What has a pooled grid as output: `prefix_length` vectors in a square, or `output_size`, rows and columns."""

    pairs = ("output_size",)
    takes_lengths = True

    def __init__(self, *, output_size: Sequence[int] | None = None, **common: Any):
        super().__init__(**common)
        self.output_size = self._output_size(self.prefix_length, output_size)

    @classmethod
    def _output_size(cls, prefix_length: int | None, output_size: Sequence[int] | None) -> tuple[int, int]:
        if output_size is None:
            side = math.isqrt(prefix_length or 0)
            if prefix_length is None or side * side != prefix_length:
                raise ValueError(
                    f"prefix_length={prefix_length}: the connector {cls._name()!r} writes a grid of vectors, so it needs a "
                    "square number of them (16, 64, 144 …), or connector_config={'output_size': (rows, columns)}."
                    " [errors.md#connector-fit]"
                )
            return side, side
        rows, columns = output_size
        if prefix_length not in (None, rows * columns):
            raise ValueError(
                f"prefix_length={prefix_length} and output_size={tuple(output_size)}, which makes {rows * columns} vectors: "
                "leave one of the two out, or make them agree. [errors.md#connector-fit]"
            )
        return rows, columns

    @classmethod
    def resolve_prefix_length(
        cls, num_positions: int | None, prefix_length: int | None, grid: Any = None, options: dict[str, Any] | None = None
    ) -> int | None:
        cls._need_grid(num_positions, grid)
        size = cls._output_size(prefix_length, (options or {}).get("output_size"))
        if grid != VARIABLE and (size[0] > grid[0] or size[1] > grid[1]):
            raise ValueError(
                f"The connector {cls._name()!r} would pool a grid of {tuple(grid)} to {size} rows and columns, which is more: "
                "choose a smaller prefix_length (or output_size), or a tower of smaller patches. [errors.md#connector-fit]"
            )
        return math.prod(size)

    def _pool(self, grids: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """(images, rows, columns, width) to (images, output rows, output columns, width): adaptive average pooling as torch's
        (each output the mean from floor(i n / m) to ceil((i + 1) n / m)), as two products that any exporter knows."""
        size = self.output_size if length in (None, self.prefix_length) else self._output_size(length, None)
        rows, columns = (_mean_of_ranges(grids.shape[axis], size[axis - 1], grids) for axis in (1, 2))
        return torch.einsum("or,nrcw,pc->nopw", rows, grids, columns)


def _mean_of_ranges(length: int, parts: int, like: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros(parts, length)
    for part in range(parts):
        start, end = part * length // parts, -(-(part + 1) * length // parts)
        weights[part, start:end] = 1 / (end - start)
    return weights.to(like.device, like.dtype)


class AvgPoolConnector(_Pool):
    """Adaptive average pooling of the grid, then two layers with GELU: DeCo (arXiv 2405.20985).

    Args:
        output_size (`tuple[int, int]`, *optional*): rows and columns of the prefix; `None` for a square of `prefix_length`.
        hidden_size (`int`, *optional*): width of the hidden layer; `None` for `embedding_dim`.
        dropout (`float`, defaults to 0.0): after the GELU.
    """

    def __init__(self, *, hidden_size: int | None = None, dropout: float = 0.0, **common: Any):
        super().__init__(**common)
        self._add_two_layers(hidden_size or self.embedding_dim, dropout)

    def origins_on_grid(self, rows: int, columns: int) -> torch.Tensor | None:
        places = torch.eye(rows * columns).unflatten(1, (rows, columns))[..., None]
        return self._pool(places).flatten(1).T

    def _num_read(self) -> int | None:
        return self.prefix_length

    def read(
        self, features: torch.Tensor, spatial_shapes: torch.Tensor | None = None, length: int | None = None
    ) -> torch.Tensor:
        if features.shape[1] == self.prefix_length and features.shape[1] != self.num_positions:  # pooled when they were stored
            if length in (None, self.prefix_length):
                return features
            raise ValueError(
                f"These features were stored as the {self.prefix_length} means of `pool=True`, of which no prefix of {length} "
                "vectors can be made: store all positions. [errors.md#internal]"
            )
        return torch.cat([self._pool(grids, length).flatten(1, 2) for grids in self._grids(features, spatial_shapes)])

    def _mix_grid(self, hidden: torch.Tensor, spatial_shapes: torch.Tensor | None, length: int | None) -> torch.Tensor:
        return self.hidden(hidden)


class PixelShuffleConnector(_GridConnector):
    """Squares of `scale_factor` times `scale_factor` neighbours become one vector, by their channels, which is mapped by one
    linear layer, or two: Idefics3 (arXiv 2408.12637), InternVL 1.5 (arXiv 2404.16821).

    Args:
        scale_factor (`int`, defaults to 2): side of a square; must divide rows and columns of the grid.
        hidden_size (`int`, *optional*): width of a hidden layer with GELU; `None` for none, as in Idefics3.
        dropout (`float`, defaults to 0.0): before the last layer.
    """

    def __init__(self, *, scale_factor: int = 2, hidden_size: int | None = None, dropout: float = 0.0, **common: Any):
        super().__init__(**common)
        self.scale_factor = scale_factor
        width = self.vision_width * scale_factor**2
        self.hidden = nn.Sequential(nn.Dropout(dropout))
        if hidden_size is not None:
            self.hidden = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Dropout(dropout))
        self._add_output(hidden_size or width)
        self.reset_parameters()

    @classmethod
    def resolve_prefix_length(
        cls, num_positions: int | None, prefix_length: int | None, grid: Any = None, options: dict[str, Any] | None = None
    ) -> int | None:
        cls._need_grid(num_positions, grid)
        scale = (options or {}).get("scale_factor", 2)
        if grid == VARIABLE:
            raise ValueError(
                f"The connector {cls._name()!r} takes squares of {scale} x {scale} positions together, and this tower's "
                "images have grids of any rows and columns, which the squares need not divide: take 'avg_pool', "
                "'c_abstractor' or 'resampler'. [errors.md#tower]"
            )
        if grid[0] % scale or grid[1] % scale:
            raise ValueError(
                f"scale_factor={scale} must divide the tower's grid of {grid[0]} rows and {grid[1]} columns: choose another, "
                "or 'avg_pool', which pools any grid. [errors.md#connector-fit]"
            )
        length = (grid[0] // scale) * (grid[1] // scale)
        if prefix_length not in (None, length):
            raise ValueError(
                f"prefix_length={prefix_length}: with scale_factor={scale} the connector {cls._name()!r} writes {length} "
                f"vectors of a grid of {grid[0]} x {grid[1]}; leave prefix_length out, or choose another scale_factor."
                " [errors.md#connector-fit]"
            )
        return length

    def _mix_grid(self, hidden: torch.Tensor, spatial_shapes: torch.Tensor | None, length: int | None) -> torch.Tensor:
        (grids,) = self._grids(hidden, spatial_shapes)
        return self.hidden(self._gather(grids))

    def _gather(self, grids: torch.Tensor) -> torch.Tensor:
        side = self.scale_factor
        # (images, rows / s, s, columns / s, s, width): the square's own rows and columns go to its channels.
        squares = grids.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        return squares.flatten(3).flatten(1, 2)

    def origins_on_grid(self, rows: int, columns: int) -> torch.Tensor | None:
        places = torch.eye(rows * columns).unflatten(1, (rows, columns))[..., None]
        return self._gather(places).mean(dim=-1).T


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (images, channels, rows, columns)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ConvolutionBlock(GradientCheckpointingLayer):
    """A residual block of RegNet (arXiv 2003.13678) with squeeze-and-excitation, depthwise, SiLU and LayerNorm as Honeybee has
    it: 1 x 1, 3 x 3 in each channel, excitation, 1 x 1."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = max(1, channels // 4)
        self.expand = nn.Conv2d(channels, channels, 1, bias=False)
        self.expand_norm = ChannelNorm(channels)
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.spatial_norm = ChannelNorm(channels)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.project_norm = ChannelNorm(channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.expand_norm(self.expand(maps)))
        hidden = nn.functional.silu(self.spatial_norm(self.spatial(hidden)))
        squeezed = nn.functional.silu(self.squeeze(hidden.mean(dim=(2, 3), keepdim=True)))
        hidden = hidden * self.excite(squeezed).sigmoid()
        return nn.functional.silu(maps + self.project_norm(self.project(hidden)))


class CAbstractorConnector(_Pool):
    """Residual convolutions, average pooling of the grid, residual convolutions, then two layers: Honeybee's C-Abstractor
    (arXiv 2312.06742).

    Args:
        output_size (`tuple[int, int]`, *optional*): rows and columns of the prefix; `None` for a square of `prefix_length`.
        hidden_size (`int`, defaults to 512): channels of the convolutions.
        num_layers (`int`, defaults to 3): blocks before the pooling, and as many behind it.
        dropout (`float`, defaults to 0.0): in the last two layers, after the SiLU.
    """

    def __init__(self, *, hidden_size: int = 512, num_layers: int = 3, dropout: float = 0.0, **common: Any):
        super().__init__(**common)
        self.project = nn.Linear(self.vision_width, hidden_size)
        self.before = nn.ModuleList(ConvolutionBlock(hidden_size) for _ in range(num_layers))
        self.after = nn.ModuleList(ConvolutionBlock(hidden_size) for _ in range(num_layers))
        self.hidden = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, self.embedding_dim), nn.SiLU(), nn.Dropout(dropout)
        )
        self._add_output(self.embedding_dim)
        self.reset_parameters()

    def _mix_grid(self, hidden: torch.Tensor, spatial_shapes: torch.Tensor | None, length: int | None) -> torch.Tensor:
        pooled = []
        for grids in self._grids(self.project(hidden), spatial_shapes):
            maps = grids.movedim(-1, 1)
            for block in self.before:
                maps = block(maps)
            pooled.append(self._pool(maps.movedim(1, -1), length))
        maps = torch.cat(pooled).movedim(-1, 1)
        for block in self.after:
            maps = block(maps)
        return self.hidden(maps.movedim(1, -1).flatten(1, 2))


CONNECTORS: dict[str, type[Connector]] = {
    "identity": IdentityConnector,
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "transformer": TransformerConnector,
    "resampler": ResamplerConnector,
    "qformer": QFormerConnector,
    "lstm": LSTMConnector,
    "avg_pool": AvgPoolConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "c_abstractor": CAbstractorConnector,
}


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def did_you_mean(name: Any, known: Iterable[str], otherwise: str = "") -> str:
    """A question with the known name that is most like an unknown one; `otherwise` where none is like it."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean `{nearest[0]}`? " if nearest else otherwise


def check_connector(
    connector_type: str,
    *,
    num_positions: int | None,
    vision_width: int,
    embedding_dim: int,
    prefix_length: int | None,
    grid: Sequence[int] | str | None = None,
    connector_config: dict[str, Any] | None = None,
) -> int | None:
    """
    Checks a connector's whole specification without building it.

    Returns:
        `int`, *optional*: the resolved prefix length; `None` only where the tower's positions vary and the connector keeps
        them.

    Raises:
        ValueError: unknown type (lists the choices), unknown option (names the nearest and lists the options), or
            values that do not go together.
    """
    if connector_type not in CONNECTORS:
        raise ValueError(
            f"connector_type={connector_type!r} is unknown. {did_you_mean(connector_type, CONNECTORS)}"
            f"The choices are {', '.join(map(repr, CONNECTORS))}. [errors.md#connector-fit]"
        )
    connector, options = CONNECTORS[connector_type], connector_config or {}
    geometry = {
        "num_positions": num_positions,
        "vision_width": vision_width,
        "embedding_dim": embedding_dim,
        "prefix_length": prefix_length,
        "grid": grid,
    }
    for name in options:
        if name in geometry:
            raise ValueError(
                f"connector_config holds {name!r}, which goes beside connector_config, not into it. [errors.md#choices]"
            )
        if name not in connector.options():
            choices = ", ".join(f"{option}={default!r}" for option, default in connector.options().items())
            raise ValueError(
                f"connector_config holds {name!r}, which the connector {connector_type!r} does not know. "
                f"{did_you_mean(name, connector.options())}Its options are: {choices or 'none'}. [errors.md#choices]"
            )
    return connector.check(**geometry, **options)  # type: ignore[arg-type]  # the keys have types of their own


def build_connector(connector_type: str, *, connector_config: dict[str, Any] | None = None, **geometry: Any) -> Connector:
    """Checks the specification, of the same arguments as [`check_connector`], and builds the connector, initialised."""
    geometry["prefix_length"] = check_connector(connector_type, connector_config=connector_config, **geometry)
    return CONNECTORS[connector_type](**geometry, **(connector_config or {}))


def norm_of_each_layer(
    connector_type: str, connector_config: dict[str, Any] | None, layer_widths: Sequence[int]
) -> dict[str, Any] | None:
    """`connector_config` for features of several layers or towers: each has its own norm, unless it is set there."""
    options = CONNECTORS[connector_type].options() if connector_type in CONNECTORS else {}
    if len(layer_widths) < 2 or "input_norm_groups" not in options:
        return connector_config
    groups = len(layer_widths) if len(set(layer_widths)) == 1 else list(layer_widths)
    return {"input_norm_groups": groups, **(connector_config or {})}


def draws(module: nn.Module) -> bool:
    """Whether a module's output is random: something in it trains with dropout, as a module or as a number of its own."""
    return any(one.training and (_rate(one) > 0) for one in module.modules())


def _rate(module: nn.Module) -> float:
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
        return module.p
    # No `max` with a default, which torch traces not.
    return max([0.0, *(value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))])


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """For probes of a module, which must not draw: its mode, and that of every module in it, is restored afterwards."""
    training = [one for one in module.modules() if one.training]
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


class Head(nn.Module):
    """Small modules that train by the word "connector" of `config.trainable`, in fp32, and lie in every small checkpoint."""

    _frozen_prefix_initialized = False

    def reset_parameters(self) -> None:
        """(Re)initialises every parameter; tensors marked as loaded are left as they are."""
        fill_layers(self)
        self._reset_own()
        mark_filled(self)

    def _reset_own(self) -> None:
        """For parameters that are no layer's."""

    def set_output_norm(self, norm: float) -> None:
        """For what is read among words, whose norm this is; other heads have nothing to scale."""
