"""Export: tower and connector, and the language model, for other runtimes."""

from .graphs import ImageEncoder, export_decode, export_image_encoder, export_prefill
from .llama_cpp import LlamaCppModel, export_mmproj


__all__ = [
    "ImageEncoder",
    "LlamaCppModel",
    "export_decode",
    "export_image_encoder",
    "export_mmproj",
    "export_prefill",
]
