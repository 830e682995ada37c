# SPDX-License-Identifier: Apache-2.0
"""What differs between releases of transformers for processors, 5.16.1 to the newest; for models it is
`transformers_compat.py`, which these files can't import: on the Hub all lie in one folder, and here they don't.
"""

import bisect
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import processing_utils
from transformers.utils import chat_template_utils


# Whether masks of what the assistant says are counted with the placeholders of images; before 5.18 they are not.
_MASKS_HOLD_WITH_IMAGES = (
    "return_text_replacement_offsets" in inspect.unwrap(processing_utils.ProcessorMixin.apply_chat_template).__code__.co_consts
)


def _mask_of_spans(offsets: Any, replacements: list[dict[str, Any]], spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that stands in a span of the chat before its placeholders were written out."""
    ends = [one["span"][1] for one in replacements]
    gained = [0, *(one["new_span"][1] - one["span"][1] for one in replacements)]
    moved = [[char + gained[bisect.bisect_right(ends, char)] for char in span] for span in spans]
    return [int(any(start < to and end > begin for begin, to in moved)) for start, end in offsets]


_merged_with = inspect.signature(processing_utils.ProcessorMixin._merge_kwargs).parameters.get("ModelProcessorKwargs")
if TYPE_CHECKING or _merged_with is None or _merged_with.default is None:
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

        def apply_chat_template(self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any) -> Any:
            signature = inspect.signature(super().apply_chat_template)
            options = dict(signature.bind(conversation, chat_template, *args, **kwargs).arguments)
            options |= (further := options.pop("kwargs", {}))
            asked = {**(options.get("processor_kwargs") or {}), **further}
            if asked.get("sanitize_control_tokens"):
                raise ValueError(
                    "`sanitize_control_tokens=True` would be ignored: before 5.23 transformers does not tell what users wrote "
                    "from control tokens in a processor's chats. Upgrade to transformers 5.23, or take such tokens out."
                    " [errors.md#processor]"
                )
            if asked.get("images") is not None:
                raise ValueError(
                    "Before 5.23 transformers takes the images of a chat from its turns alone, not from `processor_kwargs`: "
                    'write them there as {"type": "image", "image": image}, or upgrade to transformers 5.23.'
                    " [errors.md#versions]"
                )
            wanted = all(options.get(name) for name in ("return_assistant_tokens_mask", "tokenize", "return_dict"))
            if _MASKS_HOLD_WITH_IMAGES or not wanted or options.get("continue_final_message"):
                return super().apply_chat_template(**options)
            options.pop("return_assistant_tokens_mask")
            flags = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
            out = super().apply_chat_template(
                **{**options, "processor_kwargs": {**(options.get("processor_kwargs") or {}), **flags}}
            )
            if "offset_mapping" not in out:
                raise ValueError(
                    f"Pass what is meant for the processor in `processor_kwargs`; it may be among {list(further)}."
                    " [errors.md#processor]"
                )
            batched = isinstance(conversation[0], list | tuple)
            _, spans = chat_template_utils.render_jinja_template(
                conversations=conversation if batched else [conversation],
                return_assistant_tokens_mask=True,
                **{name: options.get(name) for name in ("chat_template", "tools", "documents")},
                add_generation_prompt=bool(options.get("add_generation_prompt")),
                **{**self.tokenizer.special_tokens_map, **further},
            )
            rows = zip(out.pop("offset_mapping"), out.pop("text_replacement_offsets") or [[]] * len(spans), spans, strict=True)
            out["assistant_masks"] = [_mask_of_spans(*row) for row in rows]
            return out.convert_to_tensors(tensor_type=options.get("return_tensors"))


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


def name_gguf_version() -> None:
    """
    Lets transformers read GGUF files under Python 3.10, where it finds no version of gguf and fails on that: gguf's wheels
    list no modules, and the module has no `__version__`, which it is given. `transformers_compat.py` has
    the same for models.
    """
    if sys.version_info < (3, 11) and importlib.util.find_spec("gguf") is not None:
        vars(importlib.import_module("gguf")).setdefault("__version__", importlib.metadata.version("gguf"))


__all__ = ["CONTROL_TOKEN_END", "CONTROL_TOKEN_START", "ProcessorMixin", "name_gguf_version", "without_empty_contents"]
