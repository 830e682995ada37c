# SPDX-License-Identifier: Apache-2.0
"""What differs between releases of transformers, 5.16.1 to the newest: the only place that knows, but for what processors
need: `processing_compat.py`, for their files import none of this folder.

Each question is asked of the object itself (has this output a field `cache`?) and not of a version number, so that releases
in between are answered rightly too. Each stand-in says from which release on it can go; a type checker reads the newest.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from packaging import version
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, configuration_utils, integrations, modeling_utils
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import hub


# ------------------------------------------------------------------------------- a language model sharded as it was loaded


def share_sharding(model: PreTrainedModel, language_model: PreTrainedModel) -> None:
    """Says of a model what is so of its language model, if that was sharded as it was loaded (`tp_plan`,
    `distributed_config`): Trainer then gives all its processes the same rows, and wraps nothing."""
    for name in ("_tp_size", "_device_mesh", "_is_distributed_loading_by_transformers"):
        if getattr(language_model, name, None):
            setattr(model, name, getattr(language_model, name))
    if (sharding := getattr(language_model.config, "distributed_config", None)) is not None:
        model.config.distributed_config = sharding  # never written to a file


# --------------------------------------------------------------------------------------------------- the cache's name

# transformers 5.24 made one `cache` of `past_key_values` and, in recurrent models, `cache_params`.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# The name by which this release's `generate()` hands a cache on, and outputs hold it.
CACHE = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """
    Takes the cache out of keyword arguments, whichever of its names it was passed by.

    Raises:
        ValueError: if it was passed by two names.
    """
    passed = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    names = [name for name, cache in passed.items() if cache is not None]
    if len(names) > 1:
        raise ValueError(
            f"The cache was passed twice, as `{names[0]}` and as `{names[1]}`: pass it once. [errors.md#contradiction]"
        )
    return passed[names[0]] if names else None


def takes_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function with a parameter `cache`, which it then takes by any of the cache's names."""

    @functools.wraps(function)
    def by_any_name(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs or "cache_params" in kwargs:
            kwargs["cache"] = take_cache(kwargs)
        return function(*args, **kwargs)

    return by_any_name


_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def forward_parameters(module_class: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """What the `forward` of a class takes, by name."""
    return _signature(module_class.forward).parameters


def cache_argument(parameters: Collection[str]) -> str:
    """The name by which a model with these parameters takes its cache."""
    return next((name for name in CACHE_NAMES if name in parameters), CACHE)


def cache_of(outputs: dict[str, Any]) -> Cache | None:
    """The cache in a model's outputs, or among its keyword arguments, by whichever name it stands there."""
    return next((outputs[name] for name in CACHE_NAMES if name in outputs.keys()), None)


def generation_cache(parameters: Collection[str]) -> str:
    """The name by which this release's `generate()` keeps the cache of a language model with these parameters."""
    return "cache_params" if CACHE != "cache" and cache_argument(parameters) == "cache_params" else CACHE


def cached_length(cache: Any) -> int:
    """How many positions a cache holds; 0 for the states of recurrent models, which know no positions."""
    if not isinstance(cache, Cache) or all(getattr(cache, "is_linear", [False])):
        return 0
    return cache.get_seq_length()


@functools.cache
def windows_remember() -> bool:
    """Whether a sliding window that records its past hands out the keys that its mask is made for; before 5.18 it hands out
    all of them."""
    with torch.device("cpu"):
        layer, keys = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 3, 1)
    layer.record_past = True
    layer.update(keys, keys)
    length, _ = layer.get_mask_sizes(2)
    return layer.update(keys[:, :, :2], keys[:, :, :2])[0].shape[-2] == length


if TYPE_CHECKING or CACHE == "cache":

    class AnyCacheName:
        """For outputs with a cache: it is read by `cache`, and by the names of earlier releases."""

else:  # before 5.24

    @dataclass
    class AnyCacheName:
        """For outputs with a cache: that of recurrent models has another name, and `cache` reads either."""

        cache_params: Cache | None = None

        @property
        def cache(self) -> Cache | None:
            return self.cache_params if self.past_key_values is None else self.past_key_values


# -------------------------------------------------------------------------------------------------------------- configs

if TYPE_CHECKING or hasattr(configuration_utils, "SubConfigSpec"):
    SubConfigSpec = configuration_utils.SubConfigSpec
    CompositeConfig = PreTrainedConfig
else:  # before 5.20

    class SubConfigSpec:
        """How a sub-config is made of a `dict`, or of nothing."""

        def __init__(self, config_class: type, model_type: str, optional: bool = False):
            self.config_class, self.model_type, self.optional = config_class, model_type, optional

    class CompositeConfig(PreTrainedConfig):
        """A config that makes its sub-configs by `sub_configs_defaults`."""

        sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {}

        def __init_subclass__(cls, *args: Any, **kwargs: Any):
            cls.sub_configs = {key: spec.config_class for key, spec in cls.sub_configs_defaults.items()}
            super().__init_subclass__(*args, **kwargs)

        def __post_init__(self, **kwargs: Any):
            for key, spec in self.sub_configs_defaults.items():
                sub_config = getattr(self, key)
                if isinstance(sub_config, PreTrainedConfig) or (sub_config is None and spec.optional):
                    continue
                options = dict(sub_config or {})
                model_type = options.pop("model_type", spec.model_type)
                setattr(self, key, transformers.CONFIG_MAPPING[model_type](**options))
            super().__post_init__(**kwargs)


# ------------------------------------------------------------------------------------------------- logits and loading

# Whether language models take a mask of positions as `logits_to_keep`; before 5.21 indices alone.
MASKS_KEEP_LOGITS = hasattr(modeling_utils, "slice_logits_to_keep")

if TYPE_CHECKING or hasattr(modeling_utils, "slice_logits_to_keep"):
    slice_logits_to_keep = modeling_utils.slice_logits_to_keep
else:  # before 5.21

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Of `hidden_states` (batch, sequence, width) the last positions (0: all), those of a 1-D tensor, each row's own
        of a 2-D one, or, flattened, those where a boolean mask is true."""
        if isinstance(logits_to_keep, int):
            return hidden_states[:, -logits_to_keep:, :] if logits_to_keep else hidden_states
        if logits_to_keep.ndim == 1:
            return hidden_states[:, logits_to_keep, :]
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


if TYPE_CHECKING or hasattr(hub, "resolve_revision"):

    def resolve_revision(
        path_or_repo_id: str, revision: str | None = None, *, file: str = "config.json", **hub_options: Any
    ) -> str | None:
        """The commit that a branch or tag stands for; the revision itself of a folder, or where the Hub can't be asked."""
        return hub.resolve_revision(path_or_repo_id, revision, **hub_options)

else:  # before 5.18, which fetches a file to know it

    def resolve_revision(
        path_or_repo_id: str, revision: str | None = None, *, file: str = "config.json", **hub_options: Any
    ) -> str | None:
        """The commit that a branch or tag stands for; the revision itself of a folder, or where the Hub can't be asked."""
        if os.path.isdir(path_or_repo_id):
            return revision
        try:
            config = hub.cached_file(path_or_repo_id, file, revision=revision, **hub_options)
        except OSError:
            return revision  # the regular way of loading says why
        return hub.extract_commit_hash(config, None) or revision


def dequantized() -> dict[str, Any]:
    """Options of `from_pretrained` by which the weights of a GGUF file are unpacked; before 5.18 they always are."""
    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


# -------------------------------------------------------------------------------------------------------- language models


def mask_later_tokens(language_model: PreTrainedModel) -> None:
    """Keeps the decoder's self-attention from tokens to come: before 5.18 UMT5's, alone of its kind, reads them where no mask
    is made (SDPA, no padding), so that it is scored, and trained, on answers that it has read."""
    for name, module in language_model.named_modules():
        if name.endswith(".SelfAttention") and getattr(module, "is_decoder", False):
            module.is_causal = True


# ------------------------------------------------------------------------------------------------------------- adapters


def adapter_rules(model: PreTrainedModel) -> list[WeightTransform]:
    """
    The rules by which `load_adapter` renames an adapter's tensors: those of the model's parts.

    transformers' rules for old checkpoints are left out: since 5.23 they hold `model.language_model.model` for a mistake, and
    would take the last part away; here it is the language model's own. An empty list would be taken for none at all.
    """
    return get_model_conversion_mapping(model, add_legacy=False) or [WeightRenaming("^model", "model")]


if TYPE_CHECKING or hasattr(integrations.peft, "WeightRenaming"):
    PreTrainedModelWithAdapters = PreTrainedModel
else:  # before 5.18, where `load_adapter` leaves out the modules that an adapter holds whole (`modules_to_save`)

    class PreTrainedModelWithAdapters(PreTrainedModel):
        """A model that fills the modules that an adapter holds whole, the connector for one."""

        def load_adapter(self, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any) -> Any:
            self._adapter_to_load = adapter_name or "default"
            try:
                return super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
            finally:
                del self._adapter_to_load

        @staticmethod
        def _load_pretrained_model(
            model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
        ) -> Any:
            adapter = getattr(model, "_adapter_to_load", None)
            if adapter is not None:  # its modules are in their places, and their rules can be known, from here on
                # By name: transformers asks for whatever custom code imports, and an adapter alone needs it.
                AuxiliaryTrainingWrapper = importlib.import_module("peft.utils.other").AuxiliaryTrainingWrapper  # noqa: N806

                load_config.weight_mapping.extend(
                    WeightRenaming(f"{name}.{saved}", f"{name}.{own}")
                    for name, module in model.named_modules()
                    if isinstance(module, AuxiliaryTrainingWrapper)
                    for saved, own in module.adapter_state_dict_load_map(adapter).items()
                )
            return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def refuse_prompts_of_old_peft(model: PreTrainedModel) -> None:
    """
    Refuses to generate by PEFT's prompts with a PEFT older than this transformers asks for: before 0.22 it does not know the
    cache by its name since transformers 5.24, and puts its prompts before every token anew.
    """
    method: Any = model.prepare_inputs_for_generation
    tuned: Any = getattr(method, "__self__", model)  # PEFT puts its own method there
    if tuned is model or not tuned.active_peft_config.is_prompt_learning:
        return
    peft = importlib.import_module("peft")  # by name, as above
    if version.parse(peft.__version__) < version.parse(integrations.peft.MIN_PEFT_VERSION):
        raise ValueError(
            f"With transformers {transformers.__version__}, PEFT {peft.__version__} would put its prompts before every token. "
            f"Use PEFT {integrations.peft.MIN_PEFT_VERSION} or later, or transformers before 5.24. [errors.md#versions]"
        )


# ----------------------------------------------------------------------------------------------------------- generate()

# Whether a prompt with images is read in chunks (`prefill_chunk_size`) images and all; before 5.23 they are left out.
CHUNKS_HOLD_MEDIA = hasattr(generation_utils, "_slice_mm_encoder_output")


def masks_maker(language_model: PreTrainedModel) -> Callable[..., Any]:
    """What makes the masks of compilable caches: the language model itself, where it has ways of its own."""
    own: Callable[..., Any] | None = getattr(language_model, "create_masks_for_generate", None)
    if own is not None:
        return own
    if hasattr(language_model.base_model, "build_alibi_tensor"):  # Bloom before 5.21
        return _two_dimensional_mask
    return create_masks_for_generate


def _two_dimensional_mask(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache, **kwargs: Any
) -> torch.Tensor:
    """`(batch, length of the cache)`: the mask from which Bloom makes its ALiBi."""
    length = past_key_values.get_max_length()
    if attention_mask is not None:
        return torch.nn.functional.pad(attention_mask, (0, length - attention_mask.shape[-1]))
    read = torch.arange(length, device=inputs_embeds.device) < past_key_values.get_seq_length() + inputs_embeds.shape[1]
    return read.long().expand(len(inputs_embeds), -1)


# Its annotations want `self` to be a whole model, which no mixin is, and the signatures of its hooks differ by release.
GenerationMixin: Any

if TYPE_CHECKING or hasattr(transformers.GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation"):
    GenerationMixin = transformers.GenerationMixin
else:  # before 5.18, where `generate()` leaves the encoding of images to the first step's forward

    class GenerationMixin(transformers.GenerationMixin):
        """`generate()` that calls later releases' hooks for encoding before the first step."""

        def _prepare_text_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return super()._prepare_encoder_decoder_kwargs_for_generation(*args, **kwargs)

        def _prepare_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return self._maybe_prepare_encoder_kwargs_for_generation(*args, **kwargs)

        def _expand_inputs_for_generation(
            self,
            expand_size: int = 1,
            is_encoder_decoder: bool = False,
            input_ids: torch.LongTensor | None = None,
            **model_kwargs: Any,
        ) -> tuple[torch.LongTensor, dict[str, Any]]:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            if not is_encoder_decoder:
                name, tensor = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
                model_kwargs = self._maybe_prepare_encoder_kwargs_for_generation(tensor, model_kwargs, name, None)
            encoded = model_kwargs.pop("mm_encoder_outputs", None)
            if encoded and expand_size > 1:
                encoded = self._expand_multimodal_outputs(input_ids, encoded, expand_size, inputs_embeds)
            input_ids, model_kwargs = super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
            return input_ids, {**model_kwargs, "mm_encoder_outputs": encoded} if encoded else model_kwargs

        @functools.wraps(transformers.GenerationMixin.prepare_inputs_for_generation)  # whose parameters are asked for
        def prepare_inputs_for_generation(
            self, input_ids: torch.LongTensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
        ) -> dict[str, Any]:
            if not is_first_iteration and kwargs.get("use_cache", True):
                kwargs.pop("mm_encoder_outputs", None)  # read already
            return super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)


def name_gguf_version() -> None:
    """
    Lets transformers read GGUF files under Python 3.10, where it finds no version of gguf and fails on that: gguf's wheels
    list no modules, and the module has no `__version__`, which it is given. Can go with Python 3.10.
    """
    if sys.version_info < (3, 11) and importlib.util.find_spec("gguf") is not None:
        vars(importlib.import_module("gguf")).setdefault("__version__", importlib.metadata.version("gguf"))


__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "CHUNKS_HOLD_MEDIA",
    "MASKS_KEEP_LOGITS",
    "AnyCacheName",
    "CompositeConfig",
    "GenerationMixin",
    "PreTrainedModelWithAdapters",
    "SubConfigSpec",
    "adapter_rules",
    "cache_argument",
    "cache_of",
    "cached_length",
    "dequantized",
    "forward_parameters",
    "generation_cache",
    "mask_later_tokens",
    "masks_maker",
    "name_gguf_version",
    "refuse_prompts_of_old_peft",
    "resolve_revision",
    "slice_logits_to_keep",
    "take_cache",
    "takes_cache",
    "windows_remember",
]
