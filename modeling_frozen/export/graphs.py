"""Models for other runtimes: tower and connector, and the language model that reads what they write, as graphs.

transformers' exporters (`transformers.exporters`) do the work; here are their inputs. The frozen prefix makes the
cut for them: an image becomes `(prefix_length, embedding_dim)` numbers once, in one graph, and from there on there is
nothing but an ordinary language model that is fed embeddings.

    exported = export_image_encoder(model, "eyes-onnx", sample_inputs=processor(images=image, return_tensors="pt"))
    prefix = exported(pixel_values=pixel_values)["image_embeds"]

Needs the extra `export`, and transformers 5.23 or later.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import Cache, PreTrainedModel

from ..modeling_frozen_prefix import FrozenPrefixModel
from ..modeling_frozen_prefix_pretrained import FrozenPrefixPreTrainedModel
from ..transformers_compat import cache_of
from ..vision_towers import VARIABLE, _default_shape, encode_images


# Name here -> transformers'. ".pt2" is the file that torch.export writes.
FORMATS = {"onnx": "onnx", "pt2": "dynamo", "dynamo": "dynamo", "openvino": "openvino", "executorch": "executorch"}

_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def _core(model: FrozenPrefixPreTrainedModel) -> FrozenPrefixModel:
    return cast(FrozenPrefixModel, model.base_model)


class ImageEncoder(nn.Module):
    """Tower and connector alone: pixel values in, prefixes out, all tensors (`get_image_features` gives lists)."""

    def __init__(self, model: FrozenPrefixPreTrainedModel):
        super().__init__()
        core, self.config = _core(model), model.config
        # The exporter gives inputs the dtype of the first parameter: the connector's, which is float32 as images are.
        self.connector: nn.Module = cast(nn.Module, core.connector)
        self.vision_tower: PreTrainedModel = cast(PreTrainedModel, core.vision_tower)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args: as the processor gives them.

        Returns:
            `image_embeds` `(images, prefix_length, embedding_dim)`; and, from a tower whose positions vary by image under
            a connector that keeps them, `image_embeds_mask` `(images, positions)`, true where there is a vector.
        """
        patches: dict[str, Any] = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        features, mask, _ = encode_images(
            self.vision_tower,
            pixel_values,
            layer=self.config.vision_feature_layer,
            select_strategy=self.config.vision_feature_select_strategy,
            num_leading_tokens=self.config.num_leading_tokens or 0,
            **{name: value for name, value in patches.items() if value is not None},
        )
        outputs = {"image_embeds": self.connector(features, attention_mask=mask)}
        if mask is not None and not self.connector.reads_positions:
            outputs["image_embeds_mask"] = mask
        return outputs


def _exporter(format: str, config_kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; choose one of {sorted(FORMATS)}. [errors.md#choices]")
    try:
        from transformers.exporters import ExportedModel  # noqa: F401  # graphs as a model of their own: 5.23
    except ImportError as error:
        raise ImportError(
            "Exporting needs transformers 5.23 or later, whose exporters give models that are saved, loaded and called, and "
            f"{transformers.__version__} is installed: pip install -U transformers. {error} [errors.md#extra]"
        ) from error
    try:
        from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

        exporter: Any = AutoHfExporter.from_config(AutoExportConfig.from_dict({"export_format": FORMATS[format]}))
    except ImportError as error:
        raise ImportError(
            f"Exporting to {format!r} needs packages that are not installed here: pip install 'frozen-prefix[export]'. {error}"
            " [errors.md#extra]"
        ) from error
    return exporter, exporter.config_class(dynamic=True, **config_kwargs)


def _two_rows(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    # A traced size of one would be taken for a constant.
    return {name: value if len(value) > 1 else torch.cat([value, value]) for name, value in inputs.items()}


def export_image_encoder(
    model: FrozenPrefixPreTrainedModel,
    save_directory: str | Path | None = None,
    *,
    format: str = "onnx",
    sample_inputs: Mapping[str, Any] | None = None,
    **config_kwargs: Any,
) -> Any:
    """
    Exports tower and connector as one graph, for any number of images.

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): any frozen-prefix model with a vision tower, in eval mode.
        save_directory (`str`, *optional*): where to write it, in transformers' layout (`model.onnx`, `export.json`, …).
        format (`str`, defaults to `"onnx"`): `"onnx"`, `"pt2"` (`torch.export`), `"openvino"` or `"executorch"`.
        sample_inputs (`Mapping`, *optional*):
            What the processor gives for an image; other keys than the tower's inputs are left aside. The graph takes
            images of this size. Left out: random ones of the size in the tower's config, which may not be the
            processor's (DINOv2's says 518, its processor makes 224).
        config_kwargs: of transformers' config for the format: `opset_version`, `optimize`, `quantizer`, ….

    Returns:
        `transformers.exporters.ExportedModel`: call it with `pixel_values` (and what else the tower takes); its
        `image_embeds` is `(images, prefix_length, embedding_dim)`.

    Raises:
        ValueError: a model without a vision tower, or whose tower is not loaded, a tower that can't be traced for any number
            of images, an unknown format, a size that the connector was not made for.
        ImportError: without the extra `export`.
    """
    config, tower = model.config, getattr(_core(model), "vision_tower", None)
    if tower is None:
        raise ValueError("This model has no vision tower to export, or it is not loaded. [errors.md#not-loaded]")
    if (towers := len(config.vision_parts)) > 1:
        raise ValueError(
            f"This model reads images by {towers} vision towers, and a graph has one: export a model with one tower, or run "
            "this one by transformers. [errors.md#tower]"
        )
    if model.training:
        raise ValueError(
            "The model is in train mode, and dropout would go into the graph: call model.eval() first. [errors.md#export]"
        )
    connector = _core(model).connector
    if connector.reads_grid and connector.grid == VARIABLE:
        raise ValueError(
            f"The connector {model.config.connector_type!r} reads grids that differ by image, one by one, which no graph for "
            "any number of images can do: export a model with another connector, such as 'resampler'."
            " [errors.md#connector-fit]"
        )
    exporter, export_config = _exporter(format, config_kwargs)
    if sample_inputs is None:
        shape = _default_shape(tower)
        if len(shape) != 3:
            raise ValueError(
                f"{type(tower).__name__} takes patches: pass sample_inputs=processor(images=…, return_tensors='pt')."
                " [errors.md#export]"
            )
        sample_inputs = {"pixel_values": torch.zeros(2, *shape)}
    inputs = {name: sample_inputs[name].to(tower.device) for name in _IMAGE_INPUTS if sample_inputs.get(name) is not None}
    if "pixel_values" not in inputs:
        raise ValueError(
            f"sample_inputs has no pixel_values, but {sorted(sample_inputs)}: give an image to the processor."
            " [errors.md#export]"
        )
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.float32)
    inputs = _two_rows(inputs)

    encoder = ImageEncoder(model).eval()
    with torch.no_grad():
        written = encoder(**inputs)["image_embeds"]
    if config.prefix_length is not None and written.shape[1] != config.prefix_length:
        raise ValueError(
            f"From images of shape {tuple(inputs['pixel_values'].shape[1:])} {written.shape[1]} vectors come, but the model "
            f"has prefix_length={config.prefix_length}: pass sample_inputs=processor(images=…, return_tensors='pt')."
            " [errors.md#shape]"
        )
    images = torch.export.Dim("images", min=1)
    export_config.dynamic_shapes = {name: {0: images} for name in inputs}
    try:
        exported = exporter.export(encoder, inputs, export_config)
    except torch._dynamo.exc.UserError as error:  # private: what `torch.export` raises has no public name
        raise ValueError(
            f"{type(tower).__name__} can't be exported for any number of images: traced, it made a constant of it, as towers "
            "do that go over the images one by one (SigLIP 2's NaFlex before transformers 5.24). Upgrade transformers, or "
            "join a tower with images of one size. [errors.md#export]"
        ) from error
    if save_directory is not None:
        exported.save_pretrained(save_directory)
    return exported


def why_not_a_reader(config: Any) -> str | None:
    """What makes a language model more than a decoder that reads embeddings among its words, for messages; `None` of one."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    return None if config.fusion == "prefix" else f"has fusion={config.fusion!r}"


def _reader(model: FrozenPrefixPreTrainedModel) -> PreTrainedModel:
    if what := why_not_a_reader(model.config):
        raise ValueError(
            f"This model {what}: its language model is more than a reader of embeddings. Export its stages with "
            "`transformers.exporters`: HfExporter.export_for_generation(model, inputs, config). [errors.md#export]"
        )
    return cast(PreTrainedModel, _core(model).language_model)


def export_prefill(
    model: FrozenPrefixPreTrainedModel,
    save_directory: str | Path | None = None,
    *,
    format: str = "onnx",
    **config_kwargs: Any,
) -> Any:
    """
    Exports the language model's first step: embeddings of prefix and words in, logits and key-value cache out.

    Args:
        model ([`FrozenPrefixPreTrainedModel`]): with a causal language model and `fusion="prefix"`.
        save_directory, format, config_kwargs: as in [`export_image_encoder`].

    Returns:
        `transformers.exporters.ExportedModel`: call it with `inputs_embeds` `(batch, sequence, embedding_dim)` and
        `attention_mask` `(batch, sequence)` of any size (and `position_ids` where the language model takes them: counted
        from the first word that is not padding); its output has `logits` and `past_key_values`.

    Raises:
        ValueError: an encoder-decoder, or layers with cross-attention between them.
        ImportError: without the extra `export`.
    """
    language_model = _reader(model)
    exporter, export_config = _exporter(format, config_kwargs)
    embeds = model.get_input_embeddings()(torch.zeros(2, 5, dtype=torch.long, device=language_model.device))
    mask = torch.ones(2, 5, dtype=torch.long, device=language_model.device)
    inputs = {"inputs_embeds": embeds.detach(), "attention_mask": mask}
    ready = _core(model).language_inputs(language_model, None, embeds, mask, None, None, {"use_cache": True})
    if "position_ids" in ready:
        inputs["position_ids"] = ready["position_ids"]
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=2)
    export_config.dynamic_shapes = {name: {0: batch, 1: sequence} for name in inputs}
    exported = exporter.export(language_model, {**inputs, "use_cache": bool(ready.get("use_cache", False))}, export_config)
    if save_directory is not None:
        exported.save_pretrained(save_directory)
    return exported


def export_decode(
    model: FrozenPrefixPreTrainedModel,
    save_directory: str | Path | None = None,
    *,
    format: str = "onnx",
    **config_kwargs: Any,
) -> Any:
    """
    Exports the language model's further steps: one word and the cache in, logits and the longer cache out.

    Args: as in [`export_prefill`], whose `past_key_values` the first of these steps takes.

    Returns:
        `transformers.exporters.ExportedModel`: call it with `input_ids` `(batch, 1)`, `attention_mask`
        `(batch, past + 1)`, `past_key_values` (and `position_ids` `(batch, 1)` where the language model takes them).

    Raises:
        ValueError: as in [`export_prefill`], and a language model without a cache of keys and values.
        ImportError: without the extra `export`.
    """
    language_model = _reader(model)
    device = language_model.device
    ids = cast(torch.LongTensor, torch.zeros(2, 5, dtype=torch.long, device=device))
    mask = torch.ones_like(ids)
    prepare = functools.partial(_core(model).language_inputs, language_model)
    with torch.no_grad():
        past = cache_of(language_model(**prepare(ids, None, mask, None, None, {"use_cache": True})))
    if not isinstance(past, Cache):
        raise ValueError(
            f"{type(language_model).__name__} keeps no cache of keys and values that a graph could take. [errors.md#export]"
        )
    exporter, export_config = _exporter(format, config_kwargs)
    longer = torch.cat([mask, mask[:, -1:]], dim=1)
    ready = prepare(cast(torch.LongTensor, ids[:, :1]), None, longer, None, past, {"use_cache": True})
    # transformers finds the sizes here: those of the caches differ from model to model.
    exported = exporter.export(language_model, ready, export_config)
    if save_directory is not None:
        exported.save_pretrained(save_directory)
    return exported


__all__ = ["FORMATS", "ImageEncoder", "export_decode", "export_image_encoder", "export_prefill"]
