"""Prefixes for servers that take embeddings among words: a stock vLLM server with `--enable-prompt-embeds`.

Such a server runs the bare language model and knows nothing of this package; whoever asks it encodes images beforehand.
"""

import base64
import io
from typing import Any

import torch

from ..export.graphs import why_not_a_reader
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from ..processors import load_rgb_image


def refuse_other_than_readers(config: Any) -> None:
    """
    Raises:
        ValueError: for a language model that reads no prefix among its words.
    """
    if what := why_not_a_reader(config):
        raise ValueError(
            f"This model {what}, and a server takes embeddings among the words of a decoder alone: serve it whole, by "
            "`frozen-prefix serve`."
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
    written = iter(core.get_image_features(**inputs).pooler_output)
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


__all__ = ["encode_images", "encoded_part", "prompt_embeds", "refuse_other_than_readers"]
