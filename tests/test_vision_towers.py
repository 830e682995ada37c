"""Any tower's output as (images, positions, width): the adapter against each family's raw output, sliced by hand."""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2ImageProcessorPil,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_frozen import vision_towers
from modeling_frozen.vision_towers import (
    VisionGeometry,
    build_vision_tower,
    encode_images,
    load_vision_tower,
    probe_vision_tower,
    vision_half,
    vision_tower_kwargs,
)
from tests.helpers.families_vision import TOWERS, Tower, full_config, image_inputs, reason_to_skip, tiny_tower, vision_config


@pytest.fixture(params=TOWERS)
def family(request) -> str:
    reason = reason_to_skip(TOWERS[request.param])
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def row(family) -> Tower:
    return TOWERS[family]


@functools.cache
def known_geometry(family: str) -> VisionGeometry:
    """What is probed for a row's last hidden state, once for all tests that don't test probing."""
    return probe_vision_tower(vision_config(TOWERS[family]), image_processor=image_processor(TOWERS[family]))


@functools.cache
def known_tower(family: str) -> PreTrainedModel:
    return tiny_tower(TOWERS[family])


def encode(model, inputs, geometry, **options):
    with torch.no_grad():
        return encode_images(model, **inputs, num_leading_tokens=geometry.num_leading_tokens, **options)


def image_processor(tower: Tower):
    """An image processor of the size the row's images have."""
    if hasattr(vision_config(tower), "num_patches"):
        return Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    size = {"height": tower.image_size, "width": tower.image_size}
    return CLIPImageProcessorPil(size=size, crop_size=size)


def as_positions(states: torch.Tensor, width: int) -> torch.Tensor:
    """A raw output as (images, positions, width), by looking for the width."""
    if states.ndim == 3:
        return states
    images = states.shape[0]
    assert (states.shape[1] == width) != (states.shape[-1] == width), "the table's map is ambiguous"
    if states.shape[-1] == width:
        return states.reshape(images, -1, width)
    return states.reshape(images, width, -1).transpose(1, 2)


# --- what is probed and what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "layer"), [("default", -2), ("full", -1), ("pooled", -1)])
def test_probe_foretells_what_the_tower_gives(family, row, strategy, layer):
    options = {"layer": layer, "select_strategy": strategy}
    geometry = probe_vision_tower(full_config(row), image_processor=image_processor(row), **options)
    features, mask, _ = encode(known_tower(family), image_inputs(row), geometry, **options)
    assert features.shape == (2, geometry.num_positions, geometry.vision_width)
    assert mask is None or mask.shape == features.shape[:2]


def test_default_drops_just_the_leading_tokens_of_the_raw_output(family, row):
    geometry = known_geometry(family)
    assert geometry.num_leading_tokens == row.leading
    model, inputs = known_tower(family), image_inputs(row)
    features, _, output = encode(model, inputs, geometry)
    positions = as_positions(output.last_hidden_state, geometry.vision_width)
    assert positions.shape[1] == geometry.num_positions + row.leading
    torch.testing.assert_close(features, positions[:, row.leading :], rtol=0, atol=0)
    full, _, _ = encode(model, inputs, geometry, select_strategy="full")
    torch.testing.assert_close(full, positions, rtol=0, atol=0)


def test_leading_tokens_do_not_see_the_image_where_it_enters_the_layers():
    """What is dropped is independent of the image in hidden state 0, and what is kept depends on it."""
    families = [
        "clip",
        "vit",
        "deit",
        "beit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "siglip",
        "ijepa",
        "vit_mae",
    ]
    for family in families:
        row = TOWERS[family]
        geometry = probe_vision_tower(vision_config(row), layer=0)
        model = tiny_tower(row)
        one, other = (
            encode(model, image_inputs(row, seed=seed), geometry, layer=0, select_strategy="full")[0] for seed in (0, 1)
        )
        moved = (one != other).any(dim=-1).any(dim=0)
        expected = [False] * row.leading + [True] * geometry.num_positions
        assert moved.tolist() == expected, family


def test_a_changed_patch_moves_its_own_position():
    """The order of positions is the patches' reading order: row by row, nothing shuffled."""
    for family in ("clip", "siglip", "vit", "deit", "beit", "dinov3_vit", "ijepa", "aimv2", "vit_mae"):
        row = TOWERS[family]
        geometry = probe_vision_tower(vision_config(row), layer=0)
        model, inputs = tiny_tower(row), image_inputs(row, images=1)
        changed = {"pixel_values": inputs["pixel_values"].clone()}
        changed["pixel_values"][:, :, 8:16, 16:24] += 1.0  # second row, third column of four
        before, after = (encode(model, x, geometry, layer=0)[0] for x in (inputs, changed))
        moved = (before != after).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == [6], family


def test_the_same_image_gives_the_same_features_bit_for_bit(family, row):
    geometry = known_geometry(family)
    model, inputs = known_tower(family), image_inputs(row)
    torch.manual_seed(1)
    once, _, _ = encode(model, inputs, geometry)
    torch.manual_seed(2)
    again, _, _ = encode(model, inputs, geometry)
    assert torch.equal(once, again)


def test_another_image_gives_other_features_and_images_do_not_mix(family, row):
    geometry = known_geometry(family)
    model, inputs = known_tower(family), image_inputs(row)
    features, _, _ = encode(model, inputs, geometry)
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["pixel_values"][1] += torch.randn(changed["pixel_values"][1].shape, generator=torch.Generator().manual_seed(9))
    others, _, _ = encode(model, changed, geometry)
    assert (features[1] - others[1]).abs().max() > 1e-2 * features.abs().max()
    torch.testing.assert_close(features[0], others[0])


def test_a_half_precision_tower_takes_full_precision_pixels_and_the_other_way_round(family, row):
    geometry = known_geometry(family)
    model, inputs = copy.deepcopy(known_tower(family)), image_inputs(row)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    features, _, _ = encode(model, inputs, geometry)
    assert features.dtype == torch.float32
    inputs["pixel_values"] = inputs["pixel_values"].float()
    features, _, _ = encode(model.to(torch.bfloat16), inputs, geometry)
    assert features.dtype == torch.bfloat16


# --- layers ---------------------------------------------------------------------------------------------------------


def test_a_list_of_layers_is_concatenated_over_the_width_in_its_order():
    for family in ("clip", "dinov2_with_registers", "siglip2_naflex"):
        row = TOWERS[family]
        geometry = probe_vision_tower(vision_config(row), layer=[-2, 1, -1])
        model, inputs = tiny_tower(row), image_inputs(row)
        features, _, output = encode(model, inputs, geometry, layer=[-2, 1, -1])
        parts = (output.hidden_states[-2], output.hidden_states[1], output.last_hidden_state)
        torch.testing.assert_close(features, torch.cat(parts, dim=-1)[:, row.leading :], rtol=0, atol=0)
        assert geometry.vision_width == features.shape[-1] == 3 * 16


def test_layer_minus_one_is_what_the_model_gives_behind_its_final_norm():
    row = TOWERS["siglip"]
    model, inputs = tiny_tower(row), image_inputs(row)
    geometry = probe_vision_tower(vision_config(row))
    last, _, output = encode(model, inputs, geometry, output_hidden_states=True)
    torch.testing.assert_close(last, model.post_layernorm(output.hidden_states[2]), rtol=0, atol=0)
    raw, _, _ = encode(model, inputs, geometry, layer=2)
    torch.testing.assert_close(raw, output.hidden_states[2], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["clip", "resnet"])
@pytest.mark.parametrize("layer", [50, -50, [-1, 50]], ids=str)
def test_a_layer_out_of_range_is_refused_with_the_range(family, layer):
    row = TOWERS[family]
    number = {"clip": 3, "resnet": 5}[family]
    expected = rf"50 is out of range: this tower's layers go from -{number} to {number - 1}"
    with pytest.raises(ValueError, match=expected):
        probe_vision_tower(vision_config(row), layer=layer)
    with pytest.raises(ValueError, match=expected):
        encode_images(tiny_tower(row), **image_inputs(row), layer=layer, num_leading_tokens=row.leading)


@pytest.mark.parametrize("layer", [[], "last", True, [1.0], [True]], ids=str)
def test_what_is_no_layer_is_refused(layer):
    with pytest.raises(ValueError, match="vision_feature_layer="):
        probe_vision_tower(vision_config(TOWERS["clip"]), layer=layer)


def test_layers_of_different_length_or_kind_are_refused():
    row = TOWERS["resnet"]
    with pytest.raises(ValueError, match=r"different length \(1: 256, -1: 4\)"):
        probe_vision_tower(vision_config(row), layer=[1, -1], image_processor=image_processor(row))
    with pytest.raises(ValueError, match="different numbers of leading tokens"):
        probe_vision_tower(vision_config(TOWERS["dinov3_convnext"]), layer=[-2, -1])


# --- pooled ---------------------------------------------------------------------------------------------------------


def test_pooled_is_the_class_token_where_the_pooler_can_be_left_out():
    """A pooler that the constructor can leave out may be random: it is not used even on a tower that has it."""
    row = TOWERS["vit"]
    torch.manual_seed(0)
    model = ViTModel(vision_config(row)).eval()
    assert model.pooler is not None
    features, _, output = encode(model, image_inputs(row), VisionGeometry(1, 1, 16), select_strategy="pooled")
    torch.testing.assert_close(features, output.last_hidden_state[:, :1], rtol=0, atol=0)
    assert not torch.equal(features[:, 0], output.pooler_output)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "resnet", "efficientnet", "convnextv2", "siglip2_naflex"])
def test_pooled_is_the_models_own_where_it_is_part_of_the_tower(family):
    row = TOWERS[family]
    geometry = probe_vision_tower(vision_config(row), select_strategy="pooled")
    features, mask, output = encode(tiny_tower(row), image_inputs(row), geometry, select_strategy="pooled")
    torch.testing.assert_close(features, output.pooler_output.flatten(1)[:, None], rtol=0, atol=0)
    assert mask is None and features.shape == (2, 1, geometry.vision_width)


@pytest.mark.parametrize("family", ["siglip_headless", "swin", "hiera", "ijepa", "mobilenet_v2"])
def test_pooled_is_the_mean_where_there_is_neither(family):
    row = TOWERS[family]
    geometry = probe_vision_tower(vision_config(row), select_strategy="pooled")
    features, _, output = encode(tiny_tower(row), image_inputs(row), geometry, select_strategy="pooled")
    positions = as_positions(output.last_hidden_state, geometry.vision_width)
    torch.testing.assert_close(features, positions.mean(1, keepdim=True))


def test_pooled_over_padded_positions_leaves_the_padding_out():
    row = TOWERS["siglip2_naflex"]
    inputs = image_inputs(row)
    features, _, output = encode(tiny_tower(row), inputs, VisionGeometry(0, 16, 16), select_strategy="pooled", layer=1)
    torch.testing.assert_close(features[1, 0], output.hidden_states[1][1, :12].mean(0))
    torch.testing.assert_close(features[0, 0], output.hidden_states[1][0].mean(0))


def test_an_unknown_strategy_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'cls': choose one of default, full, pooled"):
        probe_vision_tower(vision_config(TOWERS["clip"]), select_strategy="cls")
    with pytest.raises(ValueError, match="'cls': choose one of default, full, pooled"):
        encode_images(tiny_tower(TOWERS["clip"]), torch.zeros(1, 3, 32, 32), select_strategy="cls", num_leading_tokens=1)


# --- what goes in ---------------------------------------------------------------------------------------------------


def test_images_of_different_length_come_with_a_mask():
    row = TOWERS["siglip2_naflex"]
    geometry = probe_vision_tower(vision_config(row))
    assert geometry == VisionGeometry(0, 16, 16, "variable", (16,))
    features, mask, _ = encode(tiny_tower(row), image_inputs(row), geometry)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [16, 12]
    alone = {name: value[1:] for name, value in image_inputs(row).items()}
    alone = {
        **alone,
        "pixel_values": alone["pixel_values"][:, :12],
        "pixel_attention_mask": alone["pixel_attention_mask"][:, :12],
    }
    single, _, _ = encode(tiny_tower(row), alone, geometry)
    torch.testing.assert_close(features[1, :12], single[0], rtol=1e-5, atol=1e-5)


def test_inputs_that_the_tower_needs_are_asked_for_by_name():
    row = TOWERS["siglip2_naflex"]
    with pytest.raises(ValueError, match="Siglip2VisionModel needs pixel_attention_mask, spatial_shapes"):
        encode_images(tiny_tower(row), image_inputs(row)["pixel_values"], num_leading_tokens=0)


@pytest.mark.parametrize(("family", "shape"), [("resnet", (3, 64, 64)), ("siglip2_naflex", (2, 3, 32, 32))])
def test_pixel_values_of_another_rank_are_refused(family, shape):
    with pytest.raises(ValueError, match=r"pixel_values of shape \(\d, .*takes \(images, "):
        encode_images(tiny_tower(TOWERS[family]), torch.zeros(shape), num_leading_tokens=0)


def test_options_go_on_to_towers_that_take_them_and_not_to_others():
    larger = torch.randn(1, 3, 48, 48)
    clip, geometry = tiny_tower(TOWERS["clip"]), VisionGeometry(1, 36, 16)
    features, _, _ = encode(clip, {"pixel_values": larger}, geometry, interpolate_pos_encoding=True)
    assert features.shape == (1, 36, 16)
    with pytest.raises(ValueError, match="48"):
        encode(clip, {"pixel_values": larger}, geometry)
    model = tiny_tower(TOWERS["resnet"])
    grids = {"spatial_shapes": torch.tensor([[1, 1]]), "interpolate_pos_encoding": True}
    _, mask, output = encode(model, {"pixel_values": larger}, VisionGeometry(0, 4, 16), output_hidden_states=True, **grids)
    assert mask is None and len(output.hidden_states) == 5


def test_attentions_are_returned_where_they_are_asked_for():
    config = vision_config(TOWERS["vit"])
    model = build_vision_tower(config, attn_implementation="eager").eval()
    _, _, output = encode(model, image_inputs(TOWERS["vit"]), VisionGeometry(1, 16, 16), output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 2, 17, 17)


def test_gradients_flow_through_a_tower_that_is_trained():
    model = tiny_tower(TOWERS["vit"])
    features, _, _ = encode_images(model, **image_inputs(TOWERS["vit"]), num_leading_tokens=1)
    features.sum().backward()
    assert model.embeddings.cls_token.grad.abs().sum() > 0


# --- probing --------------------------------------------------------------------------------------------------------


def test_probing_allocates_nothing_draws_nothing_and_leaves_the_config_alone(row, monkeypatch):
    config = full_config(row)
    half = getattr(config, "vision_config", config)
    half._attn_implementation = "eager"
    before, state = config.to_dict(), torch.get_rng_state()
    built = []
    forward = torch.nn.Module.__call__

    def watch(module, *args, **kwargs):
        built.append(module)
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", watch)
    probe_vision_tower(config)
    assert built
    assert {parameter.device.type for module in built for parameter in module.parameters()} == {"meta"}
    assert config.to_dict() == before and half._attn_implementation == "eager"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_size": 384, "patch_size": 14}, (1, 729)),  # 384 / 14 leaves a rest
        ({"image_size": 336, "patch_size": 14}, (1, 576)),
        ({"image_size": 224, "patch_size": 32}, (1, 49)),
        ({"image_size": 30, "patch_size": 15}, (1, 4)),
    ],
    ids=str,
)
def test_positions_follow_the_config_even_where_patches_do_not_fill_the_image(options, expected):
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **options)
    geometry = probe_vision_tower(config)
    assert (geometry.num_leading_tokens, geometry.num_positions) == expected


def test_a_rounding_stride_does_not_pass_for_leading_tokens():
    """LeViT halves 14 x 14 patches to 7 and to 4: from sides 224 and 448 alone five of 16 positions would seem"
    " leading."""
    assert vision_towers._leading_tokens(16, 49, 121) is None
    assert vision_towers._leading_tokens(16, 64, 144) == 0
    assert vision_towers._leading_tokens(21, 69, 149) == 5
    assert vision_towers._leading_tokens(32, 32, 32) == 0


def test_the_processors_size_wins_over_the_configs():
    """DINOv2's config holds 518, its processor crops to 224; a ResNet's config holds no size."""
    size = {"height": 48, "width": 48}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    config = Dinov2Config(**{**TOWERS["dinov2"].options, "image_size": 64})
    assert probe_vision_tower(config).num_positions == 64
    assert probe_vision_tower(config, image_processor=processor).num_positions == 36
    assert probe_vision_tower(vision_config(TOWERS["resnet"])).num_positions == 49
    naflex = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=25)
    assert probe_vision_tower(vision_config(TOWERS["siglip2_naflex"]), image_processor=naflex).num_positions == 25


def test_a_size_that_the_tower_does_not_take_is_refused_unless_it_interpolates():
    size = {"height": 48, "width": 48}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    config = vision_config(TOWERS["clip"])
    with pytest.raises(ValueError, match=r"\(1, 3, 48, 48\).*interpolate_pos_encoding=True"):
        probe_vision_tower(config, image_processor=processor)
    geometry = probe_vision_tower(config, image_processor=processor, interpolate_pos_encoding=True)
    assert geometry == VisionGeometry(1, 36, 16, (6, 6), (16,))


def test_models_that_do_not_see_are_refused():
    with pytest.raises(ValueError, match="GPT2Model"):
        probe_vision_tower(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))

    class NowhereConfig(PreTrainedConfig):
        model_type = "nowhere"

    with pytest.raises(ValueError, match="No model class is known for NowhereConfig"):
        probe_vision_tower(NowhereConfig())


# --- outputs of towers that can't be installed everywhere -----------------------------------------------------------


class WrappedOutput(BaseModelOutputWithPooling):
    """As transformers' timm wrapper gives it."""


class LastMapConfig(PreTrainedConfig):
    """timm's Swin in small: a last map with the width last, hidden maps with the width first."""

    model_type = "last_map"
    model_args: dict | None = None


class LastMap(PreTrainedModel):
    config_class = LastMapConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.size = (config.model_args or {}).get("img_size", 224)
        self.patches = torch.nn.Conv2d(3, 7, 32, 32)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=None, **kwargs):
        if pixel_values.shape[-1] != self.size:
            raise AssertionError(f"Input height doesn't match model ({self.size}).")
        states = self.patches(pixel_values)
        return WrappedOutput(states.permute(0, 2, 3, 1), None, (states,) if output_hidden_states else None)


AutoModel.register(LastMapConfig, LastMap)


def test_maps_with_the_width_last_and_sizes_among_timms_arguments():
    assert probe_vision_tower(LastMapConfig()) == VisionGeometry(0, 49, 7, (7, 7), (7,))
    model, pixels = build_vision_tower(LastMapConfig()), torch.randn(2, 3, 224, 224)
    assert model.patches.out_channels == 7  # as many as rows and columns: the shape alone can't tell
    expected = model.patches(pixels).flatten(2).transpose(1, 2)
    for layer in (-1, 0):
        features, _, _ = encode_images(model, pixels, layer=layer, num_leading_tokens=0)
        torch.testing.assert_close(features, expected, rtol=0, atol=0)


# --- building and loading -------------------------------------------------------------------------------------------


def test_the_tower_holds_no_parameter_that_its_features_do_not_use(family, row):
    """A pooler left in would be a random layer wherever the checkpoint lacks it; what stays is the tower's own"
    " head."""
    model = tiny_tower(row)
    model.requires_grad_(True)
    geometry = known_geometry(family)
    _, _, output = encode_images(model, **image_inputs(row), num_leading_tokens=geometry.num_leading_tokens)
    used = [output.last_hidden_state.float().pow(2).sum()]
    if output.get("pooler_output") is not None:
        used.append(output.pooler_output.float().pow(2).sum())
    sum(used).backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}
    # CLIP's and SigLIP's ends are norms and heads of the pooled output; mask tokens serve pretraining
    assert {name for name in unused if "mask_token" not in name} == set()


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "swin", "hiera", "ijepa", "mobilenet_v2"])
def test_an_optional_pooler_is_left_out(family):
    config = vision_config(TOWERS[family])
    assert vision_tower_kwargs(config) == {"add_pooling_layer": False}
    assert build_vision_tower(config).pooler is None


def test_a_pooler_that_is_part_of_the_tower_stays():
    config = vision_config(TOWERS["resnet"])
    assert vision_tower_kwargs(config) == {}
    assert build_vision_tower(config).pooler is not None


def test_the_vision_half_is_the_very_sub_config_and_taken_once():
    config = full_config(TOWERS["clip_dual"])
    assert vision_half(config) is config.vision_config
    assert vision_half(config.vision_config) is config.vision_config


def test_a_tower_that_masks_at_random_is_refused_and_mended_by_its_half():
    row = TOWERS["vit_mae"]
    config = full_config(row)
    assert config.mask_ratio == 0.75
    masking = AutoModel.from_config(config).eval()
    with pytest.raises(ValueError, match="drops 75% of the patches at random.*vision_half"):
        encode(masking, image_inputs(row), VisionGeometry(1, 16, 16))
    assert vision_half(config).mask_ratio == 0 and config.mask_ratio == 0.75
    assert build_vision_tower(config).config.mask_ratio == 0


@pytest.fixture
def parent(row, tmp_path):
    """The parent of a row, saved as its makers save it (both halves of a dual model), and its folder."""
    torch.manual_seed(3)
    model = AutoModel.from_config(full_config(row))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_tower_is_loaded_with_its_own_weights_from_its_own_or_a_dual_repository(row, parent):
    model, folder = parent
    half = model.vision_model if row.dual else model
    for config in (None, vision_config(row)):  # read from the repository, or by a composite's config
        tower = load_vision_tower(str(folder), config=config)
        assert type(tower) is type(build_vision_tower(vision_config(row)))
        own, loaded = tower.state_dict(), half.state_dict()
        assert own.keys() == {name for name in loaded if not name.startswith("pooler.")}
        assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_loading_passes_options_on(tmp_path):
    AutoModel.from_config(full_config(TOWERS["clip_dual"])).save_pretrained(tmp_path)
    tower = load_vision_tower(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert tower.dtype == torch.bfloat16 and tower.config._attn_implementation == "eager"


def test_weights_that_a_repository_lacks_are_an_error(tmp_path):
    ViTModel(ViTConfig(**TOWERS["vit"].options)).save_pretrained(tmp_path)
    deeper = ViTConfig(**{**TOWERS["vit"].options, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of ViTModel .*would be random"):
        load_vision_tower(str(tmp_path), config=deeper)


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("clip", (4, 4)),
        ("siglip", (4, 4)),
        ("dinov2_with_registers", (4, 4)),
        ("deit", (4, 4)),
        ("swin", None),
        ("resnet", None),
        ("convnextv2", None),
        ("siglip2_naflex", "variable"),
    ],
)
def test_the_grid_is_probed(family: str, grid: Any) -> None:
    config = vision_config(TOWERS[family])
    geometry = probe_vision_tower(config)
    if grid is None:  # maps: as the tower itself gives them
        side = getattr(config, "image_size", 224) if family == "swin" else 224
        maps = tiny_tower(TOWERS[family])(torch.randn(1, 3, side, side)).last_hidden_state
        grid = (math.isqrt(maps.shape[1]),) * 2 if maps.ndim == 3 else tuple(maps.shape[2:])
    assert geometry.grid == grid
    assert grid == "variable" or math.prod(grid) == geometry.num_positions
    assert probe_vision_tower(config, select_strategy="pooled").grid is None
    leading = geometry.num_leading_tokens
    assert probe_vision_tower(config, select_strategy="full").grid == (None if leading else grid)


def test_the_grid_follows_the_image_processor() -> None:
    wide = CLIPImageProcessorPil(size={"height": 64, "width": 128}, do_center_crop=False)
    geometry = probe_vision_tower(vision_config(TOWERS["resnet"]), image_processor=wide)
    assert geometry.grid is not None and geometry.grid[1] == 2 * geometry.grid[0]
    assert math.prod(geometry.grid) == geometry.num_positions
