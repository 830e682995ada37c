"""Connectors: each keeps the same promises (shapes, masks, gradients, norms, meta build), and errors show the way."""

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_frozen.connectors import CONNECTORS, Connector, ConvolutionBlock, build_connector, check_connector
from tests.helpers.tiny import skip_where_torch_traces_no_forward


IMAGES, POSITIONS, WIDTH, DIM, LENGTH = 3, 6, 12, 20, 4
READERS = ["transformer", "resampler", "qformer", "lstm"]
GRID = (4, 6)
GRIDS = ["avg_pool", "pixel_shuffle", "c_abstractor"]
SMALL = {
    "identity": {},
    "linear": {},
    "mlp": {},
    "transformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "resampler": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "qformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "lstm": {"hidden_size": 16, "num_layers": 2},
    "avg_pool": {},
    "pixel_shuffle": {},
    "c_abstractor": {"hidden_size": 16, "num_layers": 1},
}
# name of the case -> connector, what differs from the plain specification
CASES = {name: (name, {}) for name in CONNECTORS}
CASES |= {f"{name}-positions": (name, {"position_embedding": True}) for name in ("mlp", *READERS, *GRIDS)}
CASES |= {f"{name}-layers": (name, {"input_norm_groups": 2}) for name in ("linear", "resampler", "avg_pool")}
CASES |= {"pixel_shuffle-mlp": ("pixel_shuffle", {"hidden_size": 16}), "avg_pool-wide": ("avg_pool", {"output_size": [1, 4]})}
CASES |= {f"{name}-pooled": (name, {"num_positions": 1, "prefix_length": LENGTH}) for name in ("linear", "mlp")}
CASES |= {f"{name}-variable": (name, {"num_positions": None}) for name in CONNECTORS if name not in GRIDS}
CASES |= {"linear-bare": ("linear", {"input_norm": False})}
TRAINED = [case for case in CASES if not case.startswith("identity")]


def spec(case, **changes):
    name, differs = CASES[case]
    values = {
        "num_positions": math.prod(GRID) if name in GRIDS else POSITIONS,
        "vision_width": WIDTH,
        "embedding_dim": WIDTH if name == "identity" else DIM,
        "prefix_length": LENGTH if name in (*READERS, "avg_pool", "c_abstractor") else None,
        "grid": GRID if name in GRIDS else None,
    }
    changed = {**differs, **changes}
    options = {**SMALL[name], **{key: value for key, value in changed.items() if key not in values}}
    values |= {key: value for key, value in changed.items() if key in values}
    return {"connector_type": name, **values, "connector_config": options}


def build(case, **changes):
    torch.manual_seed(0)
    return build_connector(**spec(case, **changes)).eval()


def trained(connector):
    """As after some training: biases are no longer zero, which would hide what stands at masked positions."""
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return connector


def inputs(case, images=IMAGES, seed=1):
    positions = spec(case)["num_positions"] or POSITIONS
    return torch.randn(images, positions, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_shape_and_independence_of_the_batch(case):
    connector, features = build(case), inputs(case)
    length = LENGTH if case.endswith("pooled") or case.split("-")[0] in (*READERS, "avg_pool", "c_abstractor") else POSITIONS
    prefix = connector(features)
    assert prefix.shape == (IMAGES, length, WIDTH if case.startswith("identity") else DIM)
    assert check_connector(**spec(case)) == connector.prefix_length
    torch.testing.assert_close(connector(features[1:2]), prefix[1:2])
    assert connector(features[:0]).shape == (0, *prefix.shape[1:])


@pytest.mark.parametrize("case", TRAINED)
def test_gradients_reach_every_parameter(case):
    connector = build(case).train()
    features = inputs(case).requires_grad_()
    (connector(features) * torch.randn(DIM)).pow(2).sum().backward()
    without = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias on attention keys shifts all logits of a query alike: softmax takes it away.
    assert [name for name in without if "key.bias" not in name] == []
    assert (features.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_every_position_matters(case):
    connector, features = build(case), inputs(case)
    before = connector(features)
    for position in range(features.shape[1]):
        changed = features.clone()
        changed[:, position] = inputs(case, seed=2)[:, position]
        assert ((connector(changed) - before).abs().amax(dim=(1, 2)) > 1e-4).all(), position


@pytest.mark.parametrize("grid", [(6, 6), (4, 8), (8, 4)])
@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_written_row_by_row(name, grid):
    # What merged along a line, or turned rows and columns about, would light another vector.
    rows, columns = grid
    options = {} if name == "pixel_shuffle" else {"output_size": (rows // 2, columns // 2)}
    connector = build(name, num_positions=rows * columns, grid=grid, prefix_length=None, **options)
    for module in connector.modules():
        if isinstance(module, ConvolutionBlock):  # random convolutions blur: their part is made small
            nn.init.constant_(module.project_norm.weight, 0.3)
    generator = torch.Generator().manual_seed(4)
    dark = torch.randn(8, rows, columns, WIDTH, generator=generator)
    for row in range(0, rows, 2):
        for column in range(0, columns, 2):
            lit = dark.clone()
            lit[:, row : row + 2, column : column + 2] += 5 * torch.randn(8, 2, 2, WIDTH, generator=generator)
            change = (connector(lit.flatten(1, 2)) - connector(dark.flatten(1, 2))).norm(dim=-1).mean(dim=0)
            assert change.argmax().item() == (row // 2) * (columns // 2) + column // 2, (row, column)


@pytest.mark.parametrize("name", ["avg_pool", "c_abstractor"])
def test_each_image_has_its_own_grid(name):
    connector = trained(build(name, num_positions=24, grid="variable"))
    grids = [(4, 6), (2, 5), (6, 3)]
    alone = [trained(build(name, num_positions=math.prod(grid), grid=grid)) for grid in grids]
    features = torch.randn(3, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[position < math.prod(grid) for position in range(24)] for grid in grids])
    prefix = connector(features.masked_fill(~mask[..., None], float("nan")), mask, spatial_shapes=torch.tensor(grids))
    assert prefix.shape == (3, LENGTH, DIM)
    for row, (grid, one) in enumerate(zip(grids, alone, strict=True)):
        one.load_state_dict(connector.state_dict())
        torch.testing.assert_close(one(features[row : row + 1, : math.prod(grid)])[0], prefix[row])
    for wrong, message in (
        (None, "spatial_shapes of shape None: this connector reads grids, which differ by image"),
        (torch.tensor([[4, 6]]), r"spatial_shapes of shape \(1, 2\): .* needs \(3, 2\)"),
        (torch.tensor([[5, 6], *grids[1:]]), "5 rows and 6 columns, more than the 24 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            connector(features, spatial_shapes=wrong)


def test_pooling_is_that_of_torch():
    for grid, size in (((7, 7), (3, 3)), ((5, 9), (2, 4)), ((24, 24), (12, 12)), ((3, 3), (3, 3))):
        connector = build("avg_pool", num_positions=math.prod(grid), grid=grid, output_size=size, prefix_length=None)
        features = torch.randn(2, *grid, WIDTH)
        expected = nn.functional.adaptive_avg_pool2d(features.movedim(-1, 1), size).movedim(1, -1)
        torch.testing.assert_close(connector._pool(features), expected)


def test_pixel_shuffle_is_idefics3s():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    connector = build("pixel_shuffle", num_positions=64, grid=(8, 8), scale_factor=4, input_norm=False)
    features = torch.randn(2, 64, WIDTH)
    expected = Idefics3Connector.pixel_shuffle(None, features, 4)
    torch.testing.assert_close(connector(features), connector.output(expected))


def test_layers_are_normalised_each_for_itself():
    soft, loud = torch.randn(2, POSITIONS, WIDTH // 2), torch.randn(2, POSITIONS, WIDTH // 2) * 1000
    connector = trained(build("linear-layers"))
    features = torch.cat([soft, loud], dim=-1)
    softer = connector(torch.cat([soft * 50 + 3, loud], dim=-1))
    torch.testing.assert_close(connector(features), softer, rtol=1e-3, atol=1e-3)
    weight, bias = connector.input_norm.weight, connector.input_norm.bias
    parts = [nn.functional.layer_norm(part, (WIDTH // 2,), eps=1e-6) for part in (soft, loud)]
    torch.testing.assert_close(connector(features), connector.output(torch.cat(parts, dim=-1) * weight + bias))


def test_lstm_hears_the_first_of_many_positions():
    connector = build("lstm", num_positions=256, num_layers=1)
    features = torch.randn(1, 256, WIDTH)
    changed = features.clone()
    changed[:, 0] = torch.randn(1, WIDTH)
    assert (connector(changed) - connector(features)).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32])
def test_masked_positions_do_not_matter(case, mask_dtype):
    connector, features = trained(build(case)), inputs(case)
    mask = torch.ones(features.shape[:2], dtype=mask_dtype)
    mask[0, -1] = mask[1] = mask[2, 0] = 0  # one at the end, all, one in front
    garbage = torch.where(mask.bool()[..., None], features, torch.tensor(float("nan")))
    prefix = connector(features, mask)
    assert prefix.isfinite().all()
    assert torch.equal(connector(garbage, mask), prefix)

    features.requires_grad_()
    connector(features, mask).square().sum().backward()
    assert (features.grad[~mask.bool()] == 0).all()
    assert (features.grad[mask.bool()].abs().sum(-1) > 0).all()
    torch.testing.assert_close(connector(features, torch.ones_like(mask)), connector(features))


@pytest.mark.parametrize("name", [*READERS])
@pytest.mark.parametrize("grad", [True, False])  # two code paths in nn.TransformerEncoderLayer
def test_masked_is_as_if_it_were_not_there(name, grad):
    connector, features = trained(build(f"{name}-variable")), inputs(name)
    mask = torch.tensor([True, False, True, True, False, True]).expand(IMAGES, -1)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(connector(features, mask), connector(features[:, mask[0]]))


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("norm", [0.05, 30.0])
def test_output_norm(case, norm):
    connector = build(case).train()
    connector.output.eval()
    modes = [module.training for module in connector.modules()]
    random_state = torch.get_rng_state()
    connector.set_output_norm(norm)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in connector.modules()] == modes
    features = torch.randn(400, connector.num_positions or 64, WIDTH)
    prefix = connector.eval()(features)
    assert prefix.norm(dim=-1).mean().item() == pytest.approx(norm, rel=0.08)
    again = build(case)
    again.set_output_norm(norm)
    assert all(torch.equal(p, q) for p, q in zip(connector.parameters(), again.parameters(), strict=True))
    assert all(p.grad_fn is None and p.requires_grad for p in connector.parameters())


@pytest.mark.parametrize("case", [case for case in TRAINED if case != "linear-bare"])
@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_any_feature_scale_works(case, scale):
    connector, features = build(case), inputs(case)
    torch.testing.assert_close(connector(features * scale + 5 * scale), connector(features), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("case", TRAINED)
def test_images_differ_at_the_start(case):
    # A prefix that hardly depends on the image teaches the language model to ignore it: constant captions.
    prefix = build(case)(inputs(case, images=64))
    assert prefix.var(dim=0).sum(-1).mean() > 0.03 * prefix.square().sum(-1).mean()


@pytest.mark.parametrize("case", TRAINED)
def test_meta_build_then_reset(case):
    with torch.device("meta"):
        connector = build_connector(**spec(case))
        assert all(p.is_meta for p in connector.parameters())
        connector.reset_parameters()
    persistent = set(connector.state_dict())
    assert {name for name, _ in connector.named_buffers()} <= persistent
    connector.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    connector.reset_parameters()
    fresh = build(case)
    torch.manual_seed(0)
    fresh.reset_parameters()
    assert connector.eval()(inputs(case)).isfinite().all()
    assert all(torch.equal(p, q) for p, q in zip(connector.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("loaded_half", [0, 1])
def test_reset_leaves_loaded_tensors_alone(case, loaded_half):
    connector = build(case)
    initial = {name: p.detach().clone() for name, p in connector.named_parameters()}
    loaded = {name: value for i, (name, value) in enumerate(initial.items()) if i % 2 == loaded_half}
    for name in loaded:
        connector.get_parameter(name)._is_hf_initialized = True
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(1)
    torch.manual_seed(3)
    connector.reset_parameters()
    for name, parameter in connector.named_parameters():
        assert torch.equal(parameter, initial[name] + 1) == (name in loaded), name


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "identity"])
def test_transformers_own_initialisation_leaves_it_alone(name):
    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.connector = build(name)
            self.connector.set_output_norm(7.0)
            self.before = {key: value.clone() for key, value in self.connector.state_dict().items()}
            self.post_init()

    model = Model(PreTrainedConfig())
    assert all(torch.equal(value, model.before[key]) for key, value in model.connector.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_state_dict_round_trip(case):
    connector, features = build(case), inputs(case)
    torch.manual_seed(5)
    other = build_connector(**spec(case)).eval()
    assert case.startswith("identity") or not torch.equal(other(features), connector(features))
    other.load_state_dict(connector.state_dict())
    assert torch.equal(other(features), connector(features))


@pytest.mark.parametrize("case", TRAINED)
def test_dropout_in_training_only(case):
    for option in {"input_dropout", "dropout", "output_dropout"} & set(CONNECTORS[case.split("-")[0]].options()):
        connector, features = build(case, **{option: 0.3}), inputs(case)
        assert torch.equal(connector(features), connector(features))
        connector.train()
        assert not torch.equal(connector(features), connector(features))
    half = build(case, output_dropout=0.5).train()(inputs(case, images=50))
    assert (half == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_cast_to_the_connectors_dtype(case, dtype):
    connector, features = build(case), inputs(case).to(dtype)
    prefix = connector(features)
    if case.startswith("identity"):
        assert prefix.dtype == dtype and torch.equal(prefix, features)
    else:
        assert prefix.dtype == torch.float32
        assert torch.equal(prefix, connector(features.float()))
        assert connector.to(torch.bfloat16)(inputs(case)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "identity"])
def test_autocast(name):
    connector, features = build(name).train(), inputs(name)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    mask[0, 3:] = False
    with torch.autocast("cpu", torch.bfloat16):
        prefix = connector(features, mask)
    torch.testing.assert_close(prefix.float(), connector(features, mask), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", CONNECTORS)
def test_compiles_without_a_graph_break(name):
    if name == "qformer":  # is transformers' own
        skip_where_torch_traces_no_forward()
    connector, features = build(name), inputs(name)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    mask[0, 3:] = False
    torch._dynamo.reset()
    compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, mask), connector(features, mask), rtol=1e-4, atol=1e-5)


def test_identity():
    connector = build("identity")
    assert list(connector.parameters()) == []
    connector.set_output_norm(3.0)
    connector.reset_parameters()
    assert torch.equal(connector(inputs("identity")), inputs("identity"))


def test_linear_is_limber_and_frozen():
    features = inputs("linear")
    connector = build("linear", input_norm=False)
    torch.testing.assert_close(connector(features), features @ connector.output.weight.T)  # biases start at zero
    pooled = build("linear", input_norm=False, num_positions=1, prefix_length=LENGTH)
    expected = torch.stack([features[:, :1] @ weight.T for weight in pooled.output.weight.split(DIM)], dim=1)[:, :, 0]
    torch.testing.assert_close(pooled(features[:, :1]), expected)


def test_mlp_is_llava():
    features, connector = inputs("mlp"), build("mlp", input_norm=False)
    hidden, gelu = connector.hidden[0], nn.functional.gelu
    assert hidden.out_features == DIM
    torch.testing.assert_close(connector(features), connector.output(gelu(hidden(features))))


def test_qformer_is_that_of_transformers():
    assert type(build("qformer").qformer).__module__ == "transformers.models.blip_2.modeling_blip_2"


@pytest.mark.parametrize("name", ["transformer", "resampler", "qformer"])
def test_positions_are_a_set_without_position_embeddings(name):
    features = inputs(name)
    plain, placed = build(name), build(f"{name}-positions")
    torch.testing.assert_close(plain(features.flip(1)), plain(features))
    assert (placed(features.flip(1)) - placed(features)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"connector_type": "Resampler"},
            r"'Resampler' is unknown\. Did you mean `resampler`\? The choices are 'ident",
        ),
        ({"connector_type": "zzz"}, r"'zzz' is unknown\. The choices are 'identity', 'linear', 'mlp', 'transformer', "),
        (
            {"connector_config": {"num_head": 2}},
            r"'num_head', .*'resampler' .*Did you mean `num_heads`\? .*dropout=0.0",
        ),
        ({"connector_config": {"prefix_length": 2}}, r"'prefix_length', which goes beside connector_config, not into"),
        ({"connector_type": "identity", "connector_config": {"dropout": 0.1}}, r"Its options are: none"),
        ({"connector_config": {"num_heads": 7}}, r"num_heads=7 must divide hidden_size=256; change one"),
        ({"connector_config": {"hidden_size": 0}}, r"hidden_size=0 must be a positive whole number\."),
        ({"connector_config": {"num_layers": True}}, r"num_layers=True must be a positive whole number"),
        ({"connector_config": {"num_layers": 2.0}}, r"num_layers=2.0 must be a positive whole number"),
        ({"connector_config": {"hidden_size": None}}, r"hidden_size=None must be a positive whole number\."),
        (
            {"connector_config": {"feedforward_size": -1}},
            r"feedforward_size=-1 must be a positive whole number or None",
        ),
        ({"connector_config": {"dropout": 1.0}}, r"dropout=1.0 must be a number from 0 up to, not including, 1"),
        ({"connector_config": {"dropout": "a"}}, r"dropout='a' must be a number"),
        ({"connector_config": {"dropout": float("nan")}}, r"dropout=nan must be a number"),
        ({"connector_config": {"input_norm": 1}}, r"input_norm=1 must be True or False"),
        (
            {"connector_config": {"dropout": 2, "num_layers": 0}},
            r"num_layers=0 .*; dropout=2 must|dropout=2 .*; num_la",
        ),
        (
            {"num_positions": None, "connector_config": {"position_embedding": True}},
            r"position_embedding=True needs a",
        ),
        ({"prefix_length": None}, r"prefix_length=None: the connector 'resampler' .* pass prefix_length=32"),
        ({"prefix_length": 0}, r"prefix_length=0 must be a positive whole number"),
        ({"vision_width": None}, r"vision_width=None must be a positive whole number"),
        (
            {"connector_type": "mlp", "prefix_length": 4},
            r"prefix_length=4: the connector 'mlp' .* num_positions=6; leave",
        ),
        ({"connector_config": {"input_norm_groups": 5}}, r"input_norm_groups=5 must divide the features' width, 12"),
        ({"connector_type": "avg_pool"}, r"'avg_pool' reads .* as a grid .* \(num_positions=6\) are none: .*'default'"),
        ({"connector_type": "avg_pool", "grid": (2, 4)}, r"grid=\(2, 4\) has 8 places, for num_positions=6"),
        ({"connector_type": "avg_pool", "grid": (2, 3), "prefix_length": 6}, r"prefix_length=6: .* a square number of them"),
        (
            {"connector_type": "avg_pool", "grid": (2, 3), "prefix_length": 9},
            r"grid of \(2, 3\) to \(3, 3\) rows and columns, which is more",
        ),
        (
            {"connector_type": "c_abstractor", "grid": (2, 3), "connector_config": {"output_size": [2, 3]}},
            r"prefix_length=4 and output_size=\(2, 3\), which makes 6 vectors",
        ),
        (
            {"connector_type": "avg_pool", "grid": (2, 3), "connector_config": {"output_size": [2]}},
            r"output_size=\[2\] must be a pair of positive whole numbers, rows and columns",
        ),
        (
            {"connector_type": "pixel_shuffle", "grid": (2, 3), "prefix_length": None},
            r"scale_factor=2 must divide the tower's grid of 2 rows and 3 columns",
        ),
        (
            {"connector_type": "pixel_shuffle", "grid": (2, 4), "num_positions": 8},
            r"prefix_length=4: with scale_factor=2 .* writes 2 vectors of a grid of 2 x 4",
        ),
        (
            {"connector_type": "pixel_shuffle", "grid": "variable", "prefix_length": None},
            r"grids of any rows and columns, which the squares need not divide",
        ),
        ({"connector_type": "identity", "prefix_length": None}, r"vision_width=12 and embedding_dim=20 must be equal"),
        (
            {"connector_type": "identity", "embedding_dim": 12, "num_positions": 1},
            r"prefix_length=4: the connector 'identity' writes one prefix vector per position",
        ),
    ],
)
def test_bad_specifications(changes, message):
    good = {"connector_type": "resampler", "num_positions": 6, "vision_width": 12, "embedding_dim": 20}
    for function in (check_connector, build_connector):
        with pytest.raises(ValueError, match=message):
            function(**{**good, "prefix_length": 4, **changes})


def test_prefix_length_of_a_tower_with_varying_positions():
    variable = spec("linear-variable")
    assert check_connector(**variable) is None
    assert check_connector(**{**variable, "prefix_length": 9}) == 9


@pytest.mark.parametrize(
    ("case", "shape", "message"),
    [
        ("linear", (2, 12), r"shape \(2, 12\): .* \(images, positions, 12\); .*unsqueeze\(1\)"),
        ("resampler", (2, 6, 13), r"shape \(2, 6, 13\): .* \(images, positions, 12\)"),
        ("identity", (2, 6, 13), r"shape \(2, 6, 13\)"),
        ("mlp", (2, 5, 12), r"gave 5 positions where this connector keeps 6; .*such as 'resampler'"),
        ("linear-pooled", (2, 4, 12), r"gave 4 positions where this connector keeps 1;"),
        ("lstm-positions", (2, 5, 12), r"gave 5 positions where this connector has position embeddings for 6"),
    ],
)
def test_bad_features(case, shape, message):
    with pytest.raises(ValueError, match=message):
        build(case)(torch.randn(shape))


def test_bad_mask_and_norm():
    connector = build("resampler")
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 5\) must be \(images, positions\).*\(3, 6\)"):
        connector(inputs("resampler"), torch.ones(3, 5))
    for norm in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be a positive number"):
            connector.set_output_norm(norm)
    with pytest.raises(ValueError, match="no weights yet"):
        connector.to("meta").set_output_norm(1.0)


@pytest.mark.parametrize("name", CONNECTORS)
def test_options_are_documented(name):
    described = (CONNECTORS[name].__doc__ or "") + (Connector.__doc__ or "")
    assert [option for option in CONNECTORS[name].options() if f"{option} (`" not in described] == []
