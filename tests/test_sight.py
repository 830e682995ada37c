"""Training says early when the loss does not depend on the image, and is not changed by asking."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.training.sight import SightCallback
from tests.helpers.tiny import captioned_rows, join, rows, save_parents
from tests.helpers.training import arguments


def train(folder: Path, model: Any, collator: Any, *callbacks: Any, data: Any = None, **options: Any) -> Trainer:
    options = {"max_steps": 40, "learning_rate": 3e-2, "logging_steps": 50, **options}
    trainer = Trainer(model, arguments(folder, **options), collator, data or rows(16), callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_a_connector_of_zeros_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = join(tmp_path, connector_type="linear")
    model.model.connector.output.weight.requires_grad_(False).zero_()  # its bias alone learns: how texts sound
    collator = DataCollatorForFrozenPrefix(processor)
    callback = SightCallback(rows(8), collator, every=10, num_rows=8)
    with caplog.at_level("WARNING"):
        trainer = train(tmp_path / "run", model, collator, callback)
    assert [one["step"] for one in callback.history] == [10, 20, 30, 40]
    assert all(one["right"] == one["wrong"] for one in callback.history)
    assert callback.history[-1]["right"] < callback.history[0]["right"]  # the loss falls, and everything looks well
    said = [record.getMessage() for record in caplog.records if "does not depend on the image" in record.getMessage()]
    assert len(said) == 3 and said[0].startswith("Step 10: the loss does not depend on the image: ")
    assert "8 images" in said[0] and "it is 0.03" in said[0] and "['connector']" in said[0]
    assert [one["sight"] for one in trainer.state.log_history if "sight" in one] == [0.0] * 4


def test_one_that_sees_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = join(tmp_path, connector_type="linear")
    collator = DataCollatorForFrozenPrefix(processor)
    callback = SightCallback(rows(8), collator, every=30)
    with caplog.at_level("WARNING"):
        trainer = train(tmp_path / "run", model, collator, callback)
    assert [one["step"] for one in callback.history] == [30, 40]
    assert callback.history[-1]["wrong"] > callback.history[-1]["right"] + 0.5
    assert "does not depend" not in caplog.text
    assert trainer.state.log_history[-1]["sight"] > 0.5 or trainer.state.log_history[-2]["sight"] > 0.5


def test_asking_changes_nothing(tmp_path: Path) -> None:
    """Texts that are drawn, dropout and a changed image draw from global generators; the callback from none."""
    options = {"connector_type": "mlp", "connector_config": {"dropout": 0.2}}
    weights, states = [], []
    save_parents(tmp_path)
    for ask in (False, True):
        torch.manual_seed(5)
        model, processor = join(tmp_path, **options)
        collator = DataCollatorForFrozenPrefix(processor, answer_column="captions", augment=lambda image: image.rotate(5))
        callbacks = [SightCallback(captioned_rows(8), collator, every=2, num_rows=4)] if ask else []
        train(tmp_path / "run", model, collator, *callbacks, data=captioned_rows(16), max_steps=5)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.model.connector.parameters()]))
        states.append(torch.get_rng_state())
    assert torch.equal(*weights) and torch.equal(*states)


def test_images_are_exchanged_for_different_ones(tmp_path: Path) -> None:
    """Two texts of one image, and an image of its own: the loss of a row with its own image is not called wrong."""
    model, processor = join(tmp_path)
    model.model.connector.set_output_norm(20.0)
    red, green = (Image.new("RGB", (20, 18), colour) for colour in ("red", "green"))
    data = [
        {"image": image, "text": text} for image, text in ((red, "a red square ."), (red, "that is red ."), (green, "a ."))
    ]
    collator = DataCollatorForFrozenPrefix(processor)
    right, wrong = SightCallback(data, collator).compare(model)
    model.eval()
    with torch.no_grad():
        assert right == pytest.approx(model(**collator(data)).loss.item())
        other = [{**row, "image": green if row["image"] is red else red} for row in data]
        assert wrong == pytest.approx(model(**collator(other)).loss.item())
    assert right != wrong


def test_rows_without_two_images_are_refused(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    data = rows(4)
    one = [{**row, "image": data[0]["image"]} for row in data]
    for refused in (one, [{**row, "image": None} for row in one]):
        with pytest.raises(ValueError, match="no two such images"):
            SightCallback(refused, collator).compare(model)
    with pytest.raises(ValueError, match="num_rows=1 at least 2"):
        SightCallback(one, collator, num_rows=1)
