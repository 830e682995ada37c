"""llama.cpp, two ways: prefixes handed to a language model's GGUF in process, and a projector file for its own programs.

    reader = LlamaCppModel(model, "words.gguf")            # any tower, any connector
    ids = reader.generate(**processor(images=image, text="<image> what is it?", return_tensors="pt"), max_new_tokens=24)

    export_mmproj(model, "mmproj.gguf", processor)         # SigLIP with a linear or MLP connector
    # llama-server -m words.gguf --mmproj mmproj.gguf

The first runs tower and connector in torch and the language model in llama.cpp, whatever its GGUF is quantised to. A batch of
embeddings is out of reach of the Python names of xllamacpp, so it calls the C interface (`llama.h`) that is compiled into that
package. Needs the extra `llama-cpp`; `export_mmproj` the extra `gguf` alone.
"""

import ctypes
import logging
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..connectors import LinearConnector, MLPConnector
from ..modeling_frozen_prefix import FrozenPrefixForConditionalGeneration, FrozenPrefixModel
from .graphs import why_not_a_reader


logger = logging.getLogger(__name__)

_CHUNK = 512  # what llama.cpp reads at a time, `n_ubatch`
_SAME = 0.95  # cosine of logits; a quantised table of embeddings stays far above, another scale or another file far below


# --------------------------------------------------------------------------------------------------------- C interface
class _Batch(ctypes.Structure):
    """`llama_batch`. Positions, sequences and outputs left out: one sequence that goes on, logits of the last entry."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class _Params(ctypes.Structure):
    """Room for parameters that are passed by value: more than any llama.cpp needs, and the rest the C side leaves aside."""

    _fields_ = [("values", ctypes.c_int32 * 256)]


# Where `llama_context_params` has what is set here, and what stands there by default: a release that has moved it is refused.
_N_CTX, _FLASH_ATTENTION, _TYPE_K, _TYPE_V = 0, 13, 26, 27
_DEFAULTS = {0: 512, 1: 2048, 2: _CHUNK, 3: 1, 10: -1, 11: -1, 12: -1, _FLASH_ATTENTION: -1, _TYPE_K: 1, _TYPE_V: 1}
_KEPT = {"float32": 0, "float16": 1}  # `ggml_type`

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@_LOG
def _log(level: int, text: bytes, _: Any) -> None:
    logger.debug(text.decode("utf-8", "replace").rstrip())


def _c_interface() -> Any:
    try:
        from xllamacpp import xllamacpp as binding
    except ImportError as error:
        raise ImportError(
            f"Reading a GGUF by llama.cpp needs the package xllamacpp: pip install 'frozen-prefix[llama-cpp]'. {error}"
            " [errors.md#extra]"
        ) from error
    library = ctypes.CDLL(binding.__file__)
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    declared = {
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_model_free": (None, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (whole, [pointer]),
        "llama_model_n_embd": (whole, [pointer]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (whole, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, whole]),
    }
    absent = [name for name in declared if not hasattr(library, name)]
    if not absent:
        for name, (result, arguments) in declared.items():
            getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
        values = library.llama_context_default_params().values
        absent = ["llama_context_params"] if any(values[at] != value for at, value in _DEFAULTS.items()) else []
    if absent:
        from importlib.metadata import version

        raise ImportError(
            f"xllamacpp {version('xllamacpp')} has another C interface than this package knows ({', '.join(absent)}): install "
            "the release that docs/llama_cpp.md names, or a later frozen-prefix. [errors.md#versions]"
        )
    return library


# ------------------------------------------------------------------------------------------------------------ in process
def _core(model: FrozenPrefixForConditionalGeneration) -> FrozenPrefixModel:
    if what := why_not_a_reader(model.config):
        raise ValueError(
            f"This model {what}, and llama.cpp takes prefixes among the words of a decoder alone: serve it by `frozen-prefix "
            "serve`, which runs the model itself. [errors.md#export]"
        )
    return cast(FrozenPrefixModel, model.base_model)


class LlamaCppModel:
    """
    The language model of a frozen-prefix model read by llama.cpp, out of a GGUF file, in this process. Words go in as ids,
    images as what the connector wrote. One sequence at a time, greedy.

    Args:
        model ([`FrozenPrefixForConditionalGeneration`]): with a causal language model and `fusion="prefix"`; any tower, any
            connector. Its tower and connector encode.
        gguf_file (`str` or `PathLike`): the same language model as a GGUF file, of any quantisation, its vocabulary unchanged.
        n_ctx (`int`, defaults to 4096): tokens and prefix vectors that one prompt and its answer may have together.
        cache_dtype (`"float32"` or `"float16"`, defaults to `"float32"`): of keys and values; llama.cpp's own is float16,
            which halves the cache, and whose rounding can change a word.

    Raises:
        ImportError: no xllamacpp, or one with another C interface.
        ValueError: an encoder-decoder, cross-attention, a file that llama.cpp can't read, of another width, or that reads the
            embeddings of words otherwise than the words.
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        gguf_file: str | PathLike[str],
        *,
        n_ctx: int = 4096,
        cache_dtype: str = "float32",
    ):
        self._model = self._context = None
        self._scale = 1.0
        if cache_dtype not in _KEPT:
            raise ValueError(f"cache_dtype={cache_dtype!r}: choose one of {', '.join(map(repr, _KEPT))}. [errors.md#choices]")
        if n_ctx < 1:
            raise ValueError(f"n_ctx={n_ctx} must be a positive number of tokens. [errors.md#too-long]")
        self.model, self.core = model, _core(model)
        self._c = _c_interface()
        self._c.llama_log_set(_log, None)  # of the whole process, as llama.cpp has it
        self._model = self._c.llama_model_load_from_file(fspath(gguf_file).encode(), self._c.llama_model_default_params())
        if not self._model:
            raise ValueError(
                f"llama.cpp can't read {fspath(gguf_file)!r}: its reason is in the log of {__name__!r} (DEBUG)."
                " [errors.md#export]"
            )
        width = self._c.llama_model_n_embd(self._model)
        if width != model.config.embedding_dim:
            raise ValueError(
                f"{fspath(gguf_file)!r} has embeddings of {width} numbers, and the connector writes "
                f"{model.config.embedding_dim}: pass the GGUF of the language model that it was trained with."
                " [errors.md#another-parent]"
            )
        params = self._c.llama_context_default_params()
        params.values[_N_CTX] = n_ctx
        params.values[_TYPE_K] = params.values[_TYPE_V] = _KEPT[cache_dtype]
        if cache_dtype == "float32":
            params.values[_FLASH_ATTENTION] = 0
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(
                f"llama.cpp makes no context of n_ctx={n_ctx}: see the log of {__name__!r} (DEBUG). [errors.md#too-long]"
            )
        self.vocab_size: int = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._check(fspath(gguf_file))

    def close(self) -> None:
        """Frees what llama.cpp holds; the model stays."""
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._model = self._context = None

    __del__ = close

    def _check(self, file: str) -> None:
        # Of Gemma and Gemma 2 llama.cpp scales what is handed in as it does words; and a file may be of another model.
        words = torch.arange(min(8, self.vocab_size))
        embedded = self.model.get_input_embeddings()(words[None].to(self.model.device))[0]
        expected = self._first_logits(words)
        cosines = []
        for scale in (1.0, self.model.config.embedding_dim**-0.5):
            self._scale = scale
            logits = self._first_logits(embedded)
            cosines.append(float(expected @ logits / np.sqrt((expected @ expected) * (logits @ logits))))
            if cosines[-1] > _SAME:
                return
        raise ValueError(
            f"From {file!r} llama.cpp reads words and the embeddings of the same words differently (their logits have a "
            f"cosine of {max(cosines):.2f}): it is the GGUF of another language model. Pass that of the one that the "
            "connector was trained with. [errors.md#another-parent]"
        )

    def _first_logits(self, entries: torch.Tensor) -> np.ndarray:
        self._begin()
        self._read(entries)
        return self._logits().astype(np.float64)

    def _begin(self) -> None:
        self._used = 0
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _read(self, entries: torch.Tensor) -> None:
        """Ids `(n,)` or embeddings `(n, embedding_dim)`, after what was read before."""
        room = self._c.llama_n_ctx(self._context)
        if self._used + len(entries) > room:
            raise ValueError(
                f"{self._used + len(entries)} tokens and prefix vectors don't go into n_ctx={room}: make the reader with a "
                "larger one, or ask for fewer new tokens. [errors.md#too-long]"
            )
        name, dtype = ("embd", np.float32) if entries.is_floating_point() else ("token", np.int32)
        entries = entries.detach().float() * self._scale if name == "embd" else entries
        for part in entries.cpu().split(_CHUNK):
            values = np.ascontiguousarray(part.numpy(), dtype=dtype)
            failed = self._c.llama_decode(self._context, _Batch(len(values), **{name: values.ctypes.data}))
            if failed:
                raise RuntimeError(
                    f"llama_decode gave {failed} for {len(values)} entries: see the log of {__name__!r} (DEBUG)."
                    " [errors.md#export]"
                )
        self._used += len(entries)

    def _logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, -1), (self.vocab_size,))

    @torch.no_grad()
    def stream(self, input_ids: torch.Tensor, *, max_new_tokens: int = 20, **inputs: Any) -> Iterator[int]:
        """Ids as they come, an end-of-sequence id last where one is said.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, sequence)`): as the processor gives them, placeholders among them.
            max_new_tokens (`int`, defaults to 20): at most so many.
            inputs: what else the processor gives, such as `pixel_values`.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1:
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)}: one prompt at a time, (1, sequence). [errors.md#shape]"
            )
        mask = inputs.pop("attention_mask", None)
        media = {name: value for name, value in inputs.items() if name != "token_type_ids" and value is not None}
        _, embedded, _ = self.core.merge(input_ids.to(self.model.device), None, media)
        ids = input_ids[0].cpu()
        seen = self.core.placeholders(ids)
        kept = torch.ones_like(seen) if mask is None else mask[0].cpu().bool()
        self._begin()
        edges = [0, *((seen[1:] != seen[:-1]).nonzero()[:, 0] + 1).tolist(), len(ids)]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            entries = embedded[0, start:stop] if embedded is not None and bool(seen[start]) else ids[start:stop]
            self._read(entries[kept[start:stop].to(entries.device)])
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for left in range(max_new_tokens - 1, -1, -1):
            chosen = int(self._logits().argmax())
            yield chosen
            if chosen in ends or not left:
                return
            self._read(torch.tensor([chosen]))

    def generate(self, input_ids: torch.Tensor, *, max_new_tokens: int = 20, **inputs: Any) -> torch.Tensor:
        """As [`LlamaCppModel.stream`], all at once: `(1, sequence + new tokens)`, as `model.generate` gives them."""
        new = list(self.stream(input_ids, max_new_tokens=max_new_tokens, **inputs))
        return torch.cat([input_ids, torch.tensor([new], dtype=input_ids.dtype, device=input_ids.device)], dim=1)


# --------------------------------------------------------------------------------------------------- a file of the projector
_EPS = 1e-6  # of the connector's norm


def _not_in_mmproj(model: FrozenPrefixForConditionalGeneration, processor: Any) -> list[str]:
    """What of this model llama.cpp's projector `mlp` can't say."""
    config, core = model.config, _core(model)
    problems = []
    tower, connector = core.vision_tower, core.connector
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if kind != "siglip_vision_model":
        problems.append(f"a tower of type {kind!r} (SigLIP alone, at one size)")
    elif tower.config.hidden_act not in ("gelu_pytorch_tanh", "quick_gelu"):
        problems.append(f"a tower with hidden_act={tower.config.hidden_act!r} (gelu_pytorch_tanh and quick_gelu alone)")
    if (towers := len(config.vision_parts)) > 1:
        problems.append(f"{towers} vision towers")
    if type(connector) not in (LinearConnector, MLPConnector):
        problems.append(f"the connector {config.connector_type!r} ('linear' and 'mlp' alone)")
    elif connector.positions is not None:
        problems.append("position_embedding=True")
    if connector.separator is not None:
        problems.append("separator=True")
    if config.vision_feature_select_strategy == "pooled":
        problems.append("vision_feature_select_strategy='pooled', one vector for the image")
    normed = isinstance(connector.input_norm, torch.nn.LayerNorm)
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer={layer!r}, several layers")
    elif layer == -1 and normed:
        problems.append(
            "two norms in a row, the tower's last and the connector's (join with vision_feature_layer=-2, or with "
            "input_norm=False)"
        )
    if normed and kind == "siglip_vision_model" and tower.config.layer_norm_eps != _EPS:
        problems.append(f"a tower with layer_norm_eps={tower.config.layer_norm_eps} beside the connector's {_EPS}")
    image_processor = processor.image_processor
    scale = getattr(image_processor, "rescale_factor", None)
    if scale is None or abs(scale * 255 - 1) > 1e-6 or not getattr(image_processor, "do_normalize", False):
        problems.append(f"an image processor with rescale_factor={scale} and do_normalize (1/255 and True alone)")
    if len(config.vision_parts) > 1:
        problems.append(f"{len(config.vision_parts)} vision towers")
    if processor.crop_to_patches:
        problems.append("tiles (crop_to_patches=True)")
    return problems


def _tensors(core: FrozenPrefixModel, layer: int) -> tuple[dict[str, torch.Tensor], int]:
    """llama.cpp's names, and how many layers of the tower are run."""
    tower: Any = core.vision_tower
    state = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    blocks = tower.config.num_hidden_layers + 1 + layer if layer < 0 else layer
    names = {
        "v.patch_embd": "embeddings.patch_embedding",
        "v.position_embd": "embeddings.position_embedding",
    }
    for block in range(blocks):
        ours = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
        ours |= {"attn_out": "self_attn.out_proj", "ln1": "layer_norm1", "ln2": "layer_norm2"}
        ours |= {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
        names |= {f"v.blk.{block}.{theirs}": f"encoder.layers.{block}.{name}" for theirs, name in ours.items()}
    if layer == -1:
        names["v.post_ln"] = "post_layernorm"
    found = {
        f"{theirs}.{kind}": state[f"{name}.{kind}"]
        for theirs, name in names.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in state
    }
    connector: Any = core.connector
    if isinstance(connector.input_norm, torch.nn.LayerNorm):
        found |= {f"v.post_ln.{kind}": getattr(connector.input_norm, kind) for kind in ("weight", "bias")}
    output = connector.output
    if isinstance(connector, MLPConnector):
        first: Any = connector.hidden[0]
        found |= {"mm.0.weight": first.weight, "mm.0.bias": first.bias, "mm.2.weight": output.weight}
    else:
        # The graph has a GELU behind its first map: gelu(x) - gelu(-x) = x.
        same = torch.eye(len(output.weight), device=output.weight.device)
        found["mm.0.weight"] = torch.cat([output.weight.float(), -output.weight.float()])
        found["mm.0.bias"] = found["mm.0.weight"].new_zeros(2 * len(output.weight))
        found["mm.2.weight"] = torch.cat([same, -same], dim=1)
    return {**found, "mm.2.bias": output.bias}, blocks


def export_mmproj(
    model: FrozenPrefixForConditionalGeneration, file: str | PathLike[str], processor: Any, *, dtype: str = "float32"
) -> Path:
    """
    Writes tower and connector as the `mmproj` file of llama.cpp's own programs (`llama-server`, `llama-mtmd-cli`), with their
    projector `mlp`: for a SigLIP tower with a `linear` or `mlp` connector.

    llama.cpp prepares images itself: it pads them to a square where the processor here stretches them, so that words are those
    of `generate()` for square images alone. The GELU of an `mlp` connector is its tanh form there.

    Args:
        model ([`FrozenPrefixForConditionalGeneration`]): in memory, both parts loaded.
        file (`str` or `PathLike`): where to write.
        processor ([`FrozenPrefixProcessor`]): for mean and standard deviation of the pixels.
        dtype (`"float32"` or `"float16"`, defaults to `"float32"`): of the matrices.

    Returns:
        `Path`: of the file.

    Raises:
        ValueError: names everything that llama.cpp's programs can't express; [`LlamaCppModel`] takes any tower and connector.
        ImportError: without the extra `gguf`.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"Writing GGUF files needs the package gguf: pip install 'frozen-prefix[gguf]'. {error} [errors.md#extra]"
        ) from error
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r}: choose 'float32' or 'float16'. [errors.md#choices]")
    problems = _not_in_mmproj(model, processor)
    if problems:
        raise ValueError(
            f"llama.cpp's own programs can't express {'; '.join(problems)}. `LlamaCppModel(model, gguf_file)` runs any tower "
            "and any connector beside llama.cpp, in process. [errors.md#export]"
        )
    core, image_processor = _core(model), processor.image_processor
    tower: Any = core.vision_tower
    tensors, blocks = _tensors(core, cast(int, model.config.vision_feature_layer))
    writer = gguf.GGUFWriter(fspath(file), "clip")
    writer.add_name("frozen-prefix connector and tower")
    writer.add_file_type(0 if dtype == "float32" else 1)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", tower.config.hidden_act == "gelu_pytorch_tanh")
    sizes = {
        "image_size": tower.config.image_size,
        "patch_size": tower.config.patch_size,
        "embedding_length": tower.config.hidden_size,
        "feed_forward_length": tower.config.intermediate_size,
        "attention.head_count": tower.config.num_attention_heads,
        "block_count": blocks,
        "projection_dim": model.config.embedding_dim,
    }
    for name, value in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", tower.config.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [blocks])  # else the last one is left out
    writer.add_array("clip.vision.image_mean", [float(value) for value in image_processor.image_mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in image_processor.image_std])
    for name, value in tensors.items():
        kept = torch.float16 if dtype == "float16" and value.ndim > 1 and not name.startswith("mm.") else torch.float32
        writer.add_tensor(name, value.detach().to("cpu", kept).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(file)


__all__ = ["LlamaCppModel", "export_mmproj"]
