# SPDX-License-Identifier: Apache-2.0
"""The bytes of weights: addresses at which they compute the same, whatever place a file gave them, and a digest over all.

safetensors maps a file and hands out tensors where their bytes lie, so an address is what the file's header and the tensors in
front make it. A product of float32 or float64 whose matrix begins off 16 bytes goes through another kernel of MKL, and its
last bits differ: what is loaded would give other numbers than what was saved. At multiples of 16 bytes, and of 16-bit types at
any address, products are the same, so what lies there stays mapped (see `tests/test_weight_alignment.py`).

The digest, which is equal for modules that hold the same, is of integer sums, which torch computes where the weights lie,
with the same result on every device: a gigabyte costs a quarter of a second on one core, and nothing is copied from a GPU.
"""

import functools
import hashlib
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
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
    plain = _is_plain(tensor) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.dtype in _ADDRESS_MATTERS and tensor.data_ptr() % ALIGNMENT != 0


def to_weight(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor in the dtype and on the device of the weight that it meets. An offloaded weight is on the meta device until
    accelerate's hooks bring it, and they bring the tensor to it."""
    return tensor.to(weight.dtype) if weight.is_meta else tensor.to(weight.device, weight.dtype)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is the root of what FSDP2 (`fully_shard`) dealt out over the processes."""
    # A module that no program has imported sharded nothing; some builds of torch have none.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def alone() -> bool:
    """Whether no other process runs this program with this one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def gathers_layers(module: nn.Module) -> bool:
    """Whether weights within a module are gathered from all processes when it runs: by FSDP2 or ZeRO-3."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return True
    return any(is_sharded(one) for one in module.modules())


@contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """The weights that FSDP2 dealt out with the model itself and not with one of its layers (the connector's), there for what
    is no `forward` of the whole, as `generate` is none. All processes must come here."""
    if not is_sharded(module):
        yield
        return
    root: Any = module
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


@contextmanager
def replaced(model: nn.Module, modules: Sequence[nn.Module], fill: Callable[[], None]) -> Iterator[None]:
    """
    Some modules of a model with the weights that `fill` writes; afterwards they are what they were, to the last bit.

    Of a model that FSDP2 or ZeRO-3 dealt out over the processes all must come here, and write the same: `fill` finds the
    weights whole, and each process keeps its part of what was written.
    """
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    groups: list[Any] = [one for one in model.modules() if is_sharded(one) and own & {id(p) for p in one.parameters()}]
    with _write_parts(modules, groups, fill) if groups else _write(modules, fill):
        yield


@contextmanager
def _write(modules: Sequence[nn.Module], fill: Callable[[], None]) -> Iterator[None]:
    partitioned = [p for module in modules for p in module.parameters() if is_partitioned(p)]

    @contextmanager
    def whole() -> Iterator[None]:
        if not partitioned:
            yield
            return
        gathered = importlib.import_module("deepspeed").zero.GatheredParameters
        with gathered(partitioned, modifier_rank=0), _unhooked(modules):  # what the first process writes goes to all
            yield

    with whole():
        kept = [{name: tensor.detach().clone() for name, tensor in module.state_dict().items()} for module in modules]
        fill()
    try:
        yield
    finally:
        with whole():
            for module, state in zip(modules, kept, strict=True):
                module.load_state_dict(state)


@contextmanager
def _unhooked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without the hooks by which ZeRO-3 partitions weights after a call, and loses what was written."""
    hooks = [(one, one._forward_pre_hooks, one._forward_hooks) for module in modules for one in module.modules()]
    for one, _, _ in hooks:
        one._forward_pre_hooks, one._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for one, before, after in hooks:
            one._forward_pre_hooks, one._forward_hooks = before, after


@contextmanager
def _write_parts(modules: Sequence[nn.Module], groups: list[Any], fill: Callable[[], None]) -> Iterator[None]:
    """Into the parts that FSDP2 keeps: what it gathers of them it throws away after any `forward`, and may have rounded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def tensors() -> list[torch.Tensor]:
        return [tensor.detach() for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def part_of(whole: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        if not isinstance(place, DTensor):
            return whole.clone()
        return distribute_tensor(whole.to(place.dtype), place.device_mesh, place.placements).to_local()

    def write(parts: list[torch.Tensor]) -> None:
        for group in groups:
            group.reshard()
        for tensor, value in zip(tensors(), parts, strict=True):
            part(tensor).copy_(value)
        for group in groups:
            group.unshard()

    for group in groups:
        group.reshard()
    places = tensors()
    kept = [part(tensor).clone() for tensor in places]
    for group in groups:
        group.unshard()
    fill()
    try:
        write([part_of(whole, place) for whole, place in zip(tensors(), places, strict=True)])
        yield
    finally:
        write(kept)


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 dealt out a parameter over the processes, so that none holds it."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """The weights of a module itself, there for a moment: what accelerate offloaded, and what ZeRO-3 partitioned, for which
    all processes must come here."""
    with ExitStack() as stack:
        if partitioned := [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]:
            # By name: transformers loads no custom code that imports what is not installed.
            stack.enter_context(importlib.import_module("deepspeed").zero.GatheredParameters(partitioned))
        stack.enter_context(align_module_device(module))
        yield


def brought(module: nn.Module, name: str) -> torch.Tensor:
    """A weight of a module that is not called itself, so that no hook brings what is offloaded or partitioned."""
    tensor: torch.Tensor = getattr(module, name)
    if not tensor.is_meta and not is_partitioned(tensor):
        return tensor
    with present(module):
        return getattr(module, name).clone()


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate placed its weights: on several devices, or off them, from where its hooks bring them."""
    places = getattr(module, "hf_device_map", None) or {}
    return len(set(places.values())) > 1 or any(map(has_offloaded_params, module.modules()))


def move_around(module: nn.Module, fixed: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    """`module.to(*args, **kwargs)` of all but what is in `fixed`, modules below it."""
    for child in module.children():
        if any(child is one for one in fixed):
            continue
        if any(below is one for below in child.modules() for one in fixed):
            move_around(child, fixed, *args, **kwargs)
        else:
            child.to(*args, **kwargs)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(*args, **kwargs)


_FACTOR = 0x1E3779B97F4A7C15  # any large odd number


def own_weights(module: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a module itself, by name."""
    # Private: but for the whole state dict, which a sharded module gathers, nothing says what is persistent.
    left_out = module._non_persistent_buffers_set
    buffers = module.named_buffers(recurse=False, remove_duplicate=remove_duplicate)
    return [
        *module.named_parameters(recurse=False, remove_duplicate=remove_duplicate),
        *((name, buffer) for name, buffer in buffers if name not in left_out),
    ]


def weights_digest(module: nn.Module, recurse: bool = True) -> str:
    """
    Digest over names, dtypes, shapes and all bytes of parameters and persistent buffers. A single changed value always changes
    it, however it was written; other changes but for one in 2^64.

    Args:
        module (`nn.Module`): its weights may lie on any devices, and be offloaded by accelerate.
            Where they are sharded over processes, all of these must call this.
        recurse (`bool`, defaults to `True`): with the weights of its submodules.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        ValueError: if a weight has no values (meta device).
    """
    digest = hashlib.blake2b(digest_size=16)
    for prefix, part in module.named_modules() if recurse else [("", module)]:
        with present(part):
            for name, tensor in own_weights(part):
                digest.update(f"{prefix}.{name} {_describe(tensor.detach(), prefix, name)}\n".encode())
    return digest.hexdigest()


def tensor_digests(module: nn.Module) -> dict[str, tuple[torch.dtype, str]]:
    """Of each plain tensor of a module itself its dtype, and what [`weights_digest`] takes in of it. Tensors without values
    (meta device), of other classes (quantised, sharded) and partitioned ones are left out."""
    with align_module_device(module):
        own = [(name, tensor.detach()) for name, tensor in own_weights(module) if _is_plain(tensor) and not tensor.is_meta]
        return {name: (tensor.dtype, tensor_digest(tensor)) for name, tensor in own}


def tensor_digest(tensor: torch.Tensor) -> str:
    return _describe(tensor, "", "")


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and not is_partitioned(tensor)


def _describe(tensor: torch.Tensor, prefix: str, name: str) -> str:
    if tensor.is_meta:
        raise ValueError(
            f"`{prefix}.{name}` is on the meta device, so it has no values: load or initialise the module first."
            " [errors.md#checkpoint]"
        )
    described = f"{tensor.dtype} {tuple(tensor.shape)}"
    if hasattr(tensor, "full_tensor"):  # sharded: each process has a part, and all of them come here together
        tensor = tensor.full_tensor()
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: of several tensors
        inner = (f"{key} {_describe(getattr(tensor, key), prefix, name)}" for key in tensor.__tensor_flatten__()[0])
        return f"{described} [{'; '.join(inner)}]"
    return f"{described} {_checksum(tensor)}"


def _checksum(tensor: torch.Tensor) -> int:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if len(data) % 8 or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(-len(data) % 8)])
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    factors = _factors(data.device)
    for words in data.view(torch.int64).split(len(factors)):
        # A shift before each product brings high bits down, where a product with an odd number spreads them.
        total = (total ^ (total >> 31)) * _FACTOR + ((words ^ (words >> 29)) * factors[: len(words)]).sum()
    return int(total)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> torch.Tensor:
    """An odd factor for each place of a chunk, with no regularity by which moved values could cancel out."""
    places = (torch.arange(1 << 16, device=device) + 1) * _FACTOR  # as many as the cache of a CPU holds
    places = (places ^ (places >> 31)) * _FACTOR
    return (places ^ (places >> 29)) | 1


__all__ = [
    "ALIGNMENT", "align_weights", "alone", "brought", "gathers_layers", "is_dispatched", "is_partitioned", "is_sharded",
    "move_around", "own_weights", "present", "replaced", "root_gathered", "tensor_digest", "tensor_digests", "to_weight",
    "weights_digest",
]  # fmt: skip
