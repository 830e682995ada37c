"""`from_pretrained` of a folder that holds an adapter alone, as the library's `add_adapter` and `save_pretrained` leave it.

The library loads the model that the adapter names and puts the adapter on it in one go. Here the parents come after, so the
adapter, which goes into them, has to wait.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


class AdapterFolder(Exception):
    """Raised where an adapter would be loaded into a model whose parents are not there yet."""

    def __init__(self, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__(f"An adapter of {base} waits for its model.")
        self.base, self.adapter_args, self.adapter_kwargs = base, args, kwargs


def then_load_adapter(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `from_pretrained`: for the folder of an adapter it loads the adapter's model whole, then the adapter."""

    @functools.wraps(from_pretrained)
    def load(cls: type, pretrained_model_name_or_path: str | None, *args: Any, **kwargs: Any) -> Any:
        try:
            return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        except AdapterFolder as error:
            found = error
        loaded = load(cls, found.base, *args, **{key: value for key, value in kwargs.items() if key != "revision"})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(*found.adapter_args, **found.adapter_kwargs)
        model.eval()
        return loaded

    return load


def own_names(model: PreTrainedModel) -> dict[str, Any]:
    """Options of `load_adapter` by which an adapter's keys stay as they are.

    The library's rules for old checkpoints hold `model.language_model.model` for a mistake of theirs, and would take the last
    part away; here it is the language model's own.
    """
    return {"weight_mapping": get_model_conversion_mapping(model, add_legacy=False)}


__all__ = ["AdapterFolder", "own_names", "then_load_adapter"]
