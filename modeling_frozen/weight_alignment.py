"""Where weights lie in memory: at addresses where they compute the same, whatever place a file gave them.

safetensors maps a file and hands out tensors where their bytes lie, so an address is what the file's header and the tensors in
front make it. A product of float32 or float64 whose matrix begins off 16 bytes goes through another kernel of MKL, and its
last bits differ: what is loaded would say other numbers than what was saved. At multiples of 16 bytes, and of 16-bit types at
any address, products are the same, so what lies there stays mapped (`tests/test_weight_alignment.py` asks the CPU at hand).
"""

import torch
from torch import nn


ALIGNMENT = 16  # bytes

_ADDRESS_MATTERS = (torch.float32, torch.float64)


def align_weights(module: nn.Module) -> None:
    """Copies those weights and buffers of a module that lie off [`ALIGNMENT`], one by one; torch allocates at multiples of 64.
    What is tied stays tied."""
    moved: dict[tuple, torch.Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if not _lies_off(tensor):
            continue
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if view not in moved:
            moved[view] = tensor.detach().clone()
        tensor.data = moved[view]  # the object stays: other modules, optimizers and the user hold it too


def _lies_off(tensor: torch.Tensor) -> bool:
    # Other classes (quantised, sharded) lay out their bytes themselves.
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.dtype in _ADDRESS_MATTERS and tensor.data_ptr() % ALIGNMENT != 0


__all__ = ["ALIGNMENT", "align_weights"]
