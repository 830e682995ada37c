"""A frozen-prefix model as vLLM runs it: our tower and connector write the prefix, vLLM's own language model reads it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.sequence import IntermediateTensors

from ...checkpoints import check_recorded
from ...configuration_frozen_prefix import FrozenPrefixConfig
from ...export.graphs import why_not_a_reader
from ...modeling_frozen_prefix import FrozenPrefixModel


_WORDS = "model.language_model."  # how names of the language model begin in a checkpoint of ours
_VECTORS = "image_replacement_sizes"  # what vLLM calls the number of placeholders of each image


def _refuse(config: FrozenPrefixConfig) -> None:
    what = why_not_a_reader(config)
    if what is not None:
        raise ValueError(
            f"This model {what}, and vLLM takes prefixes among the words of a decoder alone: serve it by `frozen-prefix "
            "serve`, which runs the model itself. [errors.md#server]"
        )
    if config.vision_config is None:
        raise ValueError(
            "This model takes audio alone, and the plug-in for vLLM images: serve it by `frozen-prefix serve`."
            " [errors.md#server]"
        )
    if gguf_file := (config.text_base_model or {}).get("gguf_file"):
        raise ValueError(
            f"The language model of this checkpoint lies in the GGUF file {gguf_file!r}, which vLLM "
            "does not read beside a checkpoint: read it by llama.cpp (`modeling_frozen.export.LlamaCppModel`), or join the "
            "connector to the unquantised repository and serve that. [errors.md#server]"
        )


class ProcessingInfo(MultiModalProcessingInfo):
    """Images alone, whatever else the processor takes."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        _refuse(self.get_hf_config())

    def _get_supported_modalities(self) -> list[str]:
        return ["image"]

    @property
    def _is_audio_model(self) -> bool:  # type: ignore[override]
        return False

    @property
    def _is_video_model(self) -> bool:  # type: ignore[override]
        return False


class Processor(MultiModalProcessor):
    """vLLM's own, which tells the model how many vectors each image is to have, and knows tiles that a request asked for."""

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._apply_hf_processor_main(*args, **kwargs)
        except ValueError as error:
            # What our processor said, in place of the whole of what it was given.
            raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if _VECTORS in hf_inputs:
            fields[_VECTORS] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_num_image_patches(self, hf_inputs: Any, mm_data: Any, num_images: int) -> torch.Tensor:
        vectors, rows = hf_inputs[_VECTORS], len(hf_inputs["pixel_values"])
        if rows == num_images:
            return torch.ones(num_images, dtype=torch.long)
        return vectors * rows // vectors.sum()  # tiles, of as many vectors each


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class FrozenPrefixForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """
    Built by vLLM from a checkpoint of ours, connector-only or whole. Tower and connector are loaded and checked by our own
    `from_pretrained`; the language model's weights, where the checkpoint lacks them, from the recorded repository and commit.
    """

    encoder: FrozenPrefixModel | None
    language_model: Any  # one of vLLM's

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={_WORDS: "language_model."})  # of LoRA adapters too
    # Not an adapter's file that lies beside it.
    allow_patterns_overrides = ["model*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config: Any = model_config.hf_config
        config = self.config
        _refuse(config)
        ids = list(config.placeholder_ids.values())
        SupportsMultiModal.configure_mm_token_handling(self, config.text_config.vocab_size, ids)
        options = {"token": model_config.hf_token, "cache_dir": vllm_config.load_config.download_dir}
        options = {name: value for name, value in options.items() if value is not None}
        self.encoder = self._load_encoder(vllm_config, options)
        # vLLM gives the language model the outer config's word on it.
        config.tie_word_embeddings = getattr(config.text_config, "tie_word_embeddings", False)
        self.language_model = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "language_model"), hf_config=config.text_config
        )
        self.packed_modules_mapping = getattr(self.language_model, "packed_modules_mapping", {})
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.secondary_weights = []
        record = config.text_base_model
        if "text" not in (config.saved_parts or ()):
            check_recorded(config, "text", **options)
            self.secondary_weights = [DefaultModelLoader.Source(record["name_or_path"], record["revision"], prefix=_WORDS)]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"  # of prompts in which nothing says where an image stands

    @staticmethod
    def _load_encoder(vllm_config: VllmConfig, options: dict[str, Any]) -> FrozenPrefixModel | None:
        model_config = vllm_config.model_config
        if model_config.multimodal_config.get_limit_per_prompt("image") == 0:
            return None
        # Not in the dtype and on the device that vLLM builds its own layers in.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                encoder = FrozenPrefixModel.from_pretrained(
                    model_config.model, revision=model_config.revision, load_language_model=False, **options
                )
        finally:
            torch.set_default_dtype(before)
        encoder.to(vllm_config.device_config.device)
        return encoder

    @torch.no_grad()
    def embed_multimodal(self, num_image_patches: torch.Tensor | None = None, **inputs: Any) -> list[torch.Tensor]:
        """One tensor `(vectors, embedding_dim)` for each image; of one cut into tiles, the vectors of all."""
        vectors = inputs.pop(_VECTORS, None)
        if inputs.get("pixel_values") is None or self.encoder is None:
            return []
        rows = len(inputs["pixel_values"])
        tiles = [1] * rows if num_image_patches is None else num_image_patches.flatten().tolist()
        lengths: list[int | None] = [None] * len(tiles)
        if self.config.prefix_lengths is not None and vectors is not None:
            lengths = [total // count for total, count in zip(vectors.flatten().tolist(), tiles, strict=True)]
        if len(set(lengths)) == 1 and all(isinstance(one, torch.Tensor) for one in inputs.values()):
            written = iter(_encode(self.encoder, inputs, lengths[0]))
        else:  # of several lengths, or of several sizes
            of_rows = [length for length, count in zip(lengths, tiles, strict=True) for _ in range(count)]
            alone = [{name: one[row][None] for name, one in inputs.items()} for row in range(rows)]
            written = iter(
                prefix for one, length in zip(alone, of_rows, strict=True) for prefix in _encode(self.encoder, one, length)
            )
        return [torch.cat([next(written) for _ in range(count)]) for count in tiles]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # as in `generate`, no placeholder is ever written
            for index in self.config.placeholder_ids.values():
                logits[..., index : index + 1] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        words = ((name, tensor) for name, tensor in weights if name.startswith(_WORDS))
        loaded = AutoWeightsLoader(self).load_weights(words, mapper=self.hf_to_vllm_mapper)
        # Tower and connector came with the encoder.
        return loaded | {f"encoder.{name}" for name, _ in (self.encoder or nn.Module()).named_parameters()}

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language_model")


def _encode(encoder: FrozenPrefixModel, inputs: dict[str, Any], prefix_length: int | None) -> list[torch.Tensor]:
    device: Any = encoder.device
    inputs = {name: one.to(device) for name, one in inputs.items()}
    return list(encoder.get_image_features(**inputs, prefix_length=prefix_length).pooler_output)
