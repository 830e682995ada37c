# SPDX-License-Identifier: Apache-2.0
"""Gated cross-attention, the second way to fuse: blocks between the frozen layers of any decoder, in which words attend to
the image (Flamingo, arXiv 2204.14198, section 3.1.2, "gated XATTN-DENSE").

The language model is not rebuilt around the blocks. They lie beside it; a hook before each of its layers applies a block to
the hidden states, if the call in progress has one for that layer. What the words of the call attend to is held in a context
variable, so threads don't mix, and the language model called by itself, or by another composite that shares it, is what it
always was. Generation goes on from a cache, which holds the images before its words.
"""

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from .backbones import fake_language_model
from .connectors import did_you_mean, fill_layers, mark_filled
from .losses import compiled_part
from .transformers_compat import cache_of
from .weights import to_weight


# Names and defaults of what `cross_attention_config` may hold.
OPTIONS: dict[str, Any] = {
    "every_n_layers": None,
    "num_heads": 8,
    "head_dim": 64,
    "feedforward_multiple": 4,
    "dropout": 0.0,
}

# For messages.
PREFIX_INSTEAD = 'Use `fusion="prefix"`, which needs nothing of the inside of a language model.'

# A column that no word ever has.
_NEVER = torch.iinfo(torch.long).max


# ------------------------------------------------------------------------------------------------ the decoder's layers


@dataclass(frozen=True)
class DecoderGeometry:
    """Of a decoder's stack of layers: `hidden_size`, the width of what travels between them, and `num_layers`."""

    hidden_size: int
    num_layers: int


ModuleLists = nn.ModuleList | nn.Sequential


def _outermost_lists(
    module: nn.Module, kinds: tuple[type[ModuleLists], ...], name: str = ""
) -> Iterator[tuple[str, ModuleLists]]:
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        if isinstance(child, kinds) and len(child):
            yield full_name, child
        else:
            yield from _outermost_lists(child, kinds, full_name)


def largest_list(module: nn.Module, *kinds: type[ModuleLists]) -> tuple[str, ModuleLists]:
    """Of the lists of modules of these kinds that lie in no other list (experts do) that with the most weights, after its
    name; an empty one where there is none."""
    lists = _outermost_lists(module, kinds)
    return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()), default=("", nn.ModuleList()))


def decoder_layers(language_model: PreTrainedModel) -> ModuleLists:
    """
    The decoder's stack of layers, see [`largest_list`].

    Raises:
        ValueError: if there is none.
    """
    _, layers = largest_list(language_model.base_model, nn.ModuleList)
    if not len(layers):
        raise ValueError(
            f"{type(language_model).__name__} holds no list of layers before which gated blocks could be put. {PREFIX_INSTEAD}"
            " [errors.md#cross-attention]"
        )
    return layers


class _Reached(Exception):
    """Ends a probe at the first layer."""


def probe_decoder(text_config: PreTrainedConfig) -> DecoderGeometry:
    """
    Finds what the first layer of a decoder reads, by a run on fake tensors (no weight is allocated).

    Raises:
        ValueError: for encoder-decoders, and for models whose layers do not read (batch, sequence, width): the reason.
    """
    if text_config.is_encoder_decoder:
        raise ValueError(
            f'`fusion="cross_attention"` puts gated blocks into a decoder, behind the words that hold the image; in '
            f"`{text_config.model_type}` those words are the encoder's. {PREFIX_INSTEAD} [errors.md#cross-attention]"
        )
    shapes: list[torch.Size | None] = []

    def stop(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = _hidden_states(args, kwargs)
        shapes.append(None if hidden_states is None else hidden_states.shape)
        raise _Reached

    # No two numbers alike, or a layer that reads (sequence, batch, width) would pass.
    rows, words = 2, 3
    with fake_language_model(text_config) as language_model:
        stack = decoder_layers(language_model)
        stack[0].register_forward_pre_hook(stop, with_kwargs=True)
        reason = "never calls the first of its layers"
        try:
            language_model(input_ids=torch.zeros(rows, words, dtype=torch.long), use_cache=False)
        except _Reached:
            shape = shapes[0]
            if shape is not None and len(shape) == 3 and shape[:2] == (rows, words):
                return DecoderGeometry(hidden_size=shape[2], num_layers=len(stack))
            reason = f"gives its layers {'no hidden states' if shape is None else f'a tensor of shape {tuple(shape)}'}"
        except Exception as error:  # whatever an unknown model raises
            reason = f"can't be probed for what its layers read ({type(error).__name__}: {error})"
    raise ValueError(
        f"{type(language_model).__name__} {reason}, where gated blocks need hidden states of shape (batch, sequence, "
        f"width), {(rows, words)} and the width in this probe. {PREFIX_INSTEAD} [errors.md#cross-attention]"
    )


def check_decoder(language_model: PreTrainedModel, *, hidden_size: int, num_layers: int, name: str) -> None:
    """
    Refuses another language model than the blocks were made for.

    Raises:
        ValueError: naming what differs.
    """
    geometry = probe_decoder(language_model.config)
    if geometry != DecoderGeometry(hidden_size, num_layers):
        raise ValueError(
            f"The gated blocks were made for {num_layers} layers of width {hidden_size}, but `{name}` has "
            f"{geometry.num_layers} of width {geometry.hidden_size}: give a language model of that shape, or train for this "
            "one. [errors.md#language-model]"
        )


# ------------------------------------------------------------------------------------------------------- specification


def check_cross_attention(options: dict[str, Any], num_layers: int | None) -> list[int]:
    """
    Checks `cross_attention_config` without building anything.

    Args:
        options (`dict`): `every_n_layers` (`None` for every fourth, or the last of fewer), `num_heads`, `head_dim`,
            `feedforward_multiple`, `dropout`.
        num_layers (`int`, *optional*): layers of the language model, if they are known already.

    Returns:
        `list[int]`: the layers before which there is a block: the n-th, 2n-th, … (the list counts from 0).

    Raises:
        ValueError: for an unknown option (naming the nearest) and for values out of range.
    """
    for name in options:
        if name not in OPTIONS:
            choices = ", ".join(f"{option}={default!r}" for option, default in OPTIONS.items())
            raise ValueError(
                f"cross_attention_config holds {name!r}, which is unknown. {did_you_mean(name, OPTIONS)}"
                f"Its options are: {choices}. [errors.md#cross-attention]"
            )
    values = {**OPTIONS, **options}
    for name in ("every_n_layers", "num_heads", "head_dim", "feedforward_multiple"):
        value = values[name]
        if value is None and OPTIONS[name] is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"cross_attention_config: {name}={value!r} must be a positive whole number. [errors.md#cross-attention]"
            )
    dropout = values["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(
            f"cross_attention_config: dropout={dropout!r} must be a number from 0 up to, not including, 1."
            " [errors.md#cross-attention]"
        )
    if num_layers is None:
        return []
    every = values["every_n_layers"] or min(4, num_layers)
    if every > num_layers:
        raise ValueError(
            f"cross_attention_config: every_n_layers={every} leaves no block in a language model of {num_layers} "
            f"layers; choose {num_layers} or less. [errors.md#cross-attention]"
        )
    return list(range(every - 1, num_layers, every))


# -------------------------------------------------------------------------------------------------------------- blocks


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """
    Gated XATTN-DENSE: words attend to the last image before them, then a feed-forward; both come in through tanh gates
    that start at zero (Flamingo, arXiv 2204.14198, figure 4), so that at first the block adds exactly nothing.

    One thing differs from the paper: the feed-forward too leaves words without an image before them as they are, so that
    text alone stays the language model's own, bit for bit, after training as well.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        embedding_dim: int,
        num_heads: int,
        head_dim: int,
        feedforward_multiple: int,
        dropout: float,
    ):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.dropout = num_heads, dropout
        self.query_norm = nn.LayerNorm(hidden_size)
        # Prefix vectors have the norm of word embeddings, which may be a hundredth or a hundred.
        self.visual_norm = nn.LayerNorm(embedding_dim)
        self.query = nn.Linear(hidden_size, inner, bias=False)
        self.key_value = nn.Linear(embedding_dim, 2 * inner, bias=False)
        self.output = nn.Linear(inner, hidden_size, bias=False)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.feedforward_norm = nn.LayerNorm(hidden_size)
        self.feedforward_in = nn.Linear(hidden_size, feedforward_multiple * hidden_size, bias=False)
        self.feedforward_out = nn.Linear(feedforward_multiple * hidden_size, hidden_size, bias=False)
        self.feedforward_gate = nn.Parameter(torch.empty(1))

    def _heads(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def read(self, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, heads, tokens, head_dim)` of visual tokens `(batch, tokens, embedding_dim)`."""
        weight = self.key_value.weight
        keys, values = self.key_value(self.visual_norm(to_weight(visual, weight))).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual: torch.Tensor,
        mask: torch.Tensor | None,
        has_image: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of any dtype.
            visual (`torch.Tensor` of shape `(batch, tokens, embedding_dim)`): all that a row's words may attend to.
            mask (`torch.BoolTensor` of shape `(batch, 1, sequence or 1, tokens)`, *optional*): what each word attends to.
            has_image (`torch.BoolTensor` of shape `(batch, sequence or 1, 1)`): words that have an image before them.
            keys_values (*optional*): what `read(visual)` gave before.

        Returns:
            `torch.Tensor`: hidden states of the same shape and dtype.
        """
        weight = self.query.weight
        words = to_weight(hidden_states, weight)
        keys, values = keys_values or self.read(visual)
        mask = None if mask is None else mask.to(words.device)
        dropout = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(
            self._heads(self.query(self.query_norm(words))), keys, values, attn_mask=mask, dropout_p=dropout
        )
        added = self.attention_gate.tanh() * self.output(attended.transpose(1, 2).flatten(2))
        inner = self.feedforward_in(self.feedforward_norm(words + added)).relu().square()
        inner = nn.functional.dropout(inner, dropout, self.training)
        added = added + self.feedforward_gate.tanh() * self.feedforward_out(inner)
        added = torch.where(has_image.to(words.device), added, 0)
        return hidden_states + added.to(hidden_states.device, hidden_states.dtype)


class GatedCrossAttention(nn.ModuleList):
    """
    The gated blocks of one composite; `call` calls the language model with them.

    Args:
        hidden_size, num_layers: of the language model's layers (see `probe_decoder`).
        embedding_dim: width of the connector's vectors.
        options: `cross_attention_config` (see `check_cross_attention`).
    """

    _frozen_prefix_initialized = False

    def __init__(self, *, hidden_size: int, num_layers: int, embedding_dim: int, options: dict[str, Any] | None = None):
        layer_indices = check_cross_attention(options or {}, num_layers)
        values = {**OPTIONS, **(options or {})}
        del values["every_n_layers"]
        super().__init__(
            GatedCrossAttentionBlock(hidden_size=hidden_size, embedding_dim=embedding_dim, **values) for _ in layer_indices
        )
        self.layer_indices = layer_indices
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """(Re)initialises every parameter, gates at zero; tensors marked as loaded are left as they are."""
        fill_layers(self)
        for module in self.modules():
            if isinstance(module, GatedCrossAttentionBlock):
                init.zeros_(module.attention_gate)
                init.zeros_(module.feedforward_gate)
        mark_filled(self)

    def set_output_norm(self, norm: float) -> None:
        """Does nothing: what the blocks write starts at zero."""

    def register_hooks(self, layers: ModuleLists) -> None:
        """Applies these blocks before the layers, whenever `call` runs. Doing it twice, or for another composite with the
        same language model, changes nothing."""
        for index, layer in enumerate(layers):
            hooks = layer._forward_pre_hooks.values()  # private: a module lists its hooks under no public name
            if not any(isinstance(hook, functools.partial) and hook.func is _apply_block for hook in hooks):
                layer.register_forward_pre_hook(functools.partial(_apply_block, index), with_kwargs=True)

    def call(
        self,
        callee: nn.Module,
        inputs: dict[str, Any],
        placeholders: torch.Tensor | None,
        images: list[torch.Tensor] | None,
    ) -> ModelOutput:
        """
        Calls the language model (or its headless base), whose words attend to images in the blocks.

        Args:
            callee, inputs: what is called, and by which keyword arguments.
            placeholders (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): where images are.
            images (`list[torch.Tensor]`, *optional*): visual tokens `(tokens, embedding_dim)` of each image, in
                reading order; `None` for words behind images of an earlier call, which their cache holds, or behind
                none: the language model is then called as it is.
        """
        cache = cache_of(inputs)
        cached = getattr(cache, "_cached_images", None)
        if images:
            cached, attended = attend_to_last(placeholders, images, cached, cache)  # type: ignore[arg-type]  # with images
        elif cached is not None:
            words = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
            attended = cached.attend_to_last(len(words), cache)
        else:
            return callee(**inputs, return_dict=True)
        attended.blocks = dict(zip(self.layer_indices, self, strict=True))  # type: ignore[arg-type]  # torch: any Module
        token = _in_progress.set(attended)
        try:
            outputs = compiled_part(callee, **inputs, return_dict=True)
        finally:
            _in_progress.reset(token)
        # Training with layer drop, and nothing else, may leave layers out.
        if attended.num_applied != len(self) and not callee.training and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(callee).__name__} applied {attended.num_applied} of {len(self)} gated blocks, so it would be blind: "
                'it does not run each of its layers once. Use `fusion="prefix"` for it. [errors.md#cross-attention]'
            )
        if images:
            cache = cache_of(outputs)
            if isinstance(cache, Cache):
                _keep_images(cache, cached)
        return outputs

    def zero(self) -> torch.Tensor:
        """Zero, through every parameter: for batches without images (see `FrozenPrefixModel._zero_of`)."""
        return torch.stack([parameter.flatten()[0] for parameter in self.parameters()]).sum() * 0.0


# ------------------------------------------------------------------------------- what the words of one call attend to


@dataclass
class CrossAttentionInputs:
    """What the words of one call attend to: the blocks' arguments, and the blocks by the layer that they precede."""

    visual: torch.Tensor
    mask: torch.Tensor | None
    has_image: torch.Tensor
    #: keys and values by layer, for the steps of generation that all attend to the same images
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    blocks: dict[int, GatedCrossAttentionBlock] = field(default_factory=dict)
    num_applied: int = 0


_in_progress: ContextVar[CrossAttentionInputs | None] = ContextVar("cross_attention_inputs", default=None)


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    candidate = args[0] if args else kwargs.get("hidden_states")
    return candidate if isinstance(candidate, torch.Tensor) and candidate.is_floating_point() else None


def _apply_block(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    attended, hidden_states = _in_progress.get(), _hidden_states(args, kwargs)
    if not torch.compiler.is_compiling() and hidden_states is not None:
        # A layer checkpointed from outside is run again in the backward pass, when the call is long over. What was kept are
        # the layer's own inputs, so they carry what was attended to. (Only a private name says that a backward runs.)
        if attended is None and torch._C._current_graph_task_id() != -1:
            attended = getattr(hidden_states, "_frozen_prefix_attended", None)
        elif attended is not None and torch.is_grad_enabled():
            hidden_states._frozen_prefix_attended = attended  # type: ignore[attr-defined]  # tensors take any
    block = None if attended is None else attended.blocks.get(index)
    if attended is None or block is None:
        return None
    attended.num_applied += 1
    keys_values = None
    if attended.keys_values is not None:
        if index not in attended.keys_values:
            attended.keys_values[index] = block.read(attended.visual)
        keys_values = attended.keys_values[index]
    hidden_states = block(hidden_states, attended.visual, attended.mask, attended.has_image, keys_values)
    return ((hidden_states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_states})


@dataclass
class CachedImages:
    """
    The images before the words of a cache; it lies on the cache, and its rows move with the cache's.

    Args:
        visual (`torch.Tensor` of shape `(rows, images, tokens, embedding_dim)`): zeros where a row has fewer.
        lengths (`torch.LongTensor` of shape `(rows, images)`): tokens of each image.
        columns (`torch.LongTensor` of shape `(rows, images)`): the position of each image's placeholder.
        is_even (`bool`): whether all images have the same number of tokens.
    """

    visual: torch.Tensor
    lengths: torch.Tensor
    columns: torch.Tensor
    is_even: bool
    _latest: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, dict] | None = None

    def select_rows(self, rows: torch.Tensor) -> "CachedImages":
        rows = rows.to(self.visual.device)
        return CachedImages(self.visual[rows], self.lengths[rows], self.columns[rows], self.is_even)

    def by_row(self, past: int) -> list[list[tuple[int, torch.Tensor]]]:
        """Column and visual tokens of each image before the column `past`."""
        return [
            [
                (column, visual[index, :length])
                for index, (column, length) in enumerate(zip(columns, lengths, strict=True))
                if column < past
            ]
            for visual, columns, lengths in zip(self.visual, self.columns.tolist(), self.lengths.tolist(), strict=True)
        ]

    def valid(self) -> torch.Tensor:
        """`(rows, images, tokens)`: which tokens are an image's own."""
        return torch.arange(self.visual.shape[2], device=self.visual.device) < self.lengths[..., None]

    def attend_to_last(self, rows: int, cache: Cache | None) -> CrossAttentionInputs:
        """
        For words after all images: each row attends to its last one.

        Raises:
            ValueError: if the cache has another number of rows than the call.
        """
        if rows != len(self.visual):
            raise ValueError(
                f"The call has {rows} rows, but its cache holds images of {len(self.visual)}: repeat the rows of the "
                "cache by its own `batch_repeat_interleave`. [errors.md#cross-attention]"
            )
        if self._latest is None or torch.is_grad_enabled():
            count = (self.columns < _cached_length(cache, unknown=_NEVER)).sum(-1)
            rows_and_last = torch.arange(rows, device=count.device), (count - 1).clamp(min=0)
            visual, has_image = self.visual[rows_and_last], (count > 0)[:, None, None]
            mask = None if self.is_even else self.valid()[rows_and_last][:, None, None]
            if torch.is_grad_enabled():
                return CrossAttentionInputs(visual, mask, has_image)
            self._latest = (visual, mask, has_image, {})
        return CrossAttentionInputs(*self._latest)


def _cached_length(cache: Cache | None, *, unknown: int) -> int:
    """Words in the cache. Those that hold states alone don't count, and can't be cropped either."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return unknown


def attend_to_last(
    placeholders: torch.Tensor, images: list[torch.Tensor], cached: CachedImages | None, cache: Cache | None
) -> tuple[CachedImages, CrossAttentionInputs]:
    """
    Each word attends to the last image at or before it, in this call or in its cache (the paper's phi).

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, sequence)`).
        images (`list[torch.Tensor]`): `(tokens, embedding_dim)` of each image, in reading order.
        cached: the images of the cache.
        cache: of the words before this call.
    """
    rows: list[list[tuple[int, torch.Tensor]]] = [[] for _ in placeholders]
    if cached is not None:
        rows = cached.by_row(_cached_length(cache, unknown=_NEVER))
        if len(rows) != len(placeholders):
            raise ValueError(
                f"The call has {len(placeholders)} rows, but its cache holds images of {len(rows)}."
                " [errors.md#cross-attention]"
            )
    device = images[0].device
    before = torch.tensor([len(row) for row in rows], device=device)
    start, rest = _cached_length(cache, unknown=0), iter(images)
    for row, column in placeholders.nonzero().tolist():
        rows[row].append((start + column, next(rest)))
    most, longest = max(len(row) for row in rows), max(len(tokens) for row in rows for _, tokens in row)
    is_even = all(len(tokens) == longest for row in rows for _, tokens in row)
    # Rows with fewer images attend to zeros there, and nothing of it is taken: attention to nothing at all would be NaN.
    blank = (_NEVER, images[0].new_zeros(longest, images[0].shape[-1]))
    rows = [row + [blank] * (most - len(row)) for row in rows]
    cached = CachedImages(
        visual=torch.stack([torch.stack([nn.functional.pad(t, (0, 0, 0, longest - len(t))) for _, t in row]) for row in rows]),
        lengths=torch.tensor([[len(tokens) for _, tokens in row] for row in rows], device=device),
        columns=torch.tensor([[column for column, _ in row] for row in rows], device=device),
        is_even=is_even,
    )
    count = before[:, None] + placeholders.to(device).cumsum(-1)  # of images at or before each word
    mask = None
    if most > 1 or not is_even:
        is_last = (count - 1).clamp(min=0)[..., None] == torch.arange(most, device=device)
        mask = (is_last[..., None] & cached.valid()[:, None]).flatten(2)[:, None]
    return cached, CrossAttentionInputs(cached.visual.flatten(1, 2), mask, (count > 0)[..., None])


# ------------------------------------------------------------------------------------------------- caches with images


class _CacheWithImages(Cache):
    """Mixed into the class of a cache, so that whatever moves its rows moves the images with them."""

    _cached_images: CachedImages | None

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self._cached_images is not None:
            self._cached_images = self._cached_images.select_rows(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._cached_images is not None:
            self._select_rows(torch.arange(len(self._cached_images.visual)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        if self._cached_images is not None:
            self._cached_images._latest = None

    def reset(self) -> None:
        super().reset()
        self._cached_images = None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made on the fly: copies and pickles name the plain one.
        return _restore, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _class_with_images(cache_class: type) -> type[_CacheWithImages]:
    if issubclass(cache_class, _CacheWithImages):
        return cache_class
    bases = (_CacheWithImages, cache_class)
    return type(cache_class.__name__, bases, {"__module__": cache_class.__module__})


def _keep_images(cache: Cache, images: CachedImages | None) -> None:
    # The user's own cache goes on from here: transformers' has no place for what its rows have beside keys and values, and
    # calls nothing of ours when it moves them.
    cache_class: type = type(cache)
    cache.__class__ = _class_with_images(cache_class)
    cache._cached_images = images  # type: ignore[attr-defined]  # of its class now


def _restore(cache_class: type, attributes: dict[str, Any]) -> Cache:
    with_images = _class_with_images(cache_class)
    cache = with_images.__new__(with_images)
    cache.__dict__.update(attributes)
    return cache


__all__ = [
    "OPTIONS", "DecoderGeometry", "GatedCrossAttention", "GatedCrossAttentionBlock", "check_cross_attention",
    "check_decoder", "decoder_layers", "largest_list", "probe_decoder",
]  # fmt: skip
