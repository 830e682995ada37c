"""Beside builds of torchvision, torchaudio and torchcodec that were made for another torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from modeling_frozen.processors import media_loading as media_inputs


ROOT = Path(__file__).parents[1]

# What such a build does when it is imported, as seen of those on PyPI, made for CUDA, beside a torch for CPUs.
BROKEN = {
    "torchvision": "import torch; torch.library.register_fake('torchvision::nms')(lambda boxes: boxes)",
    "torchaudio": "import torch; torch.ops.load_library('/nowhere/_torchaudio.so')",
}


def install(folder: Path, package: str, code: str) -> None:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    (folder / f"{package}-0.99.0.dist-info").mkdir()
    (folder / f"{package}-0.99.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.99.0\n"
    )


def fresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("package", BROKEN)
def test_the_error_names_the_package_and_the_way_out(tmp_path: Path, package: str) -> None:
    install(tmp_path, package, BROKEN[package])
    done = fresh("from modeling_frozen import FrozenPrefixForConditionalGeneration", tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {package} 0.99.0 can't be imported beside torch "), done.stderr
    assert f"`pip uninstall {package}`" in last


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    install(tmp_path, "safetensors", "raise RuntimeError('broken too')")
    done = fresh("from modeling_frozen import FrozenPrefixForConditionalGeneration", tmp_path)
    assert "RuntimeError: broken too" in done.stderr and "torchvision" not in done.stderr.splitlines()[-1]


def film(path: Path) -> str:
    """Twenty frames that brighten, in MPEG-4."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level in range(0, 200, 10):
            frame = av.VideoFrame(32, 32, "rgb24")
            frame.planes[0].update(bytes([level]) * frame.planes[0].buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def test_films_are_read_by_the_next_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "film.mp4")
    install(tmp_path, "torchcodec", "raise OSError('Could not load this library: libtorchcodec_image.so\\n(more)')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    levels = [frame.getpixel((16, 16))[0] for frame in media_inputs.load_video(path, 4)]
    assert all(abs(level - expected) <= 6 for level, expected in zip(levels, (0, 60, 130, 190), strict=True)), levels
    monkeypatch.setattr(media_inputs, "_DECODERS", ("torchcodec",))
    with pytest.raises(ValueError, match=r"torchcodec is, but can't be imported: Could not load.*image.so\).*pip install av"):
        media_inputs.load_video(path, 4)
