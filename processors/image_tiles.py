# SPDX-License-Identifier: Apache-2.0
"""Images in tiles: a large image as several of the tower's size, and a thumbnail of the whole.

As in InternVL 1.5 (arXiv 2404.16821, section 3.3) and the image processors of GOT-OCR 2 and InternVL in transformers, whose
names these are: the grid of tiles whose aspect ratio is nearest to the image's, the image resized to it whole, so that no
tile is padded and the number of tiles follows from height and width alone.
"""

import functools
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers.processing_utils import ImagesKwargs


class TilesKwargs(ImagesKwargs, total=False):
    """Keywords of a call about images: transformers' own, and those of tiles.

    crop_to_patches (`bool`): whether images are cut into tiles.
    min_patches, max_patches (`int`): how many tiles an image has at least and at most, without the thumbnail.
    use_thumbnail (`bool`): whether the whole image, as small as one tile, follows its tiles where there are several.
    """

    crop_to_patches: bool
    min_patches: int
    max_patches: int
    use_thumbnail: bool


DEFAULTS: dict[str, Any] = {"crop_to_patches": False, "min_patches": 1, "max_patches": 12, "use_thumbnail": True}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The four options of tiles, each that is given or its default.

    Raises:
        ValueError: for another option, or bounds that leave no number of tiles.
    """
    unknown = [name for name in options if name not in DEFAULTS]
    if unknown:
        raise ValueError(f"Tiles have no option {unknown}: there are {list(DEFAULTS)}. [errors.md#choices]")
    chosen = {name: default if options.get(name) is None else options[name] for name, default in DEFAULTS.items()}
    least, most = chosen["min_patches"], chosen["max_patches"]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in (least, most)) or not 1 <= least <= most:
        raise ValueError(
            f"min_patches={least!r} and max_patches={most!r} must be whole numbers with 1 <= min_patches <= max_patches."
            " [errors.md#range]"
        )
    return chosen


@functools.lru_cache(maxsize=1024)
def tile_grid(height: int, width: int, tile: tuple[int, int], min_patches: int, max_patches: int) -> tuple[int, int]:
    """
    Rows and columns of tiles for an image.

    Of all grids of `min_patches` to `max_patches` tiles the one whose aspect ratio is nearest to the image's; of several the
    smallest, or the largest of which the image has at least half the pixels.

    Args:
        height, width (`int`): of the image.
        tile (`tuple[int, int]`): height and width of a tile.
        min_patches, max_patches (`int`): of tiles.
    """
    best, nearest = (1, 1), float("inf")
    sides = range(1, max_patches + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if min_patches <= rows * columns <= max_patches]
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        fills = height * width > 0.5 * tile[0] * tile[1] * rows * columns
        if difference < nearest or (difference == nearest and fills):
            best, nearest = (rows, columns), difference
    return best


def count_tiles(height: int, width: int, tile: tuple[int, int], options: Mapping[str, Any]) -> int:
    """How many tiles an image of this size has, with its thumbnail; 1 where none are cut."""
    if not options["crop_to_patches"]:
        return 1
    rows, columns = tile_grid(height, width, tile, options["min_patches"], options["max_patches"])
    return rows * columns + (options["use_thumbnail"] and rows * columns > 1)


def cut_tiles(
    image: Image.Image, tile: tuple[int, int], options: Mapping[str, Any], resample: Any = None
) -> list[Image.Image]:
    """
    An image's tiles, row by row, and its thumbnail last.

    Args:
        image (`PIL.Image.Image`): in RGB.
        tile, options: as for [`count_tiles`].
        resample (`PIL.Image.Resampling`, *optional*): by which it is resized; bicubic by default.
    """
    height, width = tile
    resample = Image.Resampling.BICUBIC if resample is None else Image.Resampling(int(resample))
    rows, columns = tile_grid(image.height, image.width, tile, options["min_patches"], options["max_patches"])
    whole = image.resize((columns * width, rows * height), resample)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((left, top, left + width, top + height)) for left, top in corners]
    if options["use_thumbnail"] and len(tiles) > 1:
        tiles.append(image.resize((width, height), resample))
    return tiles
