# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that leave a prompt open: without the EOS or [SEP] that their post-processor appends to every text."""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer


def without_ending(tokenizer: Any) -> Any:
    """The tokenizer itself where it appends nothing to a text, else a copy that does not.

    A decoder goes on where its prompt ends, so it must not end with what ends a text. What was appended is the EOS of a
    tokenizer without one: answers end with it, in training as in inference.
    """
    appended = _appended(tokenizer)
    if not appended:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(appended[-1])
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    if not tokenizer.is_fast:
        build = tokenizer.build_inputs_with_special_tokens
        tokenizer.build_inputs_with_special_tokens = functools.partial(_build_open, build, len(appended))
    elif _appended(tokenizer):
        backend = tokenizer.backend_tokenizer
        opened = _opened(json.loads(backend.to_str())["post_processor"])
        model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
        backend.post_processor = Tokenizer.from_str(json.dumps({"model": model, "post_processor": opened})).post_processor
    return tokenizer


def _appended(tokenizer: Any) -> list[int]:
    """Ids that stand behind those of a text."""
    for text in ("a", "0", "."):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[start + len(bare) :]
    return []


def _build_open(build: Callable[..., list[int]], count: int, *args: Any, **kwargs: Any) -> list[int]:
    return build(*args, **kwargs)[:-count]


def _opened(post_processor: dict[str, Any]) -> dict[str, Any]:
    """The same, in the form in which tokenizers writes it, without special tokens behind the last sequence."""
    kind = post_processor["type"]
    if kind == "Sequence":
        return {**post_processor, "processors": [_opened(one) for one in post_processor["processors"]]}
    if kind in ("BertProcessing", "RobertaProcessing"):
        (cls, cls_id), (sep, sep_id) = post_processor["cls"], post_processor["sep"]
        first, last = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (cls, sep))
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        ids = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ((cls, cls_id), (sep, sep_id))}
        template = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, last, b], "special_tokens": ids}
        if kind == "BertProcessing":
            return template
        options = {name: post_processor[name] for name in ("add_prefix_space", "trim_offsets")}
        return {"type": "Sequence", "processors": [{"type": "ByteLevel", **options, "use_regex": True}, template]}
    if kind == "TemplateProcessing":
        post_processor = dict(post_processor)
        for name in ("single", "pair"):
            items = post_processor[name]
            post_processor[name] = items[: 1 + max(index for index, item in enumerate(items) if "Sequence" in item)]
    return post_processor


__all__ = ["without_ending"]
