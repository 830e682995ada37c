"""Several eyes for one loaded pair of parents, as PEFT users know adapters: load, switch, list, save.

A connector travels with the part of the config that describes it, so two of different kind, length or tower layer share
the same parents.
"""

import os
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .configuration_frozen_prefix import FrozenPrefixConfig


# What a config says of its connector, and not of the parents.
CONNECTOR_KEYS = (
    "connector_type", "connector_config", "prefix_length", "vision_feature_layer", "vision_feature_select_strategy",
    "num_leading_tokens", "num_positions", "vision_width",
)  # fmt: skip
DEFAULT = "default"


class ConnectorSwitchingMixin:
    """`load_connector`, `set_connector` and `connectors` for a model whose base model holds `connector`."""

    @property
    def connectors(self) -> list[str]:
        """Names of the loaded connectors, in the order of loading."""
        return list(self._connector_specs())

    @property
    def active_connector(self) -> str:
        """Name of the connector in use."""
        return getattr(self.base_model, "_active_connector", DEFAULT)

    def _connector_specs(self) -> dict[str, dict[str, Any]]:
        base = self.base_model
        if not hasattr(base, "_specs_of_connectors"):
            base._specs_of_connectors = {DEFAULT: {key: getattr(self.config, key) for key in CONNECTOR_KEYS}}
        return base._specs_of_connectors

    def load_connector(self, name_or_path: str, name: str, **hub_options: Any) -> None:
        """
        Loads another connector beside the active one, for the same parents, without loading those again.

        Args:
            name_or_path (`str`): a checkpoint of this package: id on the Hub or folder.
            name (`str`): what it is called from now on; see [`set_connector`].
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only` …

        Raises:
            ValueError: if the name is taken, or the checkpoint was trained with other parents.
        """
        if name in self.connectors:
            raise ValueError(f"A connector named `{name}` is loaded already, of {self.connectors}: choose another name.")
        config = FrozenPrefixConfig.from_pretrained(name_or_path, **hub_options)
        if "cross_attention" in (config.fusion, self.config.fusion):
            raise ValueError(
                f"`{name_or_path}` has fusion `{config.fusion}` and the loaded model `{self.config.fusion}`: only connectors "
                "of fusion `prefix` are switched, for gated blocks sit between layers. Load it with from_pretrained."
            )
        self._refuse_other_parents(name_or_path, config)
        weights = cached_file(str(name_or_path), SAFE_WEIGHTS_NAME, **hub_options)
        parts = self._build_connector_parts(config)
        tensors = {key.removeprefix(f"{self.base_model_prefix}."): value for key, value in load_file(weights).items()}
        for attribute, module in parts.items():
            prefix = f"{attribute}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                module.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise ValueError(
                    f"The weights of `{name_or_path}` are not those of the {config.connector_type} connector that its config "
                    f"describes: {error}"
                ) from error
            active = getattr(self.base_model, attribute, None)
            reference = next((p for p in (active or self.base_model).parameters()), None)
            module.to(reference.device).train(self.training)
            module.requires_grad_("connector" in self.config.trainable)
        self._connector_specs()[name] = {key: getattr(config, key) for key in CONNECTOR_KEYS}
        if not hasattr(self.base_model, "idle_connectors"):
            self.base_model.idle_connectors = nn.ModuleDict()
        self.base_model.idle_connectors[name] = nn.ModuleDict(parts)
        self._keys_to_ignore_on_save = self._keys_with_home()

    def _build_connector_parts(self, config: FrozenPrefixConfig) -> dict[str, nn.Module]:
        """What makes up a connector, by attribute of the base model."""
        from .connectors import build_connector

        return {"connector": build_connector(**config.connector_arguments)}

    def _refuse_other_parents(self, name: str, config: FrozenPrefixConfig) -> None:
        for part in ("vision", "text"):
            if part in (config.saved_parts or ()):
                raise ValueError(
                    f"`{name}` carries a {part} model of its own, so its connector was made for another one than the loaded: "
                    "load it with from_pretrained."
                )
            here, there = (getattr(c, f"{part}_base_model") or {} for c in (self.config, config))
            if here.get("fingerprint") != there.get("fingerprint"):
                raise ValueError(
                    f"`{name}` was trained with another {part} model (`{there.get('name_or_path')}`, fingerprint "
                    f"{there.get('fingerprint')}) than the loaded one (`{here.get('name_or_path')}`, fingerprint "
                    f"{here.get('fingerprint')}): load it with from_pretrained."
                )

    def set_connector(self, name: str) -> None:
        """
        Makes a loaded connector the one in use; parents stay as they are. `generate()`, training and `save_pretrained` are
        its from now on, and `config` describes it. A processor made for another prefix length must be made anew
        (`FrozenPrefixProcessor.from_model`).

        Raises:
            ValueError: for a name that is not loaded, listing those that are.
        """
        specs = self._connector_specs()
        if name not in specs:
            raise ValueError(f"No connector named `{name}` is loaded; loaded are {self.connectors}.")
        if name == self.active_connector:
            return
        base = self.base_model
        idle = base.idle_connectors
        chosen = idle[name]
        del idle[name]
        idle[self.active_connector] = nn.ModuleDict({attribute: getattr(base, attribute) for attribute in chosen})
        for attribute, module in chosen.items():
            setattr(base, attribute, module)
        for key, value in specs[name].items():
            setattr(self.config, key, value)
        base._active_connector = name
        self._keys_to_ignore_on_save = self._keys_with_home()

    def _keys_of_idle_connectors(self) -> set[str]:
        if not hasattr(self.base_model, "idle_connectors"):
            return set()
        return {key for key in self.state_dict() if ".idle_connectors." in f".{key}"}

    def save_all_connectors(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves every loaded connector, each as a checkpoint in a folder of its name."""
        active = self.active_connector
        try:
            for name in self.connectors:
                self.set_connector(name)
                self.save_pretrained(os.path.join(save_directory, name), **kwargs)
        finally:
            self.set_connector(active)


__all__ = ["ConnectorSwitchingMixin"]
