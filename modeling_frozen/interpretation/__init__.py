"""Interpretation: the prefix read as words, where each word attends, and how much each depends on the image."""

from .interpret import attention_to_image, nearest_words, sightedness
from .results import ImageAttention, NearestWords, Sightedness, WordSightedness


__all__ = [
    "ImageAttention",
    "NearestWords",
    "Sightedness",
    "WordSightedness",
    "attention_to_image",
    "nearest_words",
    "sightedness",
]
