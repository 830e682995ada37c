"""Opening any image as the right RGB: 8 bits, upright, transparency over white. `load_rgb_image` is public."""

import base64
import os
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import image_utils


_EXIF_ORIENTATION = 0x0112


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale grey or colour values of any dtype to 0..255; nothing is clipped.

    uint16 is always 0..65535. Wider integers and floats do not say their range, so it is read off the maximum: the
    smallest of 1 (floats only), 255 and 65535 that holds it.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.rint(array / 257).astype(np.uint8)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    floating = np.issubdtype(array.dtype, np.floating)
    if not (np.isfinite(low) and np.isfinite(high)) or low < -1e-6 or high > 65535:
        raise ValueError(
            f"its {array.dtype} values run from {low:g} to {high:g}, but an image's are in 0..1, 0..255 or 0..65535. "
            "Scale them first; values that are normalised already go to the model as `pixel_values`, or through the "
            "processor with do_rescale=False"
        )
    scale = 255.0 if floating and high <= 1 + 1e-6 else 1.0 if high <= 255 else 1 / 257
    return np.clip(np.rint(array * scale), 0, 255).astype(np.uint8)


def _array_to_pil(image: Any, channels_first: bool | None = None) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) numpy array or torch tensor, C in 1..4, to PIL.

    Where both ends could be the channels, a tensor is read as channels first, an array as channels last.
    """
    is_tensor = not isinstance(image, np.ndarray)
    if is_tensor:
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.ndim == 3:
        first, last = image.shape[0] in (1, 2, 3, 4), image.shape[-1] in (1, 2, 3, 4)
        if not (first or last):
            raise ValueError(f"its shape {tuple(image.shape)} has no axis of 1 to 4 channels first or last")
        if channels_first is None:
            channels_first = first and (is_tensor or not last)
        image = np.moveaxis(image, 0, -1) if channels_first else image
        image = image[..., 0] if image.shape[-1] == 1 else image
    elif image.ndim != 2:
        raise ValueError(f"its shape is {tuple(image.shape)}; expected (H, W), (H, W, C) or (C, H, W)")
    return Image.fromarray(np.ascontiguousarray(_to_uint8(image)))  # 2 channels: LA, 4: RGBA


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    """The RGB that a viewer would show: upright, transparency over white, deep greys scaled and not clipped."""
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read_source(source: str) -> bytes:
    """Bytes behind a URL, a data URL or a base64 string."""
    if source.startswith(("http://", "https://")):
        response = image_utils.httpx.get(source, follow_redirects=True, timeout=60)  # transformers' own client
        response.raise_for_status()
        return response.content
    try:
        return base64.b64decode(re.sub(r"\s", "", source.split(",", 1)[-1]), validate=True)
    except ValueError as error:
        raise ValueError("there is no such file, and it is neither a URL nor base64") from error


def load_rgb_image(image: Any, name: str = "image", *, channels_first: bool | None = None) -> Image.Image:
    """Open one image of any kind as 8-bit RGB.

    Args:
        image: PIL image (its current frame), path, URL, data URL, base64 string, bytes, open binary file, the
            `{"bytes", "path"}` dict of `datasets`, numpy array or tensor of shape (H, W), (H, W, C) or (C, H, W).
        name: what to call it in an error, such as "image 3".
        channels_first: layout of a 3-dimensional array, where its shape leaves it open.

    Errors: ValueError that names the image where it can't be opened.
    """
    if isinstance(image, str | os.PathLike):
        text = os.fspath(image)
        shown = repr(text if len(text) <= 120 else text[:60] + "…" + text[-40:])
    elif isinstance(image, Mapping):
        shown = repr(image.get("path")) if image.get("path") else "as bytes"
    else:
        shown = f"of type {type(image).__name__}"
    try:
        if isinstance(image, Image.Image):
            return _pil_to_rgb(image)
        if isinstance(image, np.ndarray) or hasattr(image, "is_floating_point"):
            return _pil_to_rgb(_array_to_pil(image, channels_first))
        if isinstance(image, Mapping):
            data = image.get("bytes")
            image = data if data is not None else image.get("path")
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            image = path if len(path) < 4096 and os.path.isfile(path) else _read_source(str(path))
        if isinstance(image, bytes | bytearray | memoryview):
            image = BytesIO(image)
        if not (isinstance(image, str) or hasattr(image, "read")):
            raise ValueError("expected a PIL image, path, URL, base64, bytes, a {'bytes', 'path'} dict, numpy array or tensor")
        with Image.open(image) as opened:
            return _pil_to_rgb(opened).copy()  # animated: PIL opens at the first frame
    except Exception as error:  # PIL, the network and the file system raise some twenty kinds
        reason = "it is not an image that PIL can read" if "cannot identify image file" in str(error) else str(error)
        raise ValueError(f"Can't open {name} ({shown}): {reason or type(error).__name__}.") from error


__all__ = ["load_rgb_image"]
