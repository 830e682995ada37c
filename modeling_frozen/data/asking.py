"""How a question about an image is put to a language model: in its own turns where it has such, by itself elsewhere. The same
for a row that is trained on, a row that is scored, and a photo that somebody asks about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..processors import DEFAULT_CHAT_TEMPLATE
from .collator import DataCollatorForFrozenPrefix
from .columns import COLUMNS, as_list, find_column


DEFAULT_QUESTION = "Describe the photo."


def has_own_turns(processor: Any) -> bool:
    """Whether the language model brought a chat template; the processor's own stands in for those that did not."""
    template = processor.chat_template
    templates = template.values() if isinstance(template, Mapping) else [template]
    return not any(DEFAULT_CHAT_TEMPLATE in one for one in templates)


@dataclass
class Asking:
    """
    Args:
        processor: a `FrozenPrefixProcessor`.
        question (`str`, *optional*): asked of an image that comes with none, as a caption does. By default
            `DEFAULT_QUESTION` in turns, and nothing elsewhere.
        chat (`bool`, *optional*): whether to ask in turns. By default where the language model has its own.
    """

    processor: Any
    question: str | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        self.chat = has_own_turns(self.processor) if self.chat is None else self.chat
        if self.question is None:
            self.question = DEFAULT_QUESTION if self.chat else ""

    def prompt(self, question: str = "", images: int = 1, **others: int) -> str:
        """A question about so many images (`video=1`, `audio=1` of others) as a prompt for the processor. Placeholders in it
        stay where they stand."""
        question = question or self.question or ""
        if not self.chat:
            return question
        tokens, counts = self.processor.tokens, {"image": images, **others}
        absent = {modality: count for modality, count in counts.items() if tokens.get(modality, "") not in question}
        media = [{"type": modality} for modality, count in absent.items() for _ in range(count)]
        return self.processor.chat_prompt([{"role": "user", "content": [*media, {"type": "text", "text": question}]}])

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of captions, or of prompts and answers, as it is asked; chats are what they are."""
        made = dict(row)
        if made.get("messages") is not None:
            return made
        media = {}
        for modality in COLUMNS:
            column = find_column(made, modality=modality)
            media[modality] = 0 if column is None else sum(one is not None for one in as_list(made[column]))
        images = media.pop("image")
        if made.get("prompt") is None and made.get("text") is not None and self.prompt("", images, **media):
            made["prompt"], made["answer"] = "", made.pop("text")
        if made.get("prompt") is not None:
            asked = [self.prompt(one, images, **media) for one in as_list(made["prompt"])]
            made["prompt"] = asked if isinstance(made["prompt"], list) else asked[0]
        return made


@dataclass
class AskingCollator(DataCollatorForFrozenPrefix):
    """[`DataCollatorForFrozenPrefix`] of rows that are asked as `asking` says."""

    asking: Asking | None = field(default=None, kw_only=True)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().__call__(rows if self.asking is None else [self.asking.row(row) for row in rows])


__all__ = ["DEFAULT_QUESTION", "Asking", "AskingCollator", "has_own_turns"]
