# SPDX-License-Identifier: Apache-2.0
"""Opening videos and audio, of whatever kind they come.

A video is a list of frames, sampled uniformly; each frame goes the way of an image. Audio is a mono waveform at its
feature extractor's rate. Nothing is decoded without a decoder that is installed; animated images need only PIL.
"""

import base64
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers.audio_utils import load_audio
from transformers.video_utils import read_video_opencv, read_video_pyav

from .image_loading import load_rgb_image, to_uint8


_DECODERS = ("torchcodec", "av", "cv2")  # modules, in the order in which they are tried


# ------------------------------------------------------------------------------------------------------------- videos
def _shown(source: Any) -> str:
    """A path or address whole; of an image written out as text, its beginning."""
    text = str(source)
    return text if len(text) <= 300 else f"{text[:80]}…"


def sample_frames(total: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` of `total` frames, evenly from the first to the last; a short video repeats some."""
    return np.linspace(0, total - 1, num_frames).round().astype(int).tolist()


def load_video(video: Any, num_frames: int, name: str = "video") -> list[Image.Image]:
    """Open one video of any kind as `num_frames` frames in 8-bit RGB, sampled uniformly.

    Args:
        video: list of frames (each a PIL image, numpy array or tensor), array or tensor of shape (frames, H, W, C) or
            (frames, C, H, W), animated PIL image (GIF, WebP, APNG), or path, bytes, open binary file or
            `{"bytes", "path"}` dict of such an image, or, with a decoder installed, of a video.
        num_frames: how many to sample.
        name: what to call it in an error, such as "video 3".

    Errors: ValueError that names the video where it can't be opened, or needs a decoder.
    """
    if _is_list(video) or getattr(video, "ndim", 0) == 4:
        if len(video) == 0:
            raise ValueError(f"Can't open {name}: it has no frames. [errors.md#media]")
        video = one_range(video, name)
        return [load_rgb_image(video[index], f"a frame of {name}") for index in sample_frames(len(video), num_frames)]
    if isinstance(video, Mapping):
        data = video.get("bytes")
        video = data if data is not None else video.get("path")
    source: Any = video
    try:
        if isinstance(video, Image.Image):
            return _frames_of_image(video, num_frames, name)
        if isinstance(video, bytes | bytearray | memoryview):
            source = BytesIO(video)
        elif isinstance(video, str | os.PathLike):
            source = os.fspath(video)
            if not os.path.isfile(source):
                raise ValueError("there is no such file")
        elif not hasattr(video, "read"):
            raise ValueError(
                f"expected a list of frames, a 4-dimensional array, an animated image or a path, got {type(video).__name__}"
            )
        with Image.open(source) as opened:
            return _frames_of_image(opened, num_frames, name)
    except UnidentifiedImageError:
        return _decode(source, num_frames, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Can't open {name} ({_shown(video)!r}): {str(error).partition(' [errors.md#')[0]}. [errors.md#media]"
        ) from error


def one_range(media: Any, name: str) -> Any:
    """Frames (or images) of one array or list with their numbers in 0..255, all by one range: a dark one stays dark.

    Errors: ValueError that names them, as `to_uint8`.
    """
    frames = list(media) if _is_list(media) else [media]
    # PIL images of such numbers too
    frames = [np.asarray(one) if isinstance(one, Image.Image) and one.mode in ("I", "F") else one for one in frames]
    try:
        converted = iter(to_uint8(*(one for one in frames if hasattr(one, "dtype"))))
    except ValueError as error:
        raise ValueError(f"Can't open {name}: {error}. [errors.md#media]") from error
    frames = [next(converted) if hasattr(one, "dtype") else one for one in frames]
    return frames if _is_list(media) else frames[0]


def _frames_of_image(image: Image.Image, num_frames: int, name: str) -> list[Image.Image]:
    frames = []
    for index in sample_frames(getattr(image, "n_frames", 1), num_frames):
        image.seek(index)
        frames.append(load_rgb_image(image, f"frame {index} of {name}").copy())
    return frames


def _decode(source: Any, num_frames: int, name: str) -> list[Image.Image]:
    module, broken = _find_decoder()
    if module is None:
        unusable = "".join(f" ({decoder} is, but can't be imported: {error})" for decoder, error in broken.items())
        raise ValueError(
            f"Can't open {name} ({_shown(source)!r}): PIL does not read it, and no video decoder is installed{unusable}. "
            f"Install one of {', '.join(_DECODERS)} (`pip install av`), or pass its frames: a list of images or a "
            "4-dimensional array. [errors.md#media]"
        )
    if hasattr(source, "seek"):
        source.seek(0)
    try:
        if module == "torchcodec":
            from torchcodec.decoders import VideoDecoder

            decoder = VideoDecoder(source.read() if hasattr(source, "read") else source)
            frames = decoder.get_frames_at(sample_frames(len(decoder), num_frames)).data
        elif module == "av":
            frames = _chosen(source, num_frames, read_video_pyav, _count_frames(source))
        elif hasattr(source, "read"):  # OpenCV reads files alone
            with NamedTemporaryFile() as file:
                file.write(source.read())
                file.flush()
                frames = _chosen(file.name, num_frames, read_video_opencv)
        else:
            frames = _chosen(source, num_frames, read_video_opencv)
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"Can't open {name} ({_shown(source)!r}) with {module}: {error}. [errors.md#media]") from error
    return [load_rgb_image(frame, f"a frame of {name}") for frame in frames]


def _chosen(source: Any, num_frames: int, read: Callable[..., Any], total: int | None = None) -> list[np.ndarray]:
    """The frames that are sampled, by one of transformers' readers, which keeps no others. It gives each frame once, in order,
    and fewer than were asked for where the file says that it is longer than it is."""
    wanted: list[int] = []

    def choose(metadata: Any, **options: Any) -> list[int]:
        wanted[:] = sample_frames(metadata.total_num_frames if total is None else total, num_frames)
        return sorted(set(wanted))

    frames = read(source, choose)[0]
    place = {index: number for number, index in enumerate(sorted(set(wanted)))}
    return [frames[min(place[index], len(frames) - 1)] for index in wanted]


def _count_frames(source: Any) -> int:
    """How many frames a video has: as it says, or, where it does not (WebM, a stream), by its packets, undecoded."""
    # By name: transformers asks for whatever custom code imports, and nothing but videos needs it.
    av = importlib.import_module("av")
    with av.open(source) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if hasattr(source, "seek"):
        source.seek(0)
    return count


def _find_decoder() -> tuple[str | None, dict[str, str]]:
    """The first decoder that can be imported, and those before it that are installed and can't."""
    broken: dict[str, str] = {}
    for module in _DECODERS:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # torchcodec raises what it likes where it was built for another torch, or misses FFmpeg
            broken[module] = str(error).partition("\n")[0]
        else:
            return module, broken
    return None, broken


# -------------------------------------------------------------------------------------------------------------- audio
def load_waveform(audio: Any, sampling_rate: int, name: str = "audio") -> np.ndarray:
    """Open one audio input as a mono float32 waveform at `sampling_rate`.

    Args:
        audio: waveform at that rate (list of floats, array or tensor of shape (samples,) or (channels, samples)), the
            `{"array", "sampling_rate"}` dict of `datasets`, or path, URL, base64 string, bytes, open binary file or
            `{"bytes", "path"}` dict of a file of any rate, which transformers decodes with torchcodec, soundfile or librosa.
        sampling_rate: samples per second that the feature extractor expects.
        name: what to call it in an error, such as "audio 3".

    Errors: ValueError that names the audio input where it can't be opened, or has another rate.
    """
    if isinstance(audio, Mapping):
        rate = audio.get("sampling_rate")
        if audio.get("array") is None:
            data = audio.get("bytes")
            audio = data if data is not None else audio.get("path")
        else:
            audio = audio["array"]
            if rate is not None and rate != sampling_rate:
                raise ValueError(
                    f"{name} has {rate} samples per second, but the feature extractor expects {sampling_rate}: resample it, "
                    f'with datasets by `cast_column("audio", Audio(sampling_rate={sampling_rate}))`. [errors.md#media]'
                )
    if hasattr(audio, "read"):
        audio = audio.read()
    if isinstance(audio, bytes | bytearray | memoryview):
        audio = base64.b64encode(audio).decode()  # which transformers reads as it reads a path
    if isinstance(audio, str | os.PathLike):
        try:
            audio = load_audio(os.fspath(audio), sampling_rate=sampling_rate)
        except Exception as error:  # decoders and the network raise what they like
            raise ValueError(
                f"Can't open {name} ({_shown(audio)!r}): {error}. Pass its waveform, or "
                f"`pip install librosa` (`torchcodec` serves too, if it is built for your torch). [errors.md#media]"
            ) from error
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu().float().numpy()
    try:
        waveform = np.asarray(audio, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Can't open {name}: expected a waveform, a path or a dict, got {type(audio).__name__}. [errors.md#media]"
        ) from error
    if waveform.ndim == 2 and waveform.shape[0] <= 8:
        waveform = waveform.mean(axis=0)
    if waveform.ndim != 1 or waveform.size == 0:
        raise ValueError(
            f"Can't open {name}: its shape is {np.shape(audio)}; expected (samples,) or (channels, samples). [errors.md#media]"
        )
    return waveform


# ------------------------------------------------------------------------------------------------- one, or a list of them
def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_frame(value: Any) -> bool:
    if isinstance(value, Image.Image):
        return getattr(value, "n_frames", 1) == 1
    return getattr(value, "ndim", 0) in (2, 3)


def _is_video(value: Any) -> bool:
    if _is_list(value):
        return len(value) > 0 and all(map(_is_frame, value))
    return getattr(value, "ndim", 4) == 4  # an array of five dimensions is a list of videos


def _is_audio(value: Any) -> bool:
    if _is_list(value):
        return len(value) > 0 and all(isinstance(one, int | float) for one in value)
    return value is not None


def _is_image(value: Any) -> bool:
    return not _is_list(value) and getattr(value, "ndim", 0) != 4


# Modality -> whether a value is one input of it; else it is a list of them, or of lists.
IS_ONE = {"image": _is_image, "video": _is_video, "audio": _is_audio}

__all__ = ["IS_ONE", "load_video", "load_waveform", "one_range", "sample_frames"]
