"""LoRA on the frozen language model, with the connector trained beside it (needs the extra `peft`)."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load_file, save_file
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


_WRAPPED = "base_model.model."  # how PEFT's names begin


def split_adapter(adapter: str | Path, checkpoint: str | Path, save_directory: str | Path) -> tuple[Path, Path]:
    """
    Splits an adapter that trained connector and LoRA together, for servers that take LoRA alone beside a model (vLLM): a
    connector-only checkpoint with the adapter's connector, and an adapter of the language model's LoRA.

    Args:
        adapter (`str` or `Path`): folder that `PeftModel.save_pretrained` wrote.
        checkpoint (`str` or `Path`): folder of the connector-only checkpoint that the adapter was trained on.
        save_directory (`str` or `Path`): the two are written below it, in `checkpoint` and `lora`.

    Returns:
        Both folders.

    Raises:
        ValueError: if the adapter holds a tensor that is neither LoRA of the language model nor the checkpoint's.
    """
    adapter, checkpoint, out = Path(adapter), Path(checkpoint), Path(save_directory)
    tensors = load_file(adapter / "adapter_model.safetensors")
    saved = load_file(checkpoint / "model.safetensors")
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name and ".language_model." in name}
    whole = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items() if name not in lora}
    if foreign := sorted(whole.keys() - saved.keys()):
        raise ValueError(
            f"The adapter `{adapter}` holds {foreign[:3]}…, which is neither LoRA of the language model nor in "
            f"`{checkpoint}`: name the checkpoint that it was trained on. [errors.md#checkpoint]"
        )
    shutil.copytree(checkpoint, out / "checkpoint", dirs_exist_ok=True)
    save_file({**saved, **whole}, out / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    (out / "lora").mkdir(parents=True, exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"modules_to_save": None, "base_model_name_or_path": str(out / "checkpoint")}
    (out / "lora" / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(lora, out / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    return out / "checkpoint", out / "lora"


__all__ = ["lora_config", "split_adapter"]
