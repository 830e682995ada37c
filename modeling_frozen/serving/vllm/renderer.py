"""Chats as vLLM reads them: with the BOS that our processor puts before those whose template writes none."""

import dataclasses
from typing import Any, cast

from vllm.renderers.hf import HfRenderer


_MARK = "frozen_prefix_chat"


class Renderer(HfRenderer):
    """
    vLLM's own, for every model but ours: whether a rendered chat gets the tokenizer's special tokens is told as
    `apply_chat_template` of our processor (of any of transformers) tells it, from whether the chat begins with BOS. vLLM
    adds none, as tokenizers' own chats do.
    """

    def render_messages(self, *args: Any, **kwargs: Any) -> Any:
        return self._marked(*super().render_messages(*args, **kwargs))

    async def render_messages_async(self, *args: Any, **kwargs: Any) -> Any:
        return self._marked(*await super().render_messages_async(*args, **kwargs))

    def _marked(self, conversation: Any, prompt: Any) -> tuple[Any, Any]:
        if self.model_config.hf_config.model_type == "frozen-prefix" and isinstance(prompt.get("prompt"), str):
            prompt[_MARK] = True
        return conversation, prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        prompt = dict(prompt)
        if prompt.pop(_MARK, False):
            bos = self.get_tokenizer().bos_token
            begun = bos is not None and prompt["prompt"].startswith(bos)
            params = dataclasses.replace(params, add_special_tokens=not begun)
        return super()._tokenize_prompt(cast(Any, prompt), params)


__all__ = ["Renderer"]
