"""What tests of stored tower features share: a tiny pair, images of noise, what the tower makes of them, how often it ran.

from tests.helpers.feature_stores import pair, parents  # noqa: F401      fixtures, by name
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_frozen.vision_towers import encode_images
from tests.helpers.tiny import join, save_parents


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    save_parents(folder)
    return folder


@pytest.fixture(scope="module")
def pair(parents: Path) -> tuple[Any, Any]:
    """For the checks that change nothing in it."""
    return join(parents)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (18, 20, 3), dtype=np.uint8))


@torch.no_grad()
def tower_features(pair: tuple[Any, Any], images: list[Any]) -> torch.Tensor:
    model, processor = pair
    tower = model.model.vision_tower
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return encode_images(tower, pixels.to(tower.dtype), num_leading_tokens=model.config.num_leading_tokens)[0].float()


@contextmanager
def seen(model: Any) -> Iterator[list[int]]:
    """How many images the tower read, call by call."""
    counts: list[int] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, args, kwargs: counts.append(len(args[0])), with_kwargs=True)
    yield counts
    hook.remove()
