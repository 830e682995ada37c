"""What a checkpoint holds and how it comes back: the connector, and of the parents what they can't be had without.

Saved is what was learnt. Parents that have a repository or folder of their own and never changed are recorded, and loaded from
there. Small checkpoints are built as a skeleton, to which the parents are attached, each loaded by its own `from_pretrained`.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .audio_towers import probe_audio_tower
from .backbones import HUB_OPTIONS, language_model_geometry, load_base_model, verify_fingerprint
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connector_switching import keys_of_idle_connectors
from .cross_attention import check_decoder
from .freezing import CONNECTING, trains


# Attribute of the base model that holds each parent.
PARENTS = {"vision": "vision_tower", "text": "language_model", "audio": "audio_tower"}
# What a model can do without for a while.
_UNLOADABLE = {part: attribute for part, attribute in PARENTS.items() if part != "text"}

# Set while `from_pretrained` builds a model whose parents it is about to attach; holds those that the user replaces.
replaced_parts: ContextVar[frozenset[str] | None] = ContextVar("replaced_parts", default=None)
# Set while it loads: the dtype that the user asked for by part, None where by none.
_asked_dtypes: ContextVar[dict[str, Any] | None] = ContextVar("asked_dtypes", default=None)


@contextmanager
def leave_out(replaced: frozenset[str]) -> Iterator[None]:
    token = replaced_parts.set(replaced)
    try:
        yield
    finally:
        replaced_parts.reset(token)


def parts_to_build(config: FrozenPrefixConfig) -> set[str]:
    """The parents that a constructor makes itself: all, but for those that are attached in a moment."""
    replaced = replaced_parts.get()
    parts = {part for part in PARENTS if getattr(config, f"{part}_config") is not None}
    if replaced is None:
        return parts
    saved = PARENTS if config.saved_parts is None else config.saved_parts
    return parts.intersection(saved) - replaced


# ------------------------------------------------------------------------------------------------------- what is saved


def samples_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A few values of each of the module's own plain tensors, by which a later change is noticed."""
    samples = {}
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
            flat = parameter.detach().flatten()
            # Eight runs of eight: scattered one by one, the values would cost a cache miss each.
            samples[name] = (flat if len(flat) <= 64 else flat.as_strided((8, 8), ((len(flat) - 8) // 7, 1))).clone()
    return samples


def was_changed(module: nn.Module) -> bool:
    """Whether somebody wrote into the module since it was attached (merged LoRA into it, say). Another dtype or device is no
    change."""
    before, now = getattr(module, "_frozen_prefix_samples", {}), samples_of(module)
    return any(
        name in now
        and now[name].dtype == sample.dtype
        and now[name].shape == sample.shape
        and not torch.equal(now[name].to(sample.device), sample)
        for name, sample in before.items()
    )


def changed_parts(model: Any, just_loaded: bool = False) -> set[str]:
    """Parts that train, or whose weights somebody changed since they were loaded (unless that was a moment ago)."""
    changed = set(model.config.trainable)
    for module in model.modules():
        part = getattr(module, "_frozen_prefix_part", None)
        if part is not None and part not in changed and (trains(module) or (not just_loaded and was_changed(module))):
            changed.add(part)
    return changed


def keys_with_home(model: Any, just_loaded: bool = False) -> set[str]:
    """Exactly the names in the state dict that need not be saved: of parents that can be refilled and never
    trained, and of connectors that are loaded but not in use."""
    skipped = model.base_model._parts_with_home - changed_parts(model, just_loaded)
    keys = keys_of_idle_connectors(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "_frozen_prefix_part", None) in skipped:
            prefix = f"{name}." if name else ""
            own = {"recurse": False, "remove_duplicate": False}
            keys.update(f"{prefix}{key}" for key, _ in module.named_parameters(**own))
            # Private: but for the whole state dict, which costs a gathering where it is sharded, nothing says so.
            left_out = module._non_persistent_buffers_set
            keys.update(f"{prefix}{key}" for key, _ in module.named_buffers(**own) if key not in left_out)
    return keys


def key_prefix(model: Any, part: str) -> str:
    outer = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{outer}{PARENTS[part]}."


# ------------------------------------------------------------------------------------------------------ how it comes back


def split_part_options(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes out of `kwargs` what is meant for the parents, and leaves what the checkpoint itself is loaded with."""
    options: dict[str, dict[str, Any]] = {part: {} for part in PARENTS}
    for shared in (*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "max_memory", "attn_implementation"):
        if kwargs.get(shared) is not None:
            for part in options:
                value = kwargs[shared]
                if shared == "attn_implementation" and isinstance(value, dict):
                    value = value.get(f"{part}_config", value.get(""))
                elif shared == "device_map" and isinstance(value, dict):
                    value = device_map_of(part, value)
                if value is not None:
                    options[part]["dtype" if shared == "torch_dtype" else shared] = value
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = {"": device_of_connector(kwargs["device_map"])}
    elif isinstance(kwargs.get("device_map"), str) and kwargs["device_map"] not in ("cpu", "cuda", "mps", "xpu"):
        kwargs.pop("device_map")  # "auto" and its kin spread the parents; the connector follows the words
    kwargs.pop("max_memory", None)
    if kwargs.get("quantization_config") is not None:
        options["text"]["quantization_config"] = kwargs.pop("quantization_config")
    fields = set(FrozenPrefixConfig.__dataclass_fields__)
    for key in [key for key in kwargs if key.startswith(("vision_", "text_", "audio_")) and key not in fields]:
        part, option = key.split("_", 1)
        options[part][option] = kwargs.pop(key)
    return options


def device_map_of(part: str, device_map: dict[str, Any]) -> Any:
    name = PARENTS[part]
    inner = {}
    for key, device in device_map.items():
        bare = key.removeprefix("model.")
        if bare == "" or bare == name:
            inner.setdefault("", device)
        elif bare.startswith(f"{name}."):
            inner[bare.removeprefix(f"{name}.")] = device
    return inner or None


def device_of_connector(device_map: dict[str, Any]) -> Any:
    for key in ("model.connector", "connector", "model", ""):
        if key in device_map:
            return device_map[key]
    return next(iter(device_map.values()))


@contextmanager
def asked_dtypes(options: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Remembers the `dtype` of each part's load options while a checkpoint is loaded."""
    token = _asked_dtypes.set({part: own.get("dtype") for part, own in options.items()})
    try:
        yield
    finally:
        _asked_dtypes.reset(token)


def dtype_plan(model: Any, plan: dict[str, torch.dtype | None], dtype: torch.dtype) -> dict[str, torch.dtype | None]:
    """
    Parents that a checkpoint holds keep the dtype that they were saved in, each its own, unless another was asked for.

    transformers loads a checkpoint in one dtype, that of its config; a tower in float32 beside a language model in bfloat16
    would be rounded, and say other words than it was trained with.
    """
    asked = _asked_dtypes.get()
    for part in model._parents() if asked is not None else ():
        own = asked.get(part)
        own = getattr(torch, own, None) if isinstance(own, str) else own  # "auto" is none
        if own is None or own != dtype:
            plan[f"^{re.escape(key_prefix(model, part))}"] = own  # None: as it was saved
    return plan


def refill(
    model: Any, name: str, overrides: dict[str, str], options: dict[str, dict[str, Any]], left_out: frozenset[str]
) -> None:
    """Attaches the parents that the checkpoint `name` does not hold, each loaded from its own repository and checked."""
    for part, attribute in PARENTS.items():
        if getattr(model.base_model, attribute, None) is not None or getattr(model.config, f"{part}_config") is None:
            continue
        if part in left_out:
            model.base_model._parts_with_home = model.base_model._parts_with_home | {part}
            continue
        record = getattr(model.config, f"{part}_base_model")
        if record is None and part not in overrides:
            raise ValueError(
                f"The checkpoint `{name}` neither holds the weights of its {attribute} nor says where they are: pass "
                f'{part}_base_model="id or folder" to from_pretrained.'
            )
        load_options = dict(options[part])
        if part in overrides:
            if part == "text":
                load_options["headless"] = model.config.text_headless
                model.generation_config = None  # the saved one names the other model's end of text
            module, found = load_base_model(part, overrides[part], **load_options)
            check_same_geometry(model, part, module, overrides[part])
        else:
            load_options.setdefault("dtype", record["dtype"])
            if part == "text":
                load_options["headless"] = model.config.text_headless
            module, found = load_base_model(
                part,
                record["name_or_path"],
                config=getattr(model.config, f"{part}_config"),
                revision=record["revision"],
                **load_options,
            )
            verify_fingerprint(part, record, found)
        model._attach(part, module, found)
    language_model = model._parents().get("text")
    if language_model is not None:
        device = language_model.get_input_embeddings().weight.device
        for connector in (module for module in model.modules() if isinstance(module, CONNECTING)):
            if device.type != "meta" and any(parameter.device != device for parameter in connector.parameters()):
                connector.to(device)


def check_same_geometry(model: Any, part: str, module: PreTrainedModel, name: str) -> None:
    if part == "text":
        found = language_model_geometry(module).embedding_dim
        if found != model.config.embedding_dim:
            raise ValueError(
                f"The connector writes vectors of width {model.config.embedding_dim}, but the word embeddings of `{name}` "
                f"have width {found}: give a language model of that width, or train a connector for this one."
            )
        if model.config.fusion == "cross_attention":
            sizes = {"hidden_size": model.config.text_hidden_size, "num_layers": model.config.text_num_layers}
            check_decoder(module, **sizes, name=name)
        return
    if part == "audio":
        heard = probe_audio_tower(
            module.config,
            layer=model.config.audio_feature_layer,
            select_strategy=model.config.audio_feature_select_strategy,
        )
        if heard.audio_width != model.config.audio_width:
            raise ValueError(
                f"The audio connector reads features of width {model.config.audio_width}, but `{name}` gives "
                f"{heard.audio_width}: give an audio tower of that width, or train a connector for this one."
            )
        model.config.audio_num_positions = heard.num_positions
        return
    probed = FrozenPrefixConfig.from_vision_text_configs(
        module.config,
        model.config.text_config,
        embedding_dim=model.config.embedding_dim,
        connector_type=model.config.connector_type,
        connector_config=model.config.connector_config,
        prefix_length=model.config.prefix_length,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    if probed.vision_width != model.config.vision_width:
        raise ValueError(
            f"The connector reads features of width {model.config.vision_width}, but `{name}` gives {probed.vision_width}: "
            "give a tower of that width, or train a connector for this one."
        )
    model.config.num_leading_tokens, model.config.num_positions = probed.num_leading_tokens, probed.num_positions


# ------------------------------------------------------------------------------------------- a tower put out of memory


def unload_base_model(model: Any, part: str = "vision") -> None:
    """As [`FrozenPrefixPreTrainedModel.unload_base_model`]."""
    attribute = unloadable(model, part)
    if getattr(model.base_model, attribute) is None:
        return
    if part not in model.base_model._parts_with_home or part in changed_parts(model):
        why = "was trained or changed" if part in model.base_model._parts_with_home else "has no repository or folder"
        raise ValueError(
            f"The {part} tower {why}, so it would be lost: save it by its own `save_pretrained`, and join the model anew "
            "from that folder."
        )
    setattr(model.base_model, attribute, None)
    model._gather_from_parents()
    model._keys_to_ignore_on_save = keys_with_home(model)


def reload_base_model(model: Any, part: str = "vision", **kwargs: Any) -> None:
    """As [`FrozenPrefixPreTrainedModel.load_base_model`]."""
    attribute = unloadable(model, part)
    if getattr(model.base_model, attribute) is not None:
        return
    record = getattr(model.config, f"{part}_base_model")
    if record is None:
        raise ValueError(
            f'The config does not say where the {part} tower is: load the model anew, with {part}_base_model="id or folder".'
        )
    module, found = load_base_model(
        part,
        record["name_or_path"],
        config=getattr(model.config, f"{part}_config"),
        revision=record["revision"],
        **{"dtype": record["dtype"], **kwargs},
    )
    verify_fingerprint(part, record, found)
    if "device_map" not in kwargs:
        module.to(model.get_input_embeddings().weight.device)
    model._attach(part, module, found)
    model._mark(part)
    model._gather_from_parents()
    model.freeze_base_models()
    model._keys_to_ignore_on_save = keys_with_home(model)


def unloadable(model: Any, part: str) -> str:
    attribute = _UNLOADABLE.get(part)
    if attribute is None:
        raise ValueError(
            f"part={part!r}: of {sorted(_UNLOADABLE)} one can be unloaded and loaded again; every word goes through the "
            "language model."
        )
    if getattr(model.config, f"{part}_config") is None:
        raise ValueError(f"This model has no {part} tower.")
    return attribute


def refuse_without_home(part: str, parent: str | PreTrainedModel | None) -> None:
    if not isinstance(parent, str):
        raise ValueError(
            f"`load_{part}_tower=False` leaves the tower where it is, so name its repository or folder; got "
            f"{'none' if parent is None else f'a loaded {type(parent).__name__}'}."
        )


# -------------------------------------------------------------------------------------------------- folders of adapters


class AdapterFolder(Exception):
    """Raised where an adapter would be loaded into a model whose parents are not there yet."""

    def __init__(self, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__(f"An adapter of {base} waits for its model.")
        self.base, self.adapter_args, self.adapter_kwargs = base, args, kwargs


def then_load_adapter(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `from_pretrained`: for the folder of an adapter it loads the adapter's model whole, then the adapter."""

    @functools.wraps(from_pretrained)
    def load(cls: type, pretrained_model_name_or_path: str | None, *args: Any, **kwargs: Any) -> Any:
        try:
            return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        except AdapterFolder as error:
            found = error
        loaded = load(cls, found.base, *args, **{key: value for key, value in kwargs.items() if key != "revision"})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(*found.adapter_args, **found.adapter_kwargs)
        model.eval()
        return loaded

    return load


def own_names(model: PreTrainedModel) -> dict[str, Any]:
    """Options of `load_adapter` by which an adapter's keys stay as they are.

    transformers' rules for old checkpoints hold `model.language_model.model` for a mistake of theirs, and would take the last
    part away; here it is the language model's own.
    """
    return {"weight_mapping": get_model_conversion_mapping(model, add_legacy=False)}


__all__ = [
    "PARENTS",
    "AdapterFolder",
    "asked_dtypes",
    "changed_parts",
    "dtype_plan",
    "key_prefix",
    "keys_with_home",
    "leave_out",
    "own_names",
    "parts_to_build",
    "refill",
    "refuse_without_home",
    "reload_base_model",
    "replaced_parts",
    "samples_of",
    "split_part_options",
    "then_load_adapter",
    "unload_base_model",
    "was_changed",
]
