"""Random changes of training pictures: what they may touch, what they may not, and that they repeat."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_frozen.data.augmentation import PhotoAugmentation, random_crop


pytest.importorskip("kornia")
NONE = {"crop": 1, "rotation": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def picture() -> Image.Image:
    """Red on the left, blue on the right, darker below."""
    array = np.zeros((40, 60, 3), dtype=np.uint8)
    array[:, :30, 0] = array[:, 30:, 2] = np.linspace(200, 80, 40)[:, None]
    return Image.fromarray(array)


def test_nothing_asked_nothing_changed() -> None:
    changed = PhotoAugmentation(**NONE)(picture().convert("RGBA"))
    assert changed.mode == "RGB" and np.array_equal(np.array(changed), np.array(picture()))


@pytest.mark.parametrize("option", [{"crop": 0.4}, {"rotation": 30}, {"brightness": 0.4}, {"contrast": 0.4}, {"hue": 0.1}])
def test_each_option_changes_the_picture_and_keeps_its_size(option: dict) -> None:
    torch.manual_seed(0)
    change = PhotoAugmentation(**{**NONE, **option})
    first, second = np.array(change(picture())), np.array(change(picture()))
    assert first.shape == second.shape == (40, 60, 3)
    assert not np.array_equal(first, np.array(picture())) and not np.array_equal(first, second)
    torch.manual_seed(0)
    assert np.array_equal(np.array(change(picture())), first)


def test_left_stays_left_unless_mirroring_is_asked_for() -> None:
    change = PhotoAugmentation()
    for seed in range(10):
        torch.manual_seed(seed)
        array = np.array(change(picture())).astype(int)
        assert array[:, :15, 0].sum() > array[:, :15, 2].sum() and array[:, -15:, 2].sum() > array[:, -15:, 0].sum()
    array = np.array(PhotoAugmentation(**NONE, flip=1.0)(picture()))
    assert np.array_equal(array, np.array(picture())[:, ::-1])


def test_numbers_outside_their_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"crop=0"):
        PhotoAugmentation(crop=0)
    with pytest.raises(ValueError, match=r"flip=2"):
        PhotoAugmentation(flip=2)


def test_a_random_crop_is_of_the_image_and_repeats() -> None:
    torch.manual_seed(0)
    crops = [random_crop(picture()) for _ in range(20)]
    assert all(20 <= crop.width <= 60 and 20 <= crop.height <= 40 for crop in crops) and len({crop.size for crop in crops}) > 5
    assert all(0.45 < crop.width * crop.height / 2400 <= 1 for crop in crops)
    for crop in crops:  # nothing turned or mirrored
        assert crop.getpixel((0, 0))[0] > 0 or crop.getpixel((crop.width - 1, 0))[2] > 0
        assert crop.getpixel((0, 0))[2] <= crop.getpixel((crop.width - 1, 0))[2]
    torch.manual_seed(0)
    assert random_crop(picture()).tobytes() == crops[0].tobytes()
