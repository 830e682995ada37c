# SPDX-License-Identifier: Apache-2.0
"""Any vision tower of transformers, read as (images, positions, width).

A tower is a transformer with class tokens, a pyramid of windows, a convolutional map, or one half of a dual model.
What sets them apart is read from signatures, config attributes and a run on the meta device, never from a list of
families, so that a family that transformers gains tomorrow needs no line here.

How the leading tokens (class, register, distillation) are counted: the same tower is run on the meta device, on images
of side S, 2 S and 3 S, S a multiple of patch size and stride. Its patches become four and nine times as many and its
leading tokens stay, so with N positions in all `leading = (4 N(S) - N(2 S)) / 3`, and N(3 S) proves that nothing was
rounded. This needs no name of a parameter or attribute, and it is right where counting parameters is not: DINOv3's
ConvNeXt puts a *pooled* token, which is no parameter, before its positions. The same runs tell which axis of a 4-D map
holds the width: the one that does not grow. By shapes tokens *behind* the patches are no different from leading ones; no
tower but a detector (YOLOS) has them.
"""

import copy
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .transformers_compat import forward_parameters


SELECT_STRATEGIES = ("default", "full", "pooled")
VARIABLE = "variable"  # of grids: each image has its own
_HALVES = ("vision_config", "image_config")  # the names of the vision sub-config in dual models
_OUTPUT_FLAGS = ("output_hidden_states", "output_attentions")  # taken through **kwargs by most towers
_HUB_OPTIONS = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class VisionGeometry:
    """
    What a tower gives to the connector.

    Attributes:
        num_leading_tokens (`int`): class, register and distillation tokens before the image's own positions, at the chosen
            layer.
        num_positions (`int`): vectors per image after selection; the most there can be where images differ in length.
        vision_width (`int`): length of each vector (the sum over layers where several are concatenated).
        grid (`tuple[int, int]` or `"variable"`, *optional*):
            Rows and columns of the positions, which stand row by row; `"variable"` where each image has its own (NaFlex), and
            `None` where positions are no grid: pooled vectors, learned queries, leading tokens among them.
        layer_widths (`tuple[int, ...]`): the width of each layer, in the order in which they are concatenated.
    """

    num_leading_tokens: int
    num_positions: int
    vision_width: int
    grid: tuple[int, int] | str | None = None
    layer_widths: tuple[int, ...] = ()

    def as_config(self, part: str = "vision") -> dict[str, Any]:
        """The keys of a config that hold it, of a further tower (`"vision_2"`) as one."""
        probed = {"num_leading_tokens": self.num_leading_tokens, "num_positions": self.num_positions}
        probed["vision_width"] = self.vision_width
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        return {**probed, "vision_grid": grid} if part == "vision" else {f"{part}_geometry": {**probed, "grid": grid}}


# ---------------------------------------------------------------------- which config, which class, how to build and load


def vision_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision half: the vision sub-config of a dual model (CLIP, SigLIP ...), or `config` itself.

    A config that masks patches at random (`mask_ratio`, ViT-MAE) is returned as a copy that masks none: a frozen tower
    must give the same features for the same image. Applying this function twice changes nothing.
    """
    for name in _HALVES:
        half = getattr(config, name, None)
        if name in getattr(config, "sub_configs", {}) and isinstance(half, PreTrainedConfig):
            config = half
            break
    if getattr(config, "mask_ratio", 0):
        config = copy.deepcopy(config)
        config.mask_ratio = 0.0
    return config


def class_in(mapping: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the mapping of an Auto class has for a config; of several the first."""
    classes = mapping[type(config)] if type(config) in mapping else None
    return classes[0] if isinstance(classes, (list, tuple)) else classes


def vision_tower_class(vision_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModel` builds for this config; for a half that `AutoModel` does not list, the class that
    bears the config's name (`BlipVisionConfig`: `BlipVisionModel`), as everywhere in transformers.

    Raises:
        ValueError: transformers has no such class.
    """
    tower_class = class_in(MODEL_MAPPING, vision_config)
    if tower_class is None:
        config_class = type(vision_config)
        package = sys.modules.get(config_class.__module__.partition(".")[0])
        tower_class = getattr(package, config_class.__name__.removesuffix("Config") + "Model", None)
    if inspect.isclass(tower_class) and issubclass(tower_class, PreTrainedModel):
        return tower_class
    raise ValueError(
        f"No model class is known for {type(vision_config).__name__} (model type {vision_config.model_type!r}): a vision"
        " tower must be a model that `AutoModel.from_config` can build. Register its class with `AutoModel.register`,"
        " or take another tower. [errors.md#tower]"
    )


def vision_tower_kwargs(vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Keywords to build or load the tower with, so that it holds nothing that may be missing from its checkpoint."""
    return {} if _is_remote(vision_config) else pooler_options(vision_tower_class(vision_config))


def pooler_options(model_class: type) -> dict[str, Any]:
    """
    Keywords by which a class leaves out its pooler, for constructor and `from_pretrained`.

    A class whose constructor has `add_pooling_layer` (ViT, DeiT, BEiT, Swin ...) can do without, and many checkpoints lack
    those weights: loaded with it, a random layer would be in the frozen model.
    """
    return {"add_pooling_layer": False} if _takes_pooler_option(model_class) else {}


@functools.cache
def _takes_pooler_option(model_class: type) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class).parameters


def build_vision_tower(vision_config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """
    A tower with random weights from its config: the vision half only, without an optional pooler.

    Args:
        vision_config (`PreTrainedConfig`): a vision config or that of a dual model.
        kwargs: `dtype`, `attn_implementation`, `trust_remote_code`, as for `AutoModel.from_config`.
    """
    vision_config = vision_half(vision_config)
    if _is_remote(vision_config):
        return AutoModel.from_config(vision_config, **kwargs)
    kwargs.pop("trust_remote_code", None)
    tower_class = vision_tower_class(vision_config)
    # Private: `AutoModel.from_config`, the public way, gives no half that `AutoModel` does not list.
    return tower_class._from_config(vision_config, **vision_tower_kwargs(vision_config), **kwargs)


def load_vision_tower(name_or_path: str, *, config: PreTrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    A tower with its own weights, out of the tower's repository or that of the dual model it is one half of.

    Args:
        name_or_path (`str`): repository or folder, of a tower or of a dual model.
        config (`PreTrainedConfig`, *optional*): the tower's config where it is known; else the repository's own.
        kwargs: as for `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, `token` ...

    Raises:
        ValueError: weights of the tower are missing from the checkpoint.
    """
    hub = {key: value for key, value in kwargs.items() if key in _HUB_OPTIONS}
    whole = AutoConfig.from_pretrained(name_or_path, **hub) if config is None else config
    half = vision_half(whole)
    loader: Any = AutoModel
    if not _is_remote(half):
        loader = vision_tower_class(half)
        kwargs.pop("trust_remote_code", None)

    def place(tower_class: type) -> str | None:
        # With the config of the half alone, the repository has that of the whole.
        return _place_in_dual_model(AutoConfig.from_pretrained(name_or_path, **hub) if whole is half else whole, tower_class)

    return load_with_every_weight(loader, name_or_path, place, config=half, **{**vision_tower_kwargs(half), **kwargs})


def load_with_every_weight(
    loader: Any, name_or_path: str, place: Callable[[type], str | None], **kwargs: Any
) -> PreTrainedModel:
    """
    A tower by its class's own `from_pretrained`, with no weight left random.

    Some checkpoints of a model that the tower is part of (AIMv2's) have its weights under names that the tower alone does
    not know, and transformers then leaves them random with a log line.

    Args:
        loader: the tower's class, or `AutoModel`.
        name_or_path (`str`): repository or folder.
        place (`Callable`):
            Gives, for the tower's class, the regular expression of the name of such a tower in the whole model, `None`
            where there is no whole; called only when weights are missing.
        kwargs: as for `from_pretrained`.

    Raises:
        ValueError: weights are missing.
    """
    kwargs["output_loading_info"] = True
    with quiet():  # the other half's weights are no news, and what is missing is raised below
        tower, info = loader.from_pretrained(name_or_path, **kwargs)
        if info["missing_keys"] and (prefix := place(type(tower))) is not None:
            kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), rf"^{prefix}\.": ""}
            tower, info = loader.from_pretrained(name_or_path, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name_or_path!r} lacks {len(missing)} weights of {type(tower).__name__} ({', '.join(missing[:4])} ...), which "
            "would be random. Name a repository that holds this tower, or a model that it is one half of."
            " [errors.md#no-parent]"
        )
    return tower


def _is_remote(config: PreTrainedConfig) -> bool:
    return type(config) not in MODEL_MAPPING and "AutoModel" in (getattr(config, "auto_map", None) or {})


def _place_in_dual_model(whole: PreTrainedConfig, tower_class: type) -> str | None:
    """The dotted name under which the dual model of config `whole` holds a `tower_class`."""
    if vision_half(whole) is whole or _is_remote(whole):
        return None
    with _on_meta():
        dual = AutoModel.from_config(copy.deepcopy(whole))
    return next((name for name, module in dual.named_modules() if name and type(module) is tower_class), None)


@contextmanager
def quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


# ----------------------------------------------------------------------------------------------- images in, features out


def encode_images(
    vision_tower: PreTrainedModel,
    pixel_values: Tensor,
    *,
    layer: int | Sequence[int] = -1,
    select_strategy: str = "default",
    num_leading_tokens: int,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, ModelOutput]:
    """
    Runs the tower and brings its output into (images, positions, width); gradients flow or not as the caller has set.

    Args:
        vision_tower (`PreTrainedModel`): any vision model of transformers, in eval mode.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`):
            Or `(images, patches, values)` for a tower that takes patches (SigLIP 2 NaFlex); cast to the tower's dtype here.
        layer (`int` or `Sequence[int]`, defaults to -1):
            -1 takes `last_hidden_state`, which is what the model gives, behind its final norm where it has one. Any other
            index is one into the model's `hidden_states`, of which 0 is what enters the first layer; no final norm is
            applied to them. Several indices are concatenated over the width, in that order.
        select_strategy (`str`, defaults to `"default"`):
            `"default"` drops the leading tokens, `"full"` keeps them, `"pooled"` is one vector per image: the tower's own
            `pooler_output` where it is part of the tower (CLIP's normed class token, SigLIP's attention head, the mean of a
            convolutional map), but never one that its constructor can leave out (`add_pooling_layer`), whose weights may be
            random; else the first leading token where there is one (the class token), else the mean over positions. At
            other layers than -1 the last two rules hold.
        num_leading_tokens (`int`): as probed ([`VisionGeometry`]).
        kwargs: passed on where the tower's `forward` takes them: `pixel_attention_mask`, `spatial_shapes`,
            `interpolate_pos_encoding`, `output_hidden_states`, `output_attentions`.

    Returns:
        `tuple`: the features `(images, positions, width)`; a bool mask `(images, positions)`, true at real positions, or
        `None` where all are; the tower's own output.

    Raises:
        ValueError: an unknown strategy, a layer out of range, layers of different length, inputs that the tower needs
            and does not get, or a tower that still masks patches at random.
    """
    layers = _check_choice(layer, select_strategy)
    takes = forward_parameters(type(vision_tower))
    images_ndim = 3 if "spatial_shapes" in takes else 4
    if pixel_values.ndim != images_ndim:
        shape = "(images, patches, values)" if images_ndim == 3 else "(images, channels, height, width)"
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)}: {type(vision_tower).__name__} takes {shape}."
            " [errors.md#tower]"
        )
    inputs = _inputs_taken(vision_tower, pixel_values, layers, kwargs)
    output = vision_tower(pixel_values.to(vision_tower.dtype), **inputs)
    if getattr(output, "ids_restore", None) is not None and getattr(vision_tower.config, "mask_ratio", False):
        raise ValueError(
            f"{type(vision_tower).__name__} drops {vision_tower.config.mask_ratio:.0%} of the patches at random, so"
            " that its features change from call to call. Build or load it with `config=vision_half(config)`, which"
            " sets `mask_ratio=0`. [errors.md#tower]"
        )
    patches_mask = inputs.get("pixel_attention_mask")
    features, features_mask = _select(
        output,
        layers,
        select_strategy,
        num_leading_tokens,
        patches_mask if patches_mask is not None and patches_mask.ndim == 2 else None,
        width_axis=lambda index: _known_width_axis(vision_tower, index),
        use_pooler=not pooler_options(type(vision_tower)),
    )
    return features, features_mask, output


def join_features(features: Sequence[Tensor], grids: Sequence[Sequence[int]]) -> Tensor:
    """
    Features of several towers as those of one (Prismatic, arXiv 2402.07865): brought to the grid of the first, bilinearly, and
    joined over the width.

    Args:
        features (`Sequence[torch.Tensor]`): one `(images, positions, width)` a tower, row by row, of the same images.
        grids (`Sequence[Sequence[int]]`): rows and columns of each.

    Returns:
        `torch.Tensor` of shape `(images, positions of the first, sum of widths)`, in float32 at least, on its device.

    Raises:
        ValueError: numbers of images that differ, or positions that do not fill a grid.
    """
    first, joined = features[0], []
    for number, (own, (rows, columns)) in enumerate(zip(features, grids, strict=True), 1):
        if own.shape[:2] != (len(first), rows * columns):
            raise ValueError(
                f"Of {len(first)} images the features of vision tower {number} have shape {tuple(own.shape)}, where its grid "
                f"of {rows} rows and {columns} columns is ({len(first)}, {rows * columns}, width): give each tower the same "
                "images, each of the size that its own image processor makes. [errors.md#tower]"
            )
        own = own.to(first.device, torch.promote_types(own.dtype, torch.float32))
        if number > 1 and tuple(grids[0]) != (rows, columns):
            maps = own.transpose(1, 2).unflatten(2, (rows, columns))
            maps = nn.functional.interpolate(maps, size=tuple(grids[0]), mode="bilinear", align_corners=False)
            own = maps.flatten(2).transpose(1, 2)
        joined.append(own)
    return torch.cat(joined, dim=-1)


def _check_choice(layer: int | Sequence[int], select_strategy: str) -> list[int]:
    if select_strategy not in SELECT_STRATEGIES:
        raise ValueError(
            f"vision_feature_select_strategy={select_strategy!r}: choose one of {', '.join(SELECT_STRATEGIES)}."
            " [errors.md#tower]"
        )
    layers = [layer] if isinstance(layer, int) else list(layer)
    if not layers or not all(isinstance(index, int) and not isinstance(index, bool) for index in layers):
        raise ValueError(
            f"vision_feature_layer={layer!r}: give an index or a list of indices of hidden states, e.g. -1 or [-2, -1]."
            " [errors.md#tower]"
        )
    return layers


def _inputs_taken(tower: PreTrainedModel, pixel_values: Tensor, layers: list[int], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of `kwargs`, what this tower's forward takes, plus what the chosen layers and a repeatable run need."""
    takes = forward_parameters(type(tower))
    variadic = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if layers != [-1]:
        kwargs = {**kwargs, "output_hidden_states": True}
    inputs = {
        name: value
        for name, value in kwargs.items()
        if value is not None and (name in takes or (variadic and name in _OUTPUT_FLAGS))
    }
    if "noise" in takes and hasattr(tower.config, "mask_ratio"):
        # The order of the noise is the order of the patches: a ramp leaves them as they are.
        rows, columns = (
            size // patch for size, patch in zip(pixel_values.shape[-2:], _pair(tower.config.patch_size), strict=True)
        )
        ramp = torch.arange(rows * columns, device=pixel_values.device, dtype=torch.float32)
        inputs.setdefault("noise", ramp.expand(pixel_values.shape[0], -1))
    lacking = [
        name
        for name, parameter in list(takes.items())[2:]  # behind self and the pixels
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in inputs
    ]
    if lacking:
        raise ValueError(
            f"{type(tower).__name__} needs {', '.join(lacking)} beside pixel_values: pass what its image processor"
            " returns under these names. Of such towers only those that take pixel_attention_mask and spatial_shapes"
            " are served. [errors.md#tower]"
        )
    return inputs


def _select(
    output: ModelOutput,
    layers: list[int],
    select_strategy: str,
    num_leading_tokens: int,
    patches_mask: Tensor | None,
    *,
    width_axis: Callable[[int], int],
    use_pooler: bool,
) -> tuple[Tensor, Tensor | None]:
    """The chosen layers of a tower's output as (images, positions, width) and their mask; see `encode_images`."""
    chosen, mask = [], None
    for index in layers:
        pooled = getattr(output, "pooler_output", None)
        if select_strategy == "pooled" and index == -1 and use_pooler and pooled is not None:
            chosen.append(pooled.flatten(1).unsqueeze(1))
            continue
        states = _layer_states(output, index)
        if states.ndim > 3:
            states = states.movedim(width_axis(index), -1).flatten(1, -2)
        if states.ndim != 3 or states.shape[1] < num_leading_tokens:
            raise ValueError(
                f"vision_feature_layer={index} has shape {tuple(states.shape)}; with num_leading_tokens="
                f"{num_leading_tokens} a tower must give (images, positions, width) or a map of more dimensions."
                " Probe the tower again with this layer. [errors.md#tower]"
            )
        mask = None if patches_mask is None else patches_mask.to(states.device, torch.bool)
        if select_strategy == "pooled":
            chosen.append(states[:, :1] if num_leading_tokens else _mean_over_positions(states, mask))
        else:
            chosen.append(states[:, num_leading_tokens if select_strategy == "default" else 0 :])
    if len({states.shape[1] for states in chosen}) > 1:
        lengths = ", ".join(f"{index}: {states.shape[1]}" for index, states in zip(layers, chosen, strict=True))
        raise ValueError(
            f"vision_feature_layer={layers} has layers of different length ({lengths}): choose layers of one length."
            " [errors.md#tower]"
        )
    features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
    if select_strategy == "pooled" or mask is None:
        return features, None
    if select_strategy == "full" and mask.shape[1] + num_leading_tokens == features.shape[1]:
        mask = nn.functional.pad(mask, (num_leading_tokens, 0), value=True)
    return features, mask


def _layer_states(output: ModelOutput, index: int) -> Tensor:
    if index == -1:
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise ValueError(
                f"{type(output).__name__} has no last_hidden_state: take a model without a task head as vision tower."
                " [errors.md#tower]"
            )
        return states[-1] if isinstance(states, (list, tuple)) else states
    hidden_states = getattr(output, "hidden_states", None)
    if not hidden_states or not isinstance(hidden_states[0], Tensor):
        raise ValueError(
            f"vision_feature_layer={index}: this tower gives no hidden states; only -1 can be chosen. [errors.md#tower]"
        )
    number = len(hidden_states)
    if not -number <= index < number:
        raise ValueError(
            f"vision_feature_layer={index} is out of range: this tower's layers go from {-number} to {number - 1}."
            " [errors.md#tower]"
        )
    return hidden_states[index]


def _mean_over_positions(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states.mean(dim=1, keepdim=True)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------------------- probing on the meta device


def probe_vision_tower(
    vision_config: PreTrainedConfig,
    *,
    layer: int | Sequence[int] = -1,
    select_strategy: str = "default",
    image_processor: Any = None,
    **kwargs: Any,
) -> VisionGeometry:
    """
    What [`encode_images`] will give for this tower, probed without a single weight.

    Args:
        vision_config (`PreTrainedConfig`): a vision config or that of a dual model.
        layer, select_strategy: as for [`encode_images`].
        image_processor (*optional*):
            The tower's image processor. The image size it makes is then the one probed, and not the config's, which may
            differ: DINOv2's config says 518 and its processor crops to 224; a ResNet's config says nothing (224 is taken).
        kwargs: `trust_remote_code`, `interpolate_pos_encoding`.

    Returns:
        [`VisionGeometry`]

    Raises:
        ValueError: as for [`encode_images`], or a processor whose images do not fit the tower.
    """
    layers = _check_choice(layer, select_strategy)
    vision_config = vision_half(vision_config)
    trust = {"trust_remote_code": kwargs.pop("trust_remote_code", None)}
    if _is_remote(vision_config):
        with _on_meta():
            tower = AutoModel.from_config(vision_config, **trust).eval()
    else:
        tower = _meta_tower(vision_config, vision_tower_class(vision_config))
    axes, leading, follows = _compare_sizes(tower, layers)
    if len(set(leading)) > 1:
        raise ValueError(
            f"vision_feature_layer={layers} has layers with different numbers of leading tokens ({leading}): choose"
            " layers of one kind. [errors.md#tower]"
        )
    shape = _default_shape(tower) if image_processor is None else _processed_shape(image_processor)
    output = _run_on_meta(tower, shape, layers, kwargs)
    features, _ = _select(
        output,
        layers,
        select_strategy,
        leading[0],
        None,
        width_axis=lambda index: axes[layers.index(index)],
        use_pooler=not pooler_options(type(tower)),
    )
    grid: tuple[int, int] | str | None = None
    kept = leading[0] if select_strategy == "full" else 0
    if select_strategy != "pooled" and follows and not kept:
        states = _layer_states(output, layers[0])
        if len(shape) == 2:
            grid = VARIABLE
        elif states.ndim == 4:
            rows, columns = states.movedim(axes[0], -1).shape[1:3]
            grid = (rows, columns)
        else:
            grid = grid_of(features.shape[1], *shape[-2:])
    widths = tuple(_layer_states(output, index).shape[axis] for index, axis in zip(layers, axes, strict=True))
    # A tower's own pooling may give another width than its layers have.
    widths = widths if sum(widths) == features.shape[2] else ()
    return VisionGeometry(leading[0], features.shape[1], features.shape[2], grid, widths)


def grid_of(num_positions: int, height: int, width: int) -> tuple[int, int] | None:
    """
    Rows and columns of a tower's positions on an image of `height` times `width` pixels.

    Every tower of transformers steps over the image in squares and lists them row by row; the step is the one that
    gives this number of positions, rounded down (patches) or up (padded convolutions).

    Returns:
        (rows, columns), or None where no step gives this number.
    """
    for step in range(1, max(height, width) + 1):
        for rows, columns in ((height // step, width // step), (-(-height // step), -(-width // step))):
            if rows * columns == num_positions:
                return rows, columns
    return None


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), torch.no_grad():
        yield


def _meta_tower(config: PreTrainedConfig, tower_class: type) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = None  # a kernel that this machine lacks plays no part in shapes
    with _on_meta():
        return tower_class(config, **pooler_options(tower_class)).eval()


def _run_on_meta(
    tower: PreTrainedModel, shape: tuple[int, ...], layers: list[int], kwargs: dict[str, Any] | None = None
) -> ModelOutput:
    kwargs = dict(kwargs or {})
    with _on_meta():
        pixel_values = torch.empty(1, *shape, dtype=tower.dtype)
        if len(shape) == 2:
            # Grid and mask are read by value. The grid is real, one row of patches; the mask is none: nothing pads.
            kwargs["spatial_shapes"] = torch.tensor([[1, shape[0]]], device="cpu")
            kwargs["pixel_attention_mask"] = pixel_values[..., 0]
        inputs = _inputs_taken(tower, pixel_values, layers, kwargs)
        if len(shape) == 2:
            inputs["pixel_attention_mask"] = None
        try:
            return tower(pixel_values, **inputs)
        except Exception as error:
            raise ValueError(
                f"{type(tower).__name__} can't be run on pixel_values of shape {(1, *shape)}: {error}. A vision tower"
                " must take images of this shape alone; where only the size is at fault, set it in the image"
                " processor or pass interpolate_pos_encoding=True to a tower that has it. [errors.md#tower]"
            ) from error


def _compare_sizes(tower: PreTrainedModel, layers: list[int]) -> tuple[list[int], list[int], bool]:
    """For each layer: the axis that holds the width, and the number of leading tokens (see the top of this file); and whether
    all have more positions on a larger image."""
    # Where a stride does not divide the side, the count is off: then a side with more powers of two is tried.
    for stride in (32, 64, 128):
        side = math.lcm(stride, *_pair(getattr(tower.config, "patch_size", 1) or 1))
        side *= math.ceil(224 / side)  # windows have to fit in
        shapes = [_shapes_at(tower, side * factor, layers) for factor in (1, 2)]
        if any(len(shape) == 3 for shape in shapes[0]):
            shapes.append(_shapes_at(tower, side * 3, layers))
        of_layer = list(zip(*shapes, strict=True))
        leading = [_leading_tokens(*(shape[1] for shape in of)) if len(of[0]) == 3 else 0 for of in of_layer]
        counts = [count for count in leading if count is not None]
        if len(counts) == len(leading):
            follows = all(math.prod(of[0]) != math.prod(of[1]) for of in of_layer)
            return [_width_axis(*of[:2]) for of in of_layer], counts, follows
    index = leading.index(None)
    raise ValueError(
        f"The leading tokens of {type(tower).__name__} at vision_feature_layer={layers[index]} can't be counted: images"
        f" of side {side} times 1, 2, 3 give {', '.join(str(shape[1]) for shape in of_layer[index])} positions."
        " Choose another layer, or a tower whose positions follow the image's size. [errors.md#tower]"
    )


def _shapes_at(tower: PreTrainedModel, side: int, layers: list[int]) -> list[torch.Size]:
    """The shape of each layer's output for a square image of another side."""
    output = _run_at(tower, side, layers)
    return [_layer_states(output, index).shape for index in layers]


def _run_at(tower: PreTrainedModel, side: int, layers: list[int]) -> ModelOutput:
    """This tower's output for a square image of another side, built anew where its config holds the size."""
    config = tower.config
    shape, resized = _sized(tower, side)
    try:
        return _run_on_meta(tower if resized is None else _meta_tower(resized, type(tower)), shape, layers)
    except ValueError:
        # timm's towers hold their size among the arguments of timm, and only some take one.
        if not hasattr(config, "model_args"):
            raise
        resized = copy.deepcopy(config)
        resized.model_args = {**(config.model_args or {}), "img_size": side}
        return _run_on_meta(_meta_tower(resized, type(tower)), shape, layers)


def _leading_tokens(once: int, twice: int, thrice: int) -> int | None:
    """From the positions at sides S, 2 S and 3 S; None where they are not `leading + patches` times 1, 4 and 9."""
    if once == twice == thrice:  # a fixed number of queries, all of them positions
        return 0
    leading, rest = divmod(4 * once - twice, 3)
    patches = once - leading
    return leading if not rest and leading >= 0 and patches > 0 and thrice == leading + 9 * patches else None


def _width_axis(small: torch.Size, large: torch.Size) -> int:
    """The axis of a layer's output that the image's size leaves alone."""
    fixed = [axis for axis in range(1, len(small)) if small[axis] == large[axis]]
    # A map that is always 1 x 1 has its width first; windows of fixed size have it last.
    first = len(small) > 3 and (fixed == [1] or math.prod(small[2:]) == 1)
    return 1 if first else len(small) - 1


def _sized(tower: PreTrainedModel, side: int) -> tuple[tuple[int, ...], PreTrainedConfig | None]:
    """The shape of one square image of this side, and the config for it where a config says its size."""
    config = tower.config
    shape = _default_shape(tower)
    if len(shape) == 2:
        patches = (side // _pair(config.patch_size)[0]) ** 2
        return (patches, shape[1]), None
    size = getattr(config, "image_size", None)
    if size is None:
        return (shape[0], side, side), None
    resized = copy.deepcopy(config)
    resized.image_size = type(size)([side, side]) if isinstance(size, (list, tuple)) else side
    return (shape[0], side, side), resized


def _default_shape(tower: PreTrainedModel) -> tuple[int, ...]:
    """(channels, height, width) of one image as the config has it, or (patches, values) for a tower that takes
    patches."""
    config = tower.config
    channels = next(
        (
            value
            for name in ("num_channels", "in_channels", "in_chans")
            if isinstance(value := getattr(config, name, None), int)
        ),
        3,
    )
    if "spatial_shapes" in forward_parameters(type(tower)):
        return config.num_patches, channels * math.prod(_pair(config.patch_size))
    timm_size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    if timm_size is not None:
        return tuple(timm_size)
    return (channels, *_pair(getattr(config, "image_size", None) or 224))


def _processed_shape(image_processor: Any) -> tuple[int, ...]:
    """The shape of one image behind this processor, measured on one."""
    from PIL import Image

    pixel_values = image_processor(images=Image.new("RGB", (512, 512)), return_tensors="pt")["pixel_values"]
    if pixel_values.shape[0] != 1 or pixel_values.ndim not in (3, 4):
        raise ValueError(
            f"{type(image_processor).__name__} makes pixel_values of shape {tuple(pixel_values.shape)} out of one"
            " image; a vision tower here reads (1, channels, height, width) or (1, patches, values). Turn the"
            " splitting of images off in the processor. [errors.md#tower]"
        )
    return tuple(pixel_values.shape[1:])


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) else (int(size), int(size))


_WIDTH_AXES: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()


@torch.compiler.disable
def _known_width_axis(tower: PreTrainedModel, index: int) -> int:
    """The width's axis in this tower's map at this layer, probed once."""
    axes = _WIDTH_AXES.setdefault(tower, {})
    if index not in axes:
        axes[index] = _compare_sizes(_meta_tower(tower.config, type(tower)), [index])[0][0]
    return axes[index]
