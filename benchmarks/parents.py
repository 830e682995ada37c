"""Parents of a given size with random weights, as ordinary folders: what the speed benchmarks join.

Speed depends on shapes alone, so nothing is downloaded; the tokenizer knows one id per made-up word.
"""

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from modeling_frozen import FrozenPrefixForConditionalGeneration


@dataclass(frozen=True)
class Sizes:
    """Sizes of the two parents and of what goes through them; also the benchmarks' arguments, `_` as `-`."""

    vision_width: int = 384
    vision_layers: int = 12
    image_size: int = 224
    patch_size: int = 16
    text_type: str = "llama"
    text_width: int = 512
    text_layers: int = 8
    vocab_size: int = 32_000
    prefix_length: int = 32
    text_length: int = 32
    dtype: str = "float32"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# So small that what is measured is not theirs.
TINY = Sizes(
    vision_width=32, vision_layers=1, image_size=16, patch_size=8, text_width=32, text_layers=1, vocab_size=64, prefix_length=4
)


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """An argument for each of [`Sizes`]; `defaults` replace its own."""
    for size in fields(Sizes):
        default = defaults.get(size.name, size.default)
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=size.type, default=default)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    return Sizes(**{size.name: getattr(arguments, size.name) for size in fields(Sizes)})


def vision_config(sizes: Sizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=max(1, sizes.vision_width // 64),
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )


def text_config(sizes: Sizes) -> Any:
    """Of any decoder-only type whose config knows transformers' common names."""
    options = {"intermediate_size": 4 * sizes.text_width, "max_position_embeddings": 1024}
    return AutoConfig.for_model(
        sizes.text_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=max(1, sizes.text_width // 64),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """One id per word: `w0`, `w1`, …; the last 16 rows are no word's, as in large vocabularies."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(sizes.vocab_size - 20))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_parents(folder: Path | str, sizes: Sizes) -> tuple[str, str]:
    """Writes both parents as their own tools would, unless they are there already; returns their folders."""
    tower, words = Path(folder) / "tower", Path(folder) / f"words-{sizes.text_type}"
    dtype = getattr(torch, sizes.dtype)
    torch.manual_seed(0)
    if not (tower / "config.json").exists():
        CLIPVisionModel(vision_config(sizes)).to(dtype).save_pretrained(tower)
        edge = sizes.image_size
        CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}).save_pretrained(tower)
    if not (words / "config.json").exists():
        AutoModelForCausalLM.from_config(text_config(sizes)).to(dtype).save_pretrained(words)
        tokenizer(sizes).save_pretrained(words)
    return str(tower), str(words)


def join(folder: Path | str, sizes: Sizes, **options: Any) -> FrozenPrefixForConditionalGeneration:
    """The two parents, joined by a resampler (or what `options` say), in eval mode."""
    tower, words = save_parents(folder, sizes)
    options = {"connector_type": "resampler", "prefix_length": sizes.prefix_length, **options}
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, **options)


def pictures(sizes: Sizes, count: int = 1, device: Any = None) -> torch.Tensor:
    """`pixel_values` of random pictures."""
    generator = torch.Generator().manual_seed(0)
    edge = sizes.image_size
    return torch.randn(count, 3, edge, edge, generator=generator).to(device)


def words(sizes: Sizes, length: int | None = None, rows: int = 1, seed: int = 0, device: Any = None) -> torch.LongTensor:
    """`input_ids` `(rows, length)` of random words, none of them special; `sizes.text_length` by default."""
    generator = torch.Generator().manual_seed(seed)
    length = sizes.text_length if length is None else length
    return torch.randint(4, sizes.vocab_size - 16, (rows, length), generator=generator).to(device)


def prompt(model: FrozenPrefixForConditionalGeneration, text: torch.LongTensor) -> torch.LongTensor:
    """`text` with one picture's placeholders before it."""
    placeholders = text.new_full((len(text), model.config.prefix_length), model.config.image_token_id)
    return torch.cat([placeholders, text], dim=1)
