# SPDX-License-Identifier: Apache-2.0
"""FrozenPrefixProcessor: the vision tower's image processor and the language model's tokenizer behind one call.

Chat templates are in `chat_templates`, the opening of images in `image_loading`, of videos and audio in `media_loading`.
Everything is done in the hooks of `ProcessorMixin`, so that what transformers adds to its `__call__` reaches us too; ours says
how long the prefixes are. Only this folder and public packages are imported: a checkpoint carries these files as custom code.
"""

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, VideosKwargs
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import cached_file, logging

from .chat_templates import DEFAULT_CHAT_TEMPLATE, with_media
from .image_loading import load_rgb_image, upright_size
from .image_tiles import DEFAULTS, TilesKwargs, checked, count_tiles, cut_tiles
from .media_loading import IS_ONE, load_video, load_waveform, one_range
from .processing_compat import (
    CONTROL_TOKEN_END,
    CONTROL_TOKEN_START,
    ProcessorMixin,
    name_gguf_version,
    without_empty_contents,
)
from .prompt_tokens import without_ending


logger = logging.get_logger(__name__)

_INPUT_NAMES = ("input_features", "input_values")  # of feature extractors
# Part -> what loads it, and a file by which it is known to be there.
_PARTS: dict[str, tuple[Any, str]] = {
    "image_processor": (AutoImageProcessor, "preprocessor_config.json"),
    "feature_extractor": (AutoFeatureExtractor, "preprocessor_config.json"),
    "tokenizer": (AutoTokenizer, "tokenizer_config.json"),
}
# Of a second and third vision tower.
_FURTHER = ("image_processor_2", "image_processor_3")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")

# The length of prefixes that a call asked for.
_length_of_call: ContextVar[int | None] = ContextVar("length_of_call", default=None)

# Above this, a tokenizer's model_max_length means "not known" (transformers uses the same bound).
_UNKNOWN_LENGTH = int(1e20)


def _is_stored(image: Any) -> bool:
    """Whether it is the features of an image in a store, whose class these files can't import: on the Hub they lie alone."""
    return hasattr(type(image), "tile_options")


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------
# How many frames are taken is the model's, not the call's: its placeholders are counted by it.
FrozenPrefixVideosKwargs = TypedDict(  # type: ignore[misc]  # the keys of another one, which no class can say
    "FrozenPrefixVideosKwargs",
    {name: kind for name, kind in VideosKwargs.__annotations__.items() if name != "num_frames"},
    total=False,
)


class FrozenPrefixProcessorKwargs(ProcessingKwargs, total=False):
    """Keywords of a call: transformers' own, for text, images, videos, audio and `return_mm_token_type_ids`; those of tiles;
    and `prefix_length`, placeholders per image, one of the processor's `prefix_lengths` (not a field here: before 5.23
    transformers wants a default of each from what is saved)."""

    images_kwargs: TilesKwargs  # type: ignore[misc]  # as transformers' own processors narrow them
    videos_kwargs: FrozenPrefixVideosKwargs  # type: ignore[misc]  # as transformers' own processors narrow them


class _PartsPresent:
    """`get_attributes()` of the class names the parts of an ordinary processor; of an instance, those that it has."""

    def __get__(self, instance: Any, owner: type) -> Callable[[], list[str]]:
        parts = getattr(instance, "_parts", ("image_processor", "tokenizer"))
        return lambda: list(parts)


class FrozenPrefixProcessor(ProcessorMixin):
    """Images and text to `pixel_values` (images, C, H, W), `input_ids` and `attention_mask` (batch, sequence).

    Each image of a text is written as `prefix_length` placeholders, which the model overwrites with the connector's
    output. Images are a single one, a flat list in reading order, or nested, one list per text. A text without any
    `<image>` gets one per image at `image_position`. The tokenizer's BOS, where it has one, stays first: BOS, image,
    text. What it appends to a text, EOS or [SEP], is left out for decoders, which go on there. `text=None` gives
    `pixel_values` alone; `text=""` gives a bare prompt with the image. Images in a store of features (rows of
    `cache_vision_features`) give `vision_features` in the place of `pixel_values`.

    A processor with `num_frames` takes videos (see `load_video`), one with a feature extractor takes audio (see
    `load_waveform`), in the same ways: `videos=` gives `pixel_values_videos` (videos, frames, C, H, W), `audio=` gives
    `input_features` and `input_features_mask`.

    Truncation cuts text and never a placeholder. Batches are padded on the left, as generation needs it (on the right
    for encoder-decoder models), with EOS where the tokenizer has no pad token.

    Args:
        image_processor: the vision tower's image processor; None for a model without one.
        image_processor_2, image_processor_3: those of a second and third vision tower, which make `pixel_values_2` and
            `pixel_values_3` of the same images.
        tokenizer: the language model's tokenizer. `image_token` is added to it as a special token where it is not in
            the vocabulary; the language model is never resized.
        prefix_length: placeholders per image, `model.config.num_image_tokens`.
        tiles: how images are cut into tiles of the tower's size, where a call does not say it: a dict of
            `crop_to_patches`, `min_patches`, `max_patches`, `use_thumbnail` (see `image_tiles`). An image then has
            `prefix_length` placeholders for each of its tiles. Not at all by default.
        prefix_lengths: numbers of them that a call may ask for, `processor(..., prefix_length=16)`: the model's
            `config.prefix_lengths`.
        image_token: the placeholder.
        image_position: "start" or "end".
        is_encoder_decoder: whether the language model is one: then prompts are padded on the right, and
            `DataCollatorForFrozenPrefix` gives the answers to the decoder.
        feature_extractor: the audio tower's, for a model with one.
        num_frames: frames sampled from a video, `model.config.num_frames`.
        video_prefix_length, audio_prefix_length: placeholders per video and per audio input,
            `model.config.num_video_tokens` and `model.config.num_audio_tokens`.
        video_token, audio_token: their placeholders, `<video>` and `<audio>` where such are taken.
        text_headless: `model.config.text_headless`, whether the text model only reads: texts then end as its tokenizer ends
            them.
        chat_template: a Jinja template, or several by name. Default: the tokenizer's own, made to render images, else
            a plain one with "User:" and "Assistant:".
    """

    get_attributes = _PartsPresent()
    valid_processor_kwargs = FrozenPrefixProcessorKwargs  # type: ignore[assignment]  # see there
    text_kwargs = {"padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        prefix_length: int | None = None,
        image_token: str = "<image>",
        image_position: str = "start",
        is_encoder_decoder: bool = False,
        chat_template: str | dict[str, str] | None = None,
        feature_extractor=None,
        num_frames: int | None = None,
        video_prefix_length: int | None = None,
        audio_prefix_length: int | None = None,
        video_token: str | None = None,
        audio_token: str | None = None,
        text_headless: bool = False,
        prefix_lengths: list[int] | None = None,
        tiles: dict[str, Any] | None = None,
        image_processor_2=None,
        image_processor_3=None,
        **kwargs,
    ):
        if prefix_length is not None and (not isinstance(prefix_length, int) or prefix_length < 1):
            raise ValueError(f"prefix_length must be an integer of at least 1, got {prefix_length!r}. [errors.md#range]")
        if image_position not in ("start", "end"):
            raise ValueError(f"image_position must be 'start' or 'end', got {image_position!r}. [errors.md#choices]")
        if not isinstance(image_token, str) or not image_token.strip():
            raise ValueError(f"image_token must be a non-empty string, got {image_token!r}. [errors.md#processor]")
        if tokenizer is not None and not (is_encoder_decoder or text_headless):
            tokenizer = without_ending(tokenizer)
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "feature_extractor": feature_extractor}
        if image_processor is not None or feature_extractor is None:
            self._parts = tuple(name for name in parts if name != "feature_extractor" or feature_extractor is not None)
        else:
            self._parts = ("tokenizer", "feature_extractor")
        further = {name: one for name, one in zip(_FURTHER, (image_processor_2, image_processor_3), strict=True) if one}
        self._parts += tuple(further)
        parts |= further
        super().__init__(**{name: parts[name] for name in self._parts}, chat_template=chat_template, **kwargs)
        self.prefix_length, self.prefix_lengths = prefix_length, prefix_lengths
        # Not each by itself: tools ask no keyword of both call and constructor.
        self.tiles = None if tiles is None else checked(tiles)
        self.tile_options()  # refuses what can't be
        has_vision = "image_processor" in self._parts
        self.image_token = image_token if has_vision else None
        self.num_frames = num_frames if has_vision else None
        self.video_token = (video_token or "<video>") if self.num_frames is not None else None
        self.audio_token = (audio_token or "<audio>") if feature_extractor is not None else None
        self.video_prefix_length, self.audio_prefix_length = video_prefix_length, audio_prefix_length
        self.image_position = image_position
        self.is_encoder_decoder, self.text_headless = is_encoder_decoder, text_headless
        if is_encoder_decoder:  # encoders with learned positions count them from the left
            self.text_kwargs = {**type(self).text_kwargs, "padding_side": "right"}
        self._prepare_tokenizer()
        for modality in ("image", "video", "audio"):
            token = self.tokens.get(modality)
            setattr(self, f"{modality}_token_id", None if token is None else tokenizer.convert_tokens_to_ids(token))
        template = self.chat_template or getattr(tokenizer, "chat_template", None) or DEFAULT_CHAT_TEMPLATE
        if isinstance(template, dict):
            self.chat_template = {name: self._with_images(one) for name, one in template.items()}
        else:
            self.chat_template = self._with_images(template)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and its code with it (where a model's config lies there already, the model's too), so that the
        folder can be pushed as it is: `Trainer` does so with its output folder. Its checkpoints stay small."""
        # By name, as transformers' own `get_last_checkpoint` finds them: `Trainer` calls this with nothing but the folder, and
        # writes what else would tell a checkpoint from its output folder (optimizer, `trainer_state.json`) afterwards.
        if push_to_hub or not re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            if self._write_code(save_directory):
                self.auto_map = {"AutoProcessor": f"{Path(__file__).stem}.{FrozenPrefixProcessor.__name__}"}
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)  # for the file alone: a reloaded processor has none
        return files

    def _write_code(self, folder: str | os.PathLike) -> set[str]:
        """Writes the code into the folder; returns the names of its files, none where this file itself runs from the Hub:
        transformers copies it on then."""
        try:
            from modeling_frozen.hub import write_code
        except ImportError:
            return set()
        return {file.name for file in write_code(Path(folder))}

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        # As the model's: the code goes along though it lay there before.
        names = self._write_code(working_dir)
        times = {name: time for name, time in files_timestamps.items() if name not in names}
        return super()._upload_modified_files(working_dir, repo_id, times, *args, **kwargs)

    def _prepare_tokenizer(self) -> None:
        """Give the tokenizer the placeholders, by which its vocabulary grows at most, and a token to pad with."""
        tokenizer = self.tokenizer
        for modality, token in self.tokens.items():
            added = AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=True)
            tokenizer.add_tokens([added], True)
            name = f"{modality}_token"
            if tokenizer.special_tokens_map.get(name) != token:
                # saved with it; pipelines read it
                if name not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
                    tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, name]
                setattr(tokenizer, name, token)
            if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
                raise ValueError(
                    f"The tokenizer splits {token!r} into several tokens although it was added as a special token. "
                    f"Choose another {modality}_token. [errors.md#vocabulary]"
                )
        special = tokenizer.special_tokens_map
        if "pad_token" not in special and (stand_in := special.get("eos_token") or special.get("unk_token")):
            tokenizer.pad_token = stand_in

    # ------------------------------------------------------------------------------------------------- construction
    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        image_processor_2: Any = None,
        image_processor_3: Any = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        audio_token: str = "<audio>",
        image_position: str = "start",
        chat_template: str | dict[str, str] | None = None,
        **kwargs,
    ) -> "FrozenPrefixProcessor":
        """The processor for a model (or its config), from the backbones that it records.

        Args:
            model: a frozen-prefix model or its config.
            image_processor, tokenizer, feature_extractor, image_processor_2, image_processor_3: taken instead of the recorded
                backbone's.
            kwargs: `crop_to_patches` and the other three of `tiles`; all else goes on to each `from_pretrained`: `token`,
                `cache_dir`, `local_files_only`, …

        Errors: ValueError where a backbone is not recorded, has no processor files, or others than when it was joined, or
        where the tokenizer's placeholder has another id than `config.image_token_id`.
        """
        tiles = {name: kwargs.pop(name) for name in DEFAULTS if name in kwargs}
        if tiles.get("crop_to_patches") and getattr(model, "config", model).fusion == "cross_attention":
            raise ValueError(
                "crop_to_patches=True makes several tiles of an image, and with fusion='cross_attention' words see the last "
                "image before them alone, here the last tile: leave it out, or join with fusion='prefix'."
                " [errors.md#cross-attention]"
            )
        config = getattr(model, "config", model)
        media = getattr(config, "media", ("image",))
        side = "right" if config.is_encoder_decoder else "left"
        if feature_extractor is None and "audio" in media:
            feature_extractor = cls._load_part(config, "audio", "feature_extractor", kwargs)
        if image_processor is None and "image" in media:
            image_processor = cls._load_part(config, "vision", "image_processor", kwargs)
        if tokenizer is None:
            tokenizer = cls._load_part(config, "text", "tokenizer", {"padding_side": side, **kwargs})
        further = {"image_processor_2": image_processor_2, "image_processor_3": image_processor_3}
        for argument, part in zip(further, ("vision_2", "vision_3"), strict=True):
            if further[argument] is None and part in getattr(config, "vision_parts", ()):
                further[argument] = cls._load_part(config, part, argument, kwargs)
        known = tokenizer.get_added_vocab()  # before the placeholder is added to it
        processor = cls(
            image_processor,
            tokenizer,
            prefix_length=config.num_image_tokens,
            image_token=image_token,
            image_position=image_position,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            chat_template=chat_template,
            feature_extractor=feature_extractor,
            num_frames=config.num_frames if "video" in media else None,
            video_prefix_length=config.num_video_tokens if "video" in media else None,
            audio_prefix_length=config.num_audio_tokens if "audio" in media else None,
            video_token=video_token,
            audio_token=audio_token,
            text_headless=bool(getattr(config, "text_headless", False)),
            prefix_lengths=getattr(config, "prefix_lengths", None),
            tiles=tiles or None,
            **further,
        )
        for modality, token in processor.tokens.items():
            own, index = getattr(processor, f"{modality}_token_id"), getattr(config, f"{modality}_token_id")
            if own == index:
                continue
            name = next((token for token, known_index in known.items() if known_index == index), None)
            way_out = f"pass {modality}_token={name!r}, which has that id, or " if name else ""
            raise ValueError(
                f"The tokenizer's {token!r} has id {own}, but the model's is {modality}_token_id={index}: {modality}s "
                f"would go to other tokens. To mend it, {way_out}pass the tokenizer it was built with; where it was joined "
                f"from loaded models, join it with tokenizer=… or {modality}_token_id={own}. [errors.md#vocabulary]"
            )
        for part, own in zip(getattr(config, "vision_parts", ("vision",)), processor.image_processors, strict=False):
            processor._check_image_size(getattr(config, f"{part}_config"), own)
        return processor

    @staticmethod
    def _load_part(config: Any, of: str, part: str, options: dict[str, Any]) -> Any:
        """The image processor, feature extractor or tokenizer of one recorded backbone (`"vision"`, `"audio"`, `"text"`, and
        `"vision_2"`, `"vision_3"`)."""
        towers = {"vision": "vision tower", "vision_2": "second vision tower", "vision_3": "third vision tower"}
        backbone = {**towers, "audio": "audio tower"}.get(of, "language model")
        way_out = "FrozenPrefixProcessor(image_processor=…, tokenizer=…, prefix_length=model.config.num_image_tokens)"
        way_out = f"Pass it: FrozenPrefixProcessor.from_model(model, {part}=…), or build {way_out}."
        record = getattr(config, f"{of}_base_model") or {}
        name = record.get("name_or_path")
        if not name:
            raise ValueError(
                f"The model records no place of its {backbone} to take the {part} from. {way_out} [errors.md#no-parent]"
            )
        changed_files: Callable[[str], list[str]] = getattr(config, "changed_processor_files", lambda part: [])
        if changed := changed_files(of):
            raise ValueError(
                f"The {part} of the {backbone} {name!r} is not the one that the connector was trained with: {changed} changed "
                "since. Restore them, take the processor that was saved with the checkpoint, or pass another knowingly, "
                f"FrozenPrefixProcessor.from_model(model, {part}=…). from_pretrained(..., {of}_base_model={name!r}) records "
                "them anew. [errors.md#another-parent]"
            )
        revision = {"revision": record["revision"]} if record.get("revision") and not os.path.isdir(name) else {}
        auto_class, file = _PARTS["image_processor" if part in _FURTHER else part]
        if record.get("gguf_file"):
            name_gguf_version()
            file, options = record["gguf_file"], {"gguf_file": record["gguf_file"], **options}
        try:
            return auto_class.from_pretrained(name, **revision, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"Can't load the {part} of the {backbone} {name!r} (is there a {file}?): {error}\n{way_out}"
                " [errors.md#no-parent]"
            ) from error

    @property
    def image_processors(self) -> list[Any]:
        """One for each vision tower, the first one's first."""
        return [getattr(self, name) for name in ("image_processor", *_FURTHER) if name in self._parts]

    def of_tower(self, number: int) -> "FrozenPrefixProcessor":
        """This processor for one of several vision towers, the first of which is 0, whose `pixel_values` are then the only."""
        alone = copy.copy(self)
        alone.image_processor = self.image_processors[number]
        alone._parts = tuple(name for name in self._parts if name not in _FURTHER)
        return alone

    def _check_image_size(self, vision_config: Any, image_processor: Any) -> None:
        """Warn where the tower was built for another input size than the image processor makes, if both are known."""
        expected = getattr(vision_config, "image_size", None)
        if expected is None or getattr(vision_config, "patch_size", None) is None:  # CNNs take any size
            return
        expected = tuple(expected) if isinstance(expected, list | tuple) else (expected, expected)
        produced = self._output_size(image_processor)
        if produced is not None and produced != expected:
            logger.warning(
                f"The image processor makes images of {produced[0]}x{produced[1]}, but the vision tower was built "
                f"for {expected[0]}x{expected[1]}. Unless it interpolates its positions it will refuse them. To mend "
                f"it, pass from_model(model, image_processor=AutoImageProcessor.from_pretrained(…, size={{'height': "
                f"{expected[0]}, 'width': {expected[1]}}}))."
            )

    @staticmethod
    def _output_size(part: Any) -> tuple[int, int] | None:
        """(height, width) of what an image processor makes, where it is fixed."""
        sizes = ("crop_size", getattr(part, "do_center_crop", None)), ("size", getattr(part, "do_resize", None))
        size: Any = next((getattr(part, name, None) for name, used in sizes if used), None)
        try:
            return int(size["height"]), int(size["width"])
        except (TypeError, KeyError):
            return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; without `processor_config.json` the processor is that of the model there, with those of its
        parts that were saved beside it."""
        name = str(pretrained_model_name_or_path)
        shared = {key: kwargs[key] for key in _HUB_OPTIONS if kwargs.get(key) is not None}
        place = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key) is not None}

        def lacks(file: str) -> bool:
            # Private, as transformers' own loaders do: an `OSError` does not tell a missing file from a Hub that fails.
            if cached_file(name, file, **shared, **place, _raise_exceptions_for_missing_entries=False) is not None:
                return False
            if os.path.isdir(name):
                return True
            where = {"cache_dir": kwargs.get("cache_dir"), "revision": kwargs.get("revision")}
            known = try_to_load_from_cache(name, "/".join([*filter(None, [kwargs.get("subfolder")]), file]), **where)
            if known is not None:  # a mark that the Hub said so
                return True
            if kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE:
                logger.warning(f"The cache holds no {file} of {name}, and offline nobody can tell whether there is one.")
                return True
            raise OSError(
                f"Whether {name} has a {file} can't be told, for the Hub can't be reached: try again, or offline."
                " [errors.md#no-parent]"
            )

        if not lacks("processor_config.json") or lacks("config.json"):
            return super().from_pretrained(name, *args, **kwargs)
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code"), **shared, **place)
        if config.model_type != "frozen-prefix":
            return super().from_pretrained(name, *args, **kwargs)
        wanted = {"image": "image_processor", "audio": "feature_extractor"}
        parts: dict[str, Any] = {}
        for part in ("tokenizer", *(wanted[medium] for medium in config.media if medium in wanted)):
            auto_class, file = _PARTS[part]
            if not lacks(file):
                parts[part] = auto_class.from_pretrained(name, **shared, **place)
        saved = getattr(parts.get("tokenizer"), "special_tokens_map", {})
        tokens = {key: saved[key] for key in ("image_token", "video_token", "audio_token") if key in saved}
        return cls.from_model(config, **parts, **tokens, **shared)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        saved = {} if processor_dict is None else processor_dict
        options = dict(kwargs)
        subfolder = options.pop("subfolder", "")
        if saved and "text_headless" not in saved:  # written before 0.2
            config = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, subfolder=subfolder, **options)[0]
            saved["text_headless"] = bool(config.get("text_headless"))
        for name in _FURTHER:
            if isinstance(saved.get(name), dict):
                # transformers' Auto class reads the first one's alone.
                kind: Any = cls.get_possibly_dynamic_module(saved[name]["image_processor_type"])
                saved[name] = kind(**saved[name])
        image_processor = None
        if "image_processor" in saved or "feature_extractor" not in saved:
            image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)
        if "feature_extractor" in saved:
            saved["feature_extractor"] = AutoFeatureExtractor.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)
        return [image_processor, tokenizer]

    # ---------------------------------------------------------------------------------------------- image placeholders
    def num_image_tokens(self, image_inputs: Mapping[str, Any] | None = None, image_idx: int = 0) -> int:
        """Placeholders of one image: the one place that says so.

        Args:
            image_inputs: what the image processor made of all images; not needed while all have the same number.
            image_idx: which of them.
        """
        if self.prefix_length is None:
            raise ValueError(
                "The processor has no prefix_length: pass it prefix_length=model.config.num_image_tokens."
                " [errors.md#processor]"
            )
        tiles = (image_inputs or {}).get("num_patches")
        return (_length_of_call.get() or self.prefix_length) * (1 if tiles is None else int(tiles[image_idx]))

    def tile_options(self, images_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """How images are cut into tiles in a call with these keywords."""
        given = {name: value for name in DEFAULTS if (value := (images_kwargs or {}).get(name)) is not None}
        options = checked({**(self.tiles or {}), **given})
        if options["crop_to_patches"] and len(self.image_processors) > 1:
            raise ValueError(
                f"crop_to_patches=True cuts tiles of one tower's size, and this processor makes images for "
                f"{len(self.image_processors)} vision towers: leave it out, or join a model with one. [errors.md#tower]"
            )
        return options

    @property
    def crop_to_patches(self) -> bool:
        """Whether images are cut into tiles, where a call does not say it."""
        return bool(self.tile_options()["crop_to_patches"])

    def count_tiles(self, image: Any, options: Mapping[str, Any] | None = None) -> int:
        """How many tiles an image has: open, encoded (path, bytes, …) or in a store; `options` as of [`tile_options`]."""
        options = self.tile_options() if options is None else options
        if _is_stored(image):
            stored = image.tile_options or checked({})
            if stored != options and (stored["crop_to_patches"] or options["crop_to_patches"]):
                raise ValueError(
                    f"These features were stored of images cut by {stored}, and this processor cuts by {options}: take the "
                    "processor that they were stored with, or run cache_vision_features with this one. [errors.md#processor]"
                )
            return image.count_tiles()
        if not options["crop_to_patches"]:
            return 1
        if isinstance(image, Image.Image):
            size = image.height, image.width
        elif isinstance(image, str | os.PathLike | bytes | Mapping):
            size = upright_size(image)
        else:
            raise ValueError(
                f"crop_to_patches=True cuts tiles from images as they are opened, and here is a {type(image).__name__}: give "
                "images, paths or arrays that are rescaled, or leave it out. [errors.md#processor]"
            )
        return count_tiles(*size, self._tile_size(), options)

    def _tile_size(self) -> tuple[int, int]:
        """Height and width of what the image processor makes."""
        if not hasattr(self, "_tile"):
            pixel_values = self.image_processor(Image.new("RGB", (512, 512)), return_tensors="pt")["pixel_values"]
            if pixel_values.ndim != 4:
                raise ValueError(
                    f"crop_to_patches=True needs images of one size for the tower, and "
                    f"{type(self.image_processor).__name__} keeps each image's own: its max_num_patches is the way to see "
                    "more of a large image. [errors.md#processor]"
                )
            self._tile = (int(pixel_values.shape[-2]), int(pixel_values.shape[-1]))
        return self._tile

    @contextmanager
    def with_length(self, prefix_length: int | None) -> Iterator[None]:
        """Inside, this thread writes so many placeholders an image; `None` leaves it as it is.

        Raises:
            ValueError: the model does not write prefixes of this length.
        """
        lengths: Sequence[int | None] = self.prefix_lengths or [self.prefix_length]
        if prefix_length is not None and prefix_length not in lengths:
            raise ValueError(
                f"prefix_length={prefix_length}: the model of this processor writes prefixes of "
                f"{' or '.join(map(str, lengths))} vectors. Take one of these, or join a model with others in prefix_lengths."
                " [errors.md#processor]"
            )
        before = _length_of_call.set(prefix_length or _length_of_call.get())
        try:
            yield
        finally:
            _length_of_call.reset(before)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As transformers', with the keywords of [`FrozenPrefixProcessorKwargs`]."""
        with self.with_length(kwargs.pop("prefix_length", None)):
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.tokens["image"] * self.num_image_tokens(image_inputs, image_idx)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders and patches (one) per image of the given (height, width) sizes."""
        if image_sizes is None:
            return MultiModalData()
        options = self.tile_options(kwargs)
        tile = self._tile_size() if options["crop_to_patches"] else (1, 1)
        tiles = [count_tiles(height, width, tile, options) for height, width in image_sizes]
        numbers = [self.num_image_tokens({"num_patches": tiles}, index) for index in range(len(image_sizes))]
        return MultiModalData(num_image_tokens=numbers, num_image_patches=tiles)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        options = self.tile_options(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in DEFAULTS}
        if stored := [image for image in images if _is_stored(image)]:
            made = {**stored[0].stack(images), "num_patches": [self.count_tiles(image, options) for image in images]}
            return made, [self.replace_image_token(made, index) for index in range(len(images))]
        if not options["crop_to_patches"]:
            made, replacements = super()._process_images(images, **kwargs)
            for number, further in enumerate(self.image_processors[1:], 2):
                made[f"pixel_values_{number}"] = further(images, **kwargs)["pixel_values"]
            return made, replacements
        tile, part = self._tile_size(), self.image_processor
        resample = kwargs.get("resample", getattr(part, "resample", None))
        tiles = [cut_tiles(image, tile, options, resample) for image in images]
        # They have their size.
        for name in ("do_resize", "do_center_crop", "do_pad"):
            if hasattr(part, name):
                kwargs[name] = False
        made = {**part([one for own in tiles for one in own], **kwargs), "num_patches": list(map(len, tiles))}
        return made, [self.replace_image_token(made, index) for index in range(len(images))]

    def num_tokens(self, modality: str) -> int:
        """Placeholders of one image, video or audio input."""
        if modality == "image":
            return self.num_image_tokens()
        number = getattr(self, f"{modality}_prefix_length")
        if number is None:
            raise ValueError(
                f"The processor has no {modality}_prefix_length: pass it "
                f"{modality}_prefix_length=model.config.num_{modality}_tokens. [errors.md#processor]"
            )
        return number

    @property
    def unused_input_names(self) -> list[str]:
        # GPT-2 would add word embeddings for the first; the second is said by the placeholders.
        return ["token_type_ids", "num_patches"]

    @property
    def model_input_names(self) -> list[str]:
        parts = [getattr(self, name) for name in self._parts if name not in ("feature_extractor", *_FURTHER)]
        names = [name for part in parts for name in part.model_input_names]
        names += [f"pixel_values_{number}" for number in range(2, len(self.image_processors) + 1)]
        names += ["pixel_values_videos"] if self.video_token is not None else []
        if self.audio_token is not None:
            own = [name for name in self.feature_extractor.model_input_names if name != "attention_mask"]
            names += ["input_features" if name in _INPUT_NAMES else name for name in own]
            if "return_attention_mask" in inspect.signature(self.feature_extractor.__call__).parameters:
                names.append("input_features_mask")  # some name it and make none, some the other way round
        return [name for name in dict.fromkeys(names) if name not in self.unused_input_names]

    def count_image_tokens(self, text: str, modality: str = "image") -> int:
        """Placeholders in a text, one per image; such as a user's chat message smuggled in are not counted."""
        token = self.tokens.get(modality)
        return 0 if token is None else len(re.findall(f"(?<!{CONTROL_TOKEN_START}){re.escape(token)}", text))

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's, or its EOS: Seq2SeqTrainer pads by it what was generated."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def place_images(self, text: str, num_images: int, modality: str = "image") -> str:
        """The text with one placeholder per image; unchanged where it holds any."""
        if self.count_image_tokens(text, modality):
            return text
        placeholders = self.tokens.get(modality, "") * num_images
        return text + placeholders if self.image_position == "end" else placeholders + text

    # ---------------------------------------------------------------------------------- the hooks of ProcessorMixin
    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Open the images, give each text its own, put placeholders in and truncate: all before transformers' steps.

        Returns: images as a flat list in reading order, text as a list of strings.
        """
        # Private: transformers' `__call__` merges its keywords after this hook only.
        merged = self._merge_kwargs(self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        rescale = merged["images_kwargs"].get("do_rescale")
        text = None if text is None else self._texts(text)
        passed = {"image": images, "video": videos, "audio": audio}
        media = {modality: self.nest_media(modality, one, rescale) for modality, one in passed.items() if one is not None}
        if text is not None:
            placed = text
            # What comes last is put in first, so that at the start images stand before videos before audio.
            order = [one for one in self.tokens if one in media or any(self.count_image_tokens(own, one) for own in text)]
            for modality in order if self.image_position == "end" else order[::-1]:
                media[modality] = self._media_per_text(modality, media.get(modality), text), True
                counts = [len(own) for own in media[modality][0]]
                placed = [self.place_images(sample, count, modality) for sample, count in zip(placed, counts, strict=True)]
            tiles = self._count_tiles(media, rescale, merged["images_kwargs"], len(text))
            length = self._max_length(merged["text_kwargs"])
            final = placed if length is None else self._truncate(placed, length, merged["text_kwargs"], tiles)
            wants_mask = kwargs.get("return_offsets_mapping") and kwargs.get("return_text_replacement_offsets")
            if wants_mask and final != text:
                for index, (before, after) in enumerate(zip(text, final, strict=True)):
                    if not before.startswith(after) and not after.startswith(before):
                        raise ValueError(
                            f"Sample {index}: the assistant mask counts characters of the rendered chat, but text was "
                            "put or cut at its start. Write the images into the turns, and truncate on the right."
                            " [errors.md#padding]"
                        )
            text = final
        flat = {modality: [one for own in nested for one in own] for modality, (nested, _) in media.items()}
        images = self._load_images(flat.get("image", []), rescale, merged["images_kwargs"].get("input_data_format"))
        videos, audio = self._load_videos(flat.get("video", [])), self._load_audio(flat.get("audio", []))
        return images or None, text, videos or None, audio or None

    def _count_tiles(self, media: dict[str, Any], rescale: bool | None, images_kwargs: Any, texts: int) -> list[int]:
        """How many tiles each text's images have beyond one each; opens the images if any are cut."""
        options = self.tile_options(images_kwargs)
        if not options["crop_to_patches"] or "image" not in media:
            return [0] * texts
        nested = media["image"][0]
        opened = [self._load_images(own, rescale, images_kwargs.get("input_data_format")) for own in nested]
        media["image"] = (opened, True)
        return [sum(self.count_tiles(image, options) - 1 for image in own) for own in opened]

    @staticmethod
    def _texts(text: Any) -> list[str]:
        text = text.tolist() if isinstance(text, np.ndarray) else text
        if isinstance(text, str):
            return [text]
        if not isinstance(text, Iterable) or isinstance(text, Mapping | bytes):
            raise ValueError(
                f"`text` must be a string or a list of strings, got a {type(text).__name__}: {text!r:.80}. [errors.md#shape]"
            )
        texts = list(text)
        if not texts:
            raise ValueError(
                '`text` is an empty list: pass one text for each sample, or `""` for an image without words. [errors.md#shape]'
            )
        for index, one in enumerate(texts):
            if not isinstance(one, str):
                raise ValueError(
                    f"`text` must hold strings, but sample {index} is a {type(one).__name__}: {one!r:.80}. [errors.md#shape]"
                )
        return texts

    def _rescales(self, rescale: bool | None) -> bool:
        return getattr(self.image_processor, "do_rescale", True) if rescale is None else rescale

    def nest_media(self, modality: str, media: Any, rescale: bool | None = None) -> tuple[list[list[Any]], bool]:
        """Images (videos, audio) as one list per entry, and whether the caller nested them. The numbers of one array are of
        one range, unless `rescale` (`image_processor.do_rescale` by default) leaves them as they are."""
        if modality not in self.tokens:
            raise ValueError(
                f"This processor takes {list(self.tokens)} and text, and was given {modality}. [errors.md#not-loaded]"
            )
        is_one = IS_ONE[modality]
        same_range = modality == "video" or (modality == "image" and self._rescales(rescale))

        def split(value: Any) -> list[Any]:
            return list(one_range(value, f"the {modality}s") if same_range and hasattr(value, "dtype") else value)

        media = media.tolist() if getattr(media, "dtype", None) is np.dtype(object) else media
        entries = [media] if is_one(media) else split(media)
        nested = [[one] if one is None or is_one(one) else split(one) for one in entries]
        is_nested = any(one is None or not is_one(one) for one in entries)
        return [[one for one in own if one is not None] for own in nested], is_nested

    def _media_per_text(self, modality: str, media: tuple[list[list[Any]], bool] | None, text: list[str]) -> list[list[Any]]:
        """The images (videos, audio) of each text: nested ones say so themselves; flat ones go one to each text, or, where the
        placeholders say otherwise, in reading order."""
        token, noun = self.tokens[modality], "audio inputs" if modality == "audio" else f"{modality}s"
        counts = [self.count_image_tokens(sample, modality) for sample in text]
        nested, is_nested = ([[] for _ in text], True) if media is None else media
        total = sum(len(own) for own in nested)
        rule = f"The {token} tokens in the prompts should be the same as the number of {noun}, text by text."
        if not is_nested and (len(text) == 1 or max(counts) > 1 or (any(counts) and len(nested) != len(text))):
            rest = iter([one for own in nested for one in own])
            nested = [[one for _, one in zip(range(count), rest, strict=False)] for count in counts]
            nested[-1] += rest
        if len(nested) != len(text):
            kind = f"lists of {noun}" if is_nested else noun
            raise ValueError(
                f"{rule} Got {len(nested)} {kind} for {len(text)} texts: sample {min(len(nested), len(text))} has "
                f"only one of the two. Pass one, or one (possibly empty) list of {noun}, per text. [errors.md#placeholders]"
            )
        for index, (count, own) in enumerate(zip(counts, nested, strict=True)):
            if count and count != len(own):
                raise ValueError(
                    f"{rule} Sample {index}: its text holds {count} {token} but it has {len(own)} {noun} "
                    f"(batch: {sum(counts)} and {total}). Write one {token} each, or none: then they "
                    f"are put in; and pass nested {noun}, one list per text, where texts have several."
                    " [errors.md#placeholders]"
                )
        return nested

    def _load_images(self, images: list[Any], rescale: bool | None, layout: Any) -> list[Any]:
        """Open and convert. Arrays that are not to be rescaled are in their final range and stay as they are, and so do images
        in a store, which the tower has seen."""
        channels_first = None if layout is None else getattr(layout, "value", layout) == "channels_first"
        loaded = []
        for index, image in enumerate(images):
            if _is_stored(image):
                pass
            elif self._rescales(rescale) or not hasattr(image, "dtype"):
                image = load_rgb_image(image, f"image {index}", channels_first=channels_first)
            elif 0 in image.shape:
                raise ValueError(
                    f"Can't open image {index}: it is empty: its shape is {tuple(image.shape)}. [errors.md#image]"
                )
            elif image.ndim == 2:  # grey
                grey = image.detach().cpu().numpy() if hasattr(image, "detach") else image
                image = np.stack([grey] * 3, axis=0 if channels_first else -1)
            loaded.append(image)
        return loaded

    # ------------------------------------------------------------------------------------------------- truncation
    def _max_length(self, options: Mapping[str, Any]) -> int | None:
        """The length that the tokenizer would cut at, None where it would not."""
        truncation, length = options.get("truncation"), options.get("max_length")
        truncation = getattr(truncation, "value", truncation)
        if truncation is None and length is not None and options.get("padding", False) is False:
            truncation = True  # the tokenizers' own rule for a bare max_length
        if truncation in (None, False, "do_not_truncate") or options.get("text_pair") is not None:
            return None
        if length is None and self.tokenizer.model_max_length < _UNKNOWN_LENGTH:
            length = self.tokenizer.model_max_length
        return length

    def _truncate(self, text: list[str], max_length: int, options: Mapping[str, Any], tiles: Sequence[int]) -> list[str]:
        """Cut each text at a token's border, so that it fits with its placeholders, all of which stay.

        Images whose place was cut off move to the cut, in order. The tokenizer's truncation then has nothing to do.
        """
        names = "add_special_tokens", "sanitize_control_tokens"
        options = {name: options[name] for name in names if name in options and options[name] is not None}
        options |= {"return_attention_mask": False, "verbose": False}
        present = [modality for modality in self.tokens if any(self.count_image_tokens(one, modality) for one in text)]
        extra = {modality: self.num_tokens(modality) - 1 for modality in present}

        def lengths(samples: list[str], tiles: Sequence[int]) -> list[int]:
            ids = self.tokenizer(samples, **options)["input_ids"]
            return [
                len(one)
                + sum(more * self.count_image_tokens(text, modality) for modality, more in extra.items())
                + (own * self.num_image_tokens() if own else 0)
                for one, text, own in zip(ids, samples, tiles, strict=True)
            ]

        return [
            sample
            if length <= max_length
            else self._cut(index, sample, max_length, options, lambda one, own=own: lengths(one, [own]))
            for index, (sample, length, own) in enumerate(zip(text, lengths(text, tiles), tiles, strict=True))
        ]

    @property
    def _any_placeholder(self) -> re.Pattern:
        return re.compile(f"(?<!{CONTROL_TOKEN_START})(?:{'|'.join(map(re.escape, self.tokens.values()))})")

    def _cut(self, index: int, text: str, max_length: int, options: dict[str, Any], lengths: Any) -> str:
        """The longest part of one text that fits, by bisection over its tokens' borders (slow tokenizer: words')."""
        left = self.tokenizer.truncation_side == "left"

        def keep(position: int) -> str:
            before, after = text[:position], text[position:]
            gone = "".join(self._any_placeholder.findall(before if left else after))
            return gone + after if left else before + gone

        smallest = keep(len(text) if left else 0)
        if (needed := lengths([smallest])[0]) > max_length:
            counts = {modality: self.count_image_tokens(text, modality) for modality in self.tokens}
            placeholders = needed - len(self.tokenizer([smallest], **options)["input_ids"][0]) + sum(counts.values())
            held = " and ".join(f"{count} {modality}s" for modality, count in counts.items() if count) or "0 images"
            raise ValueError(
                f"Sample {index}: its {held} take {placeholders} placeholders, {needed} tokens with the "
                f"special tokens, but max_length is {max_length}; placeholders are never cut. Use max_length={needed} "
                "or more, fewer images per sample, or a connector with a smaller prefix_length. [errors.md#placeholders]"
            )
        borders: set[int] = set()
        if self.tokenizer.is_fast and not options.get("sanitize_control_tokens"):
            offsets = self.tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
            borders = {span[0] if left else span[1] for span in offsets if span[1] > span[0]}
        borders = borders or {match.start() for match in re.finditer(r"(?<=\S)(?=\s)|(?<=\s)(?=\S)", text)}
        marked = "|".join([f"{CONTROL_TOKEN_START}.*?{CONTROL_TOKEN_END}", *map(re.escape, self.tokens.values())])
        whole = [match.span() for match in re.finditer(marked, text)]
        inside = {position for start, end in whole for position in range(start + 1, end)}
        cuts = sorted(borders - inside, reverse=left)  # from the shortest part to the longest
        low, high = 0, len(cuts)
        while low < high:
            middle = (low + high) // 2
            fits = lengths([keep(cuts[middle])])[0] <= max_length
            low, high = (middle + 1, high) if fits else (low, middle)
        return keep(cuts[low - 1]) if low else smallest

    # ---------------------------------------------------------------------------------------------- chat templates
    def _with_images(self, template: str) -> str:
        special = tuple(sorted(self.tokenizer.special_tokens_map.items()))
        return with_media(template, tuple(self.tokens.items()), special)

    def template_of(self, chat_template: str | None = None) -> str | None:
        """The template by which `apply_chat_template(..., chat_template=...)` renders; `None` where there is none to take."""
        own = self.chat_template
        if isinstance(own, dict):
            chosen = own.get("default" if chat_template is None else chat_template, chat_template)
        else:
            chosen = own if chat_template is None else chat_template
        return None if chosen is None else self._with_images(chosen)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', by a template that places images (videos, audio) as it places text."""
        conversation = without_empty_contents(conversation)
        return super().apply_chat_template(conversation, self.template_of(chat_template), *args, **kwargs)

    def chat_prompt(self, conversation: str | Sequence[Mapping[str, Any]], images: int = 1) -> str:
        """
        A chat as a plain prompt, up to where the assistant answers: for `processor(text=…)`, rows with `prompt` and
        `evaluate(prompt=…)`. What the tokenizer puts before every text itself is not in it.

        Args:
            conversation: the turns, as for `apply_chat_template`; or what one user asks about `images` images before it.
        """
        if isinstance(conversation, str):
            content = [{"type": "image"}] * images + [{"type": "text", "text": conversation}]
            conversation = [{"role": "user", "content": content}]
        text = self.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.special_tokens_map.get("bos_token")
        if bos and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            return text.removeprefix(bos)
        return text

    # ------------------------------------------------------------------------------------------------ videos and audio
    def to_dict(self) -> dict[str, Any]:
        absent = {"num_frames", "video_prefix_length", "video_token"} if self.video_token is None else set()
        absent |= {"audio_prefix_length", "audio_token"} if self.audio_token is None else set()
        absent |= {"image_token"} if self.image_token is None else set()
        absent |= {name for name in _FURTHER if name not in self._parts}
        return {key: value for key, value in super().to_dict().items() if key not in absent}

    @property
    def tokens(self) -> dict[str, str]:
        """The placeholder of each medium that is taken: of `"image"`, `"video"` and `"audio"`."""
        named = {modality: getattr(self, f"{modality}_token", None) for modality in ("image", "video", "audio")}
        return {modality: token for modality, token in named.items() if token is not None}

    # transformers asks for one before it processes videos; frames are images here.
    @property
    def video_processor(self) -> Any:
        if self.video_token is None:
            raise AttributeError("This processor takes no videos. [errors.md#not-loaded]")
        return self.image_processor

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        merged = super()._merge_kwargs(*args, **kwargs)
        # transformers gives these to text and audio alike: a text's `max_length` would cut audio to as many samples.
        meant = kwargs.get("audio_kwargs") or {}
        for name in ("padding", "max_length", "truncation", "pad_to_multiple_of"):
            if name not in meant:
                merged["audio_kwargs"].pop(name, None)
        return merged

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        return self.tokens["video"] * self.num_tokens("video")

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        return self.tokens["audio"] * self.num_tokens("audio")

    def _load_videos(self, videos: list[Any]) -> list[list[Image.Image]]:
        if self.num_frames is None:
            return []
        return [load_video(video, self.num_frames, f"video {index}") for index, video in enumerate(videos)]

    def _load_audio(self, audio: list[Any]) -> list[np.ndarray]:
        rate = self.feature_extractor.sampling_rate if audio else 0
        return [load_waveform(one, rate, f"audio {index}") for index, one in enumerate(audio)]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs: Any) -> None:
        # They are counted there: transformers would stack each video's frames for it, and knows no stored image.
        pixel = np.zeros((1, 1, 3), dtype=np.uint8)
        images = None if images is None else [pixel if _is_stored(image) else image for image in images]
        videos = None if videos is None else [pixel[None]] * len(videos)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        takes = getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", {})
        options = {key: value for key, value in kwargs.items() if key in takes or not takes}
        frames = [frame for video in videos for frame in video]
        made = self.image_processor(frames, **{**options, "return_tensors": "pt"})
        if set(made) != {"pixel_values"}:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes {sorted(made)} of an image; frames of a video need a tower that "
                "takes `pixel_values` of one size alone. [errors.md#media]"
            )
        pixels = made["pixel_values"]
        pixels = pixels.unflatten(0, (len(videos), len(pixels) // len(videos)))
        replacements = [self.replace_video_token(made, index) for index in range(len(videos))]
        return {"pixel_values_videos": pixels}, replacements

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
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


__all__ = ["FrozenPrefixProcessor", "FrozenPrefixProcessorKwargs"]
