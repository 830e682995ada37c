"""From which places of the image a prefix vector comes: the connector's own attention, and the grid of the tower.

Connectors that keep positions write one vector per place, so there the answer is known. Those that read all positions
at learned queries are asked for their attention, rolled out over their layers (Abnar and Zuidema, arXiv 2005.00928,
section 3): half of each layer's output is what stood there before, half what it attended to. An LSTM has none to ask.
"""

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..connectors import Connector


_Module = TypeVar("_Module", bound=nn.Module)


def twin_of(module: _Module, *shared: nn.Module | None) -> _Module:
    """
    The same weights (not a copy) in module objects of their own, with configs of their own.

    So hooks and another attention implementation are put on it without a thread that uses `module` in the meantime
    noticing: a model whose implementation changes between the making of its masks and a layer attends to the future.

    Args:
        module: any module.
        shared: parts of it to be taken over as they are, objects and all.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    memo.update({id(part): part for part in shared if part is not None})
    return copy.deepcopy(module, memo)


@torch.no_grad()
def prefix_origins(
    connector: Connector,
    features: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    spatial_shapes: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    How much of each prefix vector of one image comes from each position of the tower.

    Args:
        connector: of the model.
        features: (1, positions, vision_width), as the tower gives them.
        attention_mask: (1, positions), true at valid positions; only these are in the answer.
        spatial_shapes: (1, 2), rows and columns, where each image has its own grid.

    Returns:
        (prefix_length, valid positions), rows that sum to one: the identity for connectors that keep positions, the
        mean over its part of the grid for those that pool or gather it, the attention rollout for those that attend; None for
        a single pooled position and for connectors that do none of these.
    """
    valid = torch.ones(features.shape[1], dtype=torch.bool) if attention_mask is None else attention_mask[0].bool().cpu()
    if features.shape[1] == 1:
        return None
    if not connector.reads_positions:
        return torch.eye(int(valid.sum()))
    if connector.reads_grid:
        grid: Any = connector.grid if spatial_shapes is None else spatial_shapes[0].tolist()
        return connector.origins_on_grid(*grid)
    positions, queries = features.shape[1], connector.prefix_length
    if queries is None:
        return None
    twin = twin_of(connector).eval()
    layers: list[tuple[torch.Tensor, bool]] = []
    _record(twin, layers)
    device = next(connector.parameters()).device
    twin(features.to(device), None if attention_mask is None else attention_mask.to(device))
    if not layers:
        return None
    # Rows: what stands at the queries, then at the positions; columns: where it came from.
    origins = torch.eye(queries + positions)
    for weights, across in layers:
        rows, columns = weights.shape
        seen = origins[queries:] if across else origins[:columns]
        if rows not in (queries, len(origins)) or columns not in (queries, positions, len(origins)):
            return None  # a middle of another build
        origins = torch.cat([0.5 * origins[:rows] + 0.5 * weights @ seen, origins[rows:]])
    from_image = origins[:queries, queries:][:, valid]
    return from_image / from_image.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def _record(twin: nn.Module, layers: list[tuple[torch.Tensor, bool]]) -> None:
    """Appends (rows, columns) weights, and whether they go to positions alone, as each attention of `twin` runs."""

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(across: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: tuple) -> None:
            layers.append((output[1][0].float().mean(dim=0).cpu(), across))

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")  # the fused ones give no weights
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(ask, with_kwargs=True)
            module.register_forward_hook(keep(False))
        elif type(module).__name__ == "Blip2QFormerMultiHeadAttention":
            module.register_forward_hook(keep("crossattention" in name))


__all__ = ["prefix_origins", "twin_of"]
