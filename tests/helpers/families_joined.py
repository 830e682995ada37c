"""Each language model of `families_text` behind a tiny CLIP tower, and the rows, images and labels that it reads."""

import functools
from typing import Any

import torch
from transformers import CLIPVisionConfig

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from tests.helpers.families_text import DECODERS, VOCAB_SIZE, text_config


PREFIX = 4
IMAGE = VOCAB_SIZE  # one past the vocabulary: the placeholder has no row of its own
# A tiny size for each connector that has one.
CONNECTOR_SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_size": 16},
    "transformer": {"hidden_size": 16, "num_heads": 2, "num_layers": 1},
    "resampler": {"hidden_size": 16, "num_heads": 2, "num_layers": 1},
    "qformer": {"hidden_size": 16, "num_heads": 2, "num_layers": 2},
    "lstm": {"hidden_size": 16},
    "c_abstractor": {"hidden_size": 16, "num_layers": 1},
}


def build(family: str, *, connector_type: str = "resampler", **options: Any) -> FrozenPrefixForConditionalGeneration:
    """With random weights, the same each time. `options` are those of the config."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    options = {"prefix_length": PREFIX, "connector_config": CONNECTOR_SIZES.get(connector_type, {}), **options}
    config = FrozenPrefixConfig.from_vision_text_configs(vision, text_config(family), connector_type=connector_type, **options)
    torch.manual_seed(0)
    return FrozenPrefixForConditionalGeneration(config).eval()


@functools.cache
def shared_model(family: str) -> FrozenPrefixForConditionalGeneration:
    """For the checks that change nothing in it."""
    return build(family)


def prompt(words: int = 5, images: int = 1, seed: int = 0, placeholders: int = PREFIX) -> torch.Tensor:
    """One row: word, then each image (so many placeholders) followed by a word, then words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (words + images,), generator=generator).tolist()
    row = [ids.pop()]
    for _ in range(images):
        row += [IMAGE] * placeholders + [ids.pop()]
    return torch.tensor([row + ids])


def pictures(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def decoder_inputs(family: str, rows: int = 1) -> dict[str, torch.Tensor]:
    if family in DECODERS:
        return {}
    return {"decoder_input_ids": torch.tensor([[2, 7, 8, 9]]).expand(rows, -1)}
