"""Serving: transformers' own server and chat, run where the model type `frozen-prefix` is known."""

from .server import main


__all__ = [
    "main",
]
