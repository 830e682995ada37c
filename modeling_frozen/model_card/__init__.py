"""The card of a repository: its text, what scores and training say in it, and the callback that writes it."""

from .callback import FrozenPrefixHubCallback
from .card import frozen_prefix_model, write_model_card


__all__ = [
    "FrozenPrefixHubCallback",
    "frozen_prefix_model",
    "write_model_card",
]
