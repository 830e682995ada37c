"""Draws the pictures of README and pages into docs/images: `python docs/draw.py`. Standard library only.

A test draws them again and compares, so a picture is changed here and not by hand.
"""

import html
import itertools
import math
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


def lengths() -> str:
    """Loss over the length of the prefix: one checkpoint at all of its lengths, and one trained at each."""
    found: dict[tuple[str, bool], dict[int, float]] = {}
    base = [row for row in rows_of("connectors", "connectors") if row[0] in ("resampler", "avg_pool")]
    for name, vectors, _, _, nats, *_ in base + rows_of("connectors", "lengths"):
        connector, _, kind = name.partition(", ")
        found.setdefault((connector, kind == "one checkpoint"), {})[int(vectors)] = float(nats.split(" ")[0])
    longest = max(length for line in found.values() for length in line)
    values = [value for line in found.values() for value in line.values()]
    low, high = math.floor(5 * min(values)) / 5, math.ceil(5 * max(values)) / 5

    def place(length: int, value: float) -> tuple[float, float]:
        return 90 + 380 * math.log(length) / math.log(longest), 50 + 200 * (high - value) / (high - low)

    drawn = [text(300, 26, "nats a token of captions", 16, "bold"), text(280, 300, "vectors of an image", 14)]
    for number in range(round((high - low) / 0.2) + 1):
        _, y = place(1, low + 0.2 * number)
        drawn.append(f'<path d="M80 {y:.1f} H500" stroke="#d7dde2" stroke-width="1"/>')
        drawn.append(text(58, y + 5, f"{low + 0.2 * number:.1f}", 13))
    drawn += [text(round(place(one, low)[0], 1), 276, str(one), 13) for one in sorted(set().union(*found.values()))]
    for number, ((connector, one), line) in enumerate(sorted(found.items())):
        colour = TRAINS_LINE if connector == "resampler" else FROZEN_LINE
        dashes = "" if one else ' stroke-dasharray="6 5"'
        points = [place(length, value) for length, value in sorted(line.items())]
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2.5" fill="none"{dashes}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        y = 90 + 34 * number
        drawn.append(f'<path d="M524 {y} H560" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        said = f"{connector}, {'one checkpoint' if one else 'one for each'}"
        drawn.append(f'<text x="570" y="{y + 5}" font-size="14" fill="{INK}">{said}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 316" font-family="Helvetica, Arial, sans-serif" role="img">'
        "<title>Loss over the length of the prefix, of one checkpoint and of one for each length</title>"
        '<rect width="790" height="316" rx="12" fill="#ffffff"/>' + "".join(drawn) + "</svg>\n"
    )


PICTURES = {"parts.svg": parts, "lengths.svg": lengths}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, drawn in PICTURES.items():
        (IMAGES / name).write_text(drawn(), encoding="utf-8")
