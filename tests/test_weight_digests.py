"""A digest over weights sees every value, and nothing but weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from modeling_frozen.weights import weights_digest


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 7), nn.BatchNorm1d(7), nn.Linear(7, 3).bfloat16())


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a value in place": lambda m: m[0].weight.__setitem__((39, 23), 1.0),
    "a value through data": lambda m: m[1].weight.data.__setitem__((3, 5), 0.0),
    "the last bit": lambda m: m[1].weight.data.view(torch.int32).__setitem__((0, 0), m[1].weight.view(torch.int32)[0, 0] ^ 1),
    "a sign": lambda m: m[3].weight.data[2].neg_(),
    "two signs": lambda m: m[1].weight.data[:, 1:3].neg_(),
    "all signs": lambda m: m[0].weight.data.neg_(),
    "a row": lambda m: m[0].weight.data[17].mul_(1.5),
    "a neuron": lambda m: m[1].weight.data[2].zero_(),
    "rows change places": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(0)),
    "a small tensor": lambda m: m[3].bias.data.add_(1),
    "a buffer": lambda m: m[2].running_var.mul_(1.01),
    "a count": lambda m: m[2].num_batches_tracked.add_(1),
    "dtype": lambda m: m[1].double(),
    "shape": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data.view(20, 48))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    module = network()
    before = weights_digest(module)
    with torch.no_grad():
        CHANGES[change](module)
    assert weights_digest(module) != before


def test_fifty_single_values_of_a_large_tensor() -> None:
    module = nn.Linear(1000, 900, bias=False)  # of several chunks
    flat, digests = module.weight.data.view(-1), {weights_digest(module)}
    for place in torch.randperm(len(flat))[:50]:
        kept, flat[place] = flat[place].clone(), flat[place] * (1 + 2e-7)
        digests.add(weights_digest(module))
        flat[place] = kept
    assert len(digests) == 51 and weights_digest(module) in digests


def test_regular_values_that_move_do_not_cancel_out() -> None:
    """Of equal values in equally spaced places."""
    digests = set()
    for places in ([0, 3], [1, 2], [0, 1], [2, 3], [0, 2], [1, 3]):
        module = nn.Linear(8, 1, bias=False).double()
        module.weight.data.zero_()[0, places] = 1.0
        digests.add(weights_digest(module))
    assert len(digests) == 6


def test_it_is_of_the_values_alone(tmp_path: Path) -> None:
    module = network()
    wanted = weights_digest(module)
    assert len(wanted) == 32 and weights_digest(copy.deepcopy(module)) == wanted
    other = network()
    storage = torch.zeros(24 * 7 + 1)[1:].view(7, 24)  # off eight bytes
    other[1].weight.data = storage.copy_(module[1].weight.data)
    other[0].weight.data = module[0].weight.data.T.contiguous().T  # other strides
    other[2].register_buffer("scratch", torch.ones(3), persistent=False)
    other.eval().requires_grad_(False)
    assert weights_digest(other) == wanted
    assert weights_digest(module, recurse=False) == weights_digest(nn.Sequential())
    assert weights_digest(cpu_offload(network(), torch.device("cpu"))) == wanted
    assert weights_digest(disk_offload(network(), tmp_path, torch.device("cpu"))) == wanted
    with torch.device("meta"), pytest.raises(ValueError, match=r"`0\.weight` is on the meta device"):
        weights_digest(nn.Sequential(nn.Linear(2, 2)))
