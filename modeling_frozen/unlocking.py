"""Which parameters and modules of a frozen parent are its last layers, for `unlocked_layers` (open_clip's `lock` with groups).

A parent is asked, not looked up: its layers are the list of modules with the most weights, as they are registered.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


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


__all__ = ["Unlocked", "last_layers"]
