"""Videos that PyAV writes."""

from pathlib import Path

import pytest
from PIL import Image


def write_video(path: Path, levels: list[int], size: tuple[int, int] = (32, 32)) -> None:
    """A frame for each level of grey."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        codec = {".mp4": "mpeg4", ".webm": "libvpx"}[path.suffix]
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (level, level, level)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
