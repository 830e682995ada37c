"""Images of every kind through the loader and the processor: each is what PIL decodes, or what its file says."""

import io
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from transformers import ViTImageProcessorPil

from modeling_frozen.processors import FrozenPrefixProcessor, image_loading, load_rgb_image
from tests.helpers import fresh_python
from tests.helpers.tiny import tokenizer


RAMP = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
RGB = Image.fromarray(RAMP)
ALPHA = Image.fromarray(np.dstack([RAMP, RAMP[..., :1]]))
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
CLEAR = int(DEEP[2, 3])


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.init()
    if kind in Image.SAVE:  # not in every PIL
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(kind: int, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits, which PIL does not write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))), (b"IEND", b"")]
    checked = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def tiff(bits: int, sample_format: int, width: int, height: int, data: bytes) -> bytes:
    """A grey TIFF in one strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 0), (277, 1), (278, height), (279, len(data))]
    tags.append((339, sample_format))
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def profile(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile: a matrix and gamma 1.8, or grey of that gamma."""
    xyz = lambda *values: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(1.8 * 256)) + b"\0\0"
    name = b"swapped"
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(80), "wtpt": xyz(0.9642, 1.0, 0.8249)}
    if space == b"RGB ":  # red and blue change places
        tags |= {"bXYZ": xyz(0.4361, 0.2225, 0.0139), "gXYZ": xyz(0.3851, 0.7169, 0.0971), "rXYZ": xyz(0.1431, 0.0606, 0.7141)}
        tags |= {"rTRC": curve, "gTRC": curve, "bTRC": curve}
    else:
        tags["kTRC"] = curve
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag.encode() + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def on_white(data: bytes) -> np.ndarray:
    """PIL's own decoding."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def by_profile(mode: str) -> Callable[[bytes], np.ndarray]:
    def convert(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"])), ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(image.convert(mode), own, srgb, outputMode="RGB")
        if image.mode == "RGBA":
            colours.putalpha(image.getchannel("A"))
        return on_white(saved(colours, "PNG"))

    return convert


def grey(values: np.ndarray, top: float) -> Callable[[bytes], np.ndarray]:
    levels = np.rint(values * (255 / top)).astype(np.uint8)
    return lambda data: np.repeat(levels[..., None], 3, axis=-1)


def palette() -> Image.Image:
    return RGB.quantize(16)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def tga_with_a_clear_colour() -> bytes:
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 4, 4, 8, 0x28)
    return head + bytes([0, 0, 255, 255, 255, 0, 0, 64]) + bytes([0, 1] * 8)


def twelve_bits() -> bytes:
    pairs = (DEEP >> 4).reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


DARK = (DEEP >> 9).astype(np.uint16)  # nearly black: no value above 127 of 65535
TEN = DEEP >> 6
MATTE = np.repeat(np.where(DEEP == CLEAR, 255, np.rint(DEEP / 257)).astype(np.uint8)[..., None], 3, axis=-1)
COLOURS16 = np.dstack([DEEP, DEEP.T.reshape(6, 8), DEEP[::-1]])
CLEAR16 = struct.pack(">3H", *(int(value) for value in COLOURS16[2, 3]))
KINDS: dict[str, tuple[bytes, Callable[[bytes], np.ndarray]]] = {
    "jpeg": (saved(RGB, "JPEG"), on_white),
    "jpeg, grey": (saved(RGB.convert("L"), "JPEG"), on_white),
    "jpeg, cmyk": (saved(RGB.convert("CMYK"), "JPEG"), on_white),
    "jpeg, progressive": (saved(RGB, "JPEG", progressive=True), on_white),
    "jpeg, turned": (saved(RGB, "JPEG", exif=turned()), on_white),
    "png, turned": (saved(RGB, "PNG", exif=turned()), on_white),
    "tiff, turned": (saved(RGB, "TIFF", exif=turned()), on_white),
    "webp, turned": (saved(RGB, "WEBP", lossless=True, exif=turned()), on_white),
    "jpeg, profile": (saved(RGB, "JPEG", icc_profile=profile(b"RGB ")), by_profile("RGB")),
    "jpeg, profile of sRGB": (
        saved(RGB, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), on_white,
    ),
    "jpeg, broken profile": (saved(RGB, "JPEG", icc_profile=b"nothing"), on_white),
    "jpeg, profile of other pixels": (saved(RGB, "JPEG", icc_profile=profile(b"GRAY")), on_white),
    "png": (saved(RGB, "PNG"), on_white),
    "png, grey": (saved(RGB.convert("L"), "PNG"), on_white),
    "png, grey with profile": (saved(RGB.convert("L"), "PNG", icc_profile=profile(b"GRAY")), by_profile("L")),
    "png, black and white": (saved(RGB.convert("1"), "PNG"), on_white),
    "png, palette": (saved(palette(), "PNG"), on_white),
    "png, palette with profile": (saved(palette(), "PNG", icc_profile=profile(b"RGB ")), by_profile("RGB")),
    "png, palette with a clear colour": (saved(palette(), "PNG", transparency=3), on_white),
    "png, palette with alpha": (saved(palette(), "PNG", transparency=bytes(range(0, 256, 16))), on_white),
    "png, alpha": (saved(ALPHA, "PNG"), on_white),
    "png, alpha and profile": (saved(ALPHA, "PNG", icc_profile=profile(b"RGB ")), by_profile("RGB")),
    "png, grey with alpha": (saved(ALPHA.convert("LA"), "PNG"), on_white),
    "png, clear colour": (saved(RGB, "PNG", transparency=tuple(map(int, RAMP[2, 3]))), on_white),
    "png, clear grey": (saved(RGB.convert("L"), "PNG", transparency=RGB.convert("L").getpixel((3, 2))), on_white),
    "png, 16 bits": (saved(Image.fromarray(DEEP), "PNG"), grey(DEEP, 65535)),
    "png, 16 bits, dark": (saved(Image.fromarray(DARK), "PNG"), grey(DARK, 65535)),
    "png, 16 bits, clear grey": (png(0, DEEP, (b"tRNS", struct.pack(">H", CLEAR))), lambda _: MATTE),
    "png, 16 bits, colours": (png(2, COLOURS16.reshape(6, -1).reshape(6, 8, 3)), on_white),
    "png, 16 bits, clear colour": (
        png(2, COLOURS16, (b"tRNS", CLEAR16)),
        lambda _: np.where((COLOURS16 == COLOURS16[2, 3]).all(-1, keepdims=True), 255, COLOURS16 >> 8).astype(np.uint8),
    ),
    "gif": (saved(palette(), "GIF"), on_white),
    "gif, clear colour": (saved(palette(), "GIF", transparency=3), on_white),
    "gif, animated": (saved(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)]), on_white),
    "webp": (saved(RGB, "WEBP"), on_white),
    "webp, lossless with alpha": (saved(ALPHA, "WEBP", lossless=True, exact=True), on_white),
    "avif": (saved(RGB, "AVIF"), on_white),
    "bmp": (saved(RGB, "BMP"), on_white),
    "bmp, palette": (saved(palette(), "BMP"), on_white),
    "tiff": (saved(RGB, "TIFF", compression="tiff_lzw"), on_white),
    "tiff, cmyk": (saved(RGB.convert("CMYK"), "TIFF"), on_white),
    "tiff, alpha": (saved(ALPHA, "TIFF"), on_white),
    "tiff, 16 bits": (saved(Image.fromarray(DEEP), "TIFF"), grey(DEEP, 65535)),
    "tiff, 16 bits, other byte order": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), grey(DEEP, 65535)),
    "tiff, 12 bits": (tiff(12, 1, 8, 6, twelve_bits()), grey(DEEP >> 4, 4095)),
    "tiff, floats": (tiff(32, 3, 8, 6, (DEEP / 65535).astype("<f4").tobytes()), grey(DEEP, 65535)),
    "tiff, floats that overshoot": (
        tiff(32, 3, 8, 6, (DEEP.clip(0, 65400) / 65400 + (DEEP == CLEAR) * 1.001).clip(0, 1.001).astype("<f4").tobytes()),
        grey((DEEP.clip(0, 65400) / 65400 + (DEEP == CLEAR) * 1.0).clip(0, 1), 1),
    ),
    "tiff, 32 bits": (tiff(32, 1, 8, 6, DEEP.astype("<u4").tobytes()), grey(DEEP, 65535)),
    "tga": (saved(RGB, "TGA"), on_white),
    "tga, alpha": (saved(ALPHA, "TGA", compression="tga_rle"), on_white),
    "tga, palette with alpha": (tga_with_a_clear_colour(), on_white),
    "ppm": (saved(RGB, "PPM"), on_white),
    "pgm, 16 bits, dark": (b"P5 8 6 65535\n" + DARK.astype(">u2").tobytes(), grey(DARK, 65535)),
    "pgm, 10 bits": (b"P5 8 6 1023\n" + TEN.astype(">u2").tobytes(), grey(np.rint(TEN * 65535.0 / 1023), 65535)),
    "jpeg 2000": (saved(RGB, "JPEG2000"), on_white),
    "jpeg 2000, 16 bits": (saved(Image.fromarray(DEEP), "JPEG2000"), grey(DEEP, 65535)),
    "ico": (saved(ALPHA, "ICO", sizes=[(8, 6)]), on_white),
    "sgi": (saved(RGB, "SGI"), on_white),
    "pcx": (saved(palette(), "PCX"), on_white),
    "dds": (saved(ALPHA, "DDS"), on_white),
    "qoi": (saved(RGB, "QOI"), on_white),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_its_file_says(kind: str) -> None:
    data, decode = KINDS[kind]
    if not data:
        pytest.skip(f"this PIL does not write {kind}")
    try:
        expected = decode(data)
    except ValueError as error:
        pytest.skip(f"this PIL does not read {kind}: {error}")
    opened = load_rgb_image(data)
    np.testing.assert_array_equal(np.asarray(opened), expected)
    assert opened.mode == "RGB" and image_loading.upright_size(data) == expected.shape[:2]
    np.testing.assert_array_equal(np.asarray(load_rgb_image(opened)), expected)  # so once more
    np.testing.assert_array_equal(np.asarray(load_rgb_image(Image.open(io.BytesIO(data)))), expected)
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(opened))), expected)  # as workers send it
    processor = FrozenPrefixProcessor(ViTImageProcessorPil(size={"height": 5, "width": 7}), tokenizer(), 2)
    seen = processor(images=data, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen, processor.image_processor(Image.fromarray(expected), return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "I;16"])
def test_large_images_are_converted_as_small_ones(mode: str) -> None:
    size = (2100, 2100)
    if mode == "I;16":
        image = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint32).reshape(size).astype(np.uint16))
        parts = [image.crop((0, 0, 2100, 1000)), image.crop((0, 1000, 2100, 2100))]
    else:
        noise = Image.effect_noise(size, 90)
        image = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(270)])
        image = image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)
        if mode == "P":
            image.info["transparency"] = 5
        parts = [image.crop((0, 0, 2100, 1000)), image.crop((0, 1000, 2100, 2100))]
    expected = np.concatenate([np.asarray(load_rgb_image(part)) for part in parts])
    np.testing.assert_array_equal(np.asarray(load_rgb_image(image)), expected)


LARGE = """
import io, resource, sys
import numpy
from PIL import Image
from modeling_frozen.processors import load_rgb_image
Image.MAX_IMAGE_PIXELS = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert load_rgb_image(sys.argv[1]).size == (13300, 13300)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mode", ["RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_huge_image_is_the_same_through_a_file(
    mode: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 255, (90, 70, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values, mode).save(tmp_path / "it.tif", exif=exif)
    plain = load_rgb_image(tmp_path / "it.tif")
    monkeypatch.setattr(image_loading, "_STRIP", 70 * 8)
    monkeypatch.setattr(image_loading, "_HUGE", 70 * 90 - 1)
    huge = load_rgb_image(tmp_path / "it.tif")
    assert huge.mode == "RGB" and huge.size == plain.size and huge.tobytes() == plain.tobytes()
    with Image.open(tmp_path / "it.tif") as image:  # a caller's own stays open
        assert load_rgb_image(image).tobytes() == plain.tobytes() and image.getpixel((0, 0))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures in kilobytes, as Linux counts")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_a_huge_image_takes_one_gigabyte(mode: str, tmp_path) -> None:
    path = tmp_path / ("huge.tif" if mode == "CMYK" else "huge.png")
    Image.new(mode, (13300, 13300)).save(path, **({"transparency": 0} if mode == "P" else {}))
    done = fresh_python.run("-c", LARGE, str(path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 10**9


# ------------------------------------------------------------------------------------------------------ ranges of arrays
def level(image: object) -> int:
    return load_rgb_image(image).getpixel((1, 1))[0]


def array(value: float, brightest: float, dtype: str = "float32") -> np.ndarray:
    """Of one value, but for a corner."""
    values = np.full((5, 6, 3), value, dtype=dtype)
    values[0, 0] = brightest
    return values


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda values: torch.from_numpy(values).bfloat16()])
def test_a_little_overshoot_is_clipped(kind: Callable[[np.ndarray], object]) -> None:
    assert level(kind(array(0.5, 1.01))) == level(kind(array(0.5, 1.0))) == 128
    assert level(kind(array(128, 256.0))) == level(kind(array(128, 255.0))) == 128
    assert level(kind(array(0.5, -0.004))) == 128
    assert load_rgb_image(kind(array(0.5, 1.01))).getpixel((0, 0)) == (255, 255, 255)


def test_what_could_be_of_two_ranges_is_refused() -> None:
    for values in (array(0.5, 1.5), array(0.1, 5.5), array(100, 300.5), array(100, 1000, "int64"), array(0.5, -0.5)):
        with pytest.raises(ValueError, match=r"image 3 .*run from .* to .*0\.\.1, 0\.\.255 or 0\.\.65535"):
            load_rgb_image(values, "image 3")
    assert level(array(3, 5.0)) == 3  # whole numbers of a dark image
    assert level(array(25700, 60000, "int32")) == 100
    assert level(array(12850, 60000.0)) == 50


@pytest.mark.parametrize("shape", [(0, 32, 3), (32, 0, 3), (0, 0), (3, 0, 32)])
def test_nothing_empty_is_an_image(shape: tuple[int, ...]) -> None:
    processor = FrozenPrefixProcessor(ViTImageProcessorPil(size={"height": 5, "width": 7}), tokenizer(), 2)
    for dtype in ("uint8", "float32"):
        for options in ({}, {"do_rescale": False}):
            with pytest.raises(ValueError, match="image 0.*empty"):
                processor(images=np.zeros(shape, dtype), **options)
    with pytest.raises(ValueError, match="empty"):
        processor(images=np.zeros((2, 0, 32, 3)))
    with pytest.raises(ValueError, match="image 0.*empty"):
        processor(images=Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match="video 0.*empty|videos.*empty"):
        FrozenPrefixProcessor(ViTImageProcessorPil(), tokenizer(), 2, num_frames=2, video_prefix_length=2)(
            videos=np.zeros((2, 0, 8, 3), np.uint8)
        )


def test_images_of_one_array_have_one_range() -> None:
    processor = FrozenPrefixProcessor(ViTImageProcessorPil(size={"height": 4, "width": 4}), tokenizer(), 2)
    options = {"do_normalize": False, "return_tensors": "np"}
    batch = np.stack([np.full((4, 4, 3), 0.9), np.full((4, 4, 3), 200.5)]).astype(np.float32)
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), [batch]):
        levels = processor(images=images, text="a", **options)["pixel_values"].mean(axis=(1, 2, 3)) * 255
        np.testing.assert_allclose(levels, [1, 200], atol=0.01)


def test_frames_of_one_video_have_one_range() -> None:
    processor = FrozenPrefixProcessor(
        ViTImageProcessorPil(size={"height": 4, "width": 4}), tokenizer(), 2, num_frames=2, video_prefix_length=2
    )
    frames = [np.full((4, 4, 3), value, np.float32) for value in (0.9, 150.0, 200.5)]
    kinds = {
        "array": np.stack(frames),
        "tensor": torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2),
        "list": frames,
        "tensors": [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames],
        "pil": [Image.fromarray(frame[..., 0]) for frame in frames],
        "videos": np.stack([np.stack(frames)]),
    }
    for kind, video in kinds.items():
        made = processor(videos=video, do_normalize=False, return_tensors="np")["pixel_values_videos"]
        np.testing.assert_allclose(made.mean(axis=(0, 2, 3, 4)) * 255, [1, 200], atol=0.01, err_msg=kind)


def test_what_is_not_rescaled_stays_in_its_range() -> None:
    processor = FrozenPrefixProcessor(ViTImageProcessorPil(size={"height": 4, "width": 4}), tokenizer(), 2)
    grey = np.linspace(0, 1, 36, dtype=np.float32).reshape(6, 6)
    expected = processor(images=np.stack([grey] * 3), do_rescale=False, return_tensors="pt")["pixel_values"]
    assert expected.abs().max() <= 1
    for image in (grey, torch.from_numpy(grey), np.stack([grey] * 3, axis=-1)):
        assert torch.equal(processor(images=image, do_rescale=False, return_tensors="pt")["pixel_values"], expected)
