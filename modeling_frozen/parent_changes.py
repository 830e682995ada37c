"""Has a parent's module been trained or written into since it was loaded? Then its repository no longer holds what it is."""

import torch
from torch import nn


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def samples_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A few values of each of the module's own plain tensors, by which a later change is noticed."""
    samples = {}
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
            flat = parameter.detach().flatten()
            # Eight runs of eight: scattered one by one, the values would cost a cache miss each.
            samples[name] = (flat if len(flat) <= 64 else flat.as_strided((8, 8), ((len(flat) - 8) // 7, 1))).clone()
    return samples


def was_changed(module: nn.Module) -> bool:
    """Whether somebody wrote into the module since it was attached (merged LoRA into it, say). Another dtype or device is no
    change."""
    before, now = getattr(module, "_frozen_prefix_samples", {}), samples_of(module)
    return any(
        name in now
        and now[name].dtype == sample.dtype
        and now[name].shape == sample.shape
        and not torch.equal(now[name].to(sample.device), sample)
        for name, sample in before.items()
    )


__all__ = ["samples_of", "trains", "was_changed"]
