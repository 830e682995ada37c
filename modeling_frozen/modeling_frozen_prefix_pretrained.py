"""What all frozen-prefix models share. What trains is told in `freezing`, what is saved and comes back in `checkpoints`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .backbones import (
    HUB_OPTIONS,
    find_feature_extractor,
    find_image_processor,
    find_placeholder_ids,
    is_headless,
    language_model_geometry,
    load_base_model,
    reads_ahead,
    word_embedding_norm,
)
from .checkpoints import (
    PARENTS,
    AdapterFolder,
    asked_dtypes,
    changed_parts,
    dtype_plan,
    key_prefix,
    keys_with_home,
    leave_out,
    own_names,
    refill,
    refuse_without_home,
    reload_base_model,
    replaced_parts,
    samples_of,
    split_part_options,
    then_load_adapter,
    unload_base_model,
)
from .configuration_frozen_prefix import FrozenPrefixConfig
from .connector_switching import DEFAULT, connector_specs, keys_of_idle_connectors, load_connector, set_connector
from .connectors import Connector, Head
from .cross_attention import GatedCrossAttention, decoder_layers
from .freezing import CONNECTING, freeze, recompute_frozen_layers, stays_frozen
from .hub import AUTO_MAP, complete_copy, complete_repository
from .transformers_compat import CACHE_NAMES
from .weight_alignment import align_weights


class FrozenPrefixPreTrainedModel(PreTrainedModel):
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
        if replaced_parts.get() is not None:
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
        freeze(self)

    def train(self, mode: bool = True) -> "FrozenPrefixPreTrainedModel":
        """Sets the mode of what trains; frozen parents keep dropout off and batch statistics still."""
        modules, stays = list(self.modules()), stays_frozen(self)
        if all(module.training is (mode and not still) for module, still in zip(modules, stays, strict=True)):
            return self  # loading asks often, and setting it on each module takes long
        super().train(mode)
        for module, still in zip(modules, stays, strict=True):
            if still and module.training:
                module.training = False
        return self

    def _layered(self, part: str) -> nn.Module:
        """The parent whose last layers are meant by `unlocked_layers`."""
        return self._parents()[part]

    def _ids_of_idle_parameters(self) -> set[int]:
        """Ids of the parents' parameters that have no part in this model's loss: frozen, whatever is to train."""
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
        self._keys_to_ignore_on_save = keys_with_home(self, just_loaded=True)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # transformers skips containers without tensors of their own in custom code, so connectors are filled here.
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

    def changed_parts(self) -> set[str]:
        """Parts that train, or whose weights somebody changed since they were loaded."""
        return changed_parts(self)

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
        with_home = keys_of_idle_connectors(self) if include_base_models else keys_with_home(self)
        left_out = {part for part in PARENTS if any(key.startswith(key_prefix(self, part)) for key in with_home)}
        self.config.saved_parts = ("connector", *(part for part in self._parents() if part not in left_out))
        self.config.auto_map = dict(AUTO_MAP)
        self._keys_to_ignore_on_save = with_home
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._keys_to_ignore_on_save = keys_with_home(self)
        if include_base_models and kwargs.get("is_main_process", True):
            complete_copy(save_directory, self)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Every way of pushing a model ends here, and in no public method.
        complete_repository(working_dir, self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

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
            OSError: transformers' own, if a repository can't be reached.
        """
        overrides = {"vision": vision_base_model, "text": text_base_model, "audio": audio_base_model}
        overrides = {part: name for part, name in overrides.items() if name is not None}
        options = split_part_options(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("`use_safetensors=False` would read a pickle, which can run code; connectors are safetensors.")
        if pretrained_model_name_or_path is None:  # weights come as a state dict: everything is in it
            model, info = super().from_pretrained(None, *model_args, output_loading_info=True, **kwargs)
        else:
            if not load_vision_tower and "vision" in overrides:
                raise ValueError("`load_vision_tower=False` and `vision_base_model` contradict each other: leave one out.")
            left_out = frozenset() if load_vision_tower else frozenset({"vision"})
            with leave_out(left_out.union(overrides)), asked_dtypes(options):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
            model._refuse_missing(pretrained_model_name_or_path, info)
            if left_out and "vision" in (PARENTS if model.config.saved_parts is None else model.config.saved_parts):
                raise ValueError(
                    f"The checkpoint `{pretrained_model_name_or_path}` holds the vision tower itself, so it can't be left "
                    "where it is: load the model without `load_vision_tower=False`."
                )
            refill(model, pretrained_model_name_or_path, overrides, options, left_out)
        model._finish_attaching()  # in eval mode, as transformers gives it
        return (model, info) if with_info else model

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        return dtype_plan(self, super()._get_dtype_plan(dtype), dtype)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; for a folder of an adapter, which `from_pretrained` takes too, once the parents are there."""
        if replaced_parts.get() is None:
            loaded = super().load_adapter(*args, **{**own_names(self), **kwargs})
            align_weights(self)
            return loaded
        raise AdapterFolder(self.name_or_path, args, kwargs)

    def _refuse_missing(self, name: str, info: dict[str, Any]) -> None:
        missing = sorted(key for key in info["missing_keys"] if key not in self.all_tied_weights_keys)
        if missing:
            raise ValueError(
                f"The checkpoint `{name}` lacks {len(missing)} tensors of the model ({missing[:3]}…); they would be random. "
                "It was saved by another class or connector, or not saved whole: check `connector_type` in its config, "
                "or save it again."
            )

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
                Any vision model of transformers: an id, a folder, or a loaded model (saved whole later, as it has no home).
                `None` for a model with ears alone.
            text_model_name_or_path (`str` or `PreTrainedModel`):
                Any causal or encoder-decoder language model, likewise.
            audio_model_name_or_path (`str` or `PreTrainedModel`, *optional*):
                Any audio encoder of transformers, or a model that it is one half of, likewise: the model then has ears.
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
                    f"A {type(parent).__name__} is no model of transformers: give an id, a folder or a PreTrainedModel. "
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
        options = split_part_options(kwargs)
        if not load_vision_tower:
            refuse_without_home("vision", given.get("vision"))
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
        hub_options = {part: {key: options[part][key] for key in HUB_OPTIONS if key in options[part]} for part in given}
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
        with leave_out(frozenset(PARENTS)):
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

    # -------------------------------------------------------------------------------------------- towers and connectors

    def unload_base_model(self, part: str = "vision") -> None:
        """
        Frees a frozen tower. The model trains and writes from `vision_features`, and saves as before, for the tower has its
        home elsewhere; given pictures, it says what to do. Unloading what is not loaded does nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"` or `"audio"`.

        Raises:
            ValueError: for a tower that could not come back: it was trained or changed, or has no repository or folder.
        """
        unload_base_model(self, part)

    def load_base_model(self, part: str = "vision", **kwargs: Any) -> None:
        """
        Loads a tower that is not loaded from where the config says, checks it, and freezes it. Loading what is loaded does
        nothing.

        Args:
            part (`str`, defaults to `"vision"`): `"vision"` or `"audio"`.
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
        Loads another connector beside the active one, for the same parents, without loading those again.

        Args:
            name_or_path (`str`): a checkpoint of this package: id on the Hub or folder.
            name (`str`): what it is called from now on; see [`set_connector`].
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only` …

        Raises:
            ValueError: if the name is taken, or the checkpoint was trained with other parents.
        """
        load_connector(self, name_or_path, name, **hub_options)
        self._keys_to_ignore_on_save = keys_with_home(self)

    def set_connector(self, name: str) -> None:
        """
        Makes a loaded connector the one in use; parents stay as they are. `generate()`, training and `save_pretrained` are
        its from now on, and `config` describes it. A processor made for another prefix length must be made anew
        (`FrozenPrefixProcessor.from_model`).

        Raises:
            ValueError: for a name that is not loaded, listing those that are.
        """
        set_connector(self, name)
        self._keys_to_ignore_on_save = keys_with_home(self)

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
