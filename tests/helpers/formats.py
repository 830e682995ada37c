"""The committed samples of each format in tests/data/formats, with the images that they name."""

import array
import io
import json
import shutil
import tarfile
import wave
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.tiny import COLOURS


SAMPLES = Path(__file__).parents[1] / "data" / "formats"


def lay_out(folder: Path) -> Path:
    """Samples, images, videos and audio in a folder, as a user has them."""
    shutil.copytree(SAMPLES, folder, dirs_exist_ok=True)
    (folder / "images" / "val2014").mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        image = Image.new("RGB", (20, 18), colour)
        for place in ("images", "images/val2014", "imagefolder") if name in ("red", "blue") else ("images", "images/val2014"):
            image.save(folder / place / f"{name}.png")
        if number in (0, 2):
            image.save(folder / "images" / f"COCO_val2014_{1 if number == 0 else 2:012d}.jpg", quality=95)
    (folder / "media").mkdir()
    for name, levels in {"dark": [0, 10, 20, 30], "light": [200, 220, 240, 250]}.items():
        frames = [Image.new("RGB", (20, 18), (level,) * 3) for level in levels]
        frames[0].save(folder / "media" / f"{name}.gif", save_all=True, append_images=frames[1:])
    with wave.open(str(folder / "media" / "tone.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(array.array("h", [(index % 40) * 400 for index in range(1600)]).tobytes())
    with tarfile.open(folder / "webdataset-0.tar", "w") as tar:
        for key, name, suffix, text in (("0", "red", "png", "a red square ."), ("1", "blue", "jpg", "that is blue .")):
            content = io.BytesIO()
            Image.open(folder / "images" / f"{name}.png").save(content, "PNG" if suffix == "png" else "JPEG")
            files = {suffix: content.getvalue(), "txt": text.encode(), "json": json.dumps({"id": f"s{key}"}).encode()}
            for ending, data in files.items():
                _add(tar, f"part/{key}.{ending}", data)
    return folder


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder: Path, files: list[list[dict[str, Any]]]) -> str:
    """WebDataset shards of rows with `image` (PIL) and other fields; the pattern of their names."""
    for number, rows in enumerate(files):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for place, row in enumerate(rows):
                content = io.BytesIO()
                row["image"].save(content, "PNG")
                fields = {name: value for name, value in row.items() if name != "image"}
                _add(tar, f"{number}-{place}.png", content.getvalue())
                _add(tar, f"{number}-{place}.json", json.dumps(fields).encode())
    return str(folder / "shard-*.tar")
