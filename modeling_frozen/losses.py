# SPDX-License-Identifier: Apache-2.0
"""Losses of the language model: cross-entropy where a label is, in chunks, so that large vocabularies cost no memory.

Logits of 64 captions over 150,000 words are the largest tensor of a training step, by far. Here only a chunk of them
exists at a time. How the head makes logits (a bias, a scale, soft-capping, a projection) is the language model's own
business: its own `forward` is run on each chunk of hidden states, with something in the place of its headless base
that just hands these out. Whether that equals the plain way is tried once per model; where not, the plain way is taken.

The head is frozen as a rule, so nothing but the gradient of the hidden states is wanted, and that is at hand as soon as
a chunk's logits are: it is kept, they are dropped, and nothing is computed twice (as Liger's fused linear
cross-entropy does, arXiv 2410.10989, section 3.2). Where something in the head trains, chunks are recomputed instead.
Where Liger is installed, the head is on a GPU and is a linear layer and nothing else, Liger's kernels do it.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import logging

from .connectors import did_you_mean, in_eval_mode
from .transformers_compat import MASKS_KEEP_LOGITS, forward_parameters, slice_logits_to_keep


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

# Names and defaults of what `loss_config` may hold.
OPTIONS: dict[str, Any] = {"label_smoothing": 0.0, "z_loss": 0.0, "chunk_size": None}

# One chunk's logits in float32; two or three tensors of that size exist at a time.
CHUNK_BYTES = 64 * 2**20
# A chunk reads the whole head, forth and back: over fewer labels that shows in the time of a step.
CHUNK_LABELS = 128

# Devices on which Liger's kernels run, if it is installed.
LIGER_DEVICES = {"cuda"}

# Language models whose logits are those of a linear layer, with nothing done to them.
_LINEAR: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

# Language model -> where its headless base lies in it (a dotted path), or None for "take the plain way".
_PATHS: "weakref.WeakKeyDictionary[nn.Module, str | None]" = weakref.WeakKeyDictionary()


def check_loss_config(options: dict[str, Any]) -> dict[str, Any]:
    """
    All options of the training loss, defaults filled in.

    Args:
        options (`dict`):
            `label_smoothing` (`float` in [0, 1)): share of each target spread evenly over the vocabulary.
            `z_loss` (`float`): weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5: 1e-4).
            `chunk_size` (`int`, *optional*): labels per chunk; by default at most so many that their float32 logits take
                64 MiB, or 128.

    Raises:
        ValueError: for an unknown option or a value out of range.
    """
    for name in options:
        if name not in OPTIONS:
            raise ValueError(
                f"`{name}` is not an option of `loss_config`; valid ones are {sorted(OPTIONS)}. "
                f"{did_you_mean(name, OPTIONS)}[errors.md#choices]"
            )
    options = {**OPTIONS, **options}
    if not 0 <= options["label_smoothing"] < 1:
        raise ValueError(f"`label_smoothing={options['label_smoothing']}` is a share: it must be in [0, 1). [errors.md#range]")
    if options["z_loss"] < 0:
        raise ValueError(f"`z_loss={options['z_loss']}` is a weight: it must not be negative. [errors.md#range]")
    if options["chunk_size"] is not None and options["chunk_size"] < 1:
        raise ValueError(
            f"`chunk_size={options['chunk_size']}` is a number of labels: at least 1, or None to have it chosen."
            " [errors.md#range]"
        )
    return options


def shift_for_causal_model(labels: torch.Tensor) -> torch.Tensor:
    """Labels moved one to the left: position n holds what is to be predicted there. Shape `(batch, sequence)`."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def language_modeling_loss(
    loss_function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """
    Cross-entropy of `logits` against `targets` that stand at the same places, the plain way: by transformers' loss
    function, which honours `num_items_in_batch` (so that gradient accumulation is exact).

    Args:
        loss_function (`Callable`): the model's `loss_function`.
        logits (`torch.Tensor` of shape `(..., vocabulary)`).
        targets (`torch.LongTensor` of shape `(...)`): already shifted; `-100` is ignored.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the sum is divided by; by default the number of labels.
        label_smoothing, z_loss (`float`): as [`check_loss_config`]; set, they take the loss function's place.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    if not label_smoothing and not z_loss:
        return loss_function(
            logits=logits,
            labels=targets,
            shift_labels=targets.contiguous(),
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
        )
    learnt = targets != IGNORE_INDEX
    # A product, not a choice of rows: this is the way of compiled models, whose shapes must not depend on values.
    total = _sum_of_losses(logits.float().flatten(0, -2), targets.flatten(), label_smoothing, z_loss)
    return _normalized(total, learnt.sum(), num_items_in_batch)


def _sum_of_losses(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float) -> torch.Tensor:
    total = nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        total = total + z_loss * (torch.logsumexp(logits, dim=-1).square() * (targets != IGNORE_INDEX)).sum()
    return total


def _normalized(total: torch.Tensor, count: torch.Tensor | int, num_items: torch.Tensor | int | None) -> torch.Tensor:
    divisor = count if num_items is None else num_items
    # A batch of nothing (its rows were left out, say) has a loss of 0 and teaches nothing, where 0/0 would spoil all weights.
    return total / (divisor.to(total.device).clamp(min=1) if torch.is_tensor(divisor) else max(divisor, 1))


# ------------------------------------------------------------------------- the head alone, by the model's own forward


def _with_part_replaced(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """A shallow copy of the module, sharing every tensor, with another part at `path`. The module itself is untouched,
    so that other threads and other models may go on using it."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    # Private: set by its public name, the part would be set in the module itself too, for both have one dictionary of them.
    part = replacement if len(path) == 1 else _with_part_replaced(module.get_submodule(path[0]), path[1:], replacement)
    copied.__dict__["_modules"] = {**module._modules, path[0]: part}
    return copied


class _Caught(nn.Module):
    """Stands before the headless base: keeps its hidden states, and lets through to the head those of no position at all
    (or, to probe, of all)."""

    def __init__(self, base: nn.Module, passes: bool):
        super().__init__()
        self.base, self.passes = base, passes
        self.hidden_states = torch.empty(0)
        self.output_class: type[ModelOutput] = BaseModelOutput

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.base(*args, **kwargs)
        self.hidden_states = outputs[0]
        passed = outputs[0] if self.passes else outputs[0][:, :0]
        if not isinstance(outputs, ModelOutput):
            return (passed, *outputs[1:])
        self.output_class = type(outputs)
        # A new one: for whoever else holds the old (a hook, a user) it must not be emptied.
        return type(outputs)(**{**outputs, "last_hidden_state": passed})


class _HandsOut(nn.Module):
    """Stands in for the headless base: gives the hidden states that it was made with, whatever it is asked."""

    def __init__(self, hidden_states: torch.Tensor, output_class: type[ModelOutput]):
        super().__init__()
        self.hidden_states, self.output_class = hidden_states, output_class

    def forward(self, *args: Any, return_dict: bool | None = True, **kwargs: Any) -> Any:
        if return_dict is False:
            return (self.hidden_states,)
        return self.output_class(last_hidden_state=self.hidden_states)


class HeadlessCall:
    """
    One call of a language model in two halves: its base first, then its head on any hidden states.

    Args:
        language_model (`PreTrainedModel`): with its head; it is not changed.
        path (`str`): of the headless base in it, from [`headless_path`].
        keep (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): positions whose hidden states are wanted.

    Attributes:
        callee: to be called in the language model's place; its logits are those of no position.
        hidden_states: `(kept, hidden_size)` once it was called; empty before.
    """

    def __init__(self, language_model: PreTrainedModel, path: str, keep: torch.Tensor | None):
        self.language_model, self.path, self._keep = language_model, path.split("."), keep
        self._caught = _Caught(language_model.get_submodule(path), passes=keep is None)
        self.callee = _with_part_replaced(language_model, self.path, self._caught)

    @property
    def hidden_states(self) -> torch.Tensor:
        caught = self._caught
        if self._keep is not None and caught.hidden_states.ndim > 2:
            # Here and not as they are caught: a choice by a mask has no place in a compiled graph.
            caught.hidden_states = caught.hidden_states[self._keep.to(caught.hidden_states.device)]
        return caught.hidden_states

    def _standing_in(self, hidden_states: torch.Tensor) -> nn.Module:
        part = _HandsOut(hidden_states[None], self._caught.output_class)
        return _with_part_replaced(self.language_model, self.path, part)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(kept, vocabulary)` of `(kept, hidden_size)`, by the language model's own `forward`."""
        ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.language_model.config.is_encoder_decoder:
            inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden_states[None]), "decoder_input_ids": ids}
        return self._standing_in(hidden_states)(**inputs, use_cache=False, return_dict=True).logits[0]

    def head_trains(self) -> bool:
        """Whether anything that makes logits of hidden states trains; tied words do, if they train as words."""
        alone = self._standing_in(self.hidden_states)
        return any(parameter.requires_grad for parameter in alone.parameters())


def _is_wrapped(module: nn.Module) -> bool:
    """Whether somebody changed how the module is called (device maps, offloading, hooks, compilation)."""
    # Private: a module tells neither its hooks nor its compiled call by a public name.
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__ or module._compiled_call_impl is not None


@torch.no_grad()
def _is_exact(language_model: PreTrainedModel, path: str) -> bool:
    call = HeadlessCall(language_model, path, None)
    ids = torch.arange(4, device=next(language_model.get_input_embeddings().parameters()).device)[None]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "return_dict": True,
    }
    if language_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        whole = call.callee(**inputs).logits[0]
        if not call.hidden_states.numel():
            return False  # its forward doesn't go through this module's call
        halves = torch.cat([call.logits(half) for half in call.hidden_states[0].split(2)])
        none = HeadlessCall(language_model, path, torch.zeros_like(ids, dtype=torch.bool))
        none.callee(**inputs)
    except Exception:  # whatever it is that this model does otherwise, the plain way is always open
        return False
    if _is_linear(language_model, call):
        _LINEAR.add(language_model)
    return nearly_equal(halves, whole)


def nearly_equal(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4, tolerance_in_half: float = 3e-2) -> bool:
    """Whether two tensors differ by no more than a share of the largest value."""
    tolerance = tolerance if one.dtype in (torch.float32, torch.float64) else tolerance_in_half
    one, other = one.float(), other.float()
    return bool(((one - other).abs().max() <= tolerance * other.abs().max()).item())


def _is_linear(language_model: PreTrainedModel, call: HeadlessCall) -> bool:
    head, hidden_states = language_model.get_output_embeddings(), call.hidden_states[0]
    if type(head) is not nn.Linear or head.weight.dtype != hidden_states.dtype or _is_wrapped(head):
        return False
    # Once more with logits of a thousand, where soft-capping would show.
    wide = hidden_states * (1000 / call.logits(hidden_states).abs().max().clamp(min=1e-3))
    return all(nearly_equal(call.logits(one).to(one.dtype), head(one)) for one in (hidden_states, wide))


def headless_path(language_model: PreTrainedModel) -> str | None:
    """
    Where in the language model the part lies whose hidden states its head reads, if calling the two apart gives the logits
    of the whole: tried once per model on four words. `None` if the plain way must be taken.
    """
    # Replicas of `nn.DataParallel`, known by a private mark alone, live for one step and hold no parameters by which to see
    # what trains.
    if _is_wrapped(language_model) or getattr(language_model, "_is_replica", False):
        return None
    if (language_model.tp_size or 1) > 1:  # torch's sharded head fails on no positions, with gradient
        return None
    if language_model not in _PATHS:
        candidates = [language_model.base_model, language_model.get_decoder()]
        names = {id(module): name for name, module in language_model.named_modules()}
        paths = [names[id(module)] for module in candidates if names.get(id(module))]
        with in_eval_mode(language_model):
            _PATHS[language_model] = next((path for path in dict.fromkeys(paths) if _is_exact(language_model, path)), None)
    path = _PATHS[language_model]
    if path is not None and "." in path and _is_wrapped(language_model.get_submodule(path.rpartition(".")[0])):
        return None
    return path


# -------------------------------------------------------------------------------------------------- loss by chunks


def labels_per_chunk(labels: int, vocab_size: int, chunk_size: int | None = None) -> int:
    """How many of `labels` a chunk holds: as asked, or a like number in as few chunks as there can be, whose logits in float32
    take `CHUNK_BYTES` at most, or `CHUNK_LABELS` labels."""
    if chunk_size is not None:
        return chunk_size
    chunks = math.ceil(labels / max(CHUNK_LABELS, CHUNK_BYTES // (4 * vocab_size)))
    return math.ceil(labels / max(chunks, 1)) or 1


def is_plain_cross_entropy(loss_function: Callable[..., torch.Tensor]) -> bool:
    """Whether the model's loss function is transformers'; a user's own needs logits."""
    return loss_function is ForCausalLMLoss


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states under a frozen head; their gradient is computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        rows: int,
        label_smoothing: float,
        z_loss: float,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        gradient = torch.empty_like(hidden_states) if wanted else None
        for start in range(0, len(hidden_states), rows):
            chunk, target = hidden_states[start : start + rows].detach(), targets[start : start + rows, None]
            with torch.set_grad_enabled(wanted):
                logits = head(chunk.requires_grad_(wanted))
            # Of all that is as large as the logits, this alone is made; it becomes their gradient in place.
            logprobs = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
            target = target.to(logprobs.device)
            own = logprobs.gather(1, target)
            loss = (label_smoothing - 1) * own
            if label_smoothing:
                loss -= label_smoothing * logprobs.mean(dim=-1, keepdim=True)
            if z_loss:
                logsumexp = logits.detach().gather(1, target).float() - own
                loss += z_loss * logsumexp.square()
            total += loss.sum().to(total.device)
            if gradient is None:
                continue
            shares = logprobs.exp_()
            if z_loss:
                shares *= 1 + 2 * z_loss * logsumexp
            if label_smoothing:
                shares -= label_smoothing / shares.shape[-1]
            shares.scatter_add_(1, target, torch.full_like(own, label_smoothing - 1))
            (gradient[start : start + rows],) = torch.autograd.grad(logits, chunk, shares.to(logits.dtype))
        ctx.save_for_backward(gradient)  # freed with the graph
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if gradient is not None:
            gradient = (gradient * grad_output).to(gradient.dtype)
        return gradient, None, None, None, None, None


def _liger(call: HeadlessCall, hidden_states: torch.Tensor) -> tuple[type[nn.Module], nn.Linear] | None:
    """Liger's loss and the head to give it, where both fit."""
    if hidden_states.device.type not in LIGER_DEVICES or call.language_model not in _LINEAR:
        return None
    head = call.language_model.get_output_embeddings()
    # Somebody may have changed the head since it was tried, or asks for another precision than it has.
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not _is_wrapped(head)
    if not plain or head.weight.dtype != hidden_states.dtype or torch.is_autocast_enabled(hidden_states.device.type):
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss, head


def chunked_loss(
    call: HeadlessCall,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Cross-entropy of a call's hidden states, with the logits of one chunk of them at a time.

    Args:
        call ([`HeadlessCall`]): whose `callee` was called.
        targets (`torch.LongTensor` of shape `(kept,)`): what is to be predicted at each of its hidden states.
        vocab_size (`int`): for the size of chunks.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*), label_smoothing, z_loss (`float`):
            As [`language_modeling_loss`].
        chunk_size (`int`, *optional*): labels per chunk, see [`labels_per_chunk`]. If set, Liger isn't used.

    Returns:
        `torch.Tensor` of shape `()`, equal to the plain loss, and so is its gradient.
    """
    hidden_states = call.hidden_states
    rows = labels_per_chunk(len(hidden_states), vocab_size, chunk_size)
    targets = targets.to(hidden_states.device)
    if torch.is_grad_enabled() and call.head_trains():

        def of_chunk(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return _sum_of_losses(call.logits(chunk).float(), target, label_smoothing, z_loss)

        chunks = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        total = sum(checkpoint(of_chunk, *pair, use_reentrant=False) for pair in chunks)
    elif chunk_size is None and (liger := _liger(call, hidden_states)) is not None:
        loss_class, head = liger
        loss = loss_class(ignore_index=IGNORE_INDEX, lse_square_scale=z_loss, label_smoothing=label_smoothing, reduction="sum")
        total = loss(head.weight, hidden_states, targets, head.bias)
    else:
        total = _FrozenHeadLoss.apply(hidden_states, targets, call.logits, rows, label_smoothing, z_loss)
    return _normalized(total, len(targets), num_items_in_batch)


# ------------------------------------------------------------------------------------ training beside a compiled graph

try:  # torch's switch of what compiles the frames that are called, which has no public name
    from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
except ImportError:  # a release without them: parts then run as they are
    get_eval_frame_callback = set_eval_frame = None  # type: ignore[assignment]

# What compiles the frames around [`_beside_graph`].
_COMPILER: ContextVar[Any] = ContextVar("_COMPILER", default=None)


def trains_beside_graph(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    Decorates the `forward` of a model that learns from labels. How many labels and which common starts a batch has are
    known by its values, by which no graph can be cut: where the whole model is compiled (`torch.compile(model)`), training
    runs beside the graph, and what costs, tower, connector and language model, is compiled part by part, by whatever
    compiles the model ([`compiled_part`]). `skip_logits=False` keeps it in one graph, with logits of every position.
    """

    @functools.wraps(forward)
    def by_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
        learns = self.training and kwargs.get("labels") is not None and kwargs.get("skip_logits") is not False
        if learns and torch.compiler.is_dynamo_compiling():
            return _beside_graph(forward, self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return by_parts


@torch.compiler.disable(recursive=False)
def _beside_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    compiler = None if get_eval_frame_callback is None else get_eval_frame_callback()
    token = _COMPILER.set(compiler if _uncompiled(_traces_forwards) else None)
    try:
        return _uncompiled(function, *args, **kwargs)
    finally:
        _COMPILER.reset(token)


@torch.compiler.disable
def _uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@functools.cache
def _traces_forwards() -> bool:
    """Whether torch traces what decorates the `forward` of transformers' models. torch 2.6 breaks its graph there and loses
    what outputs hold; parts then run as they are."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + ("x" in forward.__code__.co_varnames)

    try:
        torch.compile(forward, backend="eager", fullgraph=True)(torch.zeros(1))
    except Exception:  # torch has no public name for what it raises here
        return False
    return True


def compiled_part(part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a part of a model: compiled, beside a graph; else as it is."""
    compiler = None if torch.compiler.is_compiling() else _COMPILER.get()
    if compiler is None:
        return part(*args, **kwargs)
    before = set_eval_frame(compiler)
    try:
        return part(*args, **kwargs)
    finally:
        set_eval_frame(before)


@contextmanager
def parts_uncompiled() -> Iterator[None]:
    """For probes of a model, whose shapes no batch has."""
    token = _COMPILER.set(None)
    try:
        yield
    finally:
        _COMPILER.reset(token)


# ------------------------------------------------------------------------------------------------ one call and its loss


class LossPlan:
    """
    How one call of the language model comes to its loss: what is called, which logits it makes, and how it ends.

    In training with labels the head runs only where a label is: on hidden states of the headless base, chunk by chunk, where
    calling the two apart is exact ([`headless_path`]), else by `logits_to_keep`. A user's own loss function, evaluation and
    graphs of the whole model get logits of every position.

    Args:
        model ([`FrozenPrefixForConditionalGeneration`]).
        labels, decoder_input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): as its `forward` takes them.
        logits_to_keep (`int` or `torch.Tensor`): likewise.
        kwargs (`dict`): what else it was called with; what the loss alone reads is taken out of it.

    Attributes:
        path: of the headless base in the language model, where it is called in the language model's place.
        learnt: the mask `(batch, sequence)` of labels, where logits are made of these positions alone.
        may_share: whether nothing but the loss is asked for, so that what rows have in common may be read once.
        kwargs: for the language model.
    """

    def __init__(
        self,
        model: Any,
        labels: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ):
        self.language_model: PreTrainedModel = model.model.language_model
        self.loss_function = model.loss_function
        self.num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        loss_config, skip_logits = kwargs.pop("loss_config", None), kwargs.pop("skip_logits", None)
        if loss_config is None:
            loss_config = model.config.loss_config if model.training else {}
        self.options = check_loss_config(loss_config)
        self.keep, self.skips = logits_to_keep, False
        self.path: str | None = None
        self.learnt: torch.Tensor | None = None
        self.targets: torch.Tensor | None = None
        self._call: HeadlessCall | None = None
        if labels is not None:
            # No word stands at a placeholder: collators that copy ids into labels would have it learnt, or overrun the head.
            targets = labels.masked_fill(model.model.placeholders(labels), IGNORE_INDEX)
            kwargs.setdefault("use_cache", False)
            self.skips = (model.training and not torch.compiler.is_compiling()) if skip_logits is None else skip_logits
            if self.skips and is_plain_cross_entropy(self.loss_function):
                self.path = headless_path(self.language_model)
            if model.config.is_encoder_decoder:
                if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
                    prepare = getattr(self.language_model, "prepare_decoder_input_ids_from_labels", None)
                    if prepare is not None:
                        decoder_input_ids = prepare(labels=targets)
                    else:
                        kwargs["labels"] = targets  # the model shifts them itself; its own loss is left alone
                        self.path = None
                self.skips = self.path is not None
            else:
                targets = shift_for_causal_model(targets) if shift_labels is None else shift_labels
            if self.skips:
                self.keep = self.learnt = targets != IGNORE_INDEX
                targets = targets[self.learnt]
            self.targets = targets
        elif model.training and self.num_items_in_batch is not None:
            logger.warning_once(
                "The labels were taken out of the batch before `forward`, as Trainer does for `label_smoothing_factor` and "
                "`compute_loss_func`: logits of every position are made. Trainer's own smoothing does not shift the labels of "
                'this class, so its loss is wrong; set `model.config.loss_config = {"label_smoothing": 0.1}` in its place.'
            )
        # Who asks for more (a cache, attentions) wants it of every row.
        asked = {name for name, value in kwargs.items() if value is not None and value is not False} - {"mm_token_type_ids"}
        self.may_share = not asked
        takes = "logits_to_keep" in forward_parameters(type(self.language_model))
        self.keeps = self.path is None and takes and (MASKS_KEEP_LOGITS or not self.skips)
        self.kwargs = {**kwargs, "decoder_input_ids": decoder_input_ids}
        if self.keeps:
            keep = self.keep
            if isinstance(keep, int) and keep > 0:
                # Places for a slice: its rows lie apart, and torch makes a copy for each of a weight that doesn't train.
                keep = torch.arange(-keep, 0, device=model._device_of_words)
            self.kwargs["logits_to_keep"] = keep

    def callee(self, skipped: int = 0) -> nn.Module:
        """What is to be called: the language model, or a copy of it whose head makes no logits. `skipped` columns at the
        start, none of them with a label, are not part of the call."""
        if self.path is None or self.learnt is None:
            return self.language_model
        self._call = HeadlessCall(self.language_model, self.path, self.learnt[:, skipped:])
        return self._call.callee

    def loss_and_logits(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss, if there are labels, and the logits, unless they are skipped, of the logits `(batch, sequence,
        vocabulary)` that the callee gave."""
        options = {**self.options, "num_items_in_batch": self.num_items_in_batch}
        if self._call is None and not self.keeps:
            logits = slice_logits_to_keep(logits, self.keep)
        if self.targets is None:
            return None, logits
        if self._call is not None:
            return chunked_loss(self._call, self.targets, vocab_size=logits.shape[-1], **options), None
        options.pop("chunk_size")
        loss = language_modeling_loss(self.loss_function, logits, self.targets.to(logits.device), **options)
        return loss, None if self.skips else logits
