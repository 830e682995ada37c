"""LoRA on the frozen language model, with the connector trained beside it (needs the extra `peft`)."""

from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..connectors import Head
from ..modeling_frozen_prefix import FrozenPrefixModel
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def lora_config(model: "FrozenPrefixPreTrainedModel | PeftModel", **options: Any) -> "LoraConfig":
    """
    A `LoraConfig` that adapts the linear layers of the language model and trains and saves connector and head whole.

    PEFT's own `target_modules="all-linear"` would wrap the tower and the connector as well, and freeze the connector.

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): the model that `get_peft_model` is to wrap, or that PEFT has wrapped
            already and `add_adapter` is to give another adapter of the same layers.
        options: other arguments of `LoraConfig` (`r`, `lora_alpha`, `lora_dropout` …); `target_modules` may be given too.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from modeling_frozen.training.lora import lora_config

    >>> tuned = get_peft_model(model, lora_config(model, r=8))
    ```"""
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    core = cast(FrozenPrefixModel, inner.base_model)
    language_model = cast(PreTrainedModel, core.language_model)
    head = language_model.get_output_embeddings()
    wrappers: list[str] = []  # what an adapter put around a layer; its own layers lie below
    leaves = set()
    for name, module in language_model.named_modules():
        if name.startswith(tuple(wrappers)):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            wrappers.append(f"{name}.")
        if module is not head and isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D)):
            leaves.add(name.rsplit(".", 1)[-1])
    parts = [
        name
        for name in ("connector", "audio_connector", "cross_attention")
        if (part := getattr(core, name, None)) is not None and any(True for _ in part.parameters())  # the identity has none
    ]
    parts += [name for name, child in inner.named_children() if isinstance(getattr(child, "original_module", child), Head)]
    # A pattern is matched whole, so it names the language model and nothing else.
    targets = rf".*language_model\..*\.({'|'.join(sorted(leaves))})"
    return LoraConfig(**{"target_modules": targets, "modules_to_save": parts or None, **options})


__all__ = ["lora_config"]
