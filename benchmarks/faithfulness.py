"""Does the method behave as its papers say? Four claims, tried on data that is made here, each with a verdict.

    python -m benchmarks.faithfulness --output_dir faithfulness                      (all claims, seeds 0, 1 and 2)
    python -m benchmarks.faithfulness --only towers frozen --seeds 0                 (some of them, one seed)

- `shots`: more shots in the prompt help (Frozen, arXiv 2106.13884, figure 4), by examples/few_shot.py;
- `towers`: through a linear connector gets more of the picture, the more language the tower was trained with (LiMBeR,
  arXiv 2209.15162); five towers of one architecture, see benchmarks/shape_towers.py;
- `frozen`: a language model that is tuned on few captions fits them better, and forgets and generalises worse (Frozen,
  section 3), beside LoRA;
- `prefix_length`: a longer prefix helps a frozen language model, and there the transformer beats the MLP (ClipCap, arXiv
  2111.09734, section 4 and figure 4).

A claim is a few *statements* of the form "A is larger than B". One `holds` where the means over seeds differ by more than
either standard deviation, is `contrary` where they do so the other way round, and is `open` otherwise. A claim is
`reproduced` where all its statements hold, `partly` where some do, `not reproduced` where none does. Nothing else decides.

The world is that of examples/shapes.py. Scores are of scenes that neither the tower nor the language model nor the connector
met. What a tiny world shows is whether the mechanism is there, not how large it is with real parents.
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from benchmarks.shape_towers import WAYS, Pictures, train_tower_by
from benchmarks.timing import machine
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.evaluation import evaluate
from modeling_frozen.feature_cache import cache_vision_features
from modeling_frozen.metrics import exact_match, perplexity
from modeling_frozen.plots import BLUE, GREEN, GREY, ORANGE, RED, finish, new_figure, plain_axes


# Put on the path by benchmarks/shape_towers.py.
from shapes import QUESTIONS, Scene, draw, sentence_and_questions, split_scenes, train_language_model  # isort: skip
from tiny_world import Arguments, train_connector  # isort: skip


Run = dict[str, dict[str, float]]  # of one seed: row of the table -> column -> figure


# --------------------------------------------------------------------------------------------------------- what decides


@dataclass
class Statement:
    """That one figure is larger than another, over seeds, and whether it is."""

    text: str
    larger: list[float]
    smaller: list[float]
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        difference = statistics.fmean(self.larger) - statistics.fmean(self.smaller)
        bar = max(deviation(self.larger), deviation(self.smaller))
        self.verdict = "holds" if difference > bar else "contrary" if -difference > bar else "open"


@dataclass
class Unchanged:
    """That figures are equal, to the last bit, in every seed."""

    text: str
    before: list[float]
    after: list[float]
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        self.verdict = "holds" if self.before == self.after else "contrary"


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 of a single seed, where any difference decides."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict_of(statements: Sequence[Statement | Unchanged]) -> str:
    """`reproduced`, `partly` or `not reproduced`: all statements hold, some, or none."""
    if not statements:
        raise ValueError("A claim without statements can't be judged.")
    held = sum(one.verdict == "holds" for one in statements)
    return "reproduced" if held == len(statements) else "partly" if held else "not reproduced"


def over_seeds(runs: Sequence[Run], row: str, column: str) -> list[float]:
    """A figure of the table, seed by seed."""
    return [run[row][column] for run in runs]


def compare(runs: Sequence[Run], text: str, larger: tuple[str, str], smaller: tuple[str, str]) -> Statement:
    """A statement about two cells of the table, each named by row and column."""
    return Statement(text, over_seeds(runs, *larger), over_seeds(runs, *smaller))


def table(runs: Sequence[Run]) -> str:
    """Rows by columns, each cell the mean ± the deviation over seeds."""
    columns = list(dict.fromkeys(column for row in runs[0].values() for column in row))
    lines = [["", *columns]]
    for row, figures in runs[0].items():
        cells = [over_seeds(runs, row, column) if column in figures else None for column in columns]
        lines.append([row, *("" if one is None else _cell(one) for one in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cell(values: list[float]) -> str:
    if all(float(one).is_integer() and abs(one) > 20 for one in values) and len(set(values)) == 1:
        return f"{int(values[0]):,}"  # a count
    return f"{statistics.fmean(values):.3f} ± {deviation(values):.3f}"


def draw_lines(
    path: Path, title: str, x_name: str, y_name: str, lines: dict[str, dict[Any, list[float]]], log_x: bool = False
) -> None:
    """A PNG of one panel: each line's mean over seeds at each x (numbers, or names side by side), with deviations."""
    figure = new_figure(7.2, 4.4)
    axes = plain_axes(figure.add_subplot())
    names = list(dict.fromkeys(x for line in lines.values() for x in line))
    places = {x: x if isinstance(x, int | float) else at for at, x in enumerate(names)}
    styles = [(BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "v"), (GREY, "--", "x"), (BLUE, ":", "D")]
    for (name, line), (colour, dash, mark) in zip(lines.items(), styles, strict=False):
        x, y = [places[one] for one in line], [statistics.fmean(values) for values in line.values()]
        error = [deviation(values) for values in line.values()]
        axes.errorbar(x, y, yerr=error, color=colour, linestyle=dash, marker=mark, markersize=5, capsize=3, label=name)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks([places[one] for one in names], [str(one) for one in names])
    axes.minorticks_off()
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_title(title)
    axes.margins(x=0.05, y=0.1)
    axes.legend(frameon=False, fontsize=9)
    finish(figure, path)


# ---------------------------------------------------------------------------------------------- parents, made once a seed


class World:
    """The parents, pictures and stored features of one seed, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace, folder: Path, seed: int):
        self.args, self.folder, self.seed = args, folder / f"seed_{seed}", seed
        self._pictures: Pictures | None = None
        self._stored: dict[tuple[str, str], Dataset] = {}
        _, held_out = split_scenes()
        rng = random.Random(seed + 1)
        scenes = rng.sample(held_out, min(args.held_out, len(held_out)))
        self.held_out = [_row(scene, draw(scene, rng)) for scene in scenes]

    @property
    def pictures(self) -> Pictures:
        self._pictures = self._pictures or Pictures(self.args.pictures, self.seed)
        return self._pictures

    def language_model(self) -> Path:
        path = self.folder / f"language_model_{self.args.language_model_steps}"
        if not path.exists():
            train_language_model(path, self.args.language_model_steps, self.seed)
        return path

    def tower(self, way: str) -> Path:
        path = self.folder / f"{way.replace(' ', '_')}_{self.args.tower_steps}_{self.args.pictures}"
        if not path.exists():
            train_tower_by(way, path, self.args.tower_steps, self.pictures)
        return path

    def join(self, way: str, **options: Any) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
        """The tower of that way and the language model, with a new connector."""
        tower, words = str(self.tower(way)), str(self.language_model())
        set_seed(self.seed)
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, **options)
        return model, FrozenPrefixProcessor.from_model(model)

    def stored(self, way: str, model: Any, processor: Any) -> Dataset:
        """Rows of all pictures with the tower's features in place of the pictures; the tower runs once."""
        key = (way, model.config.vision_feature_select_strategy)
        if key not in self._stored:
            pairs = zip(self.pictures.scenes, self.pictures.images, strict=True)
            rows = Dataset.from_list([_row(scene, image) for scene, image in pairs])
            options = {"cache_dir": self.folder / "features", "dtype": "float32", "num_workers": 0}
            self._stored[key] = cache_vision_features(rows, model, processor, **options)
        return self._stored[key]

    def train(self, model: Any, processor: Any, rows: Dataset, callbacks: Iterable[TrainerCallback] = ()) -> None:
        """As the examples train their connectors, by Trainer, from stored features."""
        arguments = Arguments(
            self.folder, steps=self.args.steps, batch_size=32, learning_rate=self.args.learning_rate, seed=self.seed
        )
        with contextlib.redirect_stdout(sys.stderr):  # what Trainer logs is not part of the tables
            train_connector(model, processor, rows, arguments, callbacks=list(callbacks))


def _row(scene: Scene, image: Any, question: str = "") -> dict[str, Any]:
    return {"image": image, "prompt": question, "answer": scene.answer(question) if question else scene.sentence}


def captions(model: Any, processor: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Scores of what the model says of held-out pictures, beside those of the same model blind."""
    found = evaluate(model, processor, rows, kinds=("sighted", "blind"), num_resamples=0, max_new_tokens=16, batch_size=48)
    scores = {"CIDEr": found.scores["sighted"]["cider"], "blind CIDEr": found.scores["blind"]["cider"]}
    said = [_first_sentence(text) for text in found.predictions["sighted"]]
    scores["exact match"] = exact_match(said, found.references)
    return scores | words_right(said, [row["answer"] for row in rows])


def words_right(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """How many captions are right in what `labels` name, and how many in the rest: "a large red circle at the top left ."."""
    pairs = [(b.split(), a.split()) for b, a in zip(said, right, strict=True)]
    return {
        "shape, colour": statistics.fmean(b[2:4] == a[2:4] for b, a in pairs),
        "size, place": statistics.fmean(b[1:2] == a[1:2] and b[4:] == a[4:] for b, a in pairs),
    }


def _first_sentence(text: str) -> str:
    return text.split(".")[0].strip() + " ."


# ------------------------------------------------------------------------------------------------------------ the claims


@dataclass
class Found:
    """What one claim's runs say: a run per seed, the statements about them, and how to draw them."""

    runs: list[Run]
    statements: list[Statement | Unchanged]
    remarks: list[str] = field(default_factory=list)
    curves: dict[str, dict[Any, list[float]]] = field(default_factory=dict)  # by line, by x, a figure per seed


def shots(worlds: list[World], args: argparse.Namespace, png: Path) -> Found:
    """Frozen, figure 4: with more shots more queries are named right."""
    from few_shot import FewShotArguments, run

    runs: list[Run] = []
    for world in tqdm(worlds, desc="few shots"):
        folder = world.folder / "few_shot"
        folder.mkdir(parents=True, exist_ok=True)
        options = {key: value for key, value in (("episodes", args.episodes),) if value is not None}
        given = FewShotArguments(folder, seed=world.seed, shots=",".join(map(str, args.shots)), **options)
        given.begin = time.time()
        for name in args.few_shot_options:
            key, _, value = name.partition("=")
            setattr(given, key, type(getattr(given, key))(value))
        with contextlib.redirect_stdout(sys.stderr):
            said = run(given)
        hows = [how for how in ("sighted", "blind", "without", "told") if f"{how}_{args.shots[0]}_shots" in said]
        rows = {how: {f"{n} shots": said[f"{how}_{n}_shots"] for n in args.shots} for how in hows}
        runs.append(rows | {"chance": {f"{n} shots": said["chance"] for n in args.shots}})
    few, many = f"{args.shots[0]} shots", f"{args.shots[-1]} shots"
    statements = [
        compare(runs, f"sighted, {many} name more than {few}", ("sighted", many), ("sighted", few)),
        compare(runs, f"{many} name more than chance", ("sighted", many), ("chance", many)),
        compare(runs, f"sighted is better than blind with {many}", ("sighted", many), ("blind", many)),
    ]
    lines = {row: {n: over_seeds(runs, row, f"{n} shots") for n in args.shots} for row in runs[0]}
    draw_lines(png, "Shots in the prompt", "pictures of each category in the prompt", "named right", lines)
    return Found(runs, statements)


def towers(worlds: list[World], args: argparse.Namespace, png: Path) -> Found:
    """LiMBeR: what a linear map gets through depends on how much language the tower was trained with."""
    runs: list[Run] = []
    for world in worlds:
        run: Run = {}
        for way in tqdm(WAYS, desc=f"towers, seed {world.seed}"):
            for connector in ("linear", "mlp"):
                model, processor = world.join(way, connector_type=connector)
                world.train(model, processor, world.stored(way, model, processor))
                run[f"{way}, {connector}"] = captions(model, processor, world.held_out)
            run[way] = {"mlp over linear": run[f"{way}, mlp"]["CIDEr"] - run[f"{way}, linear"]["CIDEr"]}
        runs.append(run)
    order = ["language", "labels", "self-supervised", "random"]
    statements: list[Statement | Unchanged] = [
        compare(runs, f"linear: {a} > {b} (CIDEr)", (f"{a}, linear", "CIDEr"), (f"{b}, linear", "CIDEr"))
        for a, b in zip(order, order[1:], strict=False)
    ]
    statements.append(
        compare(runs, "linear, language: sighted > blind", ("language, linear", "CIDEr"), ("language, linear", "blind CIDEr"))
    )
    column = "mlp over linear"
    statements += [
        compare(runs, f"an MLP adds more to {way} than to language", (way, column), ("language", column))
        for way in ("labels", "self-supervised")
    ]
    came = sorted(WAYS, key=lambda way: -statistics.fmean(over_seeds(runs, f"{way}, linear", "CIDEr")))
    lines = {
        f"{connector}, {column}": {way: over_seeds(runs, f"{way}, {connector}", column) for way in WAYS}
        for connector in ("linear", "mlp")
        for column in ("CIDEr", "blind CIDEr")
    }
    draw_lines(png, "One architecture of tower, trained in five ways", "how the tower was trained", "CIDEr-D", lines)
    return Found(runs, statements, [f"LiMBeR's order: {' > '.join(order)}; by mean CIDEr here: {' > '.join(came)}"])


TUNED = {"frozen": ("connector",), "LoRA": ("connector",), "tuned": ("connector", "text")}


def frozen(worlds: list[World], args: argparse.Namespace, png: Path) -> Found:
    """Frozen, section 3: on few captioned pictures, with the same steps and rate, what a frozen language model saves."""
    runs: list[Run] = []
    lines: dict[str, dict[int, list[float]]] = {name: {} for name in TUNED}
    for world in worlds:
        run: Run = {}
        rng = random.Random(world.seed + 2)
        _, held_out = split_scenes()
        texts = [f"{sentence_and_questions(rng, held_out)} </s>" for _ in range(200)]
        asked = [
            {**_row(row["scene"], row["image"], question)}
            for row in ({"scene": scene, "image": draw(scene, rng)} for scene in rng.sample(held_out, 24))
            for question in QUESTIONS
        ]
        for name in tqdm(TUNED, desc=f"frozen and tuned, seed {world.seed}"):
            model, processor = world.join("all labels", connector_type="mlp", trainable=TUNED[name])
            rows = world.stored("all labels", model, processor)
            few = rows.select(range(min(args.few, len(rows))))
            if name == "LoRA":
                from peft import get_peft_model

                from modeling_frozen.lora import lora_config

                model = get_peft_model(model, lora_config(model, r=8))
            collator = DataCollatorForFrozenPrefix(processor)
            before = text_perplexity(model, processor.tokenizer, texts)
            curve = Curve(model, partial(caption_loss, collator=collator, rows=world.held_out), max(1, args.steps // 6))
            world.train(model, processor, few, [curve])
            learnt, met = caption_loss(model, collator, few), caption_loss(model, collator, world.held_out)
            answers = evaluate(
                model, processor, asked, task="vqa", kinds=("sighted", "blind"), num_resamples=0, max_new_tokens=8,
                postprocess=_first_sentence, batch_size=48,
            )  # fmt: skip
            run[name] = {
                "loss, learnt": learnt,
                "loss, held out": met,
                "gap": met - learnt,
                "text before": before,
                "text after": text_perplexity(model, processor.tokenizer, texts),
                "answers": answers.scores["sighted"]["exact_match"],
                "blind answers": answers.scores["blind"]["exact_match"],
            }
            for step, loss in curve.found.items():
                lines[name].setdefault(step, []).append(loss)
        runs.append(run)
    statements: list[Statement | Unchanged] = [
        Unchanged(
            "frozen: the perplexity of other text is the same, to the last bit",
            over_seeds(runs, "frozen", "text before"),
            over_seeds(runs, "frozen", "text after"),
        )
    ]
    for name in ("tuned", "LoRA"):
        statements += [
            compare(runs, f"{name}: other text gets more perplexing", (name, "text after"), (name, "text before")),
            compare(runs, f"{name} fits its captions better than frozen", ("frozen", "loss, learnt"), (name, "loss, learnt")),
            compare(runs, f"{name} has the larger gap to held-out captions", (name, "gap"), ("frozen", "gap")),
            compare(runs, f"{name} answers fewer questions, never asked before", ("frozen", "answers"), (name, "answers")),
        ]
    title = f"Held-out captions, {args.few} pictures to learn from"
    draw_lines(png, title, "optimizer steps", "loss, nats per token", lines)
    return Found(runs, statements, curves=lines)


class Curve(TrainerCallback):
    """Measures a model every so many steps; `found` holds the figures by step."""

    def __init__(self, model: Any, measure: Callable[[Any], float], every: int):
        self.model, self.measure, self.every, self.found = model, measure, every, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.model.eval()
            self.found[state.global_step] = self.measure(self.model)
            self.model.train()


@torch.no_grad()
def caption_loss(model: Any, collator: DataCollatorForFrozenPrefix, rows: Any) -> float:
    """Mean cross-entropy of the answers of all rows, in nats per token."""
    losses, counts = [], []
    for at in range(0, len(rows), 64):
        batch = collator([rows[i] for i in range(at, min(at + 64, len(rows)))])
        losses.append(model(**batch).loss.item())
        counts.append(int((batch["labels"] != -100).sum()))
    return sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)


@torch.no_grad()
def text_perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Perplexity of texts without any picture, as the language model inside now reads them."""
    model.eval()
    losses, counts = [], []
    for at in range(0, len(texts), 50):
        batch = tokenizer(texts[at : at + 50], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        losses.append(model(**given).loss.item())
        counts.append(int((labels[:, 1:] != -100).sum()))
    return perplexity(losses, counts)


SMALL = {"mlp": {}, "transformer": {"num_layers": 2, "num_heads": 4, "hidden_size": 96}}


def prefix_length(worlds: list[World], args: argparse.Namespace, png: Path) -> Found:
    """ClipCap, figure 4: score against prefix length, from one vector of the picture, as from CLIP's."""
    runs: list[Run] = []
    for world in worlds:
        run: Run = {}
        for connector, config in SMALL.items():
            for length in tqdm(args.lengths, desc=f"{connector}, seed {world.seed}"):
                model, processor = world.join(
                    "all labels", connector_type=connector, connector_config=config, prefix_length=length,
                    vision_feature_select_strategy="pooled",
                )  # fmt: skip
                world.train(model, processor, world.stored("all labels", model, processor))
                parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
                scores = captions(model, processor, world.held_out)
                run[f"{connector}, {length}"] = {**scores, "parameters": float(parameters)}
        runs.append(run)
    short, long = args.lengths[0], args.lengths[-1]

    def best(run: Run, connector: str) -> float:
        return max(run[f"{connector}, {length}"]["CIDEr"] for length in args.lengths)

    mean = {
        connector: [
            statistics.fmean(run[f"{connector}, {length}"]["CIDEr"] for length in args.lengths) for run in runs
        ]
        for connector in SMALL
    }  # fmt: skip
    statements: list[Statement | Unchanged] = [
        compare(runs, f"{one}: {long} vectors > {short} (CIDEr)", (f"{one}, {long}", "CIDEr"), (f"{one}, {short}", "CIDEr"))
        for one in SMALL
    ]
    statements += [
        Statement("the transformer beats the MLP, mean over lengths (CIDEr)", mean["transformer"], mean["mlp"]),
        Statement(
            "the MLP's parameters grow faster with the length",
            *([run[f"{c}, {long}"]["parameters"] / run[f"{c}, {short}"]["parameters"] for run in runs] for c in SMALL),
        ),
    ]
    lines = {
        name: {n: over_seeds(runs, f"{c}, {n}", column) for n in args.lengths}
        for c in SMALL
        for name, column in ((c, "CIDEr"), (f"{c}, blind", "blind CIDEr"))
    }
    draw_lines(png, "Length of the prefix", "prefix length (vectors per image)", "CIDEr-D", lines, log_x=True)
    bests = {c: statistics.fmean(best(run, c) for run in runs) for c in SMALL}
    return Found(runs, statements, [f"best length's CIDEr, mean over seeds: {bests}"])


CLAIMS: dict[str, Callable[[list[World], argparse.Namespace, Path], Found]] = {
    "shots": shots, "towers": towers, "frozen": frozen, "prefix_length": prefix_length,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ main


def judge(name: str, found: Found, seconds: float) -> dict[str, Any]:
    """Prints a claim's table, statements and verdict, and gives all of it as JSON takes it."""
    claim = (CLAIMS[name].__doc__ or "").strip()
    verdict = verdict_of(found.statements)
    print(f"\n{name}. {claim}\n{table(found.runs)}")
    for one in found.statements:
        print(f"  {one.verdict:<9} {one.text}")
    for remark in found.remarks:
        print(f"  {remark}")
    print(f"  {name}: {verdict.upper()} ({seconds:.0f} seconds)", flush=True)
    statements = [vars(one) for one in found.statements]
    facts = {"claim": claim, "verdict": verdict, "statements": statements, "remarks": found.remarks, "curves": found.curves}
    return {**facts, "seeds": found.runs, "seconds": round(seconds, 1)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("faithfulness"), help="results.json, and a PNG for each claim")
    parser.add_argument("--parents_dir", type=Path, help="keeps trained parents for another run (default: thrown away)")
    parser.add_argument("--tower_steps", type=int, default=300)
    parser.add_argument("--language_model_steps", type=int, default=110)
    parser.add_argument("--steps", type=int, default=300, help="of each connector, in batches of 32")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of each connector, and of what trains with it")
    parser.add_argument("--pictures", type=int, default=1536, help="that towers and connectors learn from")
    parser.add_argument("--few", type=int, default=200, help="that `frozen` learns from")
    parser.add_argument("--held_out", type=int, default=96, help="held-out scenes that are described")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--episodes", type=int, help="of each score of `shots` (default: the example's)")
    parser.add_argument("--few_shot_options", nargs="*", default=[], metavar="NAME=VALUE", help="of examples/few_shot.py")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings = {key: value for key, value in settings.items() if key not in ("only", "output_dir", "parents_dir")}
    print("  ".join(f"{key} {value}" for key, value in {**settings, **machine()}.items()))
    output = args.output_dir / "results.json"
    results = json.loads(output.read_text()) if output.exists() else {"settings": settings, "claims": {}}
    if results["settings"] != settings:
        raise ValueError(f"`{output}` holds figures of other settings ({results['settings']}): name another folder.")
    results["machine"] = machine()
    with tempfile.TemporaryDirectory() as folder:
        worlds = [World(args, args.parents_dir or Path(folder), seed) for seed in args.seeds]
        for name in args.only:
            begin = time.time()
            found = CLAIMS[name](worlds, args, args.output_dir / f"{name}.png")
            results["claims"][name] = judge(name, found, time.time() - begin)
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")  # at once: a run may be cut short
    print("\n" + "\n".join(f"{name:<14} {one['verdict']}" for name, one in results["claims"].items()))
    return results


if __name__ == "__main__":
    main()
