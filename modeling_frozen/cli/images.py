"""Images that are named on the command line."""

from collections.abc import Sequence
from pathlib import Path


def files_of_images(given: Sequence[str]) -> list[str]:
    """Files and addresses as they are; of a folder its images, in the order of their names.

    Raises: ValueError for a folder without any."""
    from PIL import Image

    endings, names = set(Image.registered_extensions()), []
    for one in given:
        if not Path(one).is_dir():
            names.append(one)
            continue
        inside = sorted(str(file) for file in Path(one).iterdir() if file.suffix.lower() in endings)
        if not inside:
            raise ValueError(f"The folder {one} holds no images. [errors.md#command]")
        names += inside
    return names


__all__ = ["files_of_images"]
