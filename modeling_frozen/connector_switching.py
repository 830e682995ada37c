# SPDX-License-Identifier: Apache-2.0
"""Several connectors for one loaded pair of backbones, as PEFT users know adapters: load, switch, list, save.

A connector travels with the part of the config that describes it, so two of different kind, length or tower layer share
the same backbones.
"""

import re
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .backbones import refuse_pickles
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connectors import build_connector
from .parts import VISION_PARTS


# What a config holds of its connector, and not of the backbones.
CONNECTOR_KEYS = (
    "connector_type", "connector_config", "prefix_length", "prefix_lengths", "vision_feature_layer",
    "vision_feature_select_strategy", "num_leading_tokens", "num_positions", "vision_width", "vision_grid",
    *(f"{part}_{key}" for part in VISION_PARTS[1:] for key in ("feature_layer", "geometry")),
)  # fmt: skip
DEFAULT = "default"


def connector_specs(model: Any) -> dict[str, dict[str, Any]]:
    base = model.base_model
    if not hasattr(base, "_specs_of_connectors"):
        base._specs_of_connectors = {DEFAULT: {key: getattr(model.config, key) for key in CONNECTOR_KEYS}}
    return base._specs_of_connectors


def load_connector(model: Any, name_or_path: str, name: str, **hub_options: Any) -> None:
    """As [`FrozenPrefixPreTrainedModel.load_connector`]."""
    if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"A connector can't be named `{name}`: take letters, digits and `_`, and no word of torch's."
            " [errors.md#not-loaded]"
        )
    if name in model.connectors:
        raise ValueError(
            f"A connector named `{name}` is loaded already, of {model.connectors}: choose another name. [errors.md#not-loaded]"
        )
    config = FrozenPrefixConfig.from_pretrained(name_or_path, **hub_options)
    if "cross_attention" in (config.fusion, model.config.fusion):
        raise ValueError(
            f"`{name_or_path}` has fusion `{config.fusion}` and the loaded model `{model.config.fusion}`: only connectors "
            "of fusion `prefix` are switched, for gated blocks sit between layers. Load it with from_pretrained."
            " [errors.md#checkpoint]"
        )
    _refuse_other_backbones(model, name_or_path, config)
    weights = cached_file(str(name_or_path), SAFE_WEIGHTS_NAME, **hub_options)
    if weights is None:
        raise ValueError(
            f"`{name_or_path}` holds no {SAFE_WEIGHTS_NAME}: name a checkpoint of this package. [errors.md#checkpoint]"
        )
    refuse_pickles([weights])
    connector = build_connector(**config.connector_arguments)
    prefix = "connector."
    tensors = {key.removeprefix(f"{model.base_model_prefix}."): value for key, value in load_file(weights).items()}
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        connector.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of `{name_or_path}` are not those of the {config.connector_type} connector that its config "
            f"describes: {error} [errors.md#checkpoint]"
        ) from error
    # The device of the active connector, or, if it has no weights (`identity`), of the word embeddings.
    weight = next(model.base_model.connector.parameters(), model.get_input_embeddings().weight)
    connector.to(weight.device).train(model.training)
    connector.requires_grad_("connector" in model.config.trainable)
    connector_specs(model)[name] = {key: getattr(config, key) for key in CONNECTOR_KEYS}
    if not hasattr(model.base_model, "idle_connectors"):
        model.base_model.idle_connectors = nn.ModuleDict()
    model.base_model.idle_connectors[name] = connector


def _refuse_other_backbones(model: Any, name: str, config: FrozenPrefixConfig) -> None:
    for part in (*VISION_PARTS, "text"):
        if part in (config.saved_parts or ()):
            raise ValueError(
                f"`{name}` holds a {part} model of its own, so its connector was made for another one than the loaded: "
                "load it with from_pretrained. [errors.md#another-parent]"
            )
        here, there = (getattr(c, f"{part}_base_model") or {} for c in (model.config, config))
        if here.get("fingerprint") != there.get("fingerprint"):
            raise ValueError(
                f"`{name}` was trained with another {part} model (`{there.get('name_or_path')}`, fingerprint "
                f"{there.get('fingerprint')}) than the loaded one (`{here.get('name_or_path')}`, fingerprint "
                f"{here.get('fingerprint')}): load it with from_pretrained. [errors.md#another-parent]"
            )


def set_connector(model: Any, name: str) -> None:
    """As [`FrozenPrefixPreTrainedModel.set_connector`]."""
    specs = connector_specs(model)
    if name not in specs:
        raise ValueError(f"No connector named `{name}` is loaded; loaded are {model.connectors}. [errors.md#not-loaded]")
    if name == model.active_connector:
        return
    base = model.base_model
    idle = base.idle_connectors
    idle[model.active_connector], base.connector = base.connector, idle.pop(name)
    for key, value in specs[name].items():
        setattr(model.config, key, value)
    base._active_connector = name


def keys_of_idle_connectors(model: Any) -> set[str]:
    if not hasattr(model.base_model, "idle_connectors"):
        return set()
    return {key for key in model.state_dict() if ".idle_connectors." in f".{key}"}


__all__ = ["DEFAULT", "connector_specs", "keys_of_idle_connectors", "load_connector", "set_connector"]
