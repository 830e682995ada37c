"""LoRA on the frozen language model, with the connector trained beside it (needs the extra `peft`)."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..connectors import Head
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel


if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: FrozenPrefixPreTrainedModel, **options: Any) -> "LoraConfig":
    """
    A `LoraConfig` that adapts the linear layers of the language model and trains and saves connector and head whole.

    PEFT's own `target_modules="all-linear"` would wrap the tower and the connector as well, and freeze the connector.

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): the model that `get_peft_model` is to wrap.
        options: other arguments of `LoraConfig` (`r`, `lora_alpha`, `lora_dropout` …); `target_modules` may be given too.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from modeling_frozen.training.lora import lora_config

    >>> tuned = get_peft_model(model, lora_config(model, r=8))
    ```"""
    from peft import LoraConfig

    base = model.base_model
    language_model = base.language_model
    heads = {id(language_model.get_output_embeddings())}
    leaves = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in language_model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in heads
        }
    )
    parts = [name for name in ("connector", "audio_connector", "cross_attention") if getattr(base, name, None) is not None]
    # A pattern is matched whole, so it names the language model and nothing else.
    defaults = {"target_modules": rf".*language_model\..*\.({'|'.join(leaves)})", "modules_to_save": parts}
    if not any(True for name in parts for _ in getattr(base, name).parameters()):
        parts.clear()  # the identity connector has nothing to save
    parts += [name for name, child in model.named_children() if isinstance(child, Head)]
    defaults["modules_to_save"] = parts or None
    return LoraConfig(**{**defaults, **options})


__all__ = ["lora_config"]
