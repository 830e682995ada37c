"""Every vision-tower family the package answers for: one line each, a tiny random configuration.

The checks over the table are elsewhere; here is only what they run on, what is known by hand about each family (its
leading tokens), and images of the right shape. Where a family is hierarchical, the image is large enough that
positions are left.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from modeling_frozen.vision_towers import build_vision_tower, vision_half


_VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
_NAFLEX = {**{key: value for key, value in _VIT.items() if key != "image_size"}, "num_patches": 16}
_REGISTERS = {"num_register_tokens": 4}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
_SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
_HIERA = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
_EFFICIENTNET = {
    "image_size": 64,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.25,
    "depth_divisor": 4,
    "hidden_dim": 320,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 32],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 1],
    "expand_ratios": [1, 6, 6],
}


@dataclass(frozen=True)
class Tower:
    """A family's tiny configuration and what is known about it by hand.

    Attributes:
        model_type: as `AutoConfig.for_model` takes it.
        options: the configuration's own options.
        leading: class, register and distillation tokens of its last hidden state.
        image_size: side of the square image that it reads.
        dual: whether the configuration is that of a dual model, of which the vision half is taken.
        requires: a package without which transformers has no such family.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    leading: int = 0
    image_size: int = 32
    dual: bool = False
    requires: str | None = None


TOWERS: dict[str, Tower] = {
    "clip": Tower("clip_vision_model", _VIT, leading=1),
    "clip_dual": Tower("clip", {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 8}, leading=1, dual=True),
    "siglip": Tower("siglip_vision_model", _VIT),
    "siglip_dual": Tower("siglip", {"vision_config": _VIT, "text_config": _TEXT}, dual=True),
    "siglip_headless": Tower("siglip_vision_model", {**_VIT, "vision_use_head": False}),
    "siglip2_naflex": Tower("siglip2_vision_model", _NAFLEX),
    "siglip2_naflex_dual": Tower("siglip2", {"vision_config": _NAFLEX, "text_config": _TEXT}, dual=True),
    "vit": Tower("vit", _VIT, leading=1),
    "deit": Tower("deit", _VIT, leading=2),
    "beit": Tower("beit", _VIT, leading=1),
    "dinov2": Tower("dinov2", {**_VIT, "mlp_ratio": 2}, leading=1),
    "dinov2_with_registers": Tower("dinov2_with_registers", {**_VIT, **_REGISTERS, "mlp_ratio": 2}, leading=5),
    "dinov3_vit": Tower("dinov3_vit", {**_VIT, **_REGISTERS}, leading=5),
    # its pooled map stands before the positions as a class token does
    "dinov3_convnext": Tower("dinov3_convnext", {**_STAGES, "image_size": 64}, leading=1, image_size=64),
    "ijepa": Tower("ijepa", _VIT),
    "aimv2": Tower("aimv2_vision_model", _VIT),
    "aimv2_dual": Tower("aimv2", {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 8}, dual=True),
    "metaclip_2_dual": Tower("metaclip_2", {"vision_config": _VIT, "text_config": _TEXT}, leading=1, dual=True),
    "vit_mae": Tower("vit_mae", _VIT, leading=1),
    "swin": Tower("swin", _SWIN, image_size=64),
    "hiera": Tower("hiera", _HIERA, image_size=64),
    "convnextv2": Tower("convnextv2", {**_STAGES, "num_stages": 4}, image_size=64),
    "resnet": Tower("resnet", {**_STAGES, "embedding_size": 8}, image_size=64),
    "regnet": Tower("regnet", {**_STAGES, "embedding_size": 8, "groups_width": 8}, image_size=64),
    "mobilenet_v1": Tower("mobilenet_v1", {"depth_multiplier": 0.25, "image_size": 64}, image_size=64),
    "mobilenet_v2": Tower("mobilenet_v2", {"depth_multiplier": 0.25, "image_size": 64}, image_size=64),
    "efficientnet": Tower("efficientnet", _EFFICIENTNET, image_size=64),
    # maps with the width last
    "sam": Tower(
        "sam_vision_model",
        {**_VIT, "image_size": 64, "output_channels": 12, "window_size": 4, "num_pos_feats": 4},
        image_size=64,
    ),
    "timm": Tower("timm_wrapper", {"architecture": "resnet10t"}, image_size=64, requires="timm"),
}


def reason_to_skip(tower: Tower) -> str | None:
    """Why this row can't run here, or None."""
    if tower.requires is None:
        return None
    try:
        __import__(tower.requires)
    except ImportError as error:
        return f"{tower.model_type} needs {tower.requires}, which can't be imported here: {error}"
    return None


def full_config(tower: Tower) -> PreTrainedConfig:
    """The configuration as a parent's repository holds it: of a dual model, both halves."""
    return AutoConfig.for_model(tower.model_type, **tower.options)


def vision_config(tower: Tower) -> PreTrainedConfig:
    """The configuration of the part that sees, as a composite model holds it."""
    return vision_half(full_config(tower))


def tiny_tower(tower: Tower, seed: int = 0) -> PreTrainedModel:
    """The tower with random weights, in eval mode, so spread out that an image moves the features clearly."""
    torch.manual_seed(seed)
    model = build_vision_tower(vision_config(tower)).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        # Fresh running statistics let the signal of a deep convolutional tower die out: take them from a few images.
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        if norms:
            model(**image_inputs(tower, images=4, seed=seed))
    return model.eval()


def image_inputs(tower: Tower, images: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images as this family's image processor would hand them over. NaFlex: the last image is padded."""
    generator = torch.Generator().manual_seed(seed)
    config = vision_config(tower)
    if hasattr(config, "num_patches"):
        grids = torch.tensor([[4, 4]] * (images - 1) + [[2, 6]])
        mask = torch.arange(config.num_patches) < grids.prod(1, keepdim=True)
        values = 3 * config.patch_size**2
        pixels = torch.randn(images, config.num_patches, values, generator=generator) * mask.unsqueeze(-1)
        return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": grids}
    return {"pixel_values": torch.randn(images, 3, tower.image_size, tower.image_size, generator=generator)}
