"""What tests of stored tower features share: images of noise, and what the tower itself makes of them."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_frozen.vision_towers import encode_images


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (18, 20, 3), dtype=np.uint8))


@torch.no_grad()
def tower_features(pair: tuple[Any, Any], images: list[Any]) -> torch.Tensor:
    model, processor = pair
    tower = model.model.vision_tower
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return encode_images(tower, pixels.to(tower.dtype), num_leading_tokens=model.config.num_leading_tokens)[0].float()
