"""Figures of a training: its curves, a sheet of images with the model's outputs, and score against shots.

Each function returns a matplotlib `Figure` and writes it as a PNG where `path` is set. Figures are made without
pyplot, so that no global state is touched and threads may draw. matplotlib is an extra: `pip install
"frozen-prefix[plots]"`. Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and where two curves
share a panel their lines and marks differ too.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
# For words in other scripts than matplotlib's own font has; those that are installed are used.
_FONTS = ("Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")
# What Trainer logs beside losses and metrics.
_BOOKKEEPING = ("runtime", "per_second", "flos", "epoch", "step", "grad_norm", "learning_rate", "num_input_tokens_seen")
# Title and unit of curves that are no scores.
_CURVES = {"sight": ("What another image adds to the loss", "nats a token")}


# ------------------------------------------------------------------------------------------------ what all figures share


def new_figure(width: float, height: float) -> Any:
    """
    An empty figure, sizes in inches.

    Raises:
        ImportError: without matplotlib; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "frozen-prefix[plots]". [errors.md#extra]') from error
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Any, path: str | Path | None) -> Any:
    """Lets every script and every dollar sign be drawn as they are, and writes the figure where `path` is set."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
        text.set_parse_math(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plain_axes(axes: Any) -> Any:
    """Without the upper and right line, with a quiet grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def show_image(axes: Any, image: Any) -> None:
    """An image (a path, PIL or an array) without ticks."""
    from ..processors import load_rgb_image

    axes.imshow(load_rgb_image(image, "image") if not hasattr(image, "ndim") else image)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def shown(word: str) -> str:
    """A token as it is drawn: what can't be seen gets a mark."""
    word = word.replace("\n", "↵").replace("\t", "⇥")
    return word.strip() or word.replace(" ", "␣")


# ------------------------------------------------------------------------------------------------------ training curves


def read_history(history: Any) -> list[dict[str, float]]:
    """
    The log of a training.

    Args:
        history: a `Trainer`, its state, its `state.log_history`, a `trainer_state.json`, or the folder of a checkpoint or
            of a whole training (then its newest checkpoint's).

    Raises:
        ValueError: if there is no log in it.
    """
    history = getattr(history, "state", history)
    history = getattr(history, "log_history", history)
    if isinstance(history, str | Path):
        path = Path(history)
        if path.is_dir():
            of_checkpoints = path.glob("checkpoint-*/trainer_state.json")
            newest = max(of_checkpoints, key=lambda file: int(file.parent.name.rpartition("-")[2]), default=None)
            own = path / "trainer_state.json"  # of a checkpoint, or of `trainer.save_state()`
            path = own if own.is_file() or newest is None else newest
        if not path.is_file():
            raise ValueError(
                f"{path} is not there: give a Trainer, its log_history, or a folder with a checkpoint. [errors.md#figures]"
            )
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    rows = [dict(row) for row in history]
    if not any("step" in row for row in rows):
        raise ValueError(
            "The log holds no step: train first, with `logging_steps` below the number of steps. [errors.md#figures]"
        )
    return rows


def curves(history: Any) -> dict[str, tuple[list[float], list[float]]]:
    """What `plot_training` draws: steps and values of every loss and metric, by the name it was logged under."""
    logged: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_history(history):
        for name, value in row.items():
            bookkeeping = name.startswith("train_") or any(name.endswith(word) for word in _BOOKKEEPING)
            if bookkeeping or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            steps, values = logged.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return logged


def plot_training(
    history: Any,
    path: str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
) -> Any:
    """
    Loss curves, and one panel for each further metric of the evaluations.

    Args:
        history: see `read_history`.
        path: where the PNG goes.
        metrics: which of the metrics, as they were logged (`"eval_cider"`); all by default.
        title: over all.

    Raises:
        ValueError: for an unknown metric; lists those that were logged.
    """
    logged = curves(history)
    losses = {name: curve for name, curve in logged.items() if name == "loss" or name.endswith("_loss")}
    others = {name: curve for name, curve in logged.items() if name not in losses}
    if metrics is not None:
        if unknown := set(metrics) - set(others):
            raise ValueError(f"Not logged: {sorted(unknown)}. There are {sorted(others)}. [errors.md#figures]")
        others = {name: others[name] for name in metrics}
    if not losses and not others:
        raise ValueError(
            f"Nothing to draw: no loss and no metric in the log, which holds {sorted(logged)}. [errors.md#figures]"
        )
    panels = ([("loss", losses)] if losses else []) + [(name, {name: curve}) for name, curve in others.items()]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(6.0, 4.6 * columns), 3.7 * rows + (0.4 if title else 0))
    styles = [(BLUE, "-", None), (RED, "--", "o"), (GREEN, "-.", "s"), (ORANGE, ":", "^"), (GREY, "-", "v")]
    for index, (name, lines) in enumerate(panels):
        axes = plain_axes(figure.add_subplot(rows, columns, index + 1))
        for number, (key, (steps, values)) in enumerate(lines.items()):
            colour, line, mark = styles[number % len(styles)] if name == "loss" else (BLUE, "-", "o")
            if mark is None and len(values) < 2:
                mark = "o"  # a single point has no line
            label = {"loss": "training", "eval_loss": "evaluation"}.get(key, key.removesuffix("_loss"))
            axes.plot(steps, values, line, color=colour, marker=mark, markersize=4.5, linewidth=1.8, label=label)
        axes.set_xlabel("optimizer steps")
        if name == "loss":
            axes.set_title("Loss")
            axes.set_ylabel("nats")
            if len(lines) > 1:
                axes.legend(frameon=False)
        else:
            steps, values = lines[name]
            plain = (name.removeprefix("eval_").replace("_", " "), "score")
            heading, unit = _CURVES.get(name, plain)
            axes.set_title(heading)
            axes.set_ylabel(unit)
            _mark_highest(axes, steps, values)
        axes.margins(x=0.03, y=0.12)
    if title:
        figure.suptitle(title, fontweight="bold")
    return finish(figure, path)


def _mark_highest(axes: Any, steps: list[float], values: list[float]) -> None:
    best = max(range(len(values)), key=values.__getitem__)
    right = steps[best] > (steps[0] + steps[-1]) / 2
    axes.annotate(
        f"highest: {values[best]:.3g}",
        (steps[best], values[best]),
        xytext=(-4 if right else 4, 7),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        color=GREY,
    )


# --------------------------------------------------------------------------------------------------- images and outputs


def choose(scores: Sequence[float], each: int) -> dict[str, list[int]]:
    """Indices of the `each` best, middle and worst, best first; fewer where there are not so many, none twice."""
    order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
    each = max(1, min(each, len(order) // 3))
    start = (len(order) - each) // 2
    groups = {"best": order[:each], "middle": order[start : start + each], "worst": order[-each:]}
    taken: set[int] = set()
    for name, group in groups.items():
        groups[name] = [index for index in group if index not in taken]
        taken.update(groups[name])
    return {name: group for name, group in groups.items() if group}


def plot_sheet(
    images: Sequence[Any],
    outputs: Sequence[str],
    references: Sequence[str | Sequence[str]],
    scores: Sequence[float],
    path: str | Path | None = None,
    *,
    each: int = 1,
    score_name: str = "score",
    title: str | None = None,
) -> Any:
    """
    Images with what the model said of them and what was expected: the best, the middle and the worst by a score.

    Args:
        images: paths, PIL images or arrays.
        outputs: what the model said of each.
        references: what was expected of each; of several the first is shown.
        scores: one number for each, the higher the better (`caption_scores(...)["cider"]`).
        path: where the PNG goes.
        each: how many of the best, of the middle and of the worst.
        score_name: how the score is called.
        title: over all.

    Raises:
        ValueError: if the numbers of images, outputs, references and scores differ, or are none.
    """
    counts = {len(images), len(outputs), len(references), len(scores)}
    if len(counts) > 1 or counts == {0}:
        raise ValueError(
            f"{len(images)} images, {len(outputs)} outputs, {len(references)} references and {len(scores)} scores: "
            "give one of each for every image. [errors.md#figures]"
        )
    groups = choose(scores, each)
    rows = [[(name, index) for index in group] for name, group in groups.items()]
    if each == 1:
        rows = [[panel for row in rows for panel in row]]
    columns = max(map(len, rows))
    side, gap, line = 3.6, 0.25, 0.2  # inches; of a line of text its height
    above, left = 0.55 if title else 0.1, 0.15
    width = max(6.0, 2 * left + columns * (side + gap) - gap)
    # Each panel is placed by hand: how long its text is says how much room it needs.
    figure, panels, bottom = new_figure(width, side), [], above
    figure.set_layout_engine("none")
    for row in rows:
        drawn = []
        for column, (name, index) in enumerate(row):
            axes = figure.add_axes((0, 0, 1, 1))
            show_image(axes, images[index])
            axes.set_anchor("NW")
            axes.set_title(f"{name}  ({score_name} {scores[index]:.2f})", fontsize=12, fontweight="bold", loc="left")
            of_one = references[index]
            expected = of_one if isinstance(of_one, str) else of_one[0]
            text = _wrapped("model", outputs[index]) + "\n" + _wrapped("person", expected)
            axes.set_xlabel(text, loc="left", fontsize=10.5, linespacing=1.35)
            high, wide = axes.images[0].get_array().shape[:2]
            drawn.append((axes, left + column * (side + gap), min(side * high / wide, 1.4 * side)))
        top = bottom + 0.35
        panels += [(axes, x, top, tall) for axes, x, tall in drawn]
        bottom = top + max(tall + line * (axes.get_xlabel().count("\n") + 1) for axes, _, tall in drawn) + 0.2
    figure.set_size_inches(width, bottom)
    for axes, x, top, tall in panels:
        axes.set_position((x / width, 1 - (top + tall) / bottom, side / width, tall / bottom))
    if title:
        figure.suptitle(title, fontweight="bold", y=1 - 0.15 / bottom, va="top")
    return finish(figure, path)


def _wrapped(who: str, text: str, width: int = 40) -> str:
    lines = textwrap.wrap(f"{who}: {' '.join(text.split())}", width, subsequent_indent="    ")
    return "\n".join(lines if len(lines) <= 4 else [*lines[:3], lines[3][: width - 1] + "…"])


# ------------------------------------------------------------------------------------------------------ shots and score


def plot_shots(
    scores: Mapping[str, Mapping[int, float]],
    path: str | Path | None = None,
    *,
    chance: float | None = None,
    score_name: str = "score",
    title: str | None = "What examples in the prompt are worth",
) -> Any:
    """
    Score against the number of examples in the prompt: Frozen's figure 4 (arXiv 2106.13884).

    Args:
        scores: by the name of a line (`"sighted"`, `"blind"`), its score by number of shots.
        path: where the PNG goes.
        chance: what guessing gives, drawn as a level line.
        score_name: how the score is called, with its unit.
        title: over all.

    Raises:
        ValueError: if there is no line, or one without a score or with a negative number of shots.
    """
    lines = {name: dict(sorted(line.items())) for name, line in scores.items()}
    if not lines or any(not line or min(line) < 0 for line in lines.values()):
        raise ValueError(
            f"scores={dict(scores)!r} must hold lines, each with a score for at least one number of shots. [errors.md#figures]"
        )
    figure = new_figure(6.4, 4.2)
    axes = plain_axes(figure.add_subplot())
    styles = [(BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "D"), (GREY, "-", "v")]
    for index, (name, line) in enumerate(lines.items()):
        colour, style, mark = styles[index % len(styles)]
        axes.plot(list(line), list(line.values()), style, color=colour, marker=mark, markersize=5.5, linewidth=1.8, label=name)
    if chance is not None:
        axes.axhline(chance, color=GREY, linestyle=(0, (1, 2)), linewidth=1.4, label="chance")
    axes.set_xticks(sorted({shots for line in lines.values() for shots in line}))
    axes.set_xlabel("shots (examples of each category in the prompt)")
    axes.set_ylabel(score_name)
    axes.margins(x=0.06, y=0.14)
    axes.legend(frameon=False, fontsize=9.5)
    if title:
        axes.set_title(title)
    return finish(figure, path)


__all__ = ["curves", "plot_sheet", "plot_shots", "plot_training", "read_history"]
