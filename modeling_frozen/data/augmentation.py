"""Random changes of training images that leave their captions true: crop, rotation, brightness, contrast, colour.

Off unless asked for: `DataCollatorForFrozenPrefix(processor, augment=PhotoAugmentation())`. Mirroring is off even then, for
captions say left and right. The transforms are kornia's (`pip install frozen-prefix[augment]`); any other callable that takes
and returns an image will do in its place.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass
class PhotoAugmentation:
    """
    Changes an image at random, anew at every call, from torch's global generator (`set_seed` repeats it).

    Args:
        crop (`float`): least share of the image's area that is kept, in (0, 1]; 1 keeps all. Its size in pixels stays.
        rotation (`float`): degrees, at most so many either way.
        brightness, contrast, saturation (`float`): at most this share up or down, in [0, 1].
        hue (`float`): at most this share of the colour circle, in [0, 0.5]. Captions name colours: keep it small.
        flip (`float`): probability of mirroring left and right. 0 by default, for captions name sides.

    Raises:
        ImportError: kornia is not installed.
        ValueError: a number outside its range.
    """

    crop: float = 0.6
    rotation: float = 5.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    flip: float = 0.0

    def __post_init__(self) -> None:
        bounds = {"crop": (1e-3, 1), "rotation": (0, 180), "hue": (0, 0.5)}
        for name, value in vars(self).items():
            low, high = bounds.get(name, (0, 1))
            if not low <= value <= high:
                raise ValueError(f"{name}={value!r} is outside [{low}, {high}]. [errors.md#range]")
        self._transforms()  # says now, not in a worker's first batch, if kornia is missing

    def _transforms(self) -> list[Any]:
        try:
            from kornia import augmentation
        except ImportError as error:
            raise ImportError(
                "PhotoAugmentation needs kornia: pip install frozen-prefix[augment] [errors.md#extra]"
            ) from error
        transforms: list[Any] = []
        if self.rotation:
            transforms.append(augmentation.RandomRotation(self.rotation, p=1.0))
        jitter = (self.brightness, self.contrast, self.saturation, self.hue)
        if any(jitter):
            transforms.append(augmentation.ColorJiggle(*jitter, p=1.0))
        if self.flip:
            transforms.append(augmentation.RandomHorizontalFlip(p=self.flip))
        return transforms

    def __call__(self, image: Image.Image) -> Image.Image:
        """
        Args:
            image (`PIL.Image.Image`): of any mode.

        Returns:
            `PIL.Image.Image`: RGB, of the same size.
        """
        from kornia.augmentation import RandomResizedCrop

        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        transforms = self._transforms()
        if self.crop < 1:
            transforms.append(RandomResizedCrop((image.height, image.width), scale=(self.crop, 1.0), ratio=(0.8, 1.25), p=1.0))
        for transform in transforms:
            pixels = transform(pixels)
        array = (pixels[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array)


def random_crop(image: Image.Image) -> Image.Image:
    """
    Half to all of an image, nearly in its own shape, from torch's global generator. Never mirrored, for captions say left and
    right. Needs no kornia.

    Args:
        image (`PIL.Image.Image`): of any mode.

    Returns:
        `PIL.Image.Image`: of the same mode, smaller.
    """
    width, height = image.size
    area, shape = (torch.rand(2) * torch.tensor([0.5, 0.4]) + torch.tensor([0.5, -0.2])).tolist()
    wide, high = (min(1.0, (area * torch.e**turn) ** 0.5) for turn in (shape, -shape))
    left, top = (torch.rand(2) * torch.tensor([1 - wide, 1 - high])).tolist()
    return image.crop((left * width, top * height, (left + wide) * width, (top + high) * height))  # type: ignore[arg-type]


__all__ = ["PhotoAugmentation", "random_crop"]
