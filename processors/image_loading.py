# SPDX-License-Identifier: Apache-2.0
"""Opening any image as the right RGB: 8 bits, upright, in sRGB, transparency over white. `load_rgb_image` is public."""

import base64
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps
from transformers import image_utils


_EXIF_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)  # of its values
_BITS_PER_SAMPLE = 258  # of TIFF
_OVERSHOOT = 0.1  # of the range: resizing with cubic filters leaves it by less
_RANGES = {"bool": 1, "uint8": 255, "uint16": 65535}
_STRIP = 2**22  # pixels that are converted at a time
_HUGE = 2**26  # pixels from which on an image and its copy are too much for memory


# ------------------------------------------------------------------------------------------------------------- ranges
def _range_of(arrays: Sequence[Any]) -> float:
    low, high = min(float(one.min()) for one in arrays), max(float(one.max()) for one in arrays)
    floating = any("float" in str(one.dtype) for one in arrays)
    for top in (1, 255, 65535) if floating else (255, 65535):
        if high <= top * (1 + _OVERSHOOT):
            # What is nearly black in a range may as well be too bright for the one before; whole numbers are not.
            surely = top == 1 or high >= top / 16 or (top == 255 and all(bool((one == one.round()).all()) for one in arrays))
            if surely and low >= -top * _OVERSHOOT:
                return top
            break
    kinds = "/".join(sorted({_kind(one) for one in arrays}))
    raise ValueError(
        f"its {kinds} values run from {low:g} to {high:g}, but an image's are in 0..1, 0..255 or 0..65535. Scale them, or "
        "give uint8 or uint16; values that are normalised already go to the model as `pixel_values`, or through the processor "
        "with do_rescale=False"
    )


def _kind(values: Any) -> str:
    return getattr(values.dtype, "name", str(values.dtype).removeprefix("torch."))


def _scaled(values: Any, top: float) -> Any:
    if _kind(values) == "uint8":
        return values
    if isinstance(values, np.ndarray):
        return np.clip(np.rint(values * np.float64(255 / top)), 0, 255).astype(np.uint8)
    return (values.detach().cpu().double() * (255 / top)).round().clip(0, 255).byte()


def to_uint8(*arrays: Any) -> list[Any]:
    """Arrays or tensors of any shape, such as all images of a batch or all frames of a video, in 0..255.

    bool is 0 or 1, uint8 0..255 and uint16 0..65535. Floats and wider integers do not say what they run to, so it is read off
    all of them together: the smallest of 1 (floats only), 255 and 65535 that holds them. A little outside of it is clipped.

    Errors: ValueError for what is empty, no number, outside of these ranges, or so dark in one that it may be of another.
    """
    for one in arrays:
        if 0 in one.shape:
            raise ValueError(f"it is empty: its shape is {tuple(one.shape)}")
        if not re.match("bool|u?int|b?float", _kind(one)):
            raise ValueError(f"its values are of type {_kind(one)}, but an image's are numbers")
    unsaid = [one for one in arrays if _kind(one) not in _RANGES]
    top = _range_of(unsaid) if unsaid else 0
    return [_scaled(one, _RANGES.get(_kind(one), top)) for one in arrays]


def _array_to_pil(image: Any, channels_first: bool | None = None) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) numpy array or torch tensor, C in 1..4, to PIL.

    Where both ends could be the channels, a tensor is read as channels first, an array as channels last.
    """
    is_tensor = not isinstance(image, np.ndarray)
    image = np.asarray(to_uint8(image)[0])
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
    return Image.fromarray(np.ascontiguousarray(image))  # 2 channels: LA, 4: RGBA


# ---------------------------------------------------------------------------------------------------------------- PIL
def _declared_top(image: Image.Image) -> int | None:
    """What a grey image of more than 8 bits runs to by what its file says, None where that says nothing."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))  # TIFF has 12 bits, too
        return 2 ** bits[0] - 1
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else None


def _to_srgb(image: Image.Image) -> Image.Image:
    """An L, RGB or CMYK image in sRGB, by its ICC profile if it has one."""
    if not image.info.get("icc_profile"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ImportError):  # broken, for other pixels, or PIL is built without: viewers go on too
        return image


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    if not (image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info or palette.endswith("A")):
        image = image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")
        return (image if image.mode == "LAB" else _to_srgb(image)).convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    with_alpha = image.convert("RGBA")
    if image.info.get("icc_profile"):
        colours = _to_srgb(image.convert("L") if image.mode == "LA" else with_alpha.convert("RGB")).convert("RGB")
        colours.putalpha(with_alpha.getchannel("A"))
        with_alpha = colours
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")


def _deep_grey_to_rgb(top: float) -> Callable[[Image.Image], Image.Image]:
    def convert(image: Image.Image) -> Image.Image:
        values = np.asarray(image)
        grey = Image.fromarray(_scaled(values, top))
        if "transparency" in image.info:
            grey.paste(255, mask=Image.fromarray(values == image.info["transparency"]))
        return grey.convert("RGB")

    return convert


def _pil_to_rgb(image: Image.Image, ours: bool = False) -> Image.Image:
    """The RGB that a viewer would show: upright, in sRGB, transparency over white, deep greys scaled and not clipped. An image
    that is `ours` may be closed on the way."""
    if 0 in image.size:
        raise ValueError(f"it is empty: its size is {image.size[0]}x{image.size[1]}")
    top = _declared_top(image)  # before it is turned, which forgets the file
    is_deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())  # PIL keeps the upper 8 bits of 16
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        turned = ImageOps.exif_transpose(image)
        if ours:
            image.close()
        image = turned
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None and not image.info.get("icc_profile"):
        return image
    convert: Callable[[Image.Image], Image.Image] = _strip_to_rgb
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        convert = _deep_grey_to_rgb(_range_of([np.asarray(image)]) if top is None else top)
    elif is_deep and isinstance(transparent, tuple):
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    # By strips: an RGB image takes 4 bytes a pixel, and steps on the way there as much each.
    (width, height), rows = image.size, max(1, _STRIP // image.size[0])
    if height <= rows:
        return convert(image)
    places = range(0, height, rows)
    strips = (convert(image.crop((0, row, width, min(row + rows, height)))) for row in places)
    with contextlib.ExitStack() as stack:
        if ours and width * height > _HUGE:
            file = stack.enter_context(tempfile.TemporaryFile())
            for strip in strips:
                file.write(strip.tobytes())
            image.close()
            file.seek(0)
            heights = (min(rows, height - row) for row in places)
            strips = (Image.frombytes("RGB", (width, own), file.read(3 * width * own)) for own in heights)
        whole = Image.new("RGB", (width, height))
        for row, strip in zip(places, strips, strict=True):
            whole.paste(strip, (0, row))
    return whole


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


@contextlib.contextmanager
def _named(image: Any, name: str) -> Iterator[None]:
    """Has what can't be opened said with its name."""
    if isinstance(image, str | os.PathLike):
        text = os.fspath(image)
        shown = repr(text if len(text) <= 120 else text[:60] + "…" + text[-40:])
    elif isinstance(image, Mapping):
        shown = repr(image.get("path")) if image.get("path") else "as bytes"
    else:
        shown = f"of type {type(image).__name__}"
    try:
        yield
    except Exception as error:  # PIL, the network and the file system raise some twenty kinds
        reason = "it is not an image that PIL can read" if "cannot identify image file" in str(error) else str(error)
        raise ValueError(f"Can't open {name} ({shown}): {reason or type(error).__name__}. [errors.md#image]") from error


@contextlib.contextmanager
def _file(image: Any) -> Iterator[Image.Image]:
    """An encoded image, wherever it lies, as PIL opens it: its header is read, its pixels are not."""
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
    opened = Image.open(image)
    try:
        yield opened
    finally:
        with contextlib.suppress(ValueError):  # Pillow 10 raises where the image is closed already
            opened.__exit__()  # closes the file, and leaves the image


def load_rgb_image(image: Any, name: str = "image", *, channels_first: bool | None = None) -> Image.Image:
    """Open one image of any kind as 8-bit RGB.

    Args:
        image: PIL image (its current frame), path, URL, data URL, base64 string, bytes, open binary file, the
            `{"bytes", "path"}` dict of `datasets`, numpy array or tensor of shape (H, W), (H, W, C) or (C, H, W), in a range
            of `to_uint8`.
        name: what to call it in an error, such as "image 3".
        channels_first: layout of a 3-dimensional array, where its shape leaves it open.

    Errors: ValueError that names the image where it can't be opened.
    """
    with _named(image, name):
        if isinstance(image, Image.Image):
            return _pil_to_rgb(image)
        if isinstance(image, np.ndarray) or hasattr(image, "is_floating_point"):
            return _pil_to_rgb(_array_to_pil(image, channels_first))
        with _file(image) as opened:
            return _pil_to_rgb(opened, ours=True)  # animated: PIL opens at the first frame


def upright_size(image: Any, name: str = "image") -> tuple[int, int]:
    """Height and width that `load_rgb_image` would give an encoded image (path, URL, bytes, …). Its pixels are not decoded,
    but for PNGs, in which what turns them may stand behind the pixels, and TIFFs, which PIL turns as it decodes them.

    Errors: as of `load_rgb_image`.
    """
    with _named(image, name), _file(image) as opened:
        if opened.format == "TIFF":
            opened.load()
        turned = opened.getexif().get(_EXIF_ORIENTATION, 1) in _ON_ITS_SIDE
        width, height = opened.size
        return (width, height) if turned else (height, width)


__all__ = ["load_rgb_image", "to_uint8", "upright_size"]
