"""What trains and what stays frozen: the one place that sets `requires_grad`, and the modes of frozen modules.

A parent's modules bear the name of their part (`_frozen_prefix_part`), which travels with them through PEFT's wrapping,
`.to()` and copies. Which of them are the last layers, for `unlocked_layers` (open_clip's `lock` with groups), a parent is
asked, not looked up: its layers are the list of modules with the most weights, as they are registered.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .connectors import Connector, Head
from .cross_attention import GatedCrossAttention


# What `trainable` calls "connector": all that is neither parent.
CONNECTING = (Connector, GatedCrossAttention, Head)


@dataclass(frozen=True)
class Unlocked:
    """Ids of parameters and of modules, for both are compared by identity."""

    parameters: frozenset[int]
    modules: frozenset[int]


def _outermost_lists(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child):
            yield full_name, child
        else:
            yield from _outermost_lists(child, full_name)


def last_layers(parent: nn.Module, count: int) -> Unlocked:
    """
    The last `count` layers of a tower or language model, with what is registered behind them (a last norm, say).

    Raises:
        ValueError: if it has no list of layers, or fewer of them.
    """
    lists = list(_outermost_lists(parent))
    name, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=("", ()))
    if count > len(layers):
        raise ValueError(
            f"{type(parent).__name__} has {len(layers)} layers, so {count} of them can't be unlocked: give at most that "
            "number in `unlocked_layers`, or name the part in `trainable` to train it whole."
        )
    first = len(layers) - count
    chosen = [module for layer in layers[first:] for module in layer.modules()]
    modules, parameters = {id(module) for module in chosen}, {id(p) for layer in layers[first:] for p in layer.parameters()}
    behind = False
    for module_name, module in parent.named_modules():
        if module_name == name:
            behind = True
        elif behind and not module_name.startswith(f"{name}."):
            own = {id(p) for p in module.parameters(recurse=False)}
            shared = {id(p) for p in parent.get_input_embeddings().parameters()} if own and _has_words(parent) else set()
            if own - shared:  # a tied head is the words' own table, which comes before every layer
                modules.add(id(module))
                parameters |= own - shared
    return Unlocked(frozenset(parameters), frozenset(modules))


def _has_words(parent: nn.Module) -> bool:
    try:
        return isinstance(parent.get_input_embeddings(), nn.Module)
    except (AttributeError, NotImplementedError):
        return False


def unlocked_counts(model: Any) -> dict[str, int]:
    """Of the parents that are here and otherwise frozen, how many last layers train."""
    counts = model.config.unlocked_layers.items()
    return {part: n for part, n in counts if part in model.backbones and part not in model.config.trainable}


def freeze(model: Any) -> None:
    """
    Sets `requires_grad` of every tensor of the parents and the connector by `config.trainable`; the one place that
    does. Tensors that others added (LoRA) are left alone. Frozen parents stay in eval mode under `train()`.
    """
    unlocked = [last_layers(model._layered(part), count) for part, count in unlocked_counts(model).items()]
    unlocked_ids = set().union(*(one.parameters for one in unlocked))
    idle_ids = model._ids_of_idle_parameters()
    for module in model.modules():
        if isinstance(module, CONNECTING):
            module.requires_grad_("connector" in model.config.trainable)
        elif (part := getattr(module, "_frozen_prefix_part", None)) is not None:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    trains = part in model.config.trainable or id(parameter) in unlocked_ids
                    parameter.requires_grad_(trains and id(parameter) not in idle_ids)
    model.train(model.training)


def stays_frozen(model: Any) -> list[bool]:
    """Of every module, in the order of `model.modules()`, whether it stays in eval mode whatever mode is set."""
    unlocked = set().union(
        *(last_layers(model._layered(part), count).modules for part, count in unlocked_counts(model).items())
    )
    return [
        (part := getattr(module, "_frozen_prefix_part", None)) is not None
        and part not in model.config.trainable
        and id(module) not in unlocked
        # Trainer's NEFTune (arXiv 2310.05914) adds its noise where the embeddings are in train mode; they draw nothing else.
        and getattr(module, "neftune_noise_alpha", None) is None
        for module in model.modules()
    ]


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class _Recomputed:
    """The forward of a frozen layer that keeps its input alone and is run again in the backward pass."""

    def __init__(self, layer: GradientCheckpointingLayer):
        self.layer, self.plain = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.training or not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        # Private: transformers leaves the chosen function (reentrant or not, offloading) on the layer by this name alone.
        return self.layer._gradient_checkpointing_func(functools.partial(self.plain, **kwargs), *args)


def recompute_frozen_layers(model: Any, enable: bool) -> None:
    """Activation checkpointing of frozen layers: transformers' recompute in train mode only, and they are never in it."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and hasattr(module, "_frozen_prefix_part"):
            recomputed = module.__dict__.get("forward")
            if isinstance(recomputed, _Recomputed):
                module.forward = recomputed.plain
            if enable and module.gradient_checkpointing:
                module.forward = _Recomputed(module)


__all__ = [
    "CONNECTING",
    "Unlocked",
    "freeze",
    "last_layers",
    "recompute_frozen_layers",
    "stays_frozen",
    "trains",
    "unlocked_counts",
]
