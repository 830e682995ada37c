"""Docstrings are written as those of transformers: [`name`], and types in Markdown. The reference shows them plainly."""

import re
from typing import Any

import griffe


TYPES = re.compile(r"^ +\w+(?:, \w+)* \(.*?\)(?:, \*optional\*)?:", re.MULTILINE)


class PlainNames(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\[(`[^`]+`)\](?![(\[])", r"\1", obj.docstring.value)
            obj.docstring.value = TYPES.sub(lambda found: re.sub(r"[`*]", "", found[0]), text)
