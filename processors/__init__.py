# SPDX-License-Identifier: Apache-2.0
"""The processor of frozen-prefix models: images and text in, model inputs out.

Installed, and always imported, as `modeling_frozen.processors`: a top-level package of this name would be shadowed by
any folder of that name beside a user's script.
"""

from .chat_templates import DEFAULT_CHAT_TEMPLATE, INTERLEAVED_CHAT_TEMPLATE, few_shot_messages
from .image_loading import load_rgb_image
from .media_loading import load_video, load_waveform
from .processing_compat import CONTROL_TOKEN_END, CONTROL_TOKEN_START
from .processing_frozen_prefix import FrozenPrefixProcessor, FrozenPrefixProcessorKwargs


__all__ = [
    "CONTROL_TOKEN_END",
    "CONTROL_TOKEN_START",
    "DEFAULT_CHAT_TEMPLATE",
    "INTERLEAVED_CHAT_TEMPLATE",
    "FrozenPrefixProcessor",
    "FrozenPrefixProcessorKwargs",
    "few_shot_messages",
    "load_rgb_image",
    "load_video",
    "load_waveform",
]
