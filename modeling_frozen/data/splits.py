"""The splits of a source, by name; those that it does not have are held out of what it is trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .formats import SplitError, load_image_text, split_by_image


if TYPE_CHECKING:
    from datasets import Dataset


# What a split is called elsewhere: Karpathy's file has "val".
_ALSO = {"validation": ("validation", "val", "dev"), "test": ("test",), "train": ("train",)}


def load_splits(
    source: Any, names: Sequence[str], *, share: float | dict[str, float] = 0.1, seed: int = 0, **options: Any
) -> "dict[str, Dataset]":
    """
    Splits of a source, as [`load_image_text`] reads them.

    Args:
        source: as [`load_image_text`] takes it; a list of one is that one.
        names: of the splits: "train", and of "validation" and "test" those that are wanted.
        share: of the images, held out of "train" for each of the others that the source does not have.
        seed (`int`): of what is held out.
        options: of [`load_image_text`].

    Returns:
        `dict` of a `Dataset` for each name. No image stands in two that were made here.

    Raises:
        ValueError: as [`load_image_text`]; a source with splits, none of them "train"; too few images for a share.
    """
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    shares = dict.fromkeys(names, share) if isinstance(share, float | int) else share
    try:
        loaded = {"train": load_image_text(source, **options)}
    except SplitError as error:
        there = {name: next((one for one in _ALSO.get(name, (name,)) if one in error.splits), None) for name in names}
        if there.get("train", "") is None:
            raise
        loaded = {name: load_image_text(source, split=split, **options) for name, split in there.items() if split}
    held_out = {
        name: shares.get(name, 0.0) if name in names and name not in loaded else 0.0 for name in ("validation", "test")
    }
    if any(held_out.values()):
        validation, test = held_out.values()
        loaded |= split_by_image(loaded["train"], validation=validation, test=test, seed=seed)
    return {name: loaded[name] for name in names if name in loaded}


__all__ = ["load_splits"]
