"""Serving: transformers' own server, run where the model type `frozen-prefix` is known."""

from .server import build_app


__all__ = [
    "build_app",
]
