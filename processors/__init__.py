"""The processor of frozen-prefix models: pictures and text in, model inputs out.

Installed, and always imported, as `modeling_frozen.processors`: a top-level package of this name would be shadowed by
any folder of that name beside a user's script.
"""

from .processing_frozen_prefix import (
    DEFAULT_CHAT_TEMPLATE,
    INTERLEAVED_CHAT_TEMPLATE,
    FrozenPrefixProcessor,
    FrozenPrefixProcessorKwargs,
    few_shot_messages,
    load_rgb_image,
)


__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "INTERLEAVED_CHAT_TEMPLATE",
    "FrozenPrefixProcessor",
    "FrozenPrefixProcessorKwargs",
    "few_shot_messages",
    "load_rgb_image",
]
