# SPDX-License-Identifier: Apache-2.0
"""What all frozen-prefix models share. What trains is decided in `freezing`, what is saved and comes back in `checkpoints`."""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones import (
    HUB_OPTIONS,
    find_feature_extractor,
    find_image_processor,
    find_placeholder_ids,
    find_sentence_pooling,
    is_headless,
    language_model_geometry,
    load_base_model,
    reads_ahead,
    record_of_loaded,
    refuse_pickles,
    takes_attention,
    word_embedding_norm,
)
from .checkpoints import (
    Loading,
    changed_parts,
    dtype_plan,
    finish_weights,
    gguf_of,
    keys_left_out,
    loading,
    parts_to_save,
    refill,
    refuse_incomplete,
    refuse_lost_words,
    refuse_partly_loaded,
    refuse_quantized,
    refuse_unexpected,
    refuse_without_source,
    reload_base_model,
    remember_quantized,
    renames_on_load,
    split_part_options,
    trained_parts,
    unload_base_model,
    warn_of_changed_quantized,
    weight_files,
    while_loading,
    without_backbones,
)
from .configuration_frozen_prefix import FrozenPrefixConfig, as_list_of_towers
from .connector_switching import DEFAULT, connector_specs, load_connector, set_connector
from .connectors import Connector, Head
from .cross_attention import GatedCrossAttention, decoder_layers
from .freezing import CONNECTING, freeze, recompute_frozen_layers, refuse_without_gradient, stays_frozen
from .hub import auto_map_of, complete_copy, complete_repository, prepare_for_pushes
from .parts import MODALITIES, PARTS, VISION_PARTS
from .transformers_compat import CACHE_NAMES, PreTrainedModelWithAdapters, adapter_rules, mask_later_tokens, share_sharding
from .weights import align_weights, is_dispatched, is_sharded, move_around


if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)


class FrozenPrefixPreTrainedModel(PreTrainedModelWithAdapters):
    """
    What all frozen-prefix models share: freezing, small checkpoints, backbones that are refilled and checked on loading.

    Subclasses hold a [`FrozenPrefixModel`] as `model` (or are one).
    """

    config: FrozenPrefixConfig
    base_model: Any  # a FrozenPrefixModel, whose file imports this one
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")  # type: ignore[assignment]  # tuples in transformers' models too
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # taken back where the language model can't
    _skip_keys_device_placement = list(CACHE_NAMES)
    _no_split_modules = []
    # One checkpoint serves all classes: each leaves the others' heads aside.
    _keys_to_ignore_on_load_unexpected = [r"^contrastive_head\.", r"^classifier\."]
    # Attribute of a head that this class alone has, if any; a checkpoint of another class lacks it, and it is then new.
    _head_name = ""
    # Whether `from_vision_text_pretrained` takes text models that only read; None: with a head where there is one.
    _text_headless: bool | None = False
    # Set once the backbones are attached, with their weights.
    _is_assembled = False
    # What a save in progress leaves out.
    _left_out_now: set[str] | None = None
    _own_card: bytes | None = None  # of the folder that is being pushed
    # Set while the word embeddings' output requires gradients.
    _hook_of_words: Any = None

    # ---------------------------------------------------------------------------------------------- the backbones

    @property
    def backbones(self) -> dict[str, PreTrainedModel]:
        """The loaded backbones by part: `"vision"`, `"text"`, `"audio"`, and further vision towers, `"vision_2"`."""
        modules = {part: getattr(self.base_model, one.attribute, None) for part, one in PARTS.items()}
        return {part: module for part, module in modules.items() if module is not None}

    def _mark(self, part: str) -> None:
        # Marks travel with the modules through PEFT's wrapping, `.to()` and copies; names and tensors don't.
        for name, module in self.backbones[part].named_modules():
            module._frozen_prefix_part, module._frozen_prefix_name = part, name
        remember_quantized(self, part)

    def _finish_init(self) -> None:
        """Everything that depends on the backbones being there: freezing, and what the outer model must know of them."""
        if loading.get() is not None:
            return  # not all are there yet: `_finish_loading` does it
        self.input_modalities = (*self.config.media, "text")
        for part in self.backbones:
            self._mark(part)
        language_model = self.backbones.get("text")
        if language_model is not None:
            mask_later_tokens(language_model)
            self._is_stateful = getattr(language_model, "_is_stateful", False)
            self._can_compile_fullgraph = getattr(language_model, "_can_compile_fullgraph", False)
            if self.config.fusion == "cross_attention":
                self.base_model.cross_attention.register_hooks(decoder_layers(language_model))
                self._can_compile_fullgraph = False  # which word attends to which image is counted on the host
        self.freeze_base_models()

    def freeze_base_models(self) -> None:
        """
        Sets `requires_grad` of every tensor of the backbones and the connector by `config.trainable`; the one place that
        does. Tensors that others added (LoRA) are left alone. Frozen backbones stay in eval mode under `train()`.
        """
        freeze(self)

    def train(self, mode: bool = True) -> "Self":
        """Sets the mode of what trains; frozen backbones keep dropout off and batch statistics still."""
        modules, stays = list(self.modules()), stays_frozen(self)
        frozen = [module for module, still in zip(modules, stays, strict=True) if still]
        for module in frozen:
            module.training = False
        if all(module.training is mode for module, still in zip(modules, stays, strict=True) if not still):
            return self  # loading asks often, and setting it on each module takes long
        if mode:
            refuse_without_gradient(self)
        super().train(mode)
        for module in frozen:
            module.training = False
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Self":  # type: ignore[override]  # transformers wraps it without its types
        """As torch's; but a backbone that `device_map` or offloading placed stays there, where its hooks expect it."""
        dispatched = [backbone for backbone in self.backbones.values() if is_dispatched(backbone)]
        if not dispatched:
            return super().to(*args, **kwargs)
        move_around(self, dispatched, *args, **kwargs)
        return self

    def _layered(self, part: str) -> nn.Module:
        """The backbone whose last layers are meant by `unlocked_layers`."""
        return self.backbones[part]

    def _ids_of_idle_parameters(self) -> set[int]:
        """Ids of the backbones' parameters that have no part in this model's loss: frozen, whatever is to train."""
        return set()

    def enable_input_require_grads(self) -> None:
        """As transformers', on the word embeddings alone: hooked at its input too, a frozen tower would keep its whole
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
        recompute_frozen_layers(self, enable)

    def _attach(self, part: str, module: PreTrainedModel, record: dict[str, Any] | None) -> None:
        setattr(self.base_model, PARTS[part].attribute, module)
        # The backbone reads its own config object, so ours must hold that very one.
        setattr(self.config, f"{part}_config", module.config)
        setattr(self.config, f"{part}_base_model", record)
        if part == "text":
            share_sharding(self, module)

    def post_init(self) -> None:
        # What trains is made in fp32 too, where transformers sees to it in loading alone: `from_config` may ask for any dtype.
        for name in self._keep_in_fp32_modules_strict or ():
            if isinstance(part := getattr(self, name, None), nn.Module):
                part.float()
        super().post_init()

    def init_weights(self) -> None:
        # Attached backbones bring their weights: what `post_init` gathers of them then initialises nothing.
        if not self._is_assembled:
            super().init_weights()

    def _gather_from_backbones(self) -> None:
        # Tied keys, no-split and fp32 modules of the backbones are gathered by post_init.
        for model in dict.fromkeys((self.base_model, self)):
            model._is_assembled = True
            model.post_init()
        align_weights(self)  # every backbone comes by here, loaded with us, before us or after us

    def _finish_loading(self) -> None:
        self._gather_from_backbones()
        self._finish_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # transformers skips containers without tensors of their own in custom code, so connectors are filled here.
        for module in self.modules():
            if isinstance(module, CONNECTING) and not module._frozen_prefix_initialized:
                tensors = list(module.parameters())
                if any(tensor.is_meta or getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                    continue  # being loaded
                self._reset_connector(module)

    def _reset_connector(self, connector: Connector | GatedCrossAttention | Head) -> None:
        connector.reset_parameters()
        language_model = self.backbones.get("text")
        if language_model is not None and language_model.device.type != "meta":
            connector.set_output_norm(word_embedding_norm(language_model) * self.base_model.embed_scale)
        connector._frozen_prefix_initialized = True

    @property
    def _device_of_words(self) -> torch.device:
        device = self.base_model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def _start_head(self) -> None:
        """A head that the checkpoint lacks, filled anew, on the device of the word embeddings."""
        head: Head = getattr(self, self._head_name)
        head.to_empty(device=self._device_of_words)
        for one in (*head.modules(), *head.parameters()):
            one._is_hf_initialized = False  # type: ignore[attr-defined]  # or transformers' functions would leave it as it is
        self._reset_connector(head)

    # ------------------------------------------------------------------------------------------------- saving

    def changed_parts(self) -> set[str]:
        """Backbones that train, or whose weights are not those of the place where they were loaded."""
        return changed_parts(self)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Names in the state dict that are not saved: computed, for what trains may change at any time. Whether a frozen
        backbone was changed by hand is checked by `save_pretrained` alone."""
        return keys_left_out(self, trained_parts(self)) if self._left_out_now is None else self._left_out_now

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys: set[str]) -> None:
        pass  # `post_init` gathers it from submodels

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_base_models: bool = False, **kwargs: Any
    ) -> None:
        """
        Writes what was trained, and nothing else: by default the connector, the config and the generation config.

        Args:
            save_directory (`str` or `os.PathLike`): folder; made if absent.
            include_base_models (`bool`, defaults to `False`):
                Write the backbones too, and the code and processor with them: a self-contained copy, which loads without
                this package too (`trust_remote_code=True`). Backbones that were trained or changed, or have no repository or
                folder of their own, are always written whole.
            args, kwargs: as `PreTrainedModel.save_pretrained`. `save_original_format` is `False` by default: names in the
                file are those of the state dict, by which `Trainer` resumes.

        Raises:
            ValueError: for a backbone that would be written and is not loaded, or quantised.
        """
        for part in self.config.backbone_configs if include_base_models else ():
            if part not in self.backbones:
                raise ValueError(
                    f"`include_base_models=True` writes the {PARTS[part].description} too, and it is not loaded: "
                    f'`model.load_base_model("{part}")` first. [errors.md#not-loaded]'
                )
        refuse_lost_words(self)
        saved = ("connector", *self.backbones) if include_base_models else parts_to_save(self)
        refuse_quantized(self, saved)
        warn_of_changed_quantized(self)
        saved_before, self.config.auto_map = self.config.saved_parts, auto_map_of(self)
        variant, is_main_process = kwargs.get("variant"), kwargs.get("is_main_process", True)
        folder = Path(save_directory)
        before = weight_files(folder, variant)
        card = folder / "README.md"
        self._own_card = card.read_bytes() if kwargs.get("push_to_hub") and card.is_file() else None
        self._left_out_now, self.config.saved_parts = keys_left_out(self, set(saved)), saved
        try:
            super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
        finally:
            self._left_out_now, self.config.saved_parts, self._own_card = None, saved_before, None
        if is_main_process:
            finish_weights(folder, before, variant)
            prepare_for_pushes(folder)
        if include_base_models and is_main_process:
            complete_copy(folder, self)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        # Every way of pushing a model ends here, and in no public method. Code and card go along though they lay there
        # unchanged, as in a folder that `Trainer` wrote: the repository may be a new one.
        names = {file.name for file in complete_repository(Path(working_dir), self, repo_id, self._own_card)}
        times = {name: time for name, time in files_timestamps.items() if name not in names}
        return super()._upload_modified_files(working_dir, repo_id, times, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        vision_base_model: str | None = None,
        text_base_model: str | None = None,
        audio_base_model: str | None = None,
        load_vision_tower: bool = True,
        load_language_model: bool = True,
        **kwargs: Any,
    ) -> "Self":
        """
        Loads a connector and refills its backbones from their own repositories, at the recorded commits, checked.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Id on the Hub or folder of the checkpoint, or of an adapter of one.
            vision_base_model, text_base_model, audio_base_model (`str`, *optional*):
                Another place, or another model, for that backbone. It is taken unchecked, and recorded. Of further vision
                towers `vision_2_base_model` and `vision_3_base_model`.
            load_vision_tower (`bool`, defaults to `True`):
                `False` leaves the tower (of several, all) where it is, for a model that takes `vision_features`; see
                [`cache_vision_features`] and [`load_base_model`].
            load_language_model (`bool`, defaults to `True`):
                `False` leaves the language model where it is, for a model that encodes alone (`get_image_features` and the
                like) and whose prefixes another program reads.
            kwargs: as `PreTrainedModel.from_pretrained`. `dtype`, `device_map` and the options about reaching the Hub
                go on to the backbones; `quantization_config` to the language model; options prefixed with `vision_`,
                `text_` or `audio_` to that backbone alone, for example `text_device_map="auto"`.

        Raises:
            ValueError: if a backbone can't be filled, or is not the one the connector was trained with, or the checkpoint
                lacks weights of the connector, or holds some that its config has no place for.
            OSError: transformers' own, if a repository can't be reached.
        """
        named = {"vision": vision_base_model, "text": text_base_model, "audio": audio_base_model}
        named |= {part: kwargs.pop(f"{part}_base_model", None) for part in VISION_PARTS[1:]}
        overrides = {part: name for part, name in named.items() if name is not None}
        options = split_part_options(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors=False` would read a pickle, which can run code; connectors are safetensors."
                " [errors.md#checkpoint]"
            )
        kwargs["use_safetensors"] = True
        name = pretrained_model_name_or_path
        if name is None:  # weights come as a state dict: everything is in it
            loaded: Any = super().from_pretrained(None, *model_args, output_loading_info=True, **kwargs)
            model = loaded[0]
            model._finish_loading()
        else:
            name = str(name)
            left_out = frozenset((*(() if load_vision_tower else VISION_PARTS), *(() if load_language_model else ("text",))))
            if replaced := left_out.intersection(overrides):
                part = min(replaced)
                option = "load_language_model" if part == "text" else "load_vision_tower"
                raise ValueError(
                    f"`{option}=False` and `{part}_base_model` contradict each other: leave one out. [errors.md#contradiction]"
                )
            dtypes = {part: own.get("dtype") for part, own in options.items()}
            with while_loading(Loading(left_out.union(overrides), dtypes)) as state:
                loaded = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
            model, info = loaded
            starts_head = model._refuse_missing(name, info)
            refuse_unexpected(model, name, info, state.attached)
            held = PARTS if model.config.saved_parts is None else model.config.saved_parts
            for part in sorted(left_out.intersection(held, model.config.vision_parts)):
                raise ValueError(
                    f"The checkpoint `{name}` holds the {PARTS[part].description} itself, so it can't be left where it is: "
                    "load the model without `load_vision_tower=False`. [errors.md#not-loaded]"
                )
            refill(model, name, overrides, options, left_out)
            model._finish_loading()
            if starts_head:
                model._start_head()
            for args, options_of_adapter in state.adapters:
                model.load_adapter(*args, **options_of_adapter)
        model.eval()  # as transformers returns it
        return loaded if with_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Private: no option takes away rules that a backbone's class brings for files of its own repository.
        refuse_pickles(checkpoint_files or ())
        if not model._is_assembled:  # else it is an adapter's file
            load_config = replace(load_config, weight_mapping=renames_on_load(model, load_config.weight_mapping))
        return PreTrainedModelWithAdapters._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if (state := loading.get()) is not None:
            state.report = loading_info  # private: of a folder with an adapter, `from_pretrained` returns the adapter's report

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        return dtype_plan(self, super()._get_dtype_plan(dtype), dtype)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; for a folder of an adapter, which `from_pretrained` takes too, once the backbones are there."""
        state = loading.get()
        if state is not None:
            state.adapters.append((args, kwargs))
            return state.report
        loaded = super().load_adapter(*args, **{"weight_mapping": adapter_rules(self), **kwargs})
        align_weights(self)
        return loaded

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """
        As `nn.Module.load_state_dict`. Backbones that a checkpoint of ours leaves out stay as they were, and are not missing.

        Raises:
            RuntimeError: for `strict=True`, if other names are missing, or there are some that the model doesn't have.
            ValueError: for `strict=False`, if something that trains is missing and other names are there in its place.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        return refuse_incomplete(self, result) if strict else refuse_partly_loaded(self, result)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; sharded by FSDP2, without the backbones that a checkpoint of ours leaves out."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        return without_backbones(self, state, prefix) if is_sharded(self) else state

    def _refuse_missing(self, name: str, info: dict[str, Any]) -> bool:
        """Whether the head of this class is to be filled anew: the connector of another class is a good start."""
        missing = {key for key in info["missing_keys"] if key not in self.all_tied_weights_keys}
        head = {key for key in self.state_dict() if self._head_name and key.startswith(f"{self._head_name}.")}
        is_new = bool(head) and head <= missing
        if is_new:
            logger.warning(
                f"`{name}` has no `{self._head_name}`, so that of {type(self).__name__} is new and random: train it before "
                "you rely on its predictions."
            )
            missing -= head
        if missing:
            raise ValueError(
                f"The checkpoint `{name}` lacks {len(missing)} tensors of the model ({sorted(missing)[:3]}…); they would be "
                "random. It was saved by another class or connector, or not saved whole: check `connector_type` in its "
                "config, or save it again. [errors.md#checkpoint]"
            )
        return is_new

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PreTrainedModel | Sequence[str | PreTrainedModel] | None,
        text_model_name_or_path: str | PreTrainedModel,
        audio_model_name_or_path: str | PreTrainedModel | None = None,
        *,
        image_token: str = "<image>",
        video_token: str = "<video>",
        audio_token: str = "<audio>",
        tokenizer: Any = None,
        load_vision_tower: bool = True,
        full_fingerprint: bool = False,
        **kwargs: Any,
    ) -> "Self":
        """
        Joins pretrained models, all frozen, by new connectors.

        Args:
            vision_model_name_or_path (`str` or `PreTrainedModel`):
                Any vision model of transformers: an id, a folder, or a loaded model (saved whole later, as it has no source;
                what was quantised has the one that transformers remembers). `None` for a model of audio alone. A list of up to
                three for one prefix: each reads the image by its own image processor, and the connector their features, on the
                grid of the first, side by side (Prismatic, arXiv 2402.07865); each has its norm.
            text_model_name_or_path (`str` or `PreTrainedModel`):
                Any causal or encoder-decoder language model, likewise. Of a GGUF file its id or folder, with
                `text_gguf_file="name.gguf"`.
            audio_model_name_or_path (`str` or `PreTrainedModel`, *optional*):
                Any audio encoder of transformers, or a model that it is one half of, likewise.
            image_token, video_token, audio_token (`str`, defaults to `"<image>"`, `"<video>"`, `"<audio>"`):
                Placeholder of an image (video, audio clip) in texts; its id is the tokenizer's, or the next that it would
                give. Videos are taken where `num_frames` is set.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The language model's, for one that is joined as a loaded model; it gives the placeholders their ids, and so
                belongs into `FrozenPrefixProcessor.from_model(model, tokenizer=…)` too. By default that of the id or folder.
            load_vision_tower (`bool`, defaults to `True`):
                `False` records where the tower is, and leaves its weights there.
            full_fingerprint (`bool`, defaults to `False`):
                Fingerprint every byte of the backbones, in place of a sample of large tensors; see
                [`~modeling_frozen.backbones.fingerprint`]. Loading the checkpoint then reads all bytes too.
            kwargs:
                Keys of [`FrozenPrefixConfig`] (`connector_type`, `prefix_length`, `connector_config`, `trainable`, …) and
                options of `from_pretrained` as described there (`dtype`, `device_map`, `text_attn_implementation`, …).

        Returns:
            The model in eval mode, its connector's output at the norm of the word embeddings.

        Raises:
            ValueError: if the two can't be joined, naming both widths or lengths and the way out.
        """
        towers = as_list_of_towers(vision_model_name_or_path)
        if len(towers) > len(VISION_PARTS):
            raise ValueError(
                f"{len(towers)} vision towers: one connector reads at most {len(VISION_PARTS)} together. [errors.md#tower]"
            )
        sources: dict[str, Any] = {
            "vision": None,
            "text": text_model_name_or_path,
            "audio": audio_model_name_or_path,
            **dict(zip(VISION_PARTS, towers, strict=False)),
        }
        for part, source in list(sources.items()):
            if isinstance(source, nn.Module) and not isinstance(source, PreTrainedModel):
                raise ValueError(
                    f"A {type(source).__name__} is no model of transformers: give an id, a folder or a PreTrainedModel. "
                    "Of a PEFT model, merge_and_unload() gives one; adapters that can't be merged (prompts) are put on the "
                    "joined model. [errors.md#language-model]"
                )
            if source is None and part == "text":
                raise ValueError(
                    "`text_model_name_or_path=None`: give the id or folder of a language model, or a loaded one."
                    " [errors.md#language-model]"
                )
            if source is None:
                del sources[part]
            elif not isinstance(source, PreTrainedModel):
                sources[part] = str(source)
        options = split_part_options(kwargs)
        if not load_vision_tower:
            for part in VISION_PARTS[: len(towers) or 1]:
                refuse_without_source(part, sources.get(part))
                options[part]["device_map"] = "meta"
        fields = set(FrozenPrefixConfig.__dataclass_fields__)
        config_options = {key: kwargs.pop(key) for key in list(kwargs) if key in fields and key != "dtype"}
        for key in (*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "attn_implementation"):
            kwargs.pop(key, None)
        if kwargs:
            FrozenPrefixConfig._refuse_unknown_keys(kwargs, allowed=())
        backbones: dict[str, tuple[PreTrainedModel, dict[str, Any] | None]] = {}
        hub_options = {part: {key: options[part][key] for key in HUB_OPTIONS if key in options[part]} for part in sources}
        for part, source in sources.items():
            if isinstance(source, PreTrainedModel):
                backbones[part] = (source, record_of_loaded(part, source))
                continue
            headless = {"headless": config_options.get("text_headless", cls._text_headless)} if part == "text" else {}
            module, record = load_base_model(part, source, full_fingerprint=full_fingerprint, **headless, **options[part])
            backbones[part] = (module, record)
            hub_options[part]["revision"] = record["revision"]
        language_model = backbones["text"][0]
        if cls._text_headless is not False:
            config_options["text_headless"] = is_headless(language_model)
            if config_options.get("text_pooling") is None and isinstance(sources["text"], str):
                config_options["text_pooling"] = find_sentence_pooling(sources["text"], **hub_options["text"])
            pooling_unset = config_options.get("text_pooling") is None and not hasattr(language_model.config, "is_decoder")
            if config_options["text_headless"] and pooling_unset:  # DistilBERT reads ahead, CLIP's text half doesn't
                config_options["text_pooling"] = "mean" if reads_ahead(language_model) else "last"
            cls._choose_options(config_options)
        tokens = {"image": image_token, "video": video_token, "audio": audio_token}
        if config_options.get("num_frames") is None:
            del tokens["video"]
        tokens = {name: token for name, token in tokens.items() if MODALITIES[name].part in sources}
        if any(config_options.get(f"{name}_token_id") is None for name in tokens):
            record = backbones["text"][1] or {}
            place = {"revision": record.get("revision"), **hub_options["text"], **gguf_of(record)}
            source = record.get("name_or_path") if tokenizer is None else tokenizer
            ids = find_placeholder_ids(source, language_model.config, list(tokens.values()), **place)
            for name, index in zip(tokens, ids, strict=True):
                if config_options.get(f"{name}_token_id") is None:
                    config_options[f"{name}_token_id"] = index
        feature_extractor = None
        vision_parts = [part for part in VISION_PARTS if part in sources]
        image_processors = [
            find_image_processor(sources[part], **hub_options[part]) if isinstance(sources[part], str) else None
            for part in vision_parts
        ]
        if isinstance(sources.get("audio"), str):
            feature_extractor = find_feature_extractor(sources["audio"], **hub_options["audio"])
        config = FrozenPrefixConfig.from_vision_text_configs(
            [backbones[part][0].config for part in vision_parts],
            language_model.config,
            image_processor=image_processors,
            audio_config=backbones["audio"][0].config if "audio" in backbones else None,
            feature_extractor=feature_extractor,
            embedding_dim=language_model_geometry(language_model).embedding_dim,
            **config_options,
        )
        model = cls._from_parts(config, backbones)
        for part in () if load_vision_tower else vision_parts:
            model.unload_base_model(part)
        return model

    @classmethod
    def _choose_options(cls, options: dict[str, Any]) -> None:
        """What a class chooses by the text model that is joined, before its config is made."""

    @classmethod
    def _from_parts(
        cls,
        config: FrozenPrefixConfig,
        backbones: dict[str, tuple[PreTrainedModel, dict[str, Any] | None]],
    ) -> "Self":
        with while_loading(Loading(frozenset(PARTS))):
            model = cls(config)
        for part, (module, record) in backbones.items():
            model._attach(part, module, record)
        for connector in model.modules():
            if isinstance(connector, CONNECTING):
                model._reset_connector(connector)
                connector.to(device=model._device_of_words, dtype=torch.float32)
        model._finish_loading()
        return model.eval()

    # -------------------------------------------------------------------------------------------- towers and connectors

    def unload_base_model(self, part: str = "vision") -> None:
        """
        Frees a frozen tower. The model trains and generates from `vision_features`, and saves as before, for the tower has its
        source elsewhere; for images it raises, with the way out. Unloading what is not loaded does nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"`, `"vision_2"`, `"vision_3"` or `"audio"`.

        Raises:
            ValueError: for a tower that could not come back: it was trained or changed, or has no repository or folder.
        """
        unload_base_model(self, part)

    def load_base_model(self, part: str = "vision", **kwargs: Any) -> None:
        """
        Loads a tower that is not loaded from the place in the config, checks it, and freezes it. Loading what is loaded does
        nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"`, `"vision_2"`, `"vision_3"` or `"audio"`.
            kwargs: options of `from_pretrained` (`dtype`, `token`, `device_map`, …). The dtype is the recorded one by default,
                the device that of the word embeddings.

        Raises:
            ValueError: if the config has no record of it, or it is not the one that was recorded.
            OSError: transformers' own, if its repository can't be reached.
        """
        reload_base_model(self, part, **kwargs)

    @property
    def connectors(self) -> list[str]:
        """Names of the loaded connectors, in the order of loading."""
        return list(connector_specs(self))

    @property
    def active_connector(self) -> str:
        """Name of the connector in use."""
        return getattr(self.base_model, "_active_connector", DEFAULT)

    def load_connector(self, name_or_path: str, name: str, **hub_options: Any) -> None:
        """
        Loads another connector beside the active one, for the same backbones, without loading those again.

        Args:
            name_or_path (`str`): a checkpoint of this package: id on the Hub or folder.
            name (`str`): what it is called from now on; see [`set_connector`].
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only` …

        Raises:
            ValueError: if the name is taken, or the checkpoint was trained with other backbones.
        """
        load_connector(self, name_or_path, name, **hub_options)

    def set_connector(self, name: str) -> None:
        """
        Makes a loaded connector the one in use; backbones stay as they are. `generate()`, training and `save_pretrained` are
        its from now on, and `config` describes it. A processor made for another prefix length must be made anew
        (`FrozenPrefixProcessor.from_model`).

        Raises:
            ValueError: for a name that is not loaded, listing those that are.
        """
        set_connector(self, name)

    # --------------------------------------------------------------------------------------- transformers' accessors

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

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in transformers; of one name for all, a backbone that has no such attention keeps its own, which is logged."""
        if isinstance(attn_implementation, str):
            for part, backbone in self.backbones.items():
                choose = functools.partial(backbone.set_attn_implementation, attn_implementation, *args, **kwargs)
                takes_attention(part, type(backbone).__name__, attn_implementation, choose)
            own = {f"{part}_config": backbone.config._attn_implementation for part, backbone in self.backbones.items()}
            attn_implementation = {"": attn_implementation, **own}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """
        Returns the word embeddings as they are, for scripts that ask for the size they have.

        Raises:
            ValueError: for another size.
        """
        rows = language_model_geometry(self.base_model.language_model).num_embeddings
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == rows:
            return self.base_model.language_model.get_input_embeddings()
        raise ValueError(
            f"The language model is frozen bit for bit, so its vocabulary is never resized: it has {rows} rows, and not "
            f"{wanted}. `<image>` needs no row of its own; for more words, resize the language model itself before joining it "
            "to a tower. [errors.md#vocabulary]"
        )
