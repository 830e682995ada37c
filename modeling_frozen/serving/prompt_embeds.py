"""Prefixes for servers that take embeddings among words: a stock vLLM server with `--enable-prompt-embeds`.

Such a server runs the bare language model and knows nothing of this package; whoever asks it encodes images beforehand.
"""

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..export.graphs import why_not_a_reader
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from ..processors import CONTROL_TOKEN_END, CONTROL_TOKEN_START, load_rgb_image


# A chat template of texts that are rendered already.
_PASS_THROUGH = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


def refuse_other_than_readers(config: Any) -> None:
    """
    Raises:
        ValueError: for a language model that reads no prefix among its words.
    """
    if what := why_not_a_reader(config):
        raise ValueError(
            f"This model {what}, and a server takes embeddings among the words of a decoder alone: serve it whole, by "
            "`frozen-prefix serve`. [errors.md#server]"
        )


def encoded_part(prefix: torch.Tensor) -> dict[str, str]:
    """A prefix `(vectors, embedding_dim)` as the part of a chat message that vLLM takes."""
    file = io.BytesIO()
    torch.save(prefix.detach().cpu().contiguous().clone(), file)  # the form that vLLM reads, by `weights_only=True`
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


@torch.no_grad()
def encode_images(model: FrozenPrefixPreTrainedModel, processor: Any, images: list[Any]) -> list[torch.Tensor]:
    """One prefix `(vectors, embedding_dim)` per image, in one batch; of an image cut into tiles, the vectors of all. In the
    dtype that the language model was recorded in, to which its embeddings are rounded anyway."""
    images = [load_rgb_image(image) for image in images]
    inputs = dict(processor(images=images, return_tensors="pt"))
    core: Any = model.base_model
    inputs = {name: one.to(core.device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    length = processor.prefix_length if model.config.prefix_lengths else None
    written = iter(core.get_image_features(**inputs, prefix_length=length).pooler_output)
    dtype = getattr(torch, str((model.config.text_base_model or {}).get("dtype", "float32")))
    tiles = [processor.count_tiles(image) for image in images]
    return [torch.cat([next(written) for _ in range(count)]).to(dtype) for count in tiles]


def prompt_embeds(model: FrozenPrefixPreTrainedModel, processor: Any, images: Any) -> list[dict[str, str]]:
    """
    Images as parts of a chat message for a stock vLLM server of the bare language model.

    ```python
    >>> from modeling_frozen import FrozenPrefixModel, FrozenPrefixProcessor
    >>> from modeling_frozen.serving.prompt_embeds import prompt_embeds

    >>> model = FrozenPrefixModel.from_pretrained("me/eyes", load_language_model=False)
    >>> content = [*prompt_embeds(model, processor, image), {"type": "text", "text": "What is it?"}]
    >>> client.chat.completions.create(model="…", messages=[{"role": "user", "content": content}])
    ```

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): its language model need not be loaded.
        processor ([`FrozenPrefixProcessor`]): of the model.
        images: an image, or a list of images, as the processor takes them.

    Returns:
        `list[dict]`: for each image `{"type": "prompt_embeds", "data": base64}`; where it stands among the other parts is
        where the language model reads it.

    Raises:
        ValueError: for an encoder-decoder, or cross-attention.
    """
    refuse_other_than_readers(model.config)
    images = list(images) if isinstance(images, list | tuple) else [images]
    return [encoded_part(prefix) for prefix in encode_images(model, processor, images)]


def begun(tokenizer: Any, text: str) -> str:
    """A rendered chat that gives, without special tokens, the ids that our processor gives it: it begins with BOS, and where
    tokenizers put a space before a text's first word, with that too."""
    bos = tokenizer.special_tokens_map.get("bos_token")
    if bos is None or text.startswith(bos):
        return text
    wanted = tokenizer(text)["input_ids"]
    for candidate in (text, bos + text, f"{bos} {text}"):
        if tokenizer(candidate, add_special_tokens=False)["input_ids"] == wanted:
            return candidate
    raise ValueError(
        f"The tokenizer begins a chat with {tokenizer.convert_ids_to_tokens(wanted[:3])}, which no text gives without special "
        "tokens: write what it adds into the checkpoint's chat template. [errors.md#server]"
    )


def texts_between(processor: Any, text: str, images: int) -> list[str]:
    """
    A rendered chat as texts, between every two of which an image stands; what our processor makes of the chat, a server makes
    of them without special tokens.

    Raises:
        ValueError: where it holds another number of images.
    """
    text = begun(processor.tokenizer, text)
    token = re.escape(processor.tokens["image"])
    texts = re.split(f"(?<!{CONTROL_TOKEN_START}){token}", text)
    if len(texts) != images + 1:
        raise ValueError(
            f"The chat holds {images} images, and its text {len(texts) - 1} times {processor.tokens['image']!r}, which stands "
            "for one: leave it out of the text. [errors.md#server]"
        )
    marks = re.compile(f"[{CONTROL_TOKEN_START}{CONTROL_TOKEN_END}]")
    return [marks.sub("", one) for one in texts]


def as_one_message(config: Any, texts: Sequence[str], encoded: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Texts, and prefixes between them, as what a request says: one message, and a template that passes it on."""
    parts: list[dict[str, str]] = []
    for index, text in enumerate(texts):
        parts += [{"type": "text", "text": text}] if text else []
        parts += [encoded[index]] if index < len(encoded) else []
    # As in `generate`, no placeholder is ever written.
    unsaid = {str(index): -100 for index in config.placeholder_ids.values() if index < config.text_config.vocab_size}
    message = {"role": "user", "content": parts}
    return {"messages": [message], "chat_template": _PASS_THROUGH, "add_special_tokens": False, "logit_bias": unsaid}


def chat_request(
    model: FrozenPrefixPreTrainedModel, processor: Any, messages: Sequence[dict[str, Any]], **template_options: Any
) -> dict[str, Any]:
    """
    A chat with images as arguments of OpenAI's client, for a stock vLLM server of the bare language model, started with
    `--enable-prompt-embeds --trust-request-chat-template`. The chat is rendered here, so that the language model reads what
    `generate()` would read.

    ```python
    >>> turn = {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}]}
    >>> client.chat.completions.create(model="…", **chat_request(model, processor, [turn]), temperature=0)
    ```

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): its language model need not be loaded.
        processor ([`FrozenPrefixProcessor`]): of the model.
        messages (`list[dict]`): as `processor.apply_chat_template` takes them.
        template_options: for it, such as `tools` or `continue_final_message=True`.

    Returns:
        `dict`: `messages`, `logit_bias` and `extra_body`.

    Raises:
        ValueError: for an encoder-decoder, or cross-attention; for a text that holds the image's placeholder.
    """
    refuse_other_than_readers(model.config)
    template_options = {"add_generation_prompt": not template_options.get("continue_final_message"), **template_options}
    parts = [part for one in messages if isinstance(one.get("content"), list) for part in one["content"]]
    images = [_image_of(part) for part in parts if part["type"] in ("image", "image_url")]
    text = processor.apply_chat_template(list(messages), tokenize=False, **template_options)
    texts = texts_between(processor, text, len(images))
    encoded = [encoded_part(prefix) for prefix in encode_images(model, processor, images)] if images else []
    request = as_one_message(model.config, texts, encoded)
    own = {name: request.pop(name) for name in ("chat_template", "add_special_tokens")}
    return {**request, "extra_body": own}


def _image_of(part: dict[str, Any]) -> Any:
    image = next((part[name] for name in ("image", "url", "path", "base64", "image_url") if part.get(name) is not None), None)
    return image["url"] if isinstance(image, dict) else image


__all__ = [
    "as_one_message",
    "begun",
    "chat_request",
    "encode_images",
    "encoded_part",
    "prompt_embeds",
    "refuse_other_than_readers",
    "texts_between",
]
