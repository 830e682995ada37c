"""What differs between releases of transformers for processors, 5.16.1 to the newest; for models it is
`transformers_compat.py`, which these files can't import: on the Hub all lie in one folder, and here they don't.
"""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import processing_utils
from transformers.utils import chat_template_utils


_merged_with = inspect.signature(processing_utils.ProcessorMixin._merge_kwargs).parameters.get("ModelProcessorKwargs")
if _merged_with is None or _merged_with.default is None:
    ProcessorMixin = processing_utils.ProcessorMixin
else:  # before 5.23, where a call's defaults are those of its class of keywords alone

    class ProcessorMixin(processing_utils.ProcessorMixin):
        """A processor whose attributes `text_kwargs`, `images_kwargs`, … are the defaults of a call."""

        def __init_subclass__(cls, **kwargs: Any):
            super().__init_subclass__(**kwargs)
            if not hasattr(cls.valid_processor_kwargs, "_defaults"):  # `apply_chat_template` reads it
                cls.valid_processor_kwargs._defaults = {}

        def _merge_kwargs(self, ModelProcessorKwargs: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
            of_class = self.valid_processor_kwargs if ModelProcessorKwargs is None else ModelProcessorKwargs
            names = [name for name in of_class.__annotations__ if isinstance(getattr(self, name, None), dict)]
            defaults = {**getattr(of_class, "_defaults", {}), **{name: dict(getattr(self, name)) for name in names}}
            own = SimpleNamespace(_defaults=defaults, __annotations__=of_class.__annotations__)
            return super()._merge_kwargs(own, *args, **kwargs)


# What stands around control tokens that a user wrote into a chat: such an `<image>` is text. Private, for no public name
# says it; releases before 5.20 mark none, and these two characters then never occur.
CONTROL_TOKEN_START = getattr(chat_template_utils, "_CONTROL_TOKEN_START", "\U000f0000")
CONTROL_TOKEN_END = getattr(chat_template_utils, "_CONTROL_TOKEN_END", "\U000f0001")


def without_empty_contents(conversation: Any) -> Any:
    """Messages whose content is `None` (calls of tools) hold an empty text: templates of releases before 5.18 print "None"."""
    if isinstance(conversation, Mapping):
        return {**conversation, "content": ""} if conversation.get("content", "") is None else conversation
    if isinstance(conversation, list | tuple):
        return [without_empty_contents(one) for one in conversation]
    return conversation


__all__ = ["CONTROL_TOKEN_END", "CONTROL_TOKEN_START", "ProcessorMixin", "without_empty_contents"]
