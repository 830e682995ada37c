"""What all frozen-prefix models share: the one place that freezes, saves what was trained, and refills the parents."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter_folders import AdapterFolder, own_names, then_load_adapter
from .audio_towers import probe_audio_tower
from .base_model_unloading import BaseModelUnloadingMixin
from .base_models import (
    HUB_OPTIONS,
    find_feature_extractor,
    find_image_processor,
    find_placeholder_ids,
    is_headless,
    language_model_geometry,
    load_base_model,
    reads_ahead,
    verify_fingerprint,
    word_embedding_norm,
)
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connector_switching import ConnectorSwitchingMixin
from .connectors import Connector
from .cross_attention import GatedCrossAttention, check_decoder, decoder_layers
from .heads import Head
from .hub import AUTO_MAP, complete_copy, complete_repository
from .parent_changes import samples_of, trains, was_changed
from .part_dtypes import PartDtypesMixin, asked_dtypes
from .transformers_compat import CACHE_NAMES
from .unlocking import last_layers
from .weight_alignment import align_weights


# Attribute of the base model that holds each parent.
PARENTS = {"vision": "vision_tower", "text": "language_model", "audio": "audio_tower"}

# What `trainable` calls "connector": all that is neither parent.
CONNECTING = (Connector, GatedCrossAttention, Head)

# Set while `from_pretrained` builds a model whose parents it is about to attach; holds those that the user replaces.
_replaced_parts: ContextVar[frozenset[str] | None] = ContextVar("replaced_parts", default=None)


@contextmanager
def _leave_out(replaced: frozenset[str]) -> Iterator[None]:
    token = _replaced_parts.set(replaced)
    try:
        yield
    finally:
        _replaced_parts.reset(token)


def parts_to_build(config: FrozenPrefixConfig) -> set[str]:
    """The parents that a constructor makes itself: all, but for those that are attached in a moment."""
    replaced = _replaced_parts.get()
    parts = {part for part in PARENTS if getattr(config, f"{part}_config") is not None}
    if replaced is None:
        return parts
    saved = PARENTS if config.saved_parts is None else config.saved_parts
    return parts.intersection(saved) - replaced


class _Recomputed:
    """The forward of a frozen layer that keeps its input alone and is run again in the backward pass."""

    def __init__(self, layer: GradientCheckpointingLayer):
        self.layer, self.plain = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.training or not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        # Private: the library leaves the chosen function (reentrant or not, offloading) on the layer by this name alone.
        return self.layer._gradient_checkpointing_func(functools.partial(self.plain, **kwargs), *args)


class FrozenPrefixPreTrainedModel(BaseModelUnloadingMixin, ConnectorSwitchingMixin, PartDtypesMixin, PreTrainedModel):
    """
    What all frozen-prefix models share: freezing, small checkpoints, parents that are refilled and checked on loading.

    Subclasses hold a [`FrozenPrefixModel`] as `model` (or are one).
    """

    config: FrozenPrefixConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _no_split_modules = []
    # One checkpoint serves all classes: each leaves the others' heads aside.
    _keys_to_ignore_on_load_unexpected = [r"^contrastive_head\.", r"^classifier\."]
    # Whether `from_vision_text_pretrained` takes text models that only read; None: with a head where there is one.
    _text_headless: bool | None = False
    # Set while the word embeddings' output requires gradients.
    _hook_of_words: Any = None

    # ---------------------------------------------------------------------------------------------- the parents

    def _parents(self) -> dict[str, nn.Module]:
        found = {part: getattr(self.base_model, name, None) for part, name in PARENTS.items()}
        return {part: module for part, module in found.items() if module is not None}

    def _mark(self, part: str) -> None:
        # Marks travel with the modules through PEFT's wrapping, `.to()` and copies; names and tensors don't.
        for module in self._parents()[part].modules():
            module._frozen_prefix_part = part

    def _settle(self) -> None:
        """Everything that depends on the parents being there: freezing, and what the outer model must know of them."""
        if _replaced_parts.get() is not None:
            return  # not all are there yet: `_finish_attaching` settles
        self.input_modalities = (*self.config.media, "text")
        for part in self._parents():
            self._mark(part)
        language_model = self._parents().get("text")
        if language_model is not None:
            self._is_stateful = getattr(language_model, "_is_stateful", False)
            self._can_compile_fullgraph = all(
                getattr(parent, "_can_compile_fullgraph", False) for parent in self._parents().values()
            )
            if self.config.fusion == "cross_attention":
                self.base_model.cross_attention.stand_between(decoder_layers(language_model))
                self._can_compile_fullgraph = False  # who looks where is counted on the host
        self.freeze_base_models()

    def freeze_base_models(self) -> None:
        """
        Sets `requires_grad` of every tensor of the parents and the connector by `config.trainable`; the one place that
        does. Tensors that others added (LoRA) are left alone. Frozen parents stay in eval mode under `train()`.
        """
        unlocked = [last_layers(self._layered(part), count) for part, count in self._unlocked().items()]
        unlocked_ids = set().union(*(one.parameters for one in unlocked))
        idle_ids = self._ids_of_idle_parameters()
        for module in self.modules():
            if isinstance(module, CONNECTING):
                module.requires_grad_("connector" in self.config.trainable)
            elif (part := getattr(module, "_frozen_prefix_part", None)) is not None:
                for parameter in module.parameters(recurse=False):
                    if parameter.is_floating_point():
                        trains = part in self.config.trainable or id(parameter) in unlocked_ids
                        parameter.requires_grad_(trains and id(parameter) not in idle_ids)
        self.train(self.training)

    def _unlocked(self) -> dict[str, int]:
        """Of the parents that are here and otherwise frozen, how many last layers train."""
        counts = self.config.unlocked_layers.items()
        return {part: n for part, n in counts if part in self._parents() and part not in self.config.trainable}

    def _layered(self, part: str) -> nn.Module:
        """The parent whose last layers are meant by `unlocked_layers`."""
        return self._parents()[part]

    def _ids_of_idle_parameters(self) -> set[int]:
        """Ids of the parents' parameters that have no part in this model's loss: frozen, whatever is to train."""
        return set()

    def train(self, mode: bool = True) -> "FrozenPrefixPreTrainedModel":
        """Sets the mode of what trains; frozen parents keep dropout off and batch statistics still."""
        unlocked = set().union(*(last_layers(self._layered(part), count).modules for part, count in self._unlocked().items()))
        modules = list(self.modules())
        stays = [
            (part := getattr(module, "_frozen_prefix_part", None)) is not None
            and part not in self.config.trainable
            and id(module) not in unlocked
            for module in modules
        ]
        if all(module.training is (mode and not still) for module, still in zip(modules, stays, strict=True)):
            return self  # loading asks often, and setting it on each module takes long
        super().train(mode)
        for module, still in zip(modules, stays, strict=True):
            if still and module.training:
                module.training = False
        return self

    def enable_input_require_grads(self) -> None:
        """As the library's, on the word embeddings alone: hooked at its input too, a frozen tower would keep its whole
        graph."""
        if self._hook_of_words is None:
            words = self.get_input_embeddings()
            self._hook_of_words = words.register_forward_hook(lambda _, __, output: output.requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        """Takes that back."""
        if self._hook_of_words is not None:
            self._hook_of_words.remove()
            self._hook_of_words = None

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)  # private: 5.24 renamed the public ways, which end here
        # The library's layers recompute in train mode only, and frozen parents are never in it.
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer) and hasattr(module, "_frozen_prefix_part"):
                recomputed = module.__dict__.get("forward")
                if isinstance(recomputed, _Recomputed):
                    module.forward = recomputed.plain
                if enable and module.gradient_checkpointing:
                    module.forward = _Recomputed(module)

    def _attach(self, part: str, module: PreTrainedModel, record: dict[str, Any] | None) -> None:
        setattr(self.base_model, PARENTS[part], module)
        # The parent reads its own config object, so ours must hold that very one.
        setattr(self.config, f"{part}_config", module.config)
        setattr(self.config, f"{part}_base_model", record)
        if record is not None:
            for inner in module.modules():
                inner._frozen_prefix_samples = samples_of(inner)
            self.base_model._parts_with_home = self.base_model._parts_with_home | {part}

    def _gather_from_parents(self) -> None:
        # Tied keys, no-split and fp32 modules of the parents are gathered by post_init; weights are there already.
        with no_init_weights():
            if self.base_model is not self:
                self.base_model.post_init()
            self.post_init()
        align_weights(self)  # every parent comes by here, loaded with us, before us or after us

    def _finish_attaching(self) -> None:
        self._gather_from_parents()
        self._settle()
        self._keys_to_ignore_on_save = self._keys_with_home(just_loaded=True)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The library skips containers without tensors of their own in custom code, so connectors are filled here.
        for module in self.modules():
            if isinstance(module, CONNECTING) and not getattr(module, "_frozen_prefix_initialized", False):
                tensors = list(module.parameters())
                if any(tensor.is_meta or getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                    continue  # being loaded
                self._reset_connector(module)

    def _reset_connector(self, connector: Connector | GatedCrossAttention | Head) -> None:
        connector.reset_parameters()
        language_model = self._parents().get("text")
        if language_model is not None and language_model.device.type != "meta":
            connector.set_output_norm(word_embedding_norm(language_model) * self.base_model.embed_scale)
        connector._frozen_prefix_initialized = True

    # ------------------------------------------------------------------------------------------------- saving

    def changed_parts(self, just_loaded: bool = False) -> set[str]:
        """Parts that train, or whose weights somebody changed since they were loaded (unless that was a moment ago)."""
        changed = set(self.config.trainable)
        for module in self.modules():
            part = getattr(module, "_frozen_prefix_part", None)
            if part is not None and part not in changed and (trains(module) or (not just_loaded and was_changed(module))):
                changed.add(part)
        return changed

    def _keys_with_home(self, just_loaded: bool = False) -> set[str]:
        """Exactly the names in the state dict that need not be saved: of parents that can be refilled and never
        trained, and of connectors that are loaded but not in use."""
        skipped = self.base_model._parts_with_home - self.changed_parts(just_loaded)
        keys = self._keys_of_idle_connectors()
        for name, module in self.named_modules(remove_duplicate=False):
            if getattr(module, "_frozen_prefix_part", None) in skipped:
                prefix = f"{name}." if name else ""
                own = {"recurse": False, "remove_duplicate": False}
                keys.update(f"{prefix}{key}" for key, _ in module.named_parameters(**own))
                # Private: but for the whole state dict, which costs a gathering where it is sharded, nothing says so.
                left_out = module._non_persistent_buffers_set
                keys.update(f"{prefix}{key}" for key, _ in module.named_buffers(**own) if key not in left_out)
        return keys

    def save_pretrained(self, save_directory: str, *args: Any, include_base_models: bool = False, **kwargs: Any) -> None:
        """
        Writes what was trained, and nothing else: by default the connector, the config and the generation config.

        Args:
            save_directory (`str`): folder; made if absent.
            include_base_models (`bool`, defaults to `False`):
                Write both parents too, and the code and processor with them: a self-contained copy, which loads without
                this package too (`trust_remote_code=True`). Parents that were trained, or have no repository or folder of
                their own, are always written whole.
            args, kwargs: as `PreTrainedModel.save_pretrained`.
        """
        if include_base_models:
            for part, attribute in PARENTS.items():
                if getattr(self.config, f"{part}_config") is not None and getattr(self.base_model, attribute) is None:
                    raise ValueError(
                        f"`include_base_models=True` writes the {part} tower too, and it is not loaded: "
                        f'`model.load_base_model("{part}")` first.'
                    )
        with_home = self._keys_of_idle_connectors() if include_base_models else self._keys_with_home()
        left_out = {part for part in PARENTS if any(key.startswith(self._key_prefix(part)) for key in with_home)}
        self.config.saved_parts = ("connector", *(part for part in self._parents() if part not in left_out))
        self.config.auto_map = dict(AUTO_MAP)
        self._keys_to_ignore_on_save = with_home
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._keys_to_ignore_on_save = self._keys_with_home()
        if include_base_models and kwargs.get("is_main_process", True):
            complete_copy(save_directory, self)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Every way of pushing a model ends here, and in no public method.
        complete_repository(working_dir, self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _key_prefix(self, part: str) -> str:
        outer = "" if self.base_model is self else f"{self.base_model_prefix}."
        return f"{outer}{PARENTS[part]}."

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    @then_load_adapter
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args: Any,
        vision_base_model: str | None = None,
        text_base_model: str | None = None,
        audio_base_model: str | None = None,
        load_vision_tower: bool = True,
        **kwargs: Any,
    ) -> "FrozenPrefixPreTrainedModel":
        """
        Loads a connector and refills its two parents from their own repositories, at the recorded commits, checked.

        Args:
            pretrained_model_name_or_path (`str`): id on the Hub or folder of the checkpoint.
            vision_base_model, text_base_model, audio_base_model (`str`, *optional*):
                Another place, or another model, for that parent. It is taken as the user says and recorded.
            load_vision_tower (`bool`, defaults to `True`):
                `False` leaves the tower where it is, for a model that is given `vision_features`; see
                [`cache_vision_features`] and [`load_base_model`].
            kwargs: as `PreTrainedModel.from_pretrained`. `dtype`, `device_map` and the options about reaching the Hub
                go on to the parents; `quantization_config` to the language model; options prefixed with `vision_`,
                `text_` or `audio_` to that parent alone, for example `text_device_map="auto"`.

        Raises:
            ValueError: if a parent can't be filled, or is not the one the connector was trained with, or the checkpoint
                lacks weights of the connector.
            OSError: the library's own, if a repository can't be reached.
        """
        overrides = {"vision": vision_base_model, "text": text_base_model, "audio": audio_base_model}
        overrides = {part: name for part, name in overrides.items() if name is not None}
        options = cls._split_part_options(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("`use_safetensors=False` would read a pickle, which can run code; connectors are safetensors.")
        if pretrained_model_name_or_path is None:  # weights come as a state dict: everything is in it
            model, info = super().from_pretrained(None, *model_args, output_loading_info=True, **kwargs)
        else:
            if not load_vision_tower and "vision" in overrides:
                raise ValueError("`load_vision_tower=False` and `vision_base_model` contradict each other: leave one out.")
            left_out = frozenset() if load_vision_tower else frozenset({"vision"})
            with _leave_out(left_out.union(overrides)), asked_dtypes(options):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
            model._refuse_missing(pretrained_model_name_or_path, info)
            if left_out and "vision" in (PARENTS if model.config.saved_parts is None else model.config.saved_parts):
                raise ValueError(
                    f"The checkpoint `{pretrained_model_name_or_path}` holds the vision tower itself, so it can't be left "
                    "where it is: load the model without `load_vision_tower=False`."
                )
            model._refill(pretrained_model_name_or_path, overrides, options, left_out)
        model._finish_attaching()  # in eval mode, as the library gives it
        return (model, info) if with_info else model

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's; for a folder of an adapter, which `from_pretrained` takes too, once the parents are there."""
        if _replaced_parts.get() is None:
            loaded = super().load_adapter(*args, **{**own_names(self), **kwargs})
            align_weights(self)
            return loaded
        raise AdapterFolder(self.name_or_path, args, kwargs)

    @classmethod
    def _split_part_options(cls, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Takes out of `kwargs` what is meant for the parents, and leaves what the checkpoint itself is loaded with."""
        options: dict[str, dict[str, Any]] = {part: {} for part in PARENTS}
        for shared in (*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "max_memory", "attn_implementation"):
            if kwargs.get(shared) is not None:
                for part in options:
                    value = kwargs[shared]
                    if shared == "attn_implementation" and isinstance(value, dict):
                        value = value.get(f"{part}_config", value.get(""))
                    elif shared == "device_map" and isinstance(value, dict):
                        value = cls._device_map_of(part, value)
                    if value is not None:
                        options[part]["dtype" if shared == "torch_dtype" else shared] = value
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = {"": cls._device_of_connector(kwargs["device_map"])}
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

    @classmethod
    def _device_map_of(cls, part: str, device_map: dict[str, Any]) -> Any:
        name = PARENTS[part]
        inner = {}
        for key, device in device_map.items():
            bare = key.removeprefix("model.")
            if bare == "" or bare == name:
                inner.setdefault("", device)
            elif bare.startswith(f"{name}."):
                inner[bare.removeprefix(f"{name}.")] = device
        return inner or None

    @staticmethod
    def _device_of_connector(device_map: dict[str, Any]) -> Any:
        for key in ("model.connector", "connector", "model", ""):
            if key in device_map:
                return device_map[key]
        return next(iter(device_map.values()))

    def _refuse_missing(self, name: str, info: dict[str, Any]) -> None:
        missing = sorted(key for key in info["missing_keys"] if key not in self.all_tied_weights_keys)
        if missing:
            raise ValueError(
                f"The checkpoint `{name}` lacks {len(missing)} tensors of the model ({missing[:3]}…); they would be random. "
                "It was saved by another class or connector, or not saved whole: check `connector_type` in its config, "
                "or save it again."
            )

    def _refill(
        self, name: str, overrides: dict[str, str], options: dict[str, dict[str, Any]], left_out: frozenset[str]
    ) -> None:
        for part, attribute in PARENTS.items():
            if getattr(self.base_model, attribute, None) is not None or getattr(self.config, f"{part}_config") is None:
                continue
            if part in left_out:
                self.base_model._parts_with_home = self.base_model._parts_with_home | {part}
                continue
            record = getattr(self.config, f"{part}_base_model")
            if record is None and part not in overrides:
                raise ValueError(
                    f"The checkpoint `{name}` neither holds the weights of its {attribute} nor says where they are: pass "
                    f'{part}_base_model="id or folder" to from_pretrained.'
                )
            load_options = dict(options[part])
            if part in overrides:
                if part == "text":
                    load_options["headless"] = self.config.text_headless
                    self.generation_config = None  # the saved one names the other model's end of text
                module, found = load_base_model(part, overrides[part], **load_options)
                self._check_same_geometry(part, module, overrides[part])
            else:
                load_options.setdefault("dtype", record["dtype"])
                if part == "text":
                    load_options["headless"] = self.config.text_headless
                module, found = load_base_model(
                    part,
                    record["name_or_path"],
                    config=getattr(self.config, f"{part}_config"),
                    revision=record["revision"],
                    **load_options,
                )
                verify_fingerprint(part, record, found)
            self._attach(part, module, found)
        language_model = self._parents().get("text")
        if language_model is not None:
            device = language_model.get_input_embeddings().weight.device
            for connector in (module for module in self.modules() if isinstance(module, CONNECTING)):
                if device.type != "meta" and any(parameter.device != device for parameter in connector.parameters()):
                    connector.to(device)

    def _check_same_geometry(self, part: str, module: PreTrainedModel, name: str) -> None:
        if part == "text":
            found = language_model_geometry(module).embedding_dim
            if found != self.config.embedding_dim:
                raise ValueError(
                    f"The connector writes vectors of width {self.config.embedding_dim}, but the word embeddings of `{name}` "
                    f"have width {found}: give a language model of that width, or train a connector for this one."
                )
            if self.config.fusion == "cross_attention":
                sizes = {"hidden_size": self.config.text_hidden_size, "num_layers": self.config.text_num_layers}
                check_decoder(module, **sizes, name=name)
            return
        if part == "audio":
            heard = probe_audio_tower(
                module.config,
                layer=self.config.audio_feature_layer,
                select_strategy=self.config.audio_feature_select_strategy,
            )
            if heard.audio_width != self.config.audio_width:
                raise ValueError(
                    f"The audio connector reads features of width {self.config.audio_width}, but `{name}` gives "
                    f"{heard.audio_width}: give an audio tower of that width, or train a connector for this one."
                )
            self.config.audio_num_positions = heard.num_positions
            return
        probed = FrozenPrefixConfig.from_vision_text_configs(
            module.config,
            self.config.text_config,
            embedding_dim=self.config.embedding_dim,
            connector_type=self.config.connector_type,
            connector_config=self.config.connector_config,
            prefix_length=self.config.prefix_length,
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
        )
        if probed.vision_width != self.config.vision_width:
            raise ValueError(
                f"The connector reads features of width {self.config.vision_width}, but `{name}` gives {probed.vision_width}: "
                "give a tower of that width, or train a connector for this one."
            )
        self.config.num_leading_tokens, self.config.num_positions = probed.num_leading_tokens, probed.num_positions

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedModel | None,
        text_model_name_or_path: str | PreTrainedModel,
        audio_model_name_or_path: str | PreTrainedModel | None = None,
        *,
        image_token: str = "<image>",
        video_token: str = "<video>",
        audio_token: str = "<audio>",
        load_vision_tower: bool = True,
        **kwargs: Any,
    ) -> "FrozenPrefixPreTrainedModel":
        """
        Joins pretrained models, all frozen, by new connectors.

        Args:
            vision_model_name_or_path (`str` or `PreTrainedModel`):
                Any vision model of the library: an id, a folder, or a loaded model (saved whole later, as it has no home).
                `None` for a model with ears alone.
            text_model_name_or_path (`str` or `PreTrainedModel`):
                Any causal or encoder-decoder language model, likewise.
            audio_model_name_or_path (`str` or `PreTrainedModel`, *optional*):
                Any audio encoder of the library, or a model that it is one half of, likewise: the model then has ears.
            image_token, video_token, audio_token (`str`, defaults to `"<image>"`, `"<video>"`, `"<audio>"`):
                Word that stands for an image (video, sound) in texts; its id is looked up in, or would be added to, the
                tokenizer. Videos are taken where `num_frames` is given.
            load_vision_tower (`bool`, defaults to `True`):
                `False` takes down where the tower is, and leaves its weights there.
            kwargs:
                Keys of [`FrozenPrefixConfig`] (`connector_type`, `prefix_length`, `connector_config`, `trainable`, …) and
                options of `from_pretrained` as described there (`dtype`, `device_map`, `text_attn_implementation`, …).

        Returns:
            The model in eval mode, its connector's output at the norm of the word embeddings.

        Raises:
            ValueError: if the two can't be joined, naming both widths or lengths and the way out.
        """
        for parent in (vision_model_name_or_path, text_model_name_or_path, audio_model_name_or_path):
            if isinstance(parent, nn.Module) and not isinstance(parent, PreTrainedModel):
                raise ValueError(
                    f"A {type(parent).__name__} is no model of the library: give an id, a folder or a PreTrainedModel. "
                    "Of a PEFT model, merge_and_unload() gives one; adapters that can't be merged (prompts) are put on the "
                    "joined model."
                )
        given = {
            part: parent if isinstance(parent, PreTrainedModel) else str(parent)
            for part, parent in (
                ("vision", vision_model_name_or_path),
                ("text", text_model_name_or_path),
                ("audio", audio_model_name_or_path),
            )
            if parent is not None
        }
        options = cls._split_part_options(kwargs)
        if not load_vision_tower:
            cls._refuse_without_home("vision", given.get("vision"))
            options["vision"]["device_map"] = "meta"
        fields = set(FrozenPrefixConfig.__dataclass_fields__)
        config_options = {key: kwargs.pop(key) for key in list(kwargs) if key in fields and key != "dtype"}
        for key in (*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "attn_implementation"):
            kwargs.pop(key, None)
        if kwargs:
            FrozenPrefixConfig._refuse_unknown_keys(kwargs, allowed=())
        loaded: dict[str, tuple[PreTrainedModel, dict[str, Any] | None]] = {}
        for part, parent in given.items():
            if isinstance(parent, PreTrainedModel):
                loaded[part] = (parent, None)
            else:
                headless = {"headless": config_options.get("text_headless", cls._text_headless)} if part == "text" else {}
                loaded[part] = load_base_model(part, parent, **headless, **options[part])
        language_model = loaded["text"][0]
        if cls._text_headless is not False:
            config_options["text_headless"] = is_headless(language_model)
            unsaid = config_options.get("text_pooling") is None and not hasattr(language_model.config, "is_decoder")
            if config_options["text_headless"] and unsaid:  # DistilBERT reads ahead, CLIP's text half doesn't: ask it
                config_options["text_pooling"] = "mean" if reads_ahead(language_model) else "last"
        hub_options = {
            part: {key: options[part][key] for key in HUB_OPTIONS if key in options[part]} for part in given
        }
        for part, (_, record) in loaded.items():
            if record is not None:
                hub_options[part]["revision"] = record["revision"]
        tokens = {"image": image_token} if "vision" in given else {}
        tokens |= {"video": video_token} if config_options.get("num_frames") is not None else {}
        tokens |= {"audio": audio_token} if "audio" in given else {}
        lacking = any(config_options.get(f"{modality}_token_id") is None for modality in tokens)
        if isinstance(given["text"], str) and lacking:
            words = list(tokens.values())
            ids = find_placeholder_ids(given["text"], language_model.config, words, **hub_options["text"])
            for modality, index in zip(tokens, ids, strict=True):
                if config_options.get(f"{modality}_token_id") is None:
                    config_options[f"{modality}_token_id"] = index
        image_processor = feature_extractor = None
        if isinstance(given.get("vision"), str):
            image_processor = find_image_processor(given["vision"], **hub_options["vision"])
        if isinstance(given.get("audio"), str):
            feature_extractor = find_feature_extractor(given["audio"], **hub_options["audio"])
        config = FrozenPrefixConfig.from_vision_text_configs(
            loaded["vision"][0].config if "vision" in loaded else None,
            language_model.config,
            image_processor=image_processor,
            audio_config=loaded["audio"][0].config if "audio" in loaded else None,
            feature_extractor=feature_extractor,
            embedding_dim=language_model_geometry(language_model).embedding_dim,
            **config_options,
        )
        model = cls._from_parts(config, loaded)
        if not load_vision_tower:
            model.unload_base_model("vision")
        return model

    @classmethod
    def _from_parts(
        cls,
        config: FrozenPrefixConfig,
        parents: dict[str, tuple[PreTrainedModel, dict[str, Any] | None]],
    ) -> "FrozenPrefixPreTrainedModel":
        with _leave_out(frozenset(PARENTS)):
            model = cls(config)
        for part, (module, record) in parents.items():
            model._attach(part, module, record)
        for module in model.modules():
            if isinstance(module, CONNECTING):
                model._reset_connector(module)
                device = model.get_input_embeddings().weight.device
                module.to(device=device if device.type != "meta" else "cpu", dtype=torch.float32)
        model._finish_attaching()
        return model.eval()

    # --------------------------------------------------------------------------------------- library's accessors

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.base_model.language_model.get_decoder()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        if modality is None and self.config.is_encoder_decoder:
            return self.base_model.language_model.get_encoder()
        return super().get_encoder(modality)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError(
            "The language model is frozen bit for bit, so its vocabulary is never resized. `<image>` needs no row of its "
            "own; for more words, resize the language model itself before joining it to a tower."
        )
