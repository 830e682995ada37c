"""Draws the pictures of README and pages into docs/images: `python docs/draw.py`. Standard library only.

A test draws them again and compares, so a picture is changed here and not by hand.
"""

import html
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path


IMAGES = Path(__file__).resolve().parent / "images"
TABLES = IMAGES.parent / "tables"
INK, FROZEN, FROZEN_LINE, TRAINS, TRAINS_LINE = "#1d2b36", "#e3eef7", "#5b8db8", "#ffe3b8", "#d9822b"


def text(x: float, y: float, words: str, size: int = 15, weight: str = "normal", colour: str = INK) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, trains: bool) -> str:
    fill, line = (TRAINS, TRAINS_LINE) if trains else (FROZEN, FROZEN_LINE)
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="{line}" stroke-width="2"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{INK}" stroke-width="2" fill="none" marker-end="url(#tip)"/>'


def photo(x: float, y: float) -> str:
    return (
        f'<g transform="translate({x} {y})">'
        f'<rect width="96" height="96" rx="6" fill="#bfe0f5" stroke="{INK}" stroke-width="1.5"/>'
        '<circle cx="74" cy="22" r="10" fill="#ffd257"/>'
        '<path d="M1 66 L30 36 L52 60 L66 46 L95 74 V90 A5 5 0 0 1 90 95 H6 A5 5 0 0 1 1 90 Z" fill="#7fb069"/></g>'
    )


def parts() -> str:
    """Tower, connector and language model, with what trains."""
    # What the language model reads: the connector's vectors, then words.
    cells = [("", True)] * 4 + [("what", False), ("is", False), ("it", False), ("?", False)]
    row = []
    for number, (word, written) in enumerate(cells):
        left = 366 + 50 * number
        fill, line = (TRAINS, TRAINS_LINE) if written else ("#ffffff", FROZEN_LINE)
        row.append(
            f'<rect x="{left}" y="112" width="44" height="30" rx="5" fill="{fill}" stroke="{line}" stroke-width="1.5"/>'
        )
        row.append(text(left + 22, 132, word, 14))
    drawn = [
        photo(14, 208),
        box(150, 192, 150, 128, trains=False),
        text(225, 228, "vision tower", 16, "bold"),
        text(225, 252, "any of transformers"),
        text(225, 298, "frozen", 15, "bold", FROZEN_LINE),
        box(366, 192, 194, 128, trains=True),
        text(463, 228, "connector", 16, "bold"),
        text(463, 252, "kilobytes to megabytes"),
        text(463, 298, "trains", 15, "bold", TRAINS_LINE),
        text(666, 228, "words of the question,", 14),
        text(666, 248, "looked up as ever", 14),
        box(366, 14, 394, 62, trains=False),
        text(540, 38, "language model", 16, "bold"),
        text(540, 60, "any of transformers, head included"),
        text(718, 52, "frozen", 15, "bold", FROZEN_LINE),
        *row,
        text(225, 122, "the visual prefix:", 14),
        text(225, 141, "vectors read as if they were words", 14),
        arrow(112, 256, 146, 256),
        arrow(302, 256, 362, 256),
        arrow(463, 190, 463, 148),
        arrow(666, 210, 666, 148),
        arrow(463, 110, 463, 82),
        arrow(666, 110, 666, 82),
        arrow(762, 45, 800, 45),
        text(862, 40, "“a mountain", 15),
        text(862, 60, "under the sun”", 15),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 336" font-family="Helvetica, Arial, sans-serif" role="img">'
        "<title>A frozen vision tower, a connector that trains, and a frozen language model</title>"
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker></defs>'
        '<rect width="930" height="336" rx="12" fill="#ffffff"/>' + "".join(drawn) + "</svg>\n"
    )


def rows_of(table: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table in docs/tables/`table`.md whose first column is headed so."""
    lines = (TABLES / f"{table}.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@dataclass
class Line:
    """A line of a chart: (x, y, deviation) of each point, which is left out where it is 0."""

    label: str
    colour: str
    points: list[tuple[float, float, float]]
    dashed: bool = False


def chart(
    heading: str, below: str, title: str, lines: list[Line], step: float, ticks: list[float], logarithmic: bool = False
) -> str:
    """Lines over an axis with these ticks; `step` is that of the other axis. Deviations are drawn as a band."""
    values = [value + sign * off for line in lines for _, value, off in line.points for sign in (-1, 1)]
    low, high = step * math.floor(min(values) / step), step * math.ceil(max(values) / step)
    scale = math.log if logarithmic else float
    left, right = scale(min(ticks)), scale(max(ticks))

    def place(x: float, value: float) -> tuple[float, float]:
        return 90 + 380 * (scale(x) - left) / (right - left), 50 + 200 * (high - value) / (high - low)

    digits = max(1, -math.floor(math.log10(step)))
    drawn = [text(300, 26, heading, 16, "bold"), text(280, 300, below, 14)]
    for number in range(round((high - low) / step) + 1):
        _, y = place(ticks[-1], low + step * number)
        drawn.append(f'<path d="M80 {y:.1f} H500" stroke="#d7dde2" stroke-width="1"/>')
        drawn.append(text(58, round(y + 5, 1), f"{low + step * number:.{digits}f}", 13))
    drawn += [text(round(place(one, low)[0], 1), 276, f"{one:g}", 13) for one in ticks]
    for number, line in enumerate(lines):
        dashes = ' stroke-dasharray="6 5"' if line.dashed else ""
        points = [place(x, value) for x, value, _ in line.points]
        if any(off for _, _, off in line.points):
            edge = [place(x, value + off) for x, value, off in line.points]
            edge += [place(x, value - off) for x, value, off in reversed(line.points)]
            around = " L".join(f"{x:.1f} {y:.1f}" for x, y in edge)
            drawn.append(f'<path d="M{around} Z" fill="{line.colour}" fill-opacity="0.18"/>')
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path d="M{path}" stroke="{line.colour}" stroke-width="2.5" fill="none"{dashes}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}"/>' for x, y in points]
        y = 90 + 34 * number
        drawn.append(f'<path d="M524 {y} H560" stroke="{line.colour}" stroke-width="2.5"{dashes}/>')
        drawn.append(f'<text x="570" y="{y + 5}" font-size="14" fill="{INK}">{html.escape(line.label)}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 316" font-family="Helvetica, Arial, sans-serif" role="img">'
        f"<title>{html.escape(title)}</title>"
        '<rect width="790" height="316" rx="12" fill="#ffffff"/>' + "".join(drawn) + "</svg>\n"
    )


def figure_of(cell: str) -> tuple[float, float]:
    """Mean and deviation of a cell, "0.123 ± 0.004"."""
    mean, _, deviation = cell.partition(" ± ")
    return float(mean), float(deviation or 0)


def lengths() -> str:
    """Loss over the length of the prefix: one checkpoint at all of its lengths, and one trained at each."""
    found: dict[tuple[str, bool], dict[int, float]] = {}
    base = [row for row in rows_of("connectors", "connectors") if row[0] in ("resampler", "avg_pool")]
    for name, vectors, _, _, nats, *_ in base + rows_of("connectors", "lengths"):
        connector, _, kind = name.partition(", ")
        found.setdefault((connector, kind == "one checkpoint"), {})[int(vectors)] = figure_of(nats)[0]
    lines = [
        Line(
            f"{connector}, {'one checkpoint' if one else 'one for each'}",
            TRAINS_LINE if connector == "resampler" else FROZEN_LINE,
            [(length, value, 0) for length, value in sorted(line.items())],
            dashed=not one,
        )
        for (connector, one), line in sorted(found.items())
    ]
    title = "Loss over the length of the prefix, of one checkpoint and of one for each length"
    ticks: list[float] = sorted(set().union(*found.values()))
    return chart("nats a token of captions", "vectors of an image", title, lines, 0.2, ticks, logarithmic=True)


def learning_curve(table: str, language_model: str) -> str:
    """CIDEr, and the gap to another photo's captions, over the processor seconds of training: of each system at its better
    rate."""
    systems: dict[str, dict[str, list[list[str]]]] = {}
    for name, *cells in rows_of(table, "peers"):
        systems.setdefault(name.partition(", rate")[0], {}).setdefault(name, []).append(cells)
    colours = {"ours": TRAINS_LINE, "ours, five of a photo": "#8a5aa8", "ClipCap's code": FROZEN_LINE}
    lines = []
    for system, rates in systems.items():
        colour = colours.get(system, "#6a8f3c")
        best = max(rates.values(), key=lambda rows: figure_of(rows[-1][3])[0])
        for column, what in ((3, "CIDEr"), (4, "gap")):
            points = [(float(cells[2]), *figure_of(cells[column])) for cells in best]
            lines.append(Line(f"{system}, {what}", colour, points, dashed=what == "gap"))
    last = max(x for line in lines for x, _, _ in line.points)
    every = next(one for one in (10, 20, 50, 100, 200, 500, 1000, 2000) if last / one <= 6)
    ticks = [float(every * number) for number in range(math.ceil(last / every) + 1)]
    title = f"CIDEr and its gap to another photo's captions over the seconds of training, {language_model}"
    return chart(f"CIDEr of test photos, {language_model}", "processor seconds of training", title, lines, 0.05, ticks)


PICTURES = {
    "parts.svg": parts,
    "lengths.svg": lengths,
    "learning_curve.svg": partial(learning_curve, "learning_curve", "SmolLM2-135M-Instruct"),
    "learning_curve_story.svg": partial(learning_curve, "learning_curve_story", "story model"),
}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, drawn in PICTURES.items():
        (IMAGES / name).write_text(drawn(), encoding="utf-8")
