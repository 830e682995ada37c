"""Tiny random parents as ordinary folders, and pictures with words for them."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.connectors import CONNECTORS


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "picture", "square", "that", "is", "what", "colour", "?", ".", *COLOURS]


def tokenizer(words: list[str] = WORDS, bos: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """One id per word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})


def vision_config(**options: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPVisionConfig(**{**sizes, "image_size": 16, "patch_size": 8, **options})


def text_config(**options: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # More rows than words, as large vocabularies have: the placeholder's id falls among them.
    sizes |= {"vocab_size": len(WORDS) + 7, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **ids, "initializer_range": 0.2, **options})


def save_parents(folder: Path, vision: dict | None = None, text: dict | None = None) -> tuple[str, str]:
    """Writes both parents as their own tools would; returns their folders."""
    tower, words = folder / "tower", folder / "words"
    torch.manual_seed(0)
    CLIPVisionModel(vision_config(**(vision or {}))).save_pretrained(tower)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    ).save_pretrained(tower)
    LlamaForCausalLM(text_config(**(text or {}))).save_pretrained(words)
    tokenizer().save_pretrained(words)
    return str(tower), str(words)


def join(folder: Path, **options: Any) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """A model with tiny parents in `folder`, and its processor."""
    tower, words = folder / "tower", folder / "words"
    if not tower.exists():
        save_parents(folder)
    options = {"connector_type": "mlp", **options}
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(str(tower), str(words), **options)
    return model, FrozenPrefixProcessor.from_model(model)


def save_encoder_decoder(folder: Path, **options: Any) -> str:
    """Writes a T5 as its own tool would; returns its folder."""
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": len(WORDS) + 3}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**{**sizes, **ids, **options})).save_pretrained(folder)
    tokenizer(bos=False).save_pretrained(folder)
    return str(folder)


# Of language models that are more than a decoder that reads prefixes among its words: how they are refused.
NOT_READERS = {"an encoder-decoder": "is an encoder-decoder", "gated cross-attention": "has fusion='cross_attention'"}


def join_not_a_reader(folder: Path, kind: str) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """A model of a kind in `NOT_READERS`, saved in `folder / "eyes"` with its processor."""
    if kind == "an encoder-decoder":
        save_parents(folder)
        words = save_encoder_decoder(folder / "t5")
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            str(folder / "tower"), words, connector_type="mlp"
        )
        processor = FrozenPrefixProcessor.from_model(model)
    else:
        model, processor = join(folder, fusion="cross_attention", connector_type="resampler", prefix_length=2)
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    return model, processor


def length_of_its_own(connector_type: str, length: int = 3) -> dict[str, int]:
    """The option by which this connector writes a short prefix; none for one whose length follows from the tower."""
    connector = CONNECTORS[connector_type]
    if not connector.reads_positions or connector_type == "pixel_shuffle":
        return {}
    return {"prefix_length": 4 if connector.reads_grid else length}


def is_before(release: str) -> bool:
    """Whether this transformers is older."""
    import transformers
    from packaging import version

    return version.parse(transformers.__version__) < version.parse(release)


def skip_before(release: str, why: str) -> None:
    """For what an older transformers, in the supported range, does not do or does otherwise."""
    import pytest

    if is_before(release):
        pytest.skip(f"transformers before {release} {why}")


def skip_where_torch_traces_no_forward() -> None:
    """For what compiles a model of transformers: its decorators look names up in `func.__code__.co_varnames`, which torch 2.6
    can't trace, and breaks its graph at, losing what the model's outputs hold."""
    import pytest

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + ("x" in forward.__code__.co_varnames)

    try:
        torch.compile(forward, backend="eager", fullgraph=True)(torch.zeros(1))
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch can't trace the forward of any model of transformers")


def is_peft_too_old() -> bool:
    """Whether this transformers asks for a later PEFT: it refuses its own `add_adapter` then."""
    import peft
    from packaging import version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    return version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION)


def skip_where_peft_is_too_old() -> None:
    import pytest

    if is_peft_too_old():
        pytest.skip("this transformers asks for a later PEFT")


def recompute_activations(model: Any, enable: bool = True) -> None:
    """Activation checkpointing, by the name that it has in this transformers (`gradient_…` before 5.23)."""
    what = "enable" if enable else "disable"
    (getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}"))()


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Plain squares of one colour, and the sentence that names it."""
    names = list(COLOURS)
    return [
        {"image": Image.new("RGB", (20, 18), COLOURS[names[i % 4]]), "text": f"a {names[i % 4]} square ."}
        for i in range(count)
    ]


def captioned_rows(count: int = 8) -> list[dict[str, Any]]:
    """The same squares with a prompt, or none, and two captions each."""
    names = list(COLOURS)
    return [
        {
            "image": Image.new("RGB", (20, 18), COLOURS[names[i % 4]]),
            "prompt": "a picture" if i % 3 else "",
            "captions": [f"a {names[i % 4]} square .", f"that is {names[i % 4]} ."],
        }
        for i in range(count)
    ]


def captions_in(folder: Path, count: int = 6) -> Path:
    """Splits of photos of one colour, each told twice."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        data = rows(count)
        for index, row in enumerate(data):
            row["image"].putpixel((0, 0), (index, 0, 0))  # no two alike
            row["caption_0"], row["caption_1"] = row.pop("text"), f"that is {list(COLOURS)[index % 4]} ."
        Dataset.from_list(data).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image_inputs(model: FrozenPrefixForConditionalGeneration) -> dict[str, torch.Tensor]:
    """One row of seven ids, an image's placeholders among them."""
    ids = torch.full((1, 7), 5)
    ids[:, 1 : 1 + model.config.prefix_length] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def same_logits(first: FrozenPrefixForConditionalGeneration, second: FrozenPrefixForConditionalGeneration) -> bool:
    """Whether two models agree to the last bit on an image and words."""
    with torch.no_grad():
        return torch.equal(first(**image_inputs(first)).logits, second(**image_inputs(second)).logits)
