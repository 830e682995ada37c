# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds and how it comes back: the connector, and of the backbones what they can't be had without.

Saved is what was learnt. A backbone that has a source, the repository or folder from which it was loaded, and holds what is
there to the last bit, is recorded and loaded from there. Small checkpoints are built as a skeleton, to which the backbones are
attached, each loaded by its own `from_pretrained`. The names in a file are those of the state dict.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from packaging import version
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .audio_towers import probe_audio_tower
from .backbones import (
    FULL,
    HUB_OPTIONS,
    AttentionOfAll,
    changed_processor_files,
    fingerprint,
    language_model_geometry,
    load_base_model,
    load_unrecorded,
    verify_fingerprint,
)
from .configuration_frozen_prefix import FrozenPrefixConfig, building_skeleton
from .connector_switching import keys_of_idle_connectors
from .cross_attention import check_decoder
from .freezing import CONNECTING, trains
from .parts import PARTS, part_of
from .vision_towers import probe_vision_tower, quiet
from .weights import gathers_layers, own_weights, tensor_digest, tensor_digests


logger = logging.get_logger(__name__)

# Files of earlier versions have the names, and layouts, of each backbone's own repository.
FIRST_WITH_OWN_NAMES = version.parse("0.2.0")


@dataclass
class Loading:
    """
    What `from_pretrained` knows while transformers builds and fills the model, whose other backbones it attaches afterwards.

    Attributes:
        attached: parts that are not built, though the checkpoint may hold them: replaced by the user, or left out.
        dtypes: what the user requested, by part; `None` for nothing.
        adapters: arguments of `load_adapter`, which waits until the backbones are there.
        report: transformers' report on the checkpoint itself, in whose place it would return the adapter's.
    """

    attached: frozenset[str]
    dtypes: dict[str, Any] = field(default_factory=dict)
    adapters: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    report: Any = None


loading: ContextVar[Loading | None] = ContextVar("loading", default=None)


@contextmanager
def while_loading(state: Loading) -> Iterator[Loading]:
    token, skeleton = loading.set(state), building_skeleton.set(True)
    try:
        yield state
    finally:
        loading.reset(token)
        building_skeleton.reset(skeleton)


def parts_to_build(config: FrozenPrefixConfig) -> set[str]:
    """The backbones that a constructor makes itself: all, but for those that are attached in a moment."""
    parts, state = set(config.backbone_configs), loading.get()
    if state is None:
        return parts
    return parts.intersection(PARTS if config.saved_parts is None else config.saved_parts) - state.attached


# ------------------------------------------------------------------------------------------------------- what is saved


def parts_with_source(model: Any) -> set[str]:
    """Backbones that have a source: a repository or folder of their own, from which they were loaded."""
    held = model.config.saved_parts or ()  # by the checkpoint that the model was loaded from
    return {part for part in PARTS if getattr(model.config, f"{part}_base_model") is not None and part not in held}


def trained_parts(model: Any) -> set[str]:
    """Backbones that train, or of which something does."""
    marked = (module for module in model.modules() if hasattr(module, "_frozen_prefix_part"))
    return set(model.config.trainable).union(module._frozen_prefix_part for module in marked if trains(module))


def changed_parts(model: Any) -> set[str]:
    """Backbones that train, or whose values are not those of their source (merged LoRA, say)."""
    changed = trained_parts(model)
    candidates = parts_with_source(model).intersection(model.backbones) - changed
    return changed | {part for part in candidates if not equals_source(model, part)}


def equals_source(model: Any, part: str) -> bool:
    """
    Whether every value of a backbone is what loading it anew would give, cast to the dtype that it has now.

    The backbone is read from its folder, or the Hub's cache, once per model; of what it holds digests are kept, for later
    saves. What is sharded over processes holds other tensors, which are not compared; of what was quantised in loading see
    [`warn_of_changed_quantized`].
    """
    record = getattr(model.config, f"{part}_base_model")
    if "quantization" in record or is_quantized(model.backbones[part]) or gathers_layers(model.backbones[part]):
        return True
    digests = model.base_model.source_digests
    now = digests_of_part(model, part)
    if not now:  # its weights were never loaded
        return True
    if any((part, name, dtype) not in digests for name, (dtype, _) in now.items()):
        try:
            with quiet():
                source = load_unrecorded(
                    part,
                    record["name_or_path"],
                    config=getattr(model.config, f"{part}_config"),
                    revision=record["revision"],
                    headless=model.config.text_headless,
                    dtype=record["dtype"],
                    **gguf_of(record),
                    local_files_only=not Path(record["name_or_path"]).is_dir(),  # it was loaded from there, so it is cached
                    # Custom code that runs in this process was consented to.
                    **({"trust_remote_code": True} if is_custom_code(model.backbones[part]) else {}),
                )
        except (OSError, ValueError) as error:
            logger.warning(
                f"The {PARTS[part].description} `{record['name_or_path']}` can't be read any more, so whether it was changed "
                f"is unknown, and it is saved whole. {error}"
            )
            return False
        modules = source.named_modules()
        tensors = {f"{prefix}.{name}".lstrip("."): own for prefix, one in modules for name, own in own_weights(one)}
        for name, (dtype, _) in now.items():
            if name in tensors:
                digests[part, name, dtype] = tensor_digest(tensors[name].detach().to(dtype))
        digests[part, "names"] = set(tensors)
    # Under FSDP and DeepSpeed some tensors are elsewhere.
    complete = torch.distributed.is_initialized() or digests[part, "names"] <= now.keys()
    return complete and all(digests.get((part, name, dtype)) == digest for name, (dtype, digest) in now.items())


def digests_of_part(model: Any, part: str) -> dict[str, tuple[torch.dtype, str]]:
    """[`tensor_digests`] of a backbone, by the names that its tensors had when it was attached, wherever they are now."""
    found: dict[str, tuple[torch.dtype, str]] = {}
    for module in model.modules():
        if getattr(module, "_frozen_prefix_part", None) == part:
            own = tensor_digests(module)
            found |= {f"{module._frozen_prefix_name}.{name}".lstrip("."): digest for name, digest in own.items()}
    return found


def is_quantized(backbone: nn.Module) -> bool:
    return getattr(backbone, "hf_quantizer", None) is not None


def remember_quantized(model: Any, part: str) -> None:
    """Keeps digests of what a quantised backbone holds unquantised as it was loaded (words, norms), for it is never saved.
    What is quantised can't be told from its digest: backends lay it out anew on first use."""
    if is_quantized(model.backbones[part]):
        model.base_model.source_digests[part, "quantized"] = digests_of_part(model, part)


def warn_of_changed_quantized(model: Any) -> None:
    """Warns of a quantised backbone that holds other values than it was loaded with, which no checkpoint holds. A cast that
    takes nothing away is no change."""
    for part in model.backbones:
        before = model.base_model.source_digests.get((part, "quantized"), {})
        tensors = {
            f"{module._frozen_prefix_name}.{name}": tensor
            for module in model.modules()
            if before and getattr(module, "_frozen_prefix_part", None) == part
            for name, tensor in own_weights(module)
        }
        changed = [
            name
            for name, (dtype, digest) in before.items()
            if name in tensors and not tensors[name].is_meta and tensor_digest(tensors[name].detach().to(dtype)) != digest
        ]
        if changed:
            place = getattr(model.config, f"{part}_base_model")["name_or_path"]
            logger.warning(
                f"The {PARTS[part].description} is quantised, and {len(changed)} of its tensors are not what was loaded "
                f"({changed[:3]}…). A checkpoint can't hold it, so it will be loaded from `{place}` without that change: make "
                "the change in the unquantised model, and join or load that."
            )


def is_custom_code(backbone: nn.Module) -> bool:
    """Whether its class came from a repository."""
    return type(backbone).__module__.startswith("transformers_modules.")


def keys_of_parts(model: Any, parts: set[str]) -> set[str]:
    """Names in the state dict of all that belongs to these backbones."""
    keys: set[str] = set()
    owners: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "_frozen_prefix_part", None) in parts:
            owners.add(name)
            prefix = f"{name}." if name else ""
            keys.update(f"{prefix}{key}" for key, _ in own_weights(module, remove_duplicate=False))
    if any(is_quantized(backbone) for backbone in model.backbones.values()):
        # bitsandbytes adds names below a weight's (`weight.absmax`, 4 bits) and beside it (`SCB`, 8 bits).
        names = nn.Module.state_dict(model)
        keys.update(key for key in names if key.rpartition(".")[0] in owners or any(stem in keys for stem in _stems(key)))
    return keys


def _stems(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def keys_left_out(model: Any, saved: set[str]) -> set[str]:
    """Exactly the names in the state dict that need not be saved: of backbones that can be had again, but for those that
    are saved, and of connectors that are loaded but not in use."""
    return keys_of_idle_connectors(model) | keys_of_parts(model, parts_with_source(model) - saved)


def without_backbones(model: Any, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    A state dict without what need not be saved, for a model that FSDP2 sharded: Trainer and accelerate write, gather and send
    the whole state dict of such a model, at every checkpoint. What is on the meta device is asked for to be filled, and stays.
    """
    for name in keys_left_out(model, trained_parts(model)):
        tensor = state.get(f"{prefix}{name}")
        if tensor is not None and not tensor.is_meta:
            del state[f"{prefix}{name}"]
    return state


def weight_files(folder: str | Path, variant: str | None = None) -> dict[Path, Any]:
    """The file of weights and the index of shards that lie in a folder, each with the time at which it was written."""
    paths = [Path(folder) / _with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths if path.is_file()}


def parts_to_save(model: Any) -> tuple[str, ...]:
    """What `save_pretrained` writes: the connector, and backbones that changed or have no repository or folder."""
    with_source, changed = parts_with_source(model), changed_parts(model)
    return ("connector", *(part for part in model.backbones if part in changed or part not in with_source))


def refuse_lost_words(model: Any) -> None:
    """
    Raises:
        ValueError: if the language model was left where it is, in the checkpoint that the model was loaded from.
    """
    if "text" not in model.backbones and "text" not in parts_with_source(model):
        raise ValueError(
            "The language model of this checkpoint lies in it, and was not loaded (`load_language_model=False`), so a "
            "checkpoint saved now would have none: load the model whole to save it. [errors.md#not-loaded]"
        )


def refuse_quantized(model: Any, saved: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: if a backbone that is to be written is quantised: a checkpoint of several models can't say so of one.
    """
    for part, backbone in model.backbones.items():
        if part in saved and is_quantized(backbone):
            raise ValueError(
                f"The {PARTS[part].description} is quantised, and a checkpoint that holds it could not be loaded: save "
                "without `include_base_models=True`, so that it is loaded from its own place and quantised again, or load it "
                "unquantised first. [errors.md#checkpoint]"
            )


def finish_weights(folder: str | Path, before: dict[Path, Any], variant: str | None = None) -> None:
    """
    Leaves in a folder the weights that were saved just now, and no others: one file beside an index, or an index beside one
    file, would be read in their place. A model without a weight of its own (an `identity` connector) has an empty file.

    Args:
        before: [`weight_files`] as they were before the save.
    """
    after = weight_files(folder, variant)
    stale = [path for path, written in after.items() if before.get(path) == written]
    if len(stale) == len(after) and (Path(folder) / "adapter_config.json").is_file():
        return  # an adapter alone was written
    for path in stale:
        path.unlink()
    if len(stale) == len(after):
        save_file({}, Path(folder) / _with_variant(SAFE_WEIGHTS_NAME, variant), metadata={"format": "pt"})


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, *endings = name.split(".")
    return ".".join([stem, *endings[:-1], variant, endings[-1]])


def key_prefix(model: Any, part: str) -> str:
    outer = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{outer}{PARTS[part].attribute}."


# ------------------------------------------------------------------------------------------------------ how it comes back


def split_part_options(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes out of `kwargs` what is meant for the backbones, and leaves what the checkpoint itself is loaded with."""
    options: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for shared in (*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "max_memory", "attn_implementation"):
        if kwargs.get(shared) is not None:
            for part in options:
                value = kwargs[shared]
                if shared == "attn_implementation" and isinstance(value, dict):
                    value = value.get(f"{part}_config", value.get(""))
                elif shared == "attn_implementation":
                    value = AttentionOfAll(value)
                elif shared == "device_map" and isinstance(value, dict):
                    value = device_map_of(part, value)
                if value is not None:
                    options[part]["dtype" if shared == "torch_dtype" else shared] = value
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = {"": device_of_connector(kwargs["device_map"])}
        if kwargs["device_map"][""] == "disk":
            # Before 1.15 accelerate refuses a map of the disk alone. A name that no module has adds where it is computed.
            kwargs["device_map"]["computed"] = "cpu"
    elif isinstance(kwargs.get("device_map"), str) and kwargs["device_map"] not in ("cpu", "cuda", "mps", "xpu"):
        kwargs.pop("device_map")  # "auto" and the like spread the backbones; the connector follows the word embeddings
    kwargs.pop("max_memory", None)
    if kwargs.get("quantization_config") is not None:
        options["text"]["quantization_config"] = kwargs.pop("quantization_config")
    fields = set(FrozenPrefixConfig.__dataclass_fields__)
    for key in [key for key in kwargs if key not in fields]:
        if (owner := part_of(key)) is not None:
            options[owner][key.removeprefix(f"{owner}_")] = kwargs.pop(key)
    return options


def device_map_of(part: str, device_map: dict[str, Any]) -> Any:
    name = PARTS[part].attribute
    inner: dict[str, Any] = {}
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


def dtype_plan(model: Any, plan: dict[str, torch.dtype | None], dtype: torch.dtype) -> dict[str, torch.dtype | None]:
    """
    Backbones that a checkpoint holds keep the dtype that they were saved in, each its own, unless another was requested.

    transformers loads a checkpoint in one dtype, that of its config; a tower in float32 beside a language model in bfloat16
    would be rounded, and write other words than it was trained with.
    """
    state = loading.get()
    if state is None:
        return plan
    for part in model.backbones:
        own = state.dtypes.get(part)
        own = getattr(torch, own, None) if isinstance(own, str) else own  # "auto" is none
        if own is None or own != dtype:
            plan[f"^{re.escape(key_prefix(model, part))}"] = own  # None: as it was saved
    return plan


def refill(
    model: Any, name: str, overrides: dict[str, str], options: dict[str, dict[str, Any]], left_out: frozenset[str]
) -> None:
    """Attaches the backbones that the checkpoint `name` does not hold, each loaded from its own repository and checked."""
    for part in model.config.backbone_configs:
        if part in left_out or part in model.backbones:
            continue
        load_options = {**options[part], **({"headless": model.config.text_headless} if part == "text" else {})}
        if part in overrides:
            if part == "text":
                model.generation_config = None  # the saved one names the other model's end of text
            module, record = load_base_model(part, overrides[part], **load_options)
            check_same_geometry(model, part, module, overrides[part])
        elif getattr(model.config, f"{part}_base_model") is None:
            raise ValueError(
                f"The checkpoint `{name}` neither holds the weights of its {PARTS[part].description} nor names their source: "
                f'pass {part}_base_model="id or folder" to from_pretrained. [errors.md#no-parent]'
            )
        else:
            module, record = load_recorded(model.config, part, **load_options)
        model._attach(part, module, record)
    language_model = model.backbones.get("text")
    if language_model is not None:
        device = language_model.get_input_embeddings().weight.device
        for connector in (module for module in model.modules() if isinstance(module, CONNECTING)):
            places = {parameter.device for parameter in connector.parameters()}
            # What is offloaded, of either, accelerate's hooks bring.
            if not any(place.type == "meta" for place in (device, *places)) and places != {device}:
                connector.to(device)


def load_recorded(config: FrozenPrefixConfig, part: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The backbone that a config records, checked, and its record now."""
    record = getattr(config, f"{part}_base_model")
    full = str(record["fingerprint"]).startswith(FULL)
    options = {"dtype": record["dtype"], "full_fingerprint": full, **gguf_of(record), **kwargs}
    if "quantization" in record and kwargs.get("quantization_config") is None:
        options |= quantization_of(part, record, kwargs.get("device_map"))
    place = {"config": getattr(config, f"{part}_config"), "revision": record["revision"]}
    module, loaded = load_base_model(part, record["name_or_path"], **place, **options)
    verify_fingerprint(part, record, loaded)
    if changed := changed_processor_files(part, record):
        logger.warning(
            f"Beside the {PARTS[part].description} at `{record['name_or_path']}` {changed} changed since the connector was "
            "trained: a processor made from them would read otherwise. Use the one that was saved with the checkpoint, "
            f'restore them, or pass {part}_base_model="{record["name_or_path"]}" to record them as they are.'
        )
        loaded["processor_files"] = record["processor_files"]
    return module, loaded


def check_recorded(config: FrozenPrefixConfig, part: str, **hub_options: Any) -> None:
    """
    Checks a backbone that another program loads: by its files alone.

    Raises:
        ValueError: if it is not the one that was recorded.
        OSError: transformers' own, if its repository can't be reached.
    """
    record = getattr(config, f"{part}_base_model")
    place = {"name_or_path": record["name_or_path"], "revision": record["revision"]}
    full = str(record["fingerprint"]).startswith(FULL)
    verify_fingerprint(
        part, record, {**place, "fingerprint": fingerprint(**place, full=full, **gguf_of(record), **hub_options)}
    )


def gguf_of(record: dict[str, Any]) -> dict[str, str]:
    return {"gguf_file": record["gguf_file"]} if record.get("gguf_file") else {}


def quantization_of(part: str, record: dict[str, Any], device_map: Any) -> dict[str, Any]:
    """The option by which a backbone is quantised as it was recorded; none, with a warning, where that can't be."""
    recorded, why = record["quantization"], "its record, of an earlier version, does not say how"
    if isinstance(recorded, dict):
        try:
            config = AutoQuantizationConfig.from_dict(dict(recorded))
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
            quantizer.validate_environment(device_map=device_map, weights_only=True)
        except (ImportError, RuntimeError, ValueError) as error:
            recorded, why = recorded.get("quant_method"), str(error)
        else:
            return {"quantization_config": config}
    logger.warning(
        f"The connector was trained with the {PARTS[part].description} quantised by {recorded}, and it is loaded in "
        f"{record['dtype']}, with which it may write other words: {why}. Mend that, pass `quantization_config`, or name the "
        f'place, {part}_base_model="{record["name_or_path"]}", to record it without.'
    )
    return {}


def check_same_geometry(model: Any, part: str, module: PreTrainedModel, name: str) -> None:
    config = model.config
    if part == "text":
        width = language_model_geometry(module).embedding_dim
        if width != config.embedding_dim:
            raise ValueError(
                f"The connector writes vectors of width {config.embedding_dim}, but the word embeddings of `{name}` have "
                f"width {width}: give a language model of that width, or train a connector for this one."
                " [errors.md#another-parent]"
            )
        if config.fusion == "cross_attention":
            check_decoder(module, hidden_size=config.text_hidden_size, num_layers=config.text_num_layers, name=name)
        return
    kind = PARTS[part].kind
    choice = {"layer": getattr(config, f"{part}_feature_layer")}
    choice["select_strategy"] = getattr(config, f"{kind}_feature_select_strategy")
    if kind == "audio":
        probed: Any = probe_audio_tower(module.config, **choice)
        expected, width, found = config.audio_width, probed.audio_width, {"audio_num_positions": probed.num_positions}
    else:
        probed = probe_vision_tower(module.config, **choice)
        expected, width, found = config.geometry_of(part)["vision_width"], probed.vision_width, probed.as_config(part)
    if width != expected:
        raise ValueError(
            f"The connector of the {PARTS[part].description} reads features of width {expected}, but `{name}` gives {width}: "
            "give a tower of that width, or train a connector for this one. [errors.md#another-parent]"
        )
    for key, value in found.items():
        setattr(config, key, value)
    config.validate_architecture()


# ------------------------------------------------------------------------------------------- a tower put out of memory


def unload_base_model(model: Any, part: str = "vision") -> None:
    """As [`FrozenPrefixPreTrainedModel.unload_base_model`]."""
    attribute = unloadable(model, part)
    if getattr(model.base_model, attribute) is None:
        return
    has_source = part in parts_with_source(model)
    if not has_source or part in changed_parts(model):
        why = "was trained or changed" if has_source else "has no repository or folder"
        raise ValueError(
            f"The {PARTS[part].description} {why}, so it would be lost: save it by its own `save_pretrained`, and join the "
            "model anew from that folder. [errors.md#not-loaded]"
        )
    setattr(model.base_model, attribute, None)
    model._gather_from_backbones()


def reload_base_model(model: Any, part: str = "vision", **kwargs: Any) -> None:
    """As [`FrozenPrefixPreTrainedModel.load_base_model`]."""
    attribute = unloadable(model, part)
    if getattr(model.base_model, attribute) is not None:
        return
    if getattr(model.config, f"{part}_base_model") is None:
        raise ValueError(
            f"The config does not record where the {PARTS[part].description} is: load the model anew, with "
            f'{part}_base_model="id or folder". [errors.md#no-parent]'
        )
    module, record = load_recorded(model.config, part, **kwargs)
    if "device_map" not in kwargs:
        module.to(model.get_input_embeddings().weight.device)
    model._attach(part, module, record)
    model._mark(part)
    model._gather_from_backbones()
    model.freeze_base_models()


def unloadable(model: Any, part: str) -> str:
    names = [name for name, one in PARTS.items() if one.can_be_unloaded]
    if part not in names:
        raise ValueError(
            f"part={part!r}: of {sorted(names)} one can be unloaded and loaded again; the language model is always needed."
            " [errors.md#not-loaded]"
        )
    if getattr(model.config, f"{part}_config") is None:
        raise ValueError(f"This model has no {PARTS[part].description}. [errors.md#not-loaded]")
    return PARTS[part].attribute


def refuse_without_source(part: str, backbone: str | PreTrainedModel | None) -> None:
    if not isinstance(backbone, str):
        raise ValueError(
            f"`load_vision_tower=False` leaves the {PARTS[part].description} where it is, so name its repository or folder; "
            f"got {'none' if backbone is None else f'a loaded {type(backbone).__name__}'}. [errors.md#no-parent]"
        )


# ------------------------------------------------------------------------------------------------------ names in a file


def renames_on_load(model: PreTrainedModel, rules: list[Any]) -> list[Any]:
    """Of transformers' rules for the names and layouts of a checkpoint those that this model's checkpoint needs: none, but for
    files of versions before 0.2.0."""
    written_by = model.config.frozen_prefix_version
    return [] if written_by is None or version.parse(written_by) >= FIRST_WITH_OWN_NAMES else rules


def refuse_incomplete(model: Any, result: Any) -> Any:
    """
    What a strict `load_state_dict` missed: nothing, for what a checkpoint of ours leaves out stays as it was.

    Raises:
        RuntimeError: as torch's, if other names are missing, or the state dict has some that the model doesn't.
    """
    left_out = keys_left_out(model, trained_parts(model)) if result.missing_keys else set()
    missing = [name for name in result.missing_keys if name not in left_out]
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(model).__name__}: missing keys {missing}, unexpected keys "
            f"{result.unexpected_keys}. A checkpoint holds all that trains, under the names of `state_dict()`; load one of "
            "an earlier version by `from_pretrained`. [errors.md#checkpoint]"
        )
    return type(result)(missing, result.unexpected_keys)


def refuse_partly_loaded(model: Any, result: Any) -> Any:
    """
    What `load_state_dict(strict=False)` left as it was: of that, what trains.

    Raises:
        ValueError: if the state dict has names that the model doesn't, in place of some that train.
    """
    if not result.missing_keys:
        return result
    loaded = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in result.missing_keys}
    missing = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and name in result.missing_keys and id(parameter) not in loaded
    ]
    if missing and result.unexpected_keys:
        raise ValueError(
            f"The state dict lacks {len(missing)} tensors that train ({missing[:3]}…), and holds others that the model has no "
            f"place for ({result.unexpected_keys[:3]}…): training would go on from other weights than were saved. Load the "
            "checkpoint by `from_pretrained`, which knows the names of earlier versions, and save it again."
            " [errors.md#checkpoint]"
        )
    return type(result)(missing, result.unexpected_keys)


def refuse_unexpected(model: Any, name: str, info: dict[str, Any], attached: frozenset[str]) -> None:
    """
    Raises:
        ValueError: if the checkpoint holds weights that the model has no place for, unless they are of backbones that come
            from elsewhere.
    """
    elsewhere = tuple(f"{PARTS[part].attribute}." for part in attached)
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.removeprefix("model.").startswith(elsewhere))
    if unexpected:
        raise ValueError(
            f"The checkpoint `{name}` holds {len(unexpected)} tensors that the model of its config has no place for "
            f"({unexpected[:3]}…): its config was changed since, or belongs to another checkpoint. Restore the config that "
            "was saved with it. [errors.md#checkpoint]"
        )


__all__ = [
    "Loading", "changed_parts", "check_recorded", "dtype_plan", "finish_weights", "key_prefix", "keys_left_out", "loading",
    "parts_to_build", "parts_to_save", "parts_with_source", "refill", "refuse_incomplete",
    "refuse_lost_words", "refuse_partly_loaded",
    "refuse_quantized", "refuse_unexpected", "refuse_without_source", "reload_base_model", "remember_quantized",
    "renames_on_load", "split_part_options", "trained_parts", "unload_base_model", "warn_of_changed_quantized", "weight_files",
    "while_loading", "without_backbones",
]  # fmt: skip
