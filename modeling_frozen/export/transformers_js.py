"""transformers.js: a model for browsers and Node, in the files of LLaVA, for its class `LlavaForConditionalGeneration`.

    export_transformers_js(model, "eyes-js", processor, dtypes=("fp32", "q8"))
    # const model = await AutoModelForImageTextToText.from_pretrained("eyes-js")

Three graphs: `vision_encoder` (tower and connector), `embed_tokens`, and `decoder_model_merged`, the language model with its
cache of keys and values. transformers.js asks the config only how many layers of cache there are and where the image goes;
what is computed stands in the graphs, so that any decoder with such a cache can be written, under LLaVA's name.

Needs the extra `export`, and transformers 5.23 or later.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..backbones import language_model_geometry
from ..modeling_frozen_prefix import FrozenPrefixForConditionalGeneration, FrozenPrefixModel
from ..transformers_compat import cache_argument, cache_of, forward_parameters
from .graphs import _core, _exporter, export_image_encoder, why_not_a_reader


# Of transformers.js: how weights are stored -> the end of a file's name.
DTYPES = {"fp32": "", "q8": "_quantized", "int8": "_int8", "uint8": "_uint8", "q4": "_q4"}
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
# What goes into one protobuf file, less some room for the graph.
_MOST_BYTES = 2**31 - 2**26
_OTHER_WAY = (
    "Serve it instead (`frozen-prefix serve`), or export its graphs for a program of your own (`export_image_encoder`, or "
    "transformers' `HfExporter.export_for_generation`)."
)


class _Embedding(nn.Module):
    def __init__(self, model: FrozenPrefixForConditionalGeneration):
        super().__init__()
        self.config, self.words = model.config, model.get_input_embeddings()
        self.placeholders = list(model.config.placeholder_ids.values())

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        for placeholder in self.placeholders:  # may lie past the table; its vector is overwritten
            input_ids = torch.where(input_ids == placeholder, torch.zeros_like(input_ids), input_ids)
        return {"inputs_embeds": self.words(input_ids)}


class _Decoder(nn.Module):
    """The language model over tensors alone: a cache of any length, none included, and the logits of the last word."""

    only_end: torch.Tensor

    def __init__(self, model: FrozenPrefixForConditionalGeneration):
        super().__init__()
        core = _core(model)
        self.language_model = language_model = cast(PreTrainedModel, core.language_model)
        self.config, self.names = language_model.config, forward_parameters(type(language_model))
        end = model.generation_config.eos_token_id
        self.max_positions = None if end is None else core.max_positions
        if self.max_positions is not None:
            rows = language_model_geometry(language_model).num_embeddings
            self.register_buffer("only_end", torch.full((rows,), torch.finfo(torch.float32).min), persistent=False)
            self.only_end[end] = 0

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        # Without a config every layer keeps all it has seen, behind which a window's mask is right as well: transformers.js
        # has one length for all.
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "use_cache": True}
        inputs[cache_argument(self.names)] = cache
        if "logits_to_keep" in self.names:
            inputs["logits_to_keep"] = 1
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        outputs = self.language_model(**inputs)
        logits = outputs.logits[:, -1:]
        if self.max_positions is not None:  # transformers.js has no limit of its own, and the next word would have no place
            is_full = attention_mask.sum(-1) >= self.max_positions
            logits = torch.where(is_full[:, None, None], self.only_end, logits)
        return {"logits": logits, "present": _tensors(cast(DynamicCache, cache_of(outputs)))}


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (cast(Any, layer).keys, cast(Any, layer).values)]


def _sample_of_decoder(core: FrozenPrefixModel) -> dict[str, Any] | str:
    """Inputs for [`_Decoder`], two rows of five words behind three; or why there are none."""
    language_model = cast(PreTrainedModel, core.language_model)
    what = f"the language model {type(language_model).__name__}, which keeps no keys and values"
    if core.is_recurrent or not core.keeps_cache:
        return what
    device = language_model.device
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    cache = DynamicCache()
    with torch.no_grad():
        language_model(input_ids=ids, use_cache=True, **{cache_argument(forward_parameters(type(language_model))): cache})
    past = [getattr(layer, half, None) for layer in cache.layers for half in ("keys", "values")]
    if not past or any(one is None or one.ndim != 4 or one.shape[2] != 3 for one in past):
        return what
    embeds = core.embed_words(torch.zeros(2, 5, dtype=torch.long, device=device)).detach()
    sample: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": torch.ones(2, 8, dtype=torch.long, device=device)}
    sample["past"] = [cast(torch.Tensor, one).detach().clone() for one in past]
    if "position_ids" in forward_parameters(type(language_model)):
        sample["position_ids"] = torch.arange(3, 8, device=device).expand(2, -1).contiguous()
    return sample


# -------------------------------------------------------------------------------------------------------- what can't be said
def _plain_image_processor(image_processor: Any) -> dict[str, Any] | str:
    """The config that transformers.js reads for resize, centre crop, rescale and normalise; or why these are not all."""
    saved = image_processor.to_dict()
    name = type(image_processor).__name__
    keys = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    config = {key: saved[key] for key in (*keys, "do_normalize", "image_mean", "image_std") if saved.get(key) is not None}
    size, crop = dict(config.get("size") or {}), dict(config.get("crop_size") or {})
    if config.get("do_resize") and size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        return f"the image processor {name} with size={size} (shortest_edge, or height and width)"
    if not config.get("do_resize") and not config.get("do_center_crop"):
        return f"the image processor {name}, which leaves images at their own sizes"
    sides: dict[str, Any] = size if "height" in size else dict.fromkeys(("height", "width"), size.get("shortest_edge"))
    height, width = (int((sides if config.get("do_resize") else crop)[side]) for side in ("height", "width"))
    # On an image of the size that it resizes to, what is left can be foretold to the last step.
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    expected = pixels.astype(np.float64)
    if config.get("do_center_crop"):
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        if top < 0 or left < 0:
            return f"the image processor {name}, which pads images to its crop_size={crop}"
        expected = expected[top : top + crop["height"], left : left + crop["width"]]
    if config.get("do_rescale", True):
        expected = expected * config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize"):
        expected = (expected - np.array(config["image_mean"])) / np.array(config["image_std"])
    made = image_processor(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    if made.shape != expected.shape[2:] + expected.shape[:2] or not np.allclose(
        made, expected.transpose(2, 0, 1), atol=1e-4 * max(1.0, np.abs(expected).max())
    ):
        return f"the image processor {name}, which does more than resize, crop at the centre, rescale and normalise"
    # Without "Pil": under such a name transformers.js finds no class.
    return {**config, "image_processor_type": name.removesuffix("Pil").removesuffix("Fast"), "do_convert_rgb": True}


def _checked(
    model: FrozenPrefixForConditionalGeneration, processor: Any, dtypes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into `preprocessor_config.json`, and a sample of the decoder's inputs."""
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(
            f"dtypes={list(dtypes)}: choose some of {list(DTYPES)}; the first is what transformers.js loads."
            " [errors.md#export]"
        )
    if not isinstance(model, FrozenPrefixForConditionalGeneration):
        raise ValueError(
            f"{type(model).__name__} writes no words: load it as FrozenPrefixForConditionalGeneration. [errors.md#export]"
        )
    config, core = model.config, _core(model)
    problems = [what] if (what := why_not_a_reader(config)) else []
    if getattr(core, "vision_tower", None) is None:
        problems.append("has no vision tower, or it is not loaded")
    elif config.prefix_length is None:
        problems.append("has prefixes whose length varies by image (join with the connector 'resampler')")
    if (towers := len(config.vision_parts)) > 1:
        problems.append(f"reads images by {towers} vision towers")
    if processor.crop_to_patches:
        problems.append("cuts images into tiles (crop_to_patches=True)")
    if getattr(processor.tokenizer, "backend_tokenizer", None) is None:
        problems.append(f"has the tokenizer {type(processor.tokenizer).__name__}, of which there is no tokenizer.json")
    images: Any = {} if processor.image_processor is None else _plain_image_processor(processor.image_processor)
    if isinstance(images, str):
        problems.append(f"has {images}")
    # Of an encoder-decoder, or with gated blocks, nothing more is to be asked.
    sample: Any = {} if problems else _sample_of_decoder(core)
    if isinstance(sample, str):
        problems.append(f"has {sample}")
    if problems:
        raise ValueError(f"transformers.js can't run this model, which {'; '.join(problems)}. {_OTHER_WAY} [errors.md#export]")
    halves = {str(parameter.dtype) for parameter in model.parameters() if parameter.dtype != torch.float32}
    if halves:
        raise ValueError(
            f"The model has weights in {', '.join(sorted(halves))}, and graphs for the browser are written in float32, then "
            "quantised: load it with dtype=torch.float32. [errors.md#export]"
        )
    return images, sample


# --------------------------------------------------------------------------------------------------------------- the graphs
def _named(program: Any, inputs: Iterable[str], outputs: Iterable[str], axes: dict[str, dict[int, str]]) -> Any:
    """Gives a graph's inputs and outputs, and their axes, transformers.js's names."""
    import onnx_ir

    graph = program.graph
    for values, names in ((graph.inputs, list(inputs)), (graph.outputs, list(outputs))):
        if len(values) != len(names):
            raise RuntimeError(f"The graph has {[one.name for one in values]}, where {names} were traced. [errors.md#export]")
        for value, name in zip(values, names, strict=True):
            value.name = name
            for axis, symbol in axes.get(name.split(".")[0], {}).items():
                value.shape[axis] = onnx_ir.SymbolicDim(symbol)
    kept = {id(value) for value in graph.outputs}
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where each was traced, with paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:  # shapes inside speak of the axes by their old names, and are inferred anew
                value.shape = None
    return program


def _graphs(model: FrozenPrefixForConditionalGeneration, sample: dict[str, Any], processor: Any) -> Iterable[tuple[str, Any]]:
    batch = {0: "batch_size"}
    image = processor.image_processor(np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="pt")
    program = export_image_encoder(model, sample_inputs=image).program
    yield GRAPHS[0], _named(program, ["pixel_values"], ["image_features"], {"pixel_values": batch, "image_features": batch})

    core, sequence = _core(model), {**batch, 1: "sequence_length"}
    auto = torch.export.Dim.AUTO
    exporter, config = _exporter("onnx", {})
    ids = torch.zeros(2, 5, dtype=torch.long, device=core.language_model.device)  # type: ignore[union-attr]
    config.dynamic_shapes = {"input_ids": {0: auto, 1: auto}}
    program = exporter.export(_Embedding(model).eval(), {"input_ids": ids}, config).program
    axes = {"input_ids": sequence, "inputs_embeds": sequence}
    yield GRAPHS[1], _named(program, ["input_ids"], ["inputs_embeds"], axes)

    decoder = _Decoder(model).eval()
    exporter, config = _exporter("onnx", {})
    config.dynamic_shapes = {name: {0: auto, 1: auto} for name in sample}
    config.dynamic_shapes["past"] = [{0: auto, 2: auto} for _ in sample["past"]]
    program = exporter.export(decoder, sample, config).program
    layers = range(len(sample["past"]) // 2)
    past, present = (
        [f"{name}.{layer}.{half}" for layer in layers for half in ("key", "value")] for name in ("past_key_values", "present")
    )
    inputs = [one for name in sample for one in (past if name == "past" else [name])]
    total = {**batch, 1: "total_sequence_length"}
    axes = {"inputs_embeds": sequence, "position_ids": sequence, "attention_mask": total, "logits": batch}
    axes |= {"past_key_values": {**batch, 2: "past_sequence_length"}, "present": {**batch, 2: "total_sequence_length"}}
    yield GRAPHS[2], _named(program, inputs, ["logits", *present], axes)


def _quantised(source: Path, dtype: str) -> Any:
    """The graph in `source` with matrices of eight or four bits: onnxruntime's own quantisers."""
    import onnx

    if dtype == "q4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
        quantizer.process()
        return quantizer.model.model
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind = QuantType.QUInt8 if dtype == "uint8" else QuantType.QInt8
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / source.name
        # Convolutions of integers are slower in a browser than those of floats, where they exist at all.
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            weight_type=kind,
            extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
        )
        return onnx.load(target)


def _write(proto: Any, target: Path) -> int:
    """Writes it; returns how many files of weights lie beside it."""
    import onnx

    if proto.ByteSize() <= _MOST_BYTES:
        onnx.save(proto, target)
        return 0
    onnx.save(proto, target, save_as_external_data=True, location=f"{target.name}_data")
    return 1


# ---------------------------------------------------------------------------------------------------------------- the files
def _configs(
    model: FrozenPrefixForConditionalGeneration, processor: Any, images: dict[str, Any], num_layers: int, first_dtype: str
) -> dict[str, dict[str, Any]]:
    config, core = model.config, _core(model)
    rows = language_model_geometry(cast(PreTrainedModel, core.language_model)).num_embeddings
    generation = json.loads(model.generation_config.to_json_string(use_diff=True))
    # As `generate()` does: written, a placeholder would stand for an image in the next turn.
    suppressed = {*generation.get("suppress_tokens", ()), *(one for one in config.placeholder_ids.values() if one < rows)}
    if suppressed:
        generation["suppress_tokens"] = sorted(suppressed)
    loaded = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        # Not what the decoder is: how transformers.js counts its layers of cache, whose sizes are the graph's.
        "text_config": {"model_type": "llama", "num_hidden_layers": num_layers},
        "transformers.js_config": {"dtype": first_dtype},
    }
    # An image is smaller than one patch, so that all its placeholders are additional ones, whatever its shape.
    made = processor.image_processor(np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="np")["pixel_values"].shape
    placeholders = {"patch_size": max(made[-2:]) + 1, "num_additional_image_tokens": config.prefix_length}
    return {
        "config.json": loaded,
        "generation_config.json": generation,
        "preprocessor_config.json": {**images, "processor_class": "LlavaProcessor"},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": processor.image_token,
            **placeholders,
        },
    }


def _without_dict(template: str) -> str:
    """What our processor puts before a template, without `dict(…)`, which the Jinja of transformers.js does not have: of a
    message, role and content are left."""
    return re.sub(r"dict\(fp_m, content=(.+?)\)\] -%", r"{'role': fp_m['role'], 'content': \1}] -%", template)


def _write_tokenizer(folder: Path, processor: Any) -> None:
    processor.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # The processor's, which writes images; transformers.js reads it here alone.
    template = processor.chat_template
    if isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": _without_dict(one)} for name, one in template.items()]
    else:
        config["chat_template"] = _without_dict(template)
    if config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        config["tokenizer_class"] = "PreTrainedTokenizer"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def export_transformers_js(
    model: FrozenPrefixForConditionalGeneration,
    save_directory: str | PathLike[str],
    processor: Any,
    *,
    dtypes: Sequence[str] = ("fp32",),
) -> Path:
    """
    Writes a model for transformers.js (Node, browsers), which loads it as a LLaVA and says what `generate()` says.

    Images alone: videos and audio of a model that takes them stay behind. transformers.js resizes images in its own way (see
    `docs/browser.md`); on pixels of the tower's size, words are the same.

    Args:
        model ([`FrozenPrefixForConditionalGeneration`]): in memory, all parts loaded, in float32.
        save_directory (`str` or `PathLike`): the folder, made where it is missing; graphs go into its `onnx`.
        processor ([`FrozenPrefixProcessor`]): the model's.
        dtypes (`Sequence[str]`, defaults to `("fp32",)`):
            How weights are stored, a set of graphs for each: `"fp32"`, `"q8"` and `"int8"` (the same numbers, under two names
            of transformers.js), `"uint8"`, `"q4"` (blocks of 32, matrices of linear maps alone). The first is what is
            loaded where nothing is asked for.

    Returns:
        `Path`: of the folder.

    Raises:
        ValueError: names everything that transformers.js can't run; an unknown dtype; weights that are not float32.
        ImportError: without the extra `export`, or with transformers before 5.23.
    """
    images, sample = _checked(model, processor, dtypes)
    _exporter("onnx", {})  # says what is missing before anything is written
    import onnx_ir

    folder = Path(save_directory)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    outside: dict[str, int] = {}
    for name, program in _graphs(model, sample, processor):
        proto = onnx_ir.to_proto(program)
        for dtype in sorted(dtypes, key=list(DTYPES).index):
            target = folder / "onnx" / f"{name}{DTYPES[dtype]}.onnx"
            if dtype == "fp32":
                written = _write(proto, target)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    source = Path(scratch) / f"{name}.onnx"
                    _write(proto, source)
                    written = _write(_quantised(source, dtype), target)
            if written:
                outside[target.name] = written
    _write_tokenizer(folder, processor)
    configs = _configs(model, processor, images, len(sample["past"]) // 2, dtypes[0])
    if outside:
        configs["config.json"]["transformers.js_config"]["use_external_data_format"] = outside
    for file, content in configs.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


__all__ = ["DTYPES", "export_transformers_js"]
