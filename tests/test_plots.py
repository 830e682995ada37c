"""The figures of a training: what they draw is what was logged."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image

from modeling_frozen.evaluation.plots import (
    choose,
    curves,
    plot_sheet,
    plot_shots,
    plot_training,
    read_history,
)
from tests.helpers.tiny import rows


HISTORY = [
    {"loss": 4.0, "grad_norm": 1.5, "learning_rate": 1e-3, "epoch": 0.5, "step": 5},
    {"loss": 3.0, "grad_norm": 1.2, "learning_rate": 5e-4, "epoch": 1.0, "step": 10},
    {"eval_loss": 3.5, "eval_cider": 0.4, "eval_runtime": 2.0, "eval_samples_per_second": 9.0, "epoch": 1.0, "step": 10},
    {"loss": 2.0, "grad_norm": float("nan"), "learning_rate": 0.0, "epoch": 2.0, "step": 20},
    {"eval_loss": 3.2, "eval_cider": 0.3, "eval_runtime": 2.0, "eval_samples_per_second": 9.0, "epoch": 2.0, "step": 20},
    {"train_runtime": 9.0, "train_loss": 3.0, "total_flos": 1e9, "epoch": 2.0, "step": 20},
]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def drawn(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_curves_hold_losses_and_metrics_and_no_bookkeeping() -> None:
    assert curves(HISTORY) == {
        "loss": ([5, 10, 20], [4.0, 3.0, 2.0]),
        "eval_loss": ([10, 20], [3.5, 3.2]),
        "eval_cider": ([10, 20], [0.4, 0.3]),
    }


def test_training_curves_are_drawn_as_logged(tmp_path: Path) -> None:
    figure = plot_training(HISTORY, tmp_path / "curves.png", title="A run")
    loss, cider = figure.axes
    assert drawn(loss) == [([5, 10, 20], [4.0, 3.0, 2.0]), ([10, 20], [3.5, 3.2])]
    assert drawn(cider) == [([10, 20], [0.4, 0.3])]
    assert loss.get_ylabel() == "nats" and loss.get_xlabel() == cider.get_xlabel() == "optimizer steps"
    assert {"training", "evaluation", "A run", "cider", "highest: 0.4"} <= set(texts(figure))
    # Told apart without colours.
    assert len({(line.get_linestyle(), line.get_marker()) for line in loss.lines}) == 2
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    assert len(plot_training(HISTORY, metrics=[]).axes) == 1
    with pytest.raises(ValueError, match=r"Not logged: \['eval_bleu'\]. There are \['eval_cider'\]"):
        plot_training(HISTORY, metrics=["eval_bleu"])


def test_what_the_image_adds_is_drawn_in_nats() -> None:
    (axes,) = plot_training([{"sight": 0.2, "step": 10}, {"sight": 0.5, "step": 20}], metrics=["sight"]).axes
    assert drawn(axes) == [([10, 20], [0.2, 0.5])]
    assert axes.get_title() == "What another image adds to the loss" and axes.get_ylabel() == "nats a token"


def test_histories_are_read_from_wherever_they_are(tmp_path: Path) -> None:
    for step in (20, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        rows = [row for row in HISTORY if row["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=HISTORY))
    newest = tmp_path / "checkpoint-20"
    for source in (trainer, trainer.state, tmp_path, str(newest), newest / "trainer_state.json"):
        assert curves(read_history(source)) == curves(HISTORY)
    assert len(read_history(tmp_path / "checkpoint-10")) == 3
    with pytest.raises(ValueError, match="nowhere is not there: give a Trainer"):
        read_history(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no step: train first"):
        read_history([])


def test_best_middle_and_worst() -> None:
    scores = [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2]
    assert choose(scores, 1) == {"best": [1], "middle": [0], "worst": [2]}
    assert choose(scores, 2) == {"best": [1, 5], "middle": [3, 0], "worst": [6, 2]}
    assert choose([0.1, 0.9], 3) == {"best": [1], "worst": [0]}
    assert choose([0.1], 1) == {"best": [0]}


@pytest.mark.parametrize(("count", "each", "pictures"), [(7, 1, 3), (7, 2, 6), (1, 2, 1)])
def test_a_sheet_shows_pictures_with_both_texts(tmp_path: Path, count: int, each: int, pictures: int) -> None:
    images = [row["image"] for row in rows(count)]
    outputs = [f"it costs $5 or ${i}" for i in range(count)]
    references = [[f"picture {i}", "another"] for i in range(count)]
    scores = [((i * 3) % 7) / 7 for i in range(count)]
    figure = plot_sheet(images, outputs, references, scores, tmp_path / "sheet.png", each=each, score_name="CIDEr")
    assert len(figure.axes) == pictures
    best = figure.axes[0]
    index = max(range(count), key=scores.__getitem__)
    assert best.get_title(loc="left") == f"best  (CIDEr {scores[index]:.2f})"
    assert best.get_xlabel() == f"model: it costs $5 or ${index}\nperson: picture {index}"
    assert best.images[0].get_array().shape == (18, 20, 3)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 800
    with pytest.raises(ValueError, match=f"{count} images, 0 outputs"):
        plot_sheet(images, [], references, scores)


def test_long_texts_are_cut_where_they_would_run_into_the_next() -> None:
    (row,) = rows(1)
    figure = plot_sheet([row["image"]], ["word " * 100], ["short"], [1.0])
    lines = figure.axes[0].get_xlabel().split("\n")
    assert len(lines) == 5 and lines[3].endswith("…") and max(map(len, lines)) <= 44


@pytest.mark.parametrize("shape", [(64, 64), (60, 90), (90, 60)])
@pytest.mark.parametrize("each", [1, 4])
def test_texts_of_a_sheet_lie_within_it_and_apart(each: int, shape: tuple[int, int]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    count = 12
    images = [Image.new("RGB", shape, "red") for _ in range(count)]
    outputs = ["a small purple triangle at the bottom right .  what colour ?  purple . " * 2] * count
    references = ["a large green triangle at the bottom right beside the wall"] * count
    figure = plot_sheet(images, outputs, references, list(range(count)), each=each, title="Photos that nobody met in training")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts, *(text for axes in figure.axes for text in (axes._left_title, axes.xaxis.label))]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height, texts[index]
        assert not [other for other in boxes[:index] if box.overlaps(other)], texts[index]
    sizes = {round(axes.get_window_extent().width) for axes in figure.axes}
    assert len(sizes) == 1 and sizes.pop() > 200  # the images are not squeezed to make room


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "frozen-prefix\[plots\]"'):
        plot_training(HISTORY)


def test_scores_by_shots_are_drawn_with_chance(tmp_path: Path) -> None:
    scores = {"sighted": {3: 0.8, 1: 0.6}, "blind": {1: 0.5, 3: 0.45}}
    (axes,) = plot_shots(scores, tmp_path / "shots.png", chance=0.5, score_name="named right").axes
    sighted, blind, chance = drawn(axes)
    assert (sighted, blind) == (([1, 3], [0.6, 0.8]), ([1, 3], [0.5, 0.45])) and chance[1] == [0.5, 0.5]
    assert axes.get_ylabel() == "named right" and [text.get_text() for text in axes.get_xticklabels()] == ["1", "3"]
    assert {"sighted", "blind", "chance"} <= {text.get_text() for text in axes.get_legend().get_texts()}
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines[:2]}) == 2
    with Image.open(tmp_path / "shots.png") as image:
        assert image.width > 500
    for wrong in ({}, {"sighted": {}}, {"sighted": {-1: 0.5}}):
        with pytest.raises(ValueError, match="at least one number of shots"):
            plot_shots(wrong)
