# SPDX-License-Identifier: Apache-2.0
"""Makes the model type `frozen-prefix` known to the Auto classes of transformers, without importing them.

The documented way, `AutoConfig.register` and the like, wants the classes themselves: that would import torch, our models and
our processor, four seconds, with this package; and transformers takes no names for classes, nor reads entry points. So our
classes' names go into each module of Auto classes right after it was imported itself: at once if it has been, else by a finder
of imports.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_MODEL_TYPE, _CONFIG = "frozen-prefix", "FrozenPrefixConfig"


def _import_from_here(mapping: Any) -> None:
    # Private: what is added by name is else looked for in `transformers.models`.
    mapping._modules[_MODEL_TYPE.replace("-", "_")] = sys.modules[__package__]


def _register_config(module: Any) -> None:
    module.CONFIG_MAPPING_NAMES[_MODEL_TYPE] = _CONFIG
    _import_from_here(module.CONFIG_MAPPING)


def _register_models(module: Any) -> None:
    from .hub import AUTO_MAP  # which imports nothing that is not there by now

    for auto_class, target in AUTO_MAP.items():
        if auto_class.startswith("AutoModel"):
            mapping = getattr(module, auto_class)._model_mapping
            mapping._model_mapping[_MODEL_TYPE] = target.split(".")[1]
            mapping._reverse_config_mapping[_CONFIG] = _MODEL_TYPE  # made of the names once, maybe before ours was there
            _import_from_here(mapping)


def _register_processor(module: Any) -> None:
    # Processors are looked up by class name, in transformers' own folders first: this one is registered itself.
    from .configuration_frozen_prefix import FrozenPrefixConfig
    from .processors import FrozenPrefixProcessor

    module.AutoProcessor.register(FrozenPrefixConfig, FrozenPrefixProcessor, exist_ok=True)


_WAITING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        register = _WAITING.pop(fullname, None)
        spec = None if register is None else importlib.util.find_spec(fullname)
        if register is None or spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import
        return spec


def register_with_auto_classes() -> None:
    """Registers config, models and processor, each as soon as its Auto classes are imported."""
    for name in [name for name in _WAITING if name in sys.modules]:
        _WAITING.pop(name)(sys.modules[name])
    if _WAITING:
        sys.meta_path.insert(0, _AfterImport())
