# SPDX-License-Identifier: Apache-2.0
"""The frozen backbones: where each came from, whether it is still the same one, and how it is loaded.

A checkpoint holds only what was trained. Everything else is loaded from the backbones' own repositories, so this file
decides what is recorded of a backbone and refuses one that is not what the connector was trained with.
"""

import copy
import functools
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # private: torch exports it under no public name
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .audio_towers import load_audio_tower
from .connectors import in_eval_mode
from .parts import PARTS
from .transformers_compat import dequantized, name_gguf_version, resolve_revision
from .vision_towers import class_in, load_vision_tower, pooler_options, quiet
from .weights import present


logger = logging.get_logger(__name__)

# Options about reaching a repository. They go on to the backbones; `revision` and `subfolder` name a place in *our*
# repository and don't.
HUB_OPTIONS = ("token", "cache_dir", "force_download", "local_files_only", "proxies")

_WINDOWS, _WINDOW_BYTES = 16, 64
FULL = "full:"  # how a fingerprint of whole files begins

AutoClass = type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM] | type[AutoModelForTextEncoding]
# The classes that each Auto class gives, by config.
_MAPPINGS: dict[AutoClass, Any] = {
    AutoModel: MODEL_MAPPING,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForTextEncoding: MODEL_FOR_TEXT_ENCODING_MAPPING,
}


@dataclass(frozen=True)
class LanguageModelGeometry:
    """What a connector needs of a language model: `embedding_dim`, the width of its word embeddings, and
    `num_embeddings`, how many ids its embedding module takes."""

    embedding_dim: int
    num_embeddings: int


def language_model_class(text_config: PreTrainedConfig, headless: bool = False) -> AutoClass:
    """The Auto class that gives the whole language model, head included; or one that reads texts and writes none."""
    if headless:
        return AutoModelForTextEncoding if type(text_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    return AutoModelForSeq2SeqLM if text_config.is_encoder_decoder else AutoModelForCausalLM


def build_language_model(text_config: PreTrainedConfig, headless: bool = False) -> PreTrainedModel:
    """A language model with random weights, its config object kept as it is (no copy)."""
    options = _without_pooler(text_config) if headless else {}
    return language_model_class(text_config, headless).from_config(text_config, **options)


def is_headless(language_model: PreTrainedModel) -> bool:
    """Whether a loaded text model reads only: it has no `generate()`."""
    return not language_model.can_generate()


def text_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the part that reads: the text sub-config of a dual model (CLIP, SigLIP …), or `config` itself."""
    half = getattr(config, "text_config", None)
    is_dual = getattr(config, "vision_config", None) is not None and not _has_mapping(config)
    return half if is_dual and isinstance(half, PreTrainedConfig) else config


def _has_mapping(config: PreTrainedConfig) -> bool:
    auto_class = language_model_class(config)
    return type(config) in _MAPPINGS[auto_class] or auto_class.__name__ in (getattr(config, "auto_map", None) or {})


def _without_pooler(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Many checkpoints of encoders lack their pooler's weights, which would be random; nothing here reads them."""
    model_class = class_in(_MAPPINGS[language_model_class(text_config, headless=True)], text_config)
    return {} if model_class is None else pooler_options(model_class)


def language_model_geometry(language_model: PreTrainedModel) -> LanguageModelGeometry:
    """
    The geometry of the embedding module itself: `hidden_size` is another number where embeddings are projected (OPT-350m).

    Raises:
        ValueError: if the model has no embedding module with a width and a number of rows.
    """
    embeddings = language_model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    dim = getattr(embeddings, "embedding_dim", None) or (weight.shape[-1] if weight is not None else None)
    rows = getattr(embeddings, "num_embeddings", None) or (weight.shape[0] if weight is not None else None)
    if dim is None or rows is None:
        raise ValueError(
            f"The input embeddings of {type(language_model).__name__} are a {type(embeddings).__name__} without a width "
            "or a number of rows, so no prefix can be written for it. [errors.md#language-model]"
        )
    return LanguageModelGeometry(embedding_dim=int(dim), num_embeddings=int(rows))


def probe_language_model(text_config: PreTrainedConfig, headless: bool = False) -> LanguageModelGeometry:
    """Geometry of the language model that `text_config` describes, on the meta device: no weight is allocated."""
    with torch.device("meta"):
        return language_model_geometry(build_language_model(text_config, headless))


@contextmanager
def fake_language_model(text_config: PreTrainedConfig, headless: bool = False) -> Iterator[PreTrainedModel]:
    """The described language model of fake tensors, for its shapes: no weight is allocated and nothing drawn."""
    # The device is named, for a checkpoint's model is built with another default.
    with torch.device("cpu"), FakeTensorMode(), torch.no_grad():
        yield build_language_model(copy.deepcopy(text_config), headless).eval()


def word_embedding_norm(language_model: PreTrainedModel, max_rows: int = 4096) -> float:
    """Median L2 norm of what the embedding module gives for a word (scaling inside the module included); a prefix far
    from it is ignored or makes training diverge. The median, because unused rows may be zero."""
    embeddings = language_model.get_input_embeddings()
    rows = language_model_geometry(language_model).num_embeddings
    device: Any = embeddings.weight.device
    ids = torch.linspace(0, rows - 1, min(rows, max_rows), device=device).long()
    with torch.no_grad(), present(embeddings):
        return embeddings(ids[None]).float().norm(dim=-1).median().item()


def find_placeholder_ids(tokenizer: Any, text_config: PreTrainedConfig, tokens: list[str], **kwargs: Any) -> list[int]:
    """
    The ids that the tokenizer of the language model, or the one at that place, gives, or would give next, to `tokens`.

    Large vocabularies are padded with rows that no token uses, and the next id falls into them. Where there is none it
    falls past the last row; the model then swaps it for a valid id before the lookup.
    """
    if isinstance(tokenizer, str):
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **kwargs)
        except Exception:  # none beside the model, or one that can't be built here: the processor will say which
            tokenizer = None
    if tokenizer is None:
        return [text_config.get_text_config().vocab_size + index for index in range(len(tokens))]
    tokenizer = copy.deepcopy(tokenizer)  # which may be the user's
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(tokens)  # type: ignore[return-value]  # a list for a list


def find_image_processor(vision_name_or_path: str, **kwargs: Any) -> Any:
    """The image processor beside a tower, or `None` where there is none (or its backend is not installed)."""
    try:
        return AutoImageProcessor.from_pretrained(vision_name_or_path, **kwargs)
    except (OSError, ValueError, ImportError):
        return None


def find_feature_extractor(audio_name_or_path: str, **kwargs: Any) -> Any:
    """The feature extractor beside an audio tower, or `None` where there is none."""
    try:
        return AutoFeatureExtractor.from_pretrained(audio_name_or_path, **kwargs)
    except (OSError, ValueError, ImportError):
        return None


# How sentence-transformers calls its ways of pooling -> ours. Divided by the root of the length, a mean keeps its direction.
_SENTENCE_POOLINGS = {"mean": "mean", "mean_sqrt_len": "mean", "cls": "cls", "lasttoken": "last"}


def find_sentence_pooling(text_name_or_path: str, **kwargs: Any) -> str | None:
    """How a sentence encoder pools its words, by the files that sentence-transformers writes beside the weights; `None` where
    there are none, or where `pool_text` has no such way, with a warning."""
    optional = {"_raise_exceptions_for_missing_entries": False, **kwargs}
    listed = cached_file(text_name_or_path, "modules.json", **optional)
    modules = [] if listed is None else json.loads(Path(listed).read_text(encoding="utf-8"))
    for module in modules:
        if not module["type"].endswith(".Pooling"):
            continue
        file = cached_file(text_name_or_path, f"{module['path']}/config.json", **optional)
        facts = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        # A switch for each way (`pooling_mode_mean_tokens`), or their names under one key.
        switched = [key.removeprefix("pooling_mode_") for key in facts if key.startswith("pooling_mode_") and facts[key]]
        ways = facts.get("pooling_mode") or [re.sub("_tokens?$", "", way) for way in switched]
        ways = [ways] if isinstance(ways, str) else ways
        if len(ways) == 1 and ways[0] in _SENTENCE_POOLINGS:
            return _SENTENCE_POOLINGS[ways[0]]
        logger.warning(
            f"`{text_name_or_path}` pools its words by {ways}, which is no `text_pooling` here: they are pooled "
            "by the default of its architecture, as it was not trained to be."
        )
    return None


def _weight_files(name_or_path: str, revision: str | None, gguf_file: str | None, **hub_options: Any) -> list[str]:
    """Paths of the safetensors, or the GGUF file, that hold a backbone's weights; empty if it has them in another format."""
    # Private, as transformers' own loaders do: an `OSError` is the same for what is missing and what is out of reach.
    optional = {"_raise_exceptions_for_missing_entries": False, "revision": revision, **hub_options}
    if gguf_file is not None:
        path = cached_file(name_or_path, gguf_file, **optional)
        return [] if path is None else [path]
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **optional)
    single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **optional)
    if single is not None:
        return [single]
    if index is None:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    paths = [cached_file(name_or_path, shard, revision=revision, **hub_options) for shard in shards]
    return [path for path in paths if path is not None]


def refuse_pickles(files: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if one of the weight files is no safetensors, or is cut off.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"`{file}` is no safetensors, though its index names it; what it is may run code when it is read. Save the "
                "model anew. [errors.md#checkpoint]"
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"`{file}` can't be read ({error}): it is damaged or not whole. Fetch or save it again. [errors.md#checkpoint]"
            ) from error


def fingerprint(
    name_or_path: str,
    revision: str | None = None,
    *,
    full: bool = False,
    gguf_file: str | None = None,
    **hub_options: Any,
) -> str | None:
    """
    SHA-256 over the names, dtypes and shapes of all tensors of a backbone's safetensors and over bytes of each of them:
    the whole of small tensors, evenly spread windows of large ones, so that checking a backbone costs milliseconds per
    gigabyte. Fine-tuning moves nearly every weight, so no tuned copy passes; shard boundaries don't matter. A few values
    that were edited by hand in a large tensor may lie between the windows.

    Args:
        full (`bool`, defaults to `False`):
            Of the whole files, as they are cut into shards, and named. The Hub's cache names a file by its SHA-256, so that
            nothing is read; in a folder every byte is, a second or so per gigabyte.
        gguf_file (`str`, *optional*): the file that holds the weights in their stead; it is always taken whole.

    Returns:
        `str`, beginning with `full:` for whole files; `None` for a backbone that has no such file.
    """
    paths = _weight_files(name_or_path, revision, gguf_file, **hub_options)
    if not paths:
        return None
    if full or gguf_file is not None:
        files = "".join(f"{Path(path).name} {file_digest(path)}\n" for path in paths)
        return f"{FULL}{hashlib.sha256(files.encode()).hexdigest()}"
    tensors: dict[str, bytes] = {}
    for path in paths:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + header_size + offset for offset in entry["data_offsets"])
                digest = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                if end - start <= _WINDOWS * _WINDOW_BYTES:
                    digest.update(data[start:end])
                else:
                    spread = end - start - _WINDOW_BYTES
                    places = [start + window * spread // (_WINDOWS - 1) for window in range(_WINDOWS)]
                    digest.update(b"".join([data[at : at + _WINDOW_BYTES] for at in places]))
                tensors[name] = digest.digest()
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest() if tensors else None


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file. A large file of the Hub lies in the cache under that name, so it is not read."""
    blob = Path(path).resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _context(part: str, name_or_path: str) -> str:
    what = PARTS[part].description
    return (
        f"The {what} `{name_or_path}` could not be loaded. If it is elsewhere now, name the place: "
        f'from_pretrained(..., {part}_base_model="id or folder").'
    )


def _load_language_model(
    name_or_path: str, *, config: PreTrainedConfig, headless: bool | None = False, **kwargs: Any
) -> PreTrainedModel:
    if headless is None:  # with its head where it has one, for then it can write as well
        half = text_half(config)
        if half is not config or not _has_mapping(config):
            return _load_text_encoder(name_or_path, config=half, **kwargs)
        if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder:
            model = _load_text_encoder(name_or_path, config=config, **kwargs)
            if reads_ahead(model):
                return model
    elif headless:
        return _load_text_encoder(name_or_path, config=config, **kwargs)
    loaded: Any = language_model_class(config).from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    model, info = loaded
    if info["missing_keys"] and headless is None:
        return _load_text_encoder(name_or_path, config=config, **kwargs)
    _refuse_missing(name_or_path, model, info, "the whole model, head included")
    # Only families that can be either have a flag for decoders, and some decoders lack it: so see what the model does.
    if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder and reads_ahead(model):
        raise ValueError(
            f"`{name_or_path}` ({type(model).__name__}) reads ahead: its prediction of a word depends on the words after it. "
            "Give a causal or encoder-decoder language model, or, if this one was trained as a decoder, set "
            "`is_decoder=True` in its config. [errors.md#language-model]"
        )
    return model


def _load_text_encoder(name_or_path: str, *, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    auto_class = language_model_class(config, headless=True)
    with quiet():  # that its head or pooler is left out is no news, and what is missing is raised below
        loaded: Any = auto_class.from_pretrained(
            name_or_path, config=config, output_loading_info=True, **_without_pooler(config), **kwargs
        )
    model, info = loaded
    _refuse_missing(name_or_path, model, info, "this text model")
    return model


def _refuse_missing(name_or_path: str, model: PreTrainedModel, info: dict[str, Any], wanted: str) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"`{name_or_path}` lacks {len(missing)} of the weights that {type(model).__name__} needs ({missing[:3]}…): "
            f"they would be random. Give a repository that holds {wanted}. [errors.md#no-parent]"
        )


def reads_ahead(language_model: PreTrainedModel) -> bool:
    """Whether what a text model gives for a word depends on the word behind it."""
    ids = torch.tensor([[0, 1], [0, 2]], device=language_model.device)
    with torch.no_grad(), in_eval_mode(language_model):
        outputs = language_model(input_ids=ids)
    first = (outputs.get("logits") if "logits" in outputs else outputs.last_hidden_state)[:, 0].float()
    return not torch.allclose(first[0], first[1], atol=1e-4, rtol=1e-3)


class AttentionOfAll(str):
    """An `attn_implementation` that was chosen for the whole model: a part that can't have it keeps its own."""


def takes_attention(part: str, model: str, attn_implementation: str, choose: Callable[[], Any]) -> Any:
    """
    What `choose` gives, or `None`, said in the log, where this part has no such attention (a convolutional tower has none).

    Raises:
        ValueError: transformers' own, for a name that no model knows.
    """
    try:
        return choose()
    except ValueError as error:
        if attn_implementation not in ("eager", *AttentionInterface().valid_keys()):
            raise
        logger.info(f"The {PARTS[part].description} {model} keeps its own attention, not {attn_implementation!r}: {error}")
        return None


def load_unrecorded(
    part: str, name_or_path: str, *, config: PreTrainedConfig, headless: bool | None = False, **kwargs: Any
) -> PreTrainedModel:
    """One backbone by its own `from_pretrained`, as [`load_base_model`], without a record."""
    if kwargs.get("gguf_file") is not None:
        name_gguf_version()
        # Unpacked: kernels for packed weights compute other bits, each its own, and have no gradients.
        kwargs = {**dequantized(), **kwargs}
    attention = kwargs.pop("attn_implementation", None)
    if attention is None and config._attn_implementation is not None:
        # An Auto class writes what is chosen for all into every config.
        attention = AttentionOfAll(config._attn_implementation)
    if isinstance(attention, AttentionOfAll):
        kwargs["attn_implementation"] = str(attention)
        load = functools.partial(load_unrecorded, part, name_or_path, config=config, headless=headless, **kwargs)
        if (model := takes_attention(part, name_or_path, attention, load)) is not None:
            return model
        config._attn_implementation = attention = None
    kwargs["attn_implementation"] = attention
    if PARTS[part].kind == "vision":
        return load_vision_tower(name_or_path, config=config, **kwargs)
    if PARTS[part].kind == "audio":
        return load_audio_tower(name_or_path, config=config, **kwargs)
    return _load_language_model(name_or_path, config=config, headless=headless, **kwargs)


def load_base_model(
    part: str,
    name_or_path: str,
    *,
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    headless: bool | None = False,
    full_fingerprint: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    Loads one backbone by its own `from_pretrained` and makes its record.

    Args:
        part (`str`): of `PARTS`: `"vision"`, `"text"`, `"audio"`, or a further vision tower, `"vision_2"`.
        name_or_path (`str`): id on the Hub or local folder.
        config (`PreTrainedConfig`, *optional*): used instead of the repository's own.
        revision (`str`, *optional*): branch, tag or commit; the commit it stands for goes into the record.
        headless (`bool`, *optional*, defaults to `False`):
            Of a language model: `True` loads it without its head, as what reads alone (BERT); `None` only where it has none
            or reads ahead.
        full_fingerprint (`bool`, defaults to `False`): whether whole files are fingerprinted, see [`fingerprint`].
        kwargs: options of `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `quantization_config`,
            `gguf_file`, `token`, …). The weights of a GGUF file are unpacked, unless `quantization_config=GgufConfig()`.

    Returns:
        The model, in eval mode, and its record, see [`record_of`].

    Raises:
        OSError: transformers' own, when the repository or folder can't be reached, with our sentence of context.
        ValueError: when weights are missing there that the model needs, or a file is named.
    """
    gguf_file = kwargs.get("gguf_file")
    _refuse_files(part, name_or_path, gguf_file)
    hub_options = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
    # `proxies` and `force_download` mean nothing for resolving a branch to a commit.
    resolvable = {k: v for k, v in hub_options.items() if k in ("token", "cache_dir", "local_files_only")}
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf:
        name_gguf_version()
    try:
        revision = resolve_revision(name_or_path, revision, file=gguf_file or "config.json", **resolvable)
        if config is None:
            code = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
            config = AutoConfig.from_pretrained(name_or_path, revision=revision, **gguf, **hub_options, **code)
        model = load_unrecorded(part, name_or_path, config=config, headless=headless, revision=revision, **kwargs)
    except OSError as error:
        # transformers' own error classes (gated, not found, offline …) pass through; only the sentence is ours.
        error.args = (f"{_context(part, name_or_path)} {error.args[0] if error.args else ''}", *error.args[1:])
        raise
    hub_options.pop("force_download", None)  # the files were fetched a moment ago
    return model, record_of(part, model, name_or_path, revision, full=full_fingerprint, **gguf, **hub_options)


def _refuse_files(part: str, name_or_path: str, gguf_file: str | None) -> None:
    what = PARTS[part].description
    if gguf_file is not None and part != "text":
        raise ValueError(
            f"`{part}_gguf_file={gguf_file!r}`: transformers reads no {what} from a GGUF file, only language models."
            " [errors.md#no-parent]"
        )
    is_folder = os.path.isdir(name_or_path)
    if os.path.isfile(name_or_path) or name_or_path.endswith(".gguf") and not is_folder:
        folder, name = os.path.split(name_or_path)
        way_out = f' Of a GGUF file name both: "{folder or "."}", text_gguf_file="{name}".' if name.endswith(".gguf") else ""
        raise ValueError(
            f"`{name_or_path}` is a file: name the folder, or the id on the Hub, of the {what}, with its config and weights "
            f"as transformers saves them.{way_out} [errors.md#no-parent]"
        )
    if is_folder and gguf_file is None and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        files = sorted(file.name for file in Path(name_or_path).glob("*.gguf"))
        if files:
            raise ValueError(
                f'`{name_or_path}` holds no config.json, but {files}: name one of them, text_gguf_file="{files[0]}".'
                " [errors.md#no-parent]"
            )


def record_of(
    part: str,
    model: PreTrainedModel,
    name_or_path: str,
    revision: str | None,
    *,
    full: bool = False,
    gguf_file: str | None = None,
    **hub_options: Any,
) -> dict[str, Any]:
    """
    What a config keeps of a backbone that was loaded from a place.

    Returns:
        `dict`: `name_or_path`, `revision` (commit), `dtype`, `fingerprint`; `gguf_file` where that holds the weights;
        `processor_files`, see [`processor_files`], of a folder; and `quantization`, the whole config, where it was quantised
        while loading.
    """
    commit = getattr(revision, "resolved", revision)
    is_folder = os.path.isdir(name_or_path)
    record: dict[str, Any] = {
        "name_or_path": os.path.abspath(name_or_path) if is_folder else str(name_or_path),
        "revision": None if is_folder or commit is None else str(commit),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(name_or_path, revision, full=full, gguf_file=gguf_file, **hub_options),
    }
    if gguf_file is not None:  # which holds the tokenizer too
        record["gguf_file"] = gguf_file
    elif is_folder and (files := processor_files(part, name_or_path)):
        record["processor_files"] = files
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and is_gguf(quantizer.quantization_config) and not getattr(quantizer, "packed_modules", None):
        # All was unpacked, but of older families of GGUF files transformers says that nothing was.
        quantizer.remove_quantization_config(model)
    elif quantizer is not None and (gguf_file is not None or not quantizer.pre_quantized):
        # Quantised while loading: a choice of this session, and not what lies in the backbone's repository.
        record["quantization"] = json.loads(quantizer.quantization_config.to_json_string(use_diff=False))
    return record


_PROCESSOR_FILES = {
    "vision": ("preprocessor_config.json", "processor_config.json"),
    "audio": ("preprocessor_config.json", "processor_config.json"),
    "text": (
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt",
        "tekken.json", "*.model", "*.spm", "*.tiktoken",
    ),
}  # fmt: skip


def processor_files(part: str, folder: str | Path) -> dict[str, str]:
    """Digests, by name, of the files in a backbone's folder that its tokenizer, image processor or feature extractor is made
    of. (On the Hub the recorded commit decides what they hold.)"""
    paths = sorted(
        {path for pattern in _PROCESSOR_FILES[PARTS[part].kind] for path in Path(folder).glob(pattern) if path.is_file()}
    )
    return {path.name: file_digest(path)[:16] for path in paths}


def changed_processor_files(part: str, record: dict[str, Any] | None) -> list[str]:
    """Names of those files of a recorded backbone that are not as they were recorded; those of earlier versions weren't."""
    recorded = (record or {}).get("processor_files")
    if not record or not recorded or not os.path.isdir(record["name_or_path"]):
        return []
    now = processor_files(part, record["name_or_path"])
    return sorted(name for name in {*recorded, *now} if recorded.get(name) != now.get(name))


def is_gguf(quantization_config: Any) -> bool:
    method = getattr(quantization_config, "quant_method", None)
    return getattr(method, "value", method) == "gguf"


def record_of_loaded(part: str, model: PreTrainedModel) -> dict[str, Any] | None:
    """
    The record of a backbone that the user loaded, where its weights can't be saved, or come out of a GGUF file: then
    transformers has kept what it was loaded with. `None` for one that is saved whole.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    place = model.name_or_path
    if quantizer is not None and place:
        gguf_file = getattr(quantizer.quantization_config, "gguf_file", None)
        try:
            revision = resolve_revision(place)
            return record_of(part, model, place, revision, gguf_file=gguf_file)
        except OSError as error:
            logger.warning(f"The {PARTS[part].description} is not at `{place}` any more, from where it was loaded. {error}")
    if place:
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e6
        logger.warning(
            f"The {PARTS[part].description} was joined as a loaded {type(model).__name__}, which doesn't say which files it "
            f"came from, so that a checkpoint holds it whole ({size:.1f} MB). Name its id or folder in its place "
            f'(`{place}`; of a GGUF file with text_gguf_file="x.gguf"), and it is recorded.'
        )
    return None


def verify_fingerprint(part: str, recorded: dict[str, Any], loaded: dict[str, Any]) -> None:
    """
    Refuses a backbone that is not the one the connector was trained with.

    Raises:
        ValueError: naming both fingerprints and the override.
    """
    if recorded["fingerprint"] == loaded["fingerprint"]:  # or neither has safetensors
        return
    raise ValueError(
        f"The {PARTS[part].description} at `{loaded['name_or_path']}` has fingerprint "
        f"{loaded['fingerprint']}, but the connector was trained with {recorded['fingerprint']} (from "
        f"`{recorded['name_or_path']}`, revision {recorded['revision']}): its weights have changed, and the connector "
        f'would write for another model. Restore that backbone, or pass {part}_base_model="id or folder" to '
        "from_pretrained to use, and record, another one knowingly. [errors.md#another-parent]"
    )


def max_learned_positions(language_model: PreTrainedModel) -> int | None:
    """How many positions a table of learned position embeddings holds; `None` where positions are computed (rotary,
    ALiBi, relative) and a longer input is no error. Known by an embedding table of that length."""
    config = language_model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    words, rows = language_model.get_input_embeddings(), language_model_geometry(language_model).num_embeddings
    for module in language_model.modules():
        if isinstance(module, nn.Embedding) and module is not words:
            # Some tables have a few rows more for padding offsets.
            if positions <= module.num_embeddings <= positions + 2 and module.num_embeddings != rows:
                return positions
    return None


def skips_padding(language_model: PreTrainedModel) -> bool:
    """Whether in a recurrent language model a masked word in front leaves no trace: whatever its id, the logits of the next
    word must be the same."""
    ids = torch.tensor([[0, 1], [2, 1]], device=language_model.device)
    mask = torch.tensor([[0, 1], [0, 1]], device=language_model.device)
    with torch.no_grad(), in_eval_mode(language_model):
        logits = language_model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
    return torch.allclose(logits[0], logits[1], atol=1e-4, rtol=1e-4)


__all__ = [
    "build_language_model", "changed_processor_files", "find_feature_extractor", "find_image_processor",
    "find_placeholder_ids", "find_sentence_pooling", "fingerprint", "is_headless", "language_model_geometry",
    "load_base_model",
    "max_learned_positions", "probe_language_model", "reads_ahead", "skips_padding", "text_half", "verify_fingerprint",
    "word_embedding_norm",
]  # fmt: skip
