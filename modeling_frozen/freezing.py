# SPDX-License-Identifier: Apache-2.0
"""What trains and what stays frozen: the one place that sets `requires_grad`, and the modes of frozen modules.

A backbone's modules carry the name of their part (`_frozen_prefix_part`), which stays with them through PEFT's wrapping,
`.to()` and copies. The last layers, for `unlocked_layers` (open_clip's `lock` with groups), are those of the list of modules
with the most weights, as the backbone registers them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .connectors import Connector, Head
from .cross_attention import GatedCrossAttention, largest_list


# What `trainable` calls "connector": all that is no backbone.
CONNECTING = (Connector, GatedCrossAttention, Head)


@dataclass(frozen=True)
class Unlocked:
    """Ids of parameters and of modules, for both are compared by identity."""

    parameters: frozenset[int]
    modules: frozenset[int]


def last_layers(backbone: PreTrainedModel, count: int) -> Unlocked:
    """
    The last `count` layers of a tower or language model, with what is registered behind them (a last norm, say).

    Raises:
        ValueError: if it has no list of layers, or fewer of them.
    """
    name, layers = largest_list(backbone, nn.ModuleList, nn.Sequential)
    if count > len(layers):
        raise ValueError(
            f"{type(backbone).__name__} has {len(layers)} layers, so {count} of them can't be unlocked: give at most that "
            "number in `unlocked_layers`, or name the part in `trainable` to train it whole. [errors.md#language-model]"
        )
    last = list(layers)[len(layers) - count :]
    modules = {id(module) for layer in last for module in layer.modules()}
    parameters = {id(p) for layer in last for p in layer.parameters()}
    words, behind = _word_parameters(backbone), False
    for module_name, module in backbone.named_modules():
        if module_name == name:
            behind = True
        elif behind and not module_name.startswith(f"{name}."):
            # A tied head is the word embeddings' own table, which comes before every layer.
            own = {id(p) for p in module.parameters(recurse=False)} - words
            if own:
                modules.add(id(module))
                parameters |= own
    return Unlocked(frozenset(parameters), frozenset(modules))


def _word_parameters(backbone: PreTrainedModel) -> set[int]:
    try:
        return {id(p) for p in backbone.get_input_embeddings().parameters()}
    except (AttributeError, NotImplementedError):  # most towers have none
        return set()


def unlocked_counts(model: Any) -> dict[str, int]:
    """Of the loaded backbones that are otherwise frozen, how many last layers train."""
    counts = model.config.unlocked_layers.items()
    return {part: n for part, n in counts if part in model.backbones and part not in model.config.trainable}


def freeze(model: Any) -> None:
    """
    Sets `requires_grad` of every tensor of the backbones and the connector by `config.trainable`; the one place that
    does. Tensors that others added (LoRA) are left alone. Frozen backbones stay in eval mode under `train()`.
    """
    keep_gradients(model)
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


def keep_gradients(model: nn.Module) -> None:
    """On CPUs with bfloat16 kernels bitsandbytes, and gptqmodel of GPTQ and AWQ, pack a 4-bit layer that is called in eval
    mode without gradients, and what a packed one computes has none from then on. A frozen layer is in eval mode always: it is
    kept as it was loaded."""
    for module in model.modules():
        if getattr(module, "linear_mode", "") is None:  # gptqmodel's: not settled yet
            module.linear_mode = "train"  # type: ignore[assignment]  # in no stub
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a flag, in no stub
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # which unpacks it


def refuse_without_gradient(model: nn.Module) -> None:
    """
    Raises:
        ValueError: where layers of gptqmodel compute without gradients. Those that flow around such a layer would reach the
            connector all the same, and be wrong.
    """
    for module in model.modules():
        kind = type(module).__name__
        if getattr(module, "SUPPORTS_TRAINING", True) is False:
            raise ValueError(
                f"The quantised layers are computed by `{kind}`, which has no gradient, so nothing before them can train: "
                'load with `quantization_config=AwqConfig(backend="auto_trainable")`, or `GPTQConfig(…)` with that backend.'
                " [errors.md#internal]"
            )
        if getattr(module, "linear_mode", None) == "inference":
            raise ValueError(
                f"The quantised layers, `{kind}`, were called before the language model was joined, and are packed since, "
                "without a gradient: join it by its id or folder, or load it anew. [errors.md#internal]"
            )


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
        # Private: transformers sets the chosen function (reentrant or not, offloading) on the layer under this name alone.
        recompute = self.layer._gradient_checkpointing_func
        return recompute(functools.partial(self.plain, **kwargs), *args)  # type: ignore[operator]  # set at run time


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
    "CONNECTING", "Unlocked", "freeze", "keep_gradients", "last_layers", "recompute_frozen_layers", "refuse_without_gradient",
    "stays_frozen", "trains", "unlocked_counts",
]  # fmt: skip
