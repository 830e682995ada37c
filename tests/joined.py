"""Joined configurations of tiny parents, made once: what their towers and language models give is found by running them."""

import copy
from typing import Any

from transformers import PreTrainedConfig

from modeling_frozen import FrozenPrefixConfig


_MADE: dict[tuple[str, ...], FrozenPrefixConfig] = {}


def joined_config(vision: PreTrainedConfig | None, text: PreTrainedConfig, **options: Any) -> FrozenPrefixConfig:
    """`FrozenPrefixConfig.from_vision_text_configs(...)`, probed at the first call alone; a copy at each.

    Probing is nine tenths of what it costs to build a tiny model. What checks the probing itself calls the method.
    """
    key = tuple(map(repr, (vision, text, sorted(options.items()))))
    if key not in _MADE:
        _MADE[key] = FrozenPrefixConfig.from_vision_text_configs(vision, text, **options)
    return copy.deepcopy(_MADE[key])
