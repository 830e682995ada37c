"""Parents that a checkpoint holds keep the dtype that they were saved in, each its own.

The library loads a checkpoint in one dtype, that of its config; a tower in float32 beside a language model in bfloat16
would be rounded, and say other words than it was trained with.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


# Set while `from_pretrained` loads: the dtype that the user asked for by part, None where by none.
_asked: ContextVar[dict[str, Any] | None] = ContextVar("asked_dtypes", default=None)


@contextmanager
def asked_dtypes(options: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Remembers the `dtype` of each part's load options while a checkpoint is loaded."""
    token = _asked.set({part: own.get("dtype") for part, own in options.items()})
    try:
        yield
    finally:
        _asked.reset(token)


class PartDtypesMixin:
    """The part of `FrozenPrefixPreTrainedModel` that tells the library which tensors are loaded in which dtype."""

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        plan = super()._get_dtype_plan(dtype)
        asked = _asked.get()
        for part in self._parents() if asked is not None else ():
            own = asked.get(part)
            own = getattr(torch, own, None) if isinstance(own, str) else own  # "auto" is none
            if own is None or own != dtype:
                plan[f"^{re.escape(self._key_prefix(part))}"] = own  # None: as it was saved
        return plan


__all__ = ["PartDtypesMixin", "asked_dtypes"]
