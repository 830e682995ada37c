"""Makes the model type `frozen-prefix` known to the Auto classes of transformers, without importing them.

The Auto classes bring torch with them, which takes seconds. So each mapping is extended when, and only when, somebody
imports it: at once if that has happened already, else right after.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


MODEL_TYPE = "frozen-prefix"
CONFIG = "FrozenPrefixConfig"


def _say_where(mapping: Any) -> None:
    # Private, for `register` wants the class itself, whose module may be importing the Auto classes at this very moment, and
    # what is added by name alone is looked for in `transformers.models`.
    mapping._modules[MODEL_TYPE.replace("-", "_")] = sys.modules[__package__]


def _add(module: ModuleType, name: str, class_name: str) -> None:
    """Adds a class by name, as transformers adds its own: it is imported when somebody asks for it."""
    getattr(module, f"{name}_NAMES")[MODEL_TYPE] = class_name
    mapping = getattr(module, name)
    mapping._reverse_config_mapping[CONFIG] = MODEL_TYPE  # private too: made of the names once, maybe before ours was there
    _say_where(mapping)


def _register_config(module: ModuleType) -> None:
    module.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG
    _say_where(module.CONFIG_MAPPING)


def _register_models(module: ModuleType) -> None:
    _add(module, "MODEL_MAPPING", "FrozenPrefixModel")
    for name in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"):
        _add(module, name, "FrozenPrefixForConditionalGeneration")
    for name in ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"):
        _add(module, name, "FrozenPrefixForSequenceClassification")
    _add(module, "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING", "FrozenPrefixForImageTextRetrieval")


def _register_processor(module: ModuleType) -> None:
    # Processors are looked up by class name, in transformers' own folders first: this one is registered itself.
    from .configuration_frozen_prefix import FrozenPrefixConfig
    from .processors import FrozenPrefixProcessor

    module.AutoProcessor.register(FrozenPrefixConfig, FrozenPrefixProcessor, exist_ok=True)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action right after a module was first executed."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.actions = actions

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        @functools.wraps(execute)
        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = exec_module
        return spec


def register_with_auto_classes() -> None:
    """Registers config, models and processor, each with its mapping; doing it twice changes nothing."""
    waiting = {}
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
        else:
            waiting[name] = action
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))
