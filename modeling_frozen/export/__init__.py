"""Export: tower and connector, and the language model, as graphs for other runtimes."""

from .graphs import ImageEncoder, export_decode, export_image_encoder, export_prefill


__all__ = [
    "ImageEncoder",
    "export_decode",
    "export_image_encoder",
    "export_prefill",
]
