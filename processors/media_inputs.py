"""Videos and sounds for the processor: opening them, and the hooks of `ProcessorMixin` that make model inputs of them.

A video is a list of frames, sampled uniformly; each frame goes the way of a picture. A sound is a mono waveform at its
feature extractor's rate. Nothing is decoded without a decoder that is installed; animated pictures need only PIL.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import AutoFeatureExtractor, AutoTokenizer
from transformers.audio_utils import load_audio
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .from_model_files import FromModelFilesMixin
from .pictures import load_rgb_image


_DECODERS = ("torchcodec", "av", "cv2")  # modules, in the order in which they are tried
_INPUT_NAMES = ("input_features", "input_values")


# ------------------------------------------------------------------------------------------------------------- videos
def _shown(source: Any) -> str:
    """A path or address whole; of a picture written out as text, its beginning."""
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
            `{"bytes", "path"}` dict of such a picture, or, with a decoder installed, of a film.
        num_frames: how many to sample.
        name: what to call it in an error, such as "video 3".

    Errors: ValueError that names the video where it can't be opened, or needs a decoder.
    """
    if isinstance(video, list | tuple) or getattr(video, "ndim", 0) == 4:
        if len(video) == 0:
            raise ValueError(f"Can't open {name}: it has no frames.")
        return [load_rgb_image(video[index], f"a frame of {name}") for index in sample_frames(len(video), num_frames)]
    if isinstance(video, Mapping):
        data = video.get("bytes")
        video = data if data is not None else video.get("path")
    source: Any = video
    try:
        if isinstance(video, Image.Image):
            return _frames_of_picture(video, num_frames, name)
        if isinstance(video, bytes | bytearray | memoryview):
            source = BytesIO(video)
        elif isinstance(video, str | os.PathLike):
            source = os.fspath(video)
            if not os.path.isfile(source):
                raise ValueError("there is no such file")
        elif not hasattr(video, "read"):
            raise ValueError(
                f"expected a list of frames, a 4-dimensional array, an animated picture or a path, got "
                f"{type(video).__name__}"
            )
        with Image.open(source) as opened:
            return _frames_of_picture(opened, num_frames, name)
    except UnidentifiedImageError:
        return _decode(source, num_frames, name)
    except (OSError, ValueError) as error:
        raise ValueError(f"Can't open {name} ({_shown(video)!r}): {error}.") from error


def _frames_of_picture(picture: Image.Image, num_frames: int, name: str) -> list[Image.Image]:
    frames = []
    for index in sample_frames(getattr(picture, "n_frames", 1), num_frames):
        picture.seek(index)
        frames.append(load_rgb_image(picture, f"frame {index} of {name}").copy())
    return frames


def _decode(source: Any, num_frames: int, name: str) -> list[Image.Image]:
    module, broken = _find_decoder()
    if module is None:
        unusable = "".join(f" ({decoder} is, but can't be imported: {error})" for decoder, error in broken.items())
        raise ValueError(
            f"Can't open {name} ({_shown(source)!r}): PIL does not read it, and no video decoder is installed{unusable}. "
            f"Install one of {', '.join(_DECODERS)} (`pip install av`), or pass its frames: a list of pictures or a "
            "4-dimensional array."
        )
    if hasattr(source, "seek"):
        source.seek(0)
    try:
        if module == "torchcodec":
            from torchcodec.decoders import VideoDecoder

            decoder = VideoDecoder(source.read() if hasattr(source, "read") else source)
            frames = decoder.get_frames_at(sample_frames(len(decoder), num_frames)).data
        elif module == "av":
            import av

            with av.open(source) as container:
                decoded = [frame.to_image() for frame in container.decode(video=0)]
            frames = [decoded[index] for index in sample_frames(len(decoded), num_frames)]
        else:
            import cv2

            capture = cv2.VideoCapture(source)
            read = iter(lambda: capture.read(), None)
            decoded = []
            for is_there, frame in read:
                if not is_there:
                    break
                decoded.append(frame[..., ::-1])
            frames = [decoded[index] for index in sample_frames(len(decoded), num_frames)]
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"Can't open {name} ({_shown(source)!r}) with {module}: {error}.") from error
    return [load_rgb_image(frame, f"a frame of {name}") for frame in frames]


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


def _is_frame(value: Any) -> bool:
    if isinstance(value, Image.Image):
        return getattr(value, "n_frames", 1) == 1
    return getattr(value, "ndim", 0) in (2, 3)


# ------------------------------------------------------------------------------------------------------------- sounds
def load_sound(sound: Any, sampling_rate: int, name: str = "sound") -> np.ndarray:
    """Open one sound as a mono float32 waveform at `sampling_rate`.

    Args:
        sound: waveform at that rate (list of floats, array or tensor of shape (samples,) or (channels, samples)), the
            `{"array", "sampling_rate"}` dict of `datasets`, or path, URL or base64 string, which the library decodes
            with torchcodec, soundfile or librosa.
        sampling_rate: samples per second that the feature extractor expects.
        name: what to call it in an error, such as "sound 3".

    Errors: ValueError that names the sound where it can't be opened, or has another rate.
    """
    if isinstance(sound, Mapping):
        rate = sound.get("sampling_rate")
        if sound.get("array") is None:
            sound = sound.get("path")
        else:
            sound = sound["array"]
            if rate is not None and rate != sampling_rate:
                raise ValueError(
                    f"{name} has {rate} samples per second, but the feature extractor expects {sampling_rate}: "
                    f"resample it, "
                    f'with datasets by `cast_column("audio", Audio(sampling_rate={sampling_rate}))`.'
                )
    if isinstance(sound, str | os.PathLike):
        try:
            sound = load_audio(os.fspath(sound), sampling_rate=sampling_rate)
        except Exception as error:  # decoders and the network raise what they like
            raise ValueError(
                f"Can't open {name} ({_shown(sound)!r}): {error}. Pass its waveform, or "
                f"`pip install librosa` (`torchcodec` serves too, if it is built for your torch)."
            ) from error
    if hasattr(sound, "detach"):
        sound = sound.detach().cpu().float().numpy()
    try:
        waveform = np.asarray(sound, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Can't open {name}: expected a waveform, a path or a dict, got {type(sound).__name__}."
        ) from error
    if waveform.ndim == 2 and waveform.shape[0] <= 8:
        waveform = waveform.mean(axis=0)
    if waveform.ndim != 1 or waveform.size == 0:
        raise ValueError(
            f"Can't open {name}: its shape is {np.shape(sound)}; expected (samples,) or (channels, samples)."
        )
    return waveform


# ---------------------------------------------------------------------------------------------------------- processor
class _PartsPresent:
    """`get_attributes()` of the class names the parts of an ordinary processor; of an instance, those that it has."""

    def __get__(self, instance: Any, owner: type) -> Callable[[], list[str]]:
        parts = getattr(instance, "_parts", ("image_processor", "tokenizer"))
        return lambda: list(parts)


class MediaInputsMixin(FromModelFilesMixin):
    """What a processor does with videos and sounds; `FrozenPrefixProcessor` does the rest.

    Itself a `ProcessorMixin`: tools tell what a processor overrides by comparing it with the class after it.
    """

    get_attributes = _PartsPresent()

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        saved = {} if processor_dict is None else processor_dict
        options = dict(kwargs)
        subfolder = options.pop("subfolder", "")
        image_processor = None
        if "image_processor" in saved or "feature_extractor" not in saved:
            image_processor = AutoImageProcessor.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **options
            )
        if "feature_extractor" in saved:
            saved["feature_extractor"] = AutoFeatureExtractor.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)
        return [image_processor, tokenizer]

    def to_dict(self) -> dict[str, Any]:
        absent = {"num_frames", "video_prefix_length", "video_token"} if self.video_token is None else set()
        absent |= {"audio_prefix_length", "audio_token"} if self.audio_token is None else set()
        absent |= {"image_token"} if self.image_token is None else set()
        return {key: value for key, value in super().to_dict().items() if key not in absent}

    @property
    def tokens(self) -> dict[str, str]:
        """The placeholder of each medium that is taken: of `"image"`, `"video"` and `"audio"`."""
        named = {modality: getattr(self, f"{modality}_token", None) for modality in ("image", "video", "audio")}
        return {modality: token for modality, token in named.items() if token is not None}

    # The library asks for one before it processes videos; frames are pictures here.
    @property
    def video_processor(self) -> Any:
        if self.video_token is None:
            raise AttributeError("This processor takes no videos.")
        return self.image_processor

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        merged = super()._merge_kwargs(*args, **kwargs)
        # The library gives these to text and sounds alike: a text's `max_length` would cut sounds to as many samples.
        meant = kwargs.get("audio_kwargs") or {}
        for name in ("padding", "max_length", "truncation", "pad_to_multiple_of"):
            if name not in meant:
                merged["audio_kwargs"].pop(name, None)
        return merged

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        return self.video_token * self.num_tokens("video")

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        return self.audio_token * self.num_tokens("audio")

    @staticmethod
    def _nest_videos(videos: Any) -> tuple[list[list[Any]], bool]:
        """One list of videos per entry, and whether the caller nested them; a list of frames is one video."""

        def is_video(value: Any) -> bool:
            if isinstance(value, list | tuple):
                return len(value) > 0 and all(map(_is_frame, value))
            return getattr(value, "ndim", 4) == 4  # an array of five dimensions is a list of videos

        videos = [videos] if is_video(videos) else list(videos)
        nested = [[one] if one is None or is_video(one) else list(one) for one in videos]
        is_nested = any(one is None or not is_video(one) for one in videos)
        return [[one for one in own if one is not None] for own in nested], is_nested

    @staticmethod
    def _nest_audio(audio: Any) -> tuple[list[list[Any]], bool]:
        """One list of sounds per entry, and whether the caller nested them; a list of numbers is one sound."""

        def is_sound(value: Any) -> bool:
            if isinstance(value, list | tuple):
                return len(value) > 0 and all(isinstance(one, int | float) for one in value)
            return value is not None

        audio = [audio] if is_sound(audio) else list(audio)
        nested = [[one] if one is None or is_sound(one) else list(one) for one in audio]
        is_nested = any(not is_sound(one) for one in audio)
        return [[one for one in own if one is not None] for own in nested], is_nested

    def _load_videos(self, videos: list[Any]) -> list[list[Image.Image]]:
        return [load_video(video, self.num_frames, f"video {index}") for index, video in enumerate(videos)]

    def _load_audio(self, audio: list[Any]) -> list[np.ndarray]:
        rate = self.feature_extractor.sampling_rate if audio else 0
        return [load_sound(sound, rate, f"sound {index}") for index, sound in enumerate(audio)]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs: Any) -> None:
        # The library would stack each video's frames to count the videos.
        counted = None if videos is None else [np.zeros((1, 1, 1, 3), dtype=np.uint8)] * len(videos)
        super().validate_inputs(images=images, text=text, videos=counted, audio=audio, **kwargs)

    def _process_videos(self, videos: list[list[Image.Image]], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        takes = getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", {})
        options = {key: value for key, value in kwargs.items() if key in takes or not takes}
        frames = [frame for video in videos for frame in video]
        made = self.image_processor(frames, **{**options, "return_tensors": "pt"})
        if set(made) != {"pixel_values"}:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes {sorted(made)} of a picture; frames of a video need a "
                f"tower that "
                "takes `pixel_values` of one size alone."
            )
        pixels = made["pixel_values"]
        pixels = pixels.unflatten(0, (len(videos), len(pixels) // len(videos)))
        replacements = [self.replace_video_token(made, index) for index in range(len(videos))]
        return {"pixel_values_videos": pixels}, replacements

    def _process_audio(self, audio: list[np.ndarray], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        extractor = self.feature_extractor
        takes = inspect.signature(extractor.__call__).parameters
        options = {key: value for key, value in kwargs.items() if key in takes}
        options["sampling_rate"] = extractor.sampling_rate
        if "return_attention_mask" in takes:
            options.setdefault("return_attention_mask", True)
        if "padding" in takes and takes["padding"].default is False:
            options.setdefault("padding", True)
        made = dict(extractor(audio, **{**options, "return_tensors": "pt"}))
        name = next(name for name in _INPUT_NAMES if name in made)
        inputs = {"input_features": made.pop(name)}
        if (mask := made.pop("attention_mask", None)) is not None:
            inputs["input_features_mask"] = mask
        replacements = [self.replace_audio_token(made, index) for index in range(len(audio))]
        return {**inputs, **made}, replacements


__all__ = ["MediaInputsMixin", "load_sound", "load_video", "sample_frames"]
