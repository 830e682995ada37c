# SPDX-License-Identifier: Apache-2.0
"""Files that get their name when they are whole, so that a killed run leaves no half of one under it."""

import os
import platform
import time
from pathlib import Path


DISK = "See to the disk, and run `cache_vision_features` again (or `store_rows`)"


def temporary_path(folder: Path) -> Path:
    """Where this process writes what gets its name when it is whole."""
    return folder / f"writing-{platform.node()}-{os.getpid()}-{time.time_ns()}"


def remove_leftovers(folder: Path) -> None:
    """Removes what processes of this machine began to write in a folder and died over."""
    import psutil

    for path in folder.glob(f"writing-{platform.node()}-*"):
        number, began = (int(one) for one in path.name.split("-")[-2:])
        try:  # the number may be another process's by now, one that was born later
            alive = psutil.Process(number).create_time() <= began / 1e9
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            path.unlink(missing_ok=True)


def write_whole(target: Path, data: bytes) -> None:
    temporary = temporary_path(target.parent)
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"`{target}` could not be written ({error}). {DISK}. [errors.md#stored-features]") from error


__all__ = ["DISK", "remove_leftovers", "temporary_path", "write_whole"]
