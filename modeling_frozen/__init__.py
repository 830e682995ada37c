# SPDX-License-Identifier: Apache-2.0
"""frozen-prefix: images, videos and audio for any frozen language model.

Importing this package registers the model type `frozen-prefix` with the Auto classes of transformers; all else is
imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._registration import register_with_auto_classes


__version__ = "0.2.0"

# Public name -> module that defines it.
_EXPORTS = {
    "CONNECTORS": "connectors",
    "DataCollatorForFrozenPrefix": "data.collator",
    "DataCollatorForFrozenPrefixClassification": "data.classification_collator",
    "DataCollatorForFrozenPrefixRetrieval": "data.retrieval_collator",
    "FrozenPrefixCausalLMOutputWithPast": "modeling_frozen_prefix",
    "FrozenPrefixConfig": "configuration_frozen_prefix",
    "FrozenPrefixForConditionalGeneration": "modeling_frozen_prefix",
    "FrozenPrefixForImageTextRetrieval": "modeling_frozen_prefix_retrieval",
    "FrozenPrefixForSequenceClassification": "modeling_frozen_prefix_classification",
    "FrozenPrefixHubCallback": "model_card.callback",
    "FrozenPrefixImageTextOutput": "modeling_frozen_prefix_retrieval",
    "FrozenPrefixModel": "modeling_frozen_prefix",
    "FrozenPrefixModelOutputWithPast": "modeling_frozen_prefix",
    "FrozenPrefixPreTrainedModel": "modeling_frozen_prefix_pretrained",
    "FrozenPrefixProcessor": "processors",
    "PrefixCache": "prefix_cache",
    "cache_vision_features": "data.feature_cache",
    "export_decode": "export.graphs",
    "export_image_encoder": "export.graphs",
    "export_prefill": "export.graphs",
    "load_image_text": "data.formats",
    "store_rows": "data.store_filling",
}

if TYPE_CHECKING:
    from .configuration_frozen_prefix import FrozenPrefixConfig
    from .connectors import CONNECTORS
    from .data.classification_collator import DataCollatorForFrozenPrefixClassification
    from .data.collator import DataCollatorForFrozenPrefix
    from .data.feature_cache import cache_vision_features
    from .data.formats import load_image_text
    from .data.retrieval_collator import DataCollatorForFrozenPrefixRetrieval
    from .data.store_filling import store_rows
    from .export.graphs import export_decode, export_image_encoder, export_prefill
    from .model_card.callback import FrozenPrefixHubCallback
    from .modeling_frozen_prefix import (
        FrozenPrefixCausalLMOutputWithPast,
        FrozenPrefixForConditionalGeneration,
        FrozenPrefixModel,
        FrozenPrefixModelOutputWithPast,
    )
    from .modeling_frozen_prefix_classification import FrozenPrefixForSequenceClassification
    from .modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
    from .modeling_frozen_prefix_retrieval import FrozenPrefixForImageTextRetrieval, FrozenPrefixImageTextOutput
    from .prefix_cache import PrefixCache
    from .processors import FrozenPrefixProcessor


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} [errors.md#internal]")
    try:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    except Exception as error:
        from .torch_builds import explain

        if (explained := explain(error)) is not None:
            raise explained from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


register_with_auto_classes()

__all__ = [
    "CONNECTORS",
    "DataCollatorForFrozenPrefix",
    "DataCollatorForFrozenPrefixClassification",
    "DataCollatorForFrozenPrefixRetrieval",
    "FrozenPrefixCausalLMOutputWithPast",
    "FrozenPrefixConfig",
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixForImageTextRetrieval",
    "FrozenPrefixForSequenceClassification",
    "FrozenPrefixHubCallback",
    "FrozenPrefixImageTextOutput",
    "FrozenPrefixModel",
    "FrozenPrefixModelOutputWithPast",
    "FrozenPrefixPreTrainedModel",
    "FrozenPrefixProcessor",
    "PrefixCache",
    "__version__",
    "cache_vision_features",
    "export_decode",
    "export_image_encoder",
    "export_prefill",
    "load_image_text",
    "store_rows",
]
