"""Which column of a row holds images, videos or audio: one rule for collators, stores, splits and evaluation."""

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image


COLUMNS = {"image": ("image", "images"), "video": ("video", "videos"), "audio": ("audio", "audios")}


def find_column(columns: Iterable[str], name: str | None = None, modality: str = "image") -> str | None:
    """The column of a modality among `columns`: `name`, where one is asked for, else the first of [`COLUMNS`] that is there;
    `None` where there is none."""
    columns = set(columns)
    return next((one for one in ((name,) if name else COLUMNS[modality]) if one in columns), None)


def image_column(columns: Iterable[str], name: str | None = None) -> str:
    """
    The image column of a dataset: `name`, else `image`, else `images`.

    Raises:
        ValueError: if there is none.
    """
    column = find_column(columns, name)
    if column is None:
        raise ValueError(
            f"The dataset has {no_image_column(columns, name)}: name it by `image_column=…`. [errors.md#collator]"
        )
    return column


def no_image_column(columns: Iterable[str], name: str | None = None) -> str:
    """What an error says where there is none."""
    return f"no image column {' or '.join(map(repr, (name,) if name else COLUMNS['image']))} (its columns: {sorted(columns)})"


def images_of(row: Mapping[str, Any], name: str | None = None) -> list[Any] | None:
    """
    The images of a row, in order.

    Args:
        row (`Mapping`): its image column holds an image, a list of images (or an array of four axes), or `None`.
        name (`str`, *optional*): of the column. Defaults to `image`, else `images`.

    Returns:
        `list`, empty for a text-only row; `None` where the row has no such column.
    """
    column = find_column(row, name)
    return None if column is None else [image for image in as_list(row[column]) if image is not None]


def unread_image(row: Mapping[str, Any]) -> str | None:
    """The first column of a row that holds an image though no rule says so: what would be taken for a row of text alone."""
    return next((name for name, value in row.items() if any(map(_is_image, as_list(value)))), None)


def _is_image(value: Any) -> bool:
    encoded = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}  # of `datasets`
    return encoded or isinstance(value, Image.Image)


def is_list(value: Any) -> bool:
    """Whether an image column holds several images in this row."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4


def as_list(value: Any) -> list[Any]:
    return list(value) if is_list(value) else [value]


__all__ = ["COLUMNS", "as_list", "find_column", "image_column", "images_of", "is_list", "no_image_column", "unread_image"]
