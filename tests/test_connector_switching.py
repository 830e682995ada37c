"""Several connectors for one pair of parents."""

from pathlib import Path

import pytest
import torch

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import join, save_parents


Model = FrozenPrefixForConditionalGeneration


def logits(model: Model) -> torch.Tensor:
    ids = torch.full((1, model.config.prefix_length + 2), 5)
    ids[:, 1:-1] = model.config.image_token_id
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, images).logits


@pytest.fixture
def two(tmp_path: Path) -> tuple[Model, Model]:
    """Two checkpoints, `first` (mlp) and `second` (resampler of 3), of the same parents."""
    first, _ = join(tmp_path, connector_type="mlp")
    options = {"num_heads": 2, "hidden_size": 16}
    second, _ = join(tmp_path, connector_type="resampler", prefix_length=3, connector_config=options)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    return first, second


def test_switching_costs_no_reload(tmp_path: Path, two: tuple[Model, Model]) -> None:
    first, second = two
    model = Model.from_pretrained(tmp_path / "first")
    parents = (model.model.vision_tower, model.model.language_model)
    assert model.connectors == ["default"] and model.active_connector == "default"
    model.load_connector(str(tmp_path / "second"), "short")
    assert model.connectors == ["default", "short"] and model.active_connector == "default"
    assert torch.equal(logits(model), logits(first))
    model.set_connector("short")
    assert model.active_connector == "short" and model.config.prefix_length == 3
    assert torch.equal(logits(model), logits(second))
    model.set_connector("default")
    assert torch.equal(logits(model), logits(first))
    assert parents == (model.model.vision_tower, model.model.language_model)


def test_the_active_one_is_saved_or_all(tmp_path: Path, two: tuple[Model, Model]) -> None:
    first, second = two
    model = Model.from_pretrained(tmp_path / "first")
    model.load_connector(str(tmp_path / "second"), "short")
    model.set_connector("short")
    model.save_pretrained(tmp_path / "active")
    again = Model.from_pretrained(tmp_path / "active")
    assert again.connectors == ["default"] and torch.equal(logits(again), logits(second))
    for name in model.connectors:
        model.set_connector(name)
        model.save_pretrained(tmp_path / "all" / name)
    model.set_connector("short")
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "all" / "default")), logits(first))
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "all" / "short")), logits(second))
    model.save_pretrained(tmp_path / "whole", include_base_models=True)
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "whole")), logits(second))


def test_a_loaded_connector_trains_when_in_use(tmp_path: Path, two: tuple[Model, Model]) -> None:
    model = Model.from_pretrained(tmp_path / "first")
    model.load_connector(str(tmp_path / "second"), "short")
    model.set_connector("short")
    ids = torch.full((1, 5), 5)
    ids[:, 1:-1] = model.config.image_token_id
    model.train()(ids, torch.randn(1, 3, 16, 16), labels=ids.masked_fill(ids != 5, -100)).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}


def test_what_cannot_be_switched_is_refused(tmp_path: Path, two: tuple[Model, Model]) -> None:
    model = Model.from_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=r"named `short`.*\['default'\]"):
        model.set_connector("short")
    with pytest.raises(ValueError, match="`default` is loaded already"):
        model.load_connector(str(tmp_path / "second"), "default")
    save_parents(tmp_path / "other", text={"initializer_range": 0.3})
    other, _ = join(tmp_path / "other")
    other.save_pretrained(tmp_path / "third")
    with pytest.raises(ValueError, match="trained with another text model"):
        model.load_connector(str(tmp_path / "third"), "third")
    other.save_pretrained(tmp_path / "whole", include_base_models=True)
    with pytest.raises(ValueError, match="holds a vision model"):
        model.load_connector(str(tmp_path / "whole"), "whole")
    gated, _ = join(tmp_path, fusion="cross_attention")
    gated.save_pretrained(tmp_path / "gated")
    with pytest.raises(ValueError, match="fusion `cross_attention`.*`prefix`"):
        model.load_connector(str(tmp_path / "gated"), "gated")
    assert model.connectors == ["default"]


def test_another_connector_is_loaded_beside_one_without_weights(tmp_path: Path, two: tuple[Model, Model]) -> None:
    _, second = two
    identity, _ = join(tmp_path, connector_type="identity")
    identity.load_connector(str(tmp_path / "second"), "short")
    identity.set_connector("short")
    assert torch.equal(logits(identity), logits(second))
