"""Export: tower and connector, and the language model, for other runtimes. Modules are imported when first asked for, so that
the help of `frozen-prefix export` waits for none."""

import importlib
from typing import TYPE_CHECKING, Any


# Public name -> module that defines it.
_EXPORTS = {
    "ImageEncoder": "graphs",
    "LlamaCppModel": "llama_cpp",
    "export_decode": "graphs",
    "export_image_encoder": "graphs",
    "export_mmproj": "llama_cpp",
    "export_prefill": "graphs",
    "export_transformers_js": "transformers_js",
}

if TYPE_CHECKING:
    from .graphs import ImageEncoder, export_decode, export_image_encoder, export_prefill
    from .llama_cpp import LlamaCppModel, export_mmproj
    from .transformers_js import export_transformers_js

__all__ = [
    "ImageEncoder",
    "LlamaCppModel",
    "export_decode",
    "export_image_encoder",
    "export_mmproj",
    "export_prefill",
    "export_transformers_js",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} [errors.md#export]")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
