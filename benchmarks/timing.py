"""Side-by-side measuring: alternate the candidates in one run, compare them round by round, print a table, write JSON.

A machine's speed drifts by more than the differences we look for, so nothing is timed by itself: every round runs each
candidate once, the order turning from round to round, and a ratio is the median of the rounds' own ratios.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Timing:
    """What one candidate took, round by round, in seconds (or another unit, the same for all of a comparison)."""

    name: str
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Lower and upper quartile; the values' ends where there are fewer than four."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 2,
    repeat: int = 1,
    clock: str = "wall",
) -> dict[str, Timing]:
    """
    Times the candidates against each other.

    Args:
        candidates: name -> what to run, without arguments.
        rounds: how often each is timed.
        warmup: how often each runs before, untimed.
        repeat: runs within one timing, for what is too short to be timed by itself; the mean of them counts.
        clock: `"wall"`, or `"cpu"` for the process's own time, which a busy machine disturbs less.
    """
    now = CLOCKS[clock]
    timings = {name: Timing(name) for name in candidates}
    with progress(candidates, rounds + warmup) as bar:
        for turn, name in bar:
            gc.collect()
            _synchronize()
            start = now()
            for _ in range(repeat if turn >= warmup else 1):
                candidates[name]()
            _synchronize()
            if turn >= warmup:
                timings[name].rounds.append((now() - start) / repeat)
    return timings


def progress(candidates: Iterable[str], rounds: int) -> tqdm:
    """Round and candidate, the order turning from round to round, behind a bar that says how long it will take."""
    names = list(candidates)
    turns = [(turn, name) for turn in range(rounds) for name in names[turn % len(names) :] + names[: turn % len(names)]]
    return tqdm(turns, desc="timing " + ", ".join(names)[:50], unit="run", leave=False, file=sys.stderr)


def alternate_processes(
    candidates: dict[str, str], *, rounds: int = 7, warmup: int = 1, options: tuple[str, ...] = ()
) -> dict[str, Timing]:
    """As [`alternate`], each run in a fresh Python of its own: `candidates` are pieces of code that print one number, the
    last on their output (seconds, bytes, …). `options` go to the interpreter."""

    def number(code: str) -> float:
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The measured process failed:\n{done.stderr}")
        return float(done.stdout.split()[-1])

    timings = {name: Timing(name) for name in candidates}
    with progress(candidates, rounds + warmup) as bar:
        for turn, name in bar:
            value = number(candidates[name])
            if turn >= warmup:
                timings[name].rounds.append(value)
    return timings


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    facts: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        facts["transformers"] = transformers.__version__
    return facts


def kept_runs(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file holds of earlier calls, `{"settings", "runs", "machine"}`, to be added to; refused where those had other
    settings."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        raise ValueError(f"`{output}` holds figures of other settings ({results['settings']}): name another file.")
    return {**results, "machine": machine()}


class Report:
    """Collects the rows of a benchmark, prints them as a table, and writes them as JSON."""

    def __init__(self, title: str, **settings: Any):
        self.title, self.settings = title, settings
        self.rows: list[dict[str, Any]] = []

    def compare(
        self, name: str, ours: Timing, limit: Timing, *, bar: float | None = None, unit: str = "ms", scale: float = 1e3
    ) -> float:
        """A row: ours against the limit, of which it may be at most `bar` times. Returns the ratio's median."""
        ratios = [a / b for a, b in zip(ours.rounds, limit.rounds, strict=True)]
        low, high = quartiles(ratios)
        ratio = statistics.median(ratios)
        self.rows.append(
            {
                "name": name,
                "ours": ours.median * scale,
                "limit": limit.median * scale,
                "unit": unit,
                "ratio": ratio,
                "ratio_quartiles": [low, high],
                "rounds": len(ratios),
                "bar": bar,
                "met": None if bar is None else ratio <= bar,
                "ours_rounds": [value * scale for value in ours.rounds],
                "limit_rounds": [value * scale for value in limit.rounds],
            }
        )
        return ratio

    def figure(self, name: str, value: float, unit: str, *, limit: float | None = None, bar: float | None = None) -> None:
        """A row of one counted number; `bar` is the most that it may be, in its own unit."""
        row = {"name": name, "ours": value, "limit": limit, "unit": unit, "ratio": None, "rounds": 1, "bar": bar}
        self.rows.append({**row, "met": None if bar is None else value <= bar})

    def print(self) -> None:
        print(self.title)
        for facts in (self.settings, machine()):
            print("  " + ", ".join(f"{key} {value}" for key, value in facts.items()))
        cells = [("", "ours", "limit", "unit", "ratio", "quartiles", "rounds", "bar", "")]
        for row in self.rows:
            ratio, spread = row["ratio"], row.get("ratio_quartiles")
            cells.append(
                (
                    row["name"],
                    _number(row["ours"]),
                    _number(row["limit"]),
                    row["unit"],
                    "" if ratio is None else f"{ratio:.3f}",
                    "" if spread is None else f"{spread[0]:.3f}-{spread[1]:.3f}",
                    str(row["rounds"]),
                    "" if row["bar"] is None else f"<= {_number(row['bar'])}",
                    {None: "", True: "met", False: "MISSED"}[row["met"]],
                )
            )
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        for line in cells:
            left, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join([left.strip().ljust(widths[0]), *rest]).rstrip())

    def save(self, path: str | None) -> None:
        if path is None:
            return
        results = {"title": self.title, "settings": self.settings, "machine": machine(), "rows": self.rows}
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def add_arguments(parser: argparse.ArgumentParser, *, rounds: int = 7) -> None:
    """What every benchmark takes: `--rounds`, `--output`, `--clock`."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timings of each candidate (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the processes' own time, for busy machines")
    parser.add_argument("--output", help="file that the figures are written to, as JSON")
