"""Does the method behave as its papers say? Four claims, tried on data that is made here, each with a verdict.

    python -m benchmarks.shapes.faithfulness --output_dir faithfulness         (all claims, seeds 0, 1 and 2)
    python -m benchmarks.shapes.faithfulness --only towers frozen --seeds 0    (some of them, one seed)

- `shots`: more shots in the prompt help (Frozen, arXiv 2106.13884, figure 4), by few_shot.py;
- `towers`: through a linear connector gets more of the picture, the more language the tower was trained with (LiMBeR,
  arXiv 2209.15162); five towers of one architecture, see towers.py;
- `frozen`: a language model that is tuned on few captions fits them better, and forgets and generalises worse (Frozen,
  section 3), beside LoRA;
- `prefix_length`: a longer prefix helps a frozen language model, and there the transformer beats the MLP (ClipCap, arXiv
  2111.09734, section 4 and figure 4).

A claim is a few *statements* of the form "A is larger than B". One `holds` where the means over seeds differ by more than
either standard deviation, is `contrary` where they do so the other way round, and is `open` otherwise. A claim is
`reproduced` where all its statements hold, `partly` where some do, `not reproduced` where none does. Nothing else decides.

The world is that of `modeling_frozen.shapes`. Scores are of scenes that neither the tower nor the language model nor the
connector met. What a tiny world shows is whether the mechanism is there, not how large it is with real parents. A run goes on
where one before it with the same settings and `--output_dir` was stopped, so that a long one can be made piece by piece.

What came out. `frozen`, three seeds: partly; tuning forgets and no longer answers what it was never asked, but held-out
captions, of the same few words, gain by it. `prefix_length`, two seeds: partly; CIDEr 3 with one vector, 7 with two, 9 with
four and no more after; transformer and MLP are equal. `towers`, two seeds: partly, not in LiMBeR's order: labels, language,
random, self-supervised; the contrastive tower tells size and place, and after 300 steps in batches of 48 hardly a shape.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from benchmarks.shapes.few_shot import FewShotArguments
from benchmarks.shapes.few_shot import run as run_episodes
from benchmarks.shapes.tasks import Arguments, first_sentence, train_connector
from benchmarks.shapes.towers import WAYS, Pictures, train_tower_by
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.evaluation import evaluate
from modeling_frozen.evaluation.plots import BLUE, GREEN, GREY, ORANGE, RED, finish, new_figure, plain_axes
from modeling_frozen.metrics import exact_match, perplexity
from modeling_frozen.shapes.parents import train_language_model
from modeling_frozen.shapes.scenes import QUESTIONS, Scene, draw, sentence_and_questions, split_scenes


Run = dict[str, dict[str, float]]  # of one seed: row of the table -> column -> figure
Panels = dict[str, dict[str, dict[Any, list[float]]]]  # name of the score -> line -> x -> a figure per seed


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


def draw_panels(path: Path, title: str, x_name: str, panels: Panels, log_x: bool = False) -> None:
    """A PNG with a panel for each score: lines of means over seeds at each x (numbers, or names), with deviations."""
    figure = new_figure(7.2 if len(panels) == 1 else 5.6 * len(panels), 4.4)
    figure.suptitle(title)
    styles = [(BLUE, "-", "o"), (RED, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "v"), (GREY, "--", "x"), (BLUE, ":", "D")]
    for panel, (y_name, lines) in enumerate(panels.items()):
        axes = plain_axes(figure.add_subplot(1, len(panels), panel + 1))
        names = list(dict.fromkeys(x for line in lines.values() for x in line))
        named = any(isinstance(x, str) for x in names)  # then nothing lies between two, and points stand side by side
        places = {x: at if named else x for at, x in enumerate(names)}
        for number, ((name, line), (colour, dash, mark)) in enumerate(zip(lines.items(), styles, strict=False)):
            dash, beside = ("", 0.08 * (number - (len(lines) - 1) / 2)) if named else (dash, 0)
            x, y = [places[one] + beside for one in line], [statistics.fmean(values) for values in line.values()]
            error = [deviation(values) for values in line.values()]
            axes.errorbar(x, y, yerr=error, color=colour, linestyle=dash, marker=mark, markersize=5, capsize=3, label=name)
        if log_x:
            axes.set_xscale("log", base=2)
        axes.set_xticks([places[one] for one in names], [str(one) for one in names])
        axes.minorticks_off()
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
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
        steps = self.args.language_model_steps
        return self._once(f"language_model_{steps}", lambda path: train_language_model(path, steps, self.seed))

    def tower(self, way: str) -> Path:
        name = f"{way.replace(' ', '_')}_{self.args.tower_steps}_{self.args.pictures}"
        return self._once(name, lambda path: train_tower_by(way, path, self.args.tower_steps, self.pictures))

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        path, unfinished = self.folder / name, self.folder / f"{name}.new"
        if not path.exists():
            make(unfinished)
            unfinished.rename(path)
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
        """As the other experiments train their connectors, by Trainer, from stored features."""
        arguments = Arguments(
            self.folder, steps=self.args.steps, batch_size=32, learning_rate=self.args.learning_rate, seed=self.seed
        )
        with contextlib.redirect_stdout(sys.stderr):  # what Trainer logs is not part of the tables
            train_connector(model, processor, rows, arguments, callbacks=list(callbacks))


def _row(scene: Scene, image: Any, question: str = "") -> dict[str, Any]:
    return {"image": image, "prompt": question, "answer": scene.answer(question) if question else scene.sentence}


def captions(model: Any, processor: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Scores of what the model says of held-out pictures, beside those of the same model blind."""
    result = evaluate(model, processor, rows, kinds=("sighted", "blind"), num_resamples=0, max_new_tokens=16, batch_size=48)
    scores = {"CIDEr": result.scores["sighted"]["cider"], "blind CIDEr": result.scores["blind"]["cider"]}
    said = [first_sentence(text) for text in result.predictions["sighted"]]
    scores["exact match"] = exact_match(said, result.references)
    return scores | words_right(said, [row["answer"] for row in rows])


def words_right(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """How many captions are right in what `labels` name, and how many in the rest: "a large red circle at the top left ."."""
    pairs = [(b.split(), a.split()) for b, a in zip(said, right, strict=True)]
    return {
        "shape, colour": statistics.fmean(b[2:4] == a[2:4] for b, a in pairs),
        "size, place": statistics.fmean(b[1:2] == a[1:2] and b[4:] == a[4:] for b, a in pairs),
    }


# ------------------------------------------------------------------------------------------------------------ the claims


@dataclass
class Judged:
    """What runs of several seeds say: statements, remarks, and what is drawn of them."""

    statements: list[Statement | Unchanged]
    panels: Panels
    title: str
    x_name: str
    log_x: bool = False
    remarks: list[str] = field(default_factory=list)


def measure_shots(world: World, args: argparse.Namespace, run: Run) -> Iterator[None]:
    if run:
        return

    folder = world.folder / "few_shot"
    folder.mkdir(parents=True, exist_ok=True)
    shots = ",".join(map(str, args.shots))
    tower = str(world.tower("all labels"))
    arguments = FewShotArguments(folder, tower, seed=world.seed, ways="2", shots=shots, repeats="1", episodes=100)
    for option in args.few_shot_options:
        name, _, value = option.partition("=")
        setattr(arguments, name, type(getattr(arguments, name))(value))
    with contextlib.redirect_stdout(sys.stderr):
        said = run_episodes(arguments)
    hows = [name.removesuffix(end) for name in said if name.endswith(end := f"_{args.shots[0]}_shots")]
    run |= {how: {f"{n} shots": said[f"{how}_{n}_shots"] for n in args.shots} for how in hows}
    run |= {"chance": {f"{n} shots": said["chance"] for n in args.shots}}
    yield


def judge_shots(runs: list[Run], args: argparse.Namespace) -> Judged:
    few, many = f"{args.shots[0]} shots", f"{args.shots[-1]} shots"
    statements: list[Statement | Unchanged] = [
        compare(runs, f"sighted, {many} name more than {few}", ("sighted", many), ("sighted", few)),
        compare(runs, f"{many} name more than chance", ("sighted", many), ("chance", many)),
        compare(runs, f"sighted is better than blind with {many}", ("sighted", many), ("blind", many)),
    ]
    shown = ("in_words", "sighted", "blind", "swapped", "chance")
    lines = {row: {n: over_seeds(runs, row, f"{n} shots") for n in args.shots} for row in shown if row in runs[0]}
    return Judged(statements, {"named right": lines}, "Shots in the prompt", "pictures of each category in the prompt")


def measure_towers(world: World, args: argparse.Namespace, run: Run) -> Iterator[None]:
    for way in tqdm(WAYS, desc=f"towers, seed {world.seed}"):
        for connector in ("linear", "mlp"):
            if f"{way}, {connector}" in run:
                continue
            model, processor = world.join(way, connector_type=connector)
            world.train(model, processor, world.stored(way, model, processor))
            run[f"{way}, {connector}"] = captions(model, processor, world.held_out)
            yield


def judge_towers(runs: list[Run], args: argparse.Namespace) -> Judged:
    cider = {
        (way, connector): over_seeds(runs, f"{way}, {connector}", "CIDEr") for way in WAYS for connector in ("linear", "mlp")
    }
    order = ["language", "labels", "self-supervised", "random"]
    statements: list[Statement | Unchanged] = [
        Statement(f"linear: {a} > {b} (CIDEr)", cider[a, "linear"], cider[b, "linear"])
        for a, b in zip(order, order[1:], strict=False)
    ]
    statements.append(
        compare(runs, "linear, language: sighted > blind", ("language, linear", "CIDEr"), ("language, linear", "blind CIDEr"))
    )
    more = {way: [b - a for a, b in zip(cider[way, "linear"], cider[way, "mlp"], strict=True)] for way in WAYS}
    statements += [
        Statement(f"an MLP adds more over linear to {way} than to language", more[way], more["language"])
        for way in ("labels", "self-supervised")
    ]
    came = sorted(WAYS, key=lambda way: -statistics.fmean(cider[way, "linear"]))
    lines = {
        f"{connector}{', blind' * (column != 'CIDEr')}": {way: over_seeds(runs, f"{way}, {connector}", column) for way in WAYS}
        for connector in ("linear", "mlp")
        for column in ("CIDEr", "blind CIDEr")
    }
    remarks = [f"LiMBeR's order: {' > '.join(order)}; by mean CIDEr here: {' > '.join(came)}"]
    title = "One architecture of tower, trained in five ways"
    return Judged(statements, {"CIDEr-D": lines}, title, "how the tower was trained", remarks=remarks)


TUNED = {"frozen": ("connector",), "LoRA": ("connector",), "tuned": ("connector", "text")}
LOSS, TEXT = "loss, held out", "other text, after"


def measure_frozen(world: World, args: argparse.Namespace, run: Run) -> Iterator[None]:
    rng = random.Random(world.seed + 2)
    _, held_out = split_scenes()
    texts = [f"{sentence_and_questions(rng, held_out)} </s>" for _ in range(200)]
    asked = [
        _row(scene, image, question)
        for scene, image in [(scene, draw(scene, rng)) for scene in rng.sample(held_out, 24)]
        for question in QUESTIONS
    ]
    for name in tqdm(TUNED, desc=f"frozen and tuned, seed {world.seed}"):
        if name in run:
            continue
        model, processor = world.join("all labels", connector_type="mlp", trainable=TUNED[name])
        rows = world.stored("all labels", model, processor)
        few = rows.select(range(min(args.few, len(rows))))
        if name == "LoRA":
            from peft import get_peft_model

            from modeling_frozen.lora import lora_config

            model = get_peft_model(model, lora_config(model, r=8))
        collator, tokenizer = DataCollatorForFrozenPrefix(processor), processor.tokenizer
        before = text_perplexity(model, tokenizer, texts)
        measure = {
            LOSS: partial(caption_loss, collator=collator, rows=world.held_out),
            TEXT: partial(text_perplexity, tokenizer=tokenizer, texts=texts),
        }
        curve = Curve(model, measure, max(1, args.steps // 4))
        world.train(model, processor, few, [curve])
        run |= {f"{name}, {step} steps": figures for step, figures in curve.by_step.items()}
        end = {column: of(model) for column, of in measure.items()}
        learnt = caption_loss(model, collator, few)
        answers = evaluate(
            model, processor, asked, task="vqa", kinds=("sighted", "blind"), num_resamples=0, max_new_tokens=8,
            postprocess=first_sentence, batch_size=48,
        )  # fmt: skip
        run[name] = {
            **end,
            "other text, before": before,
            "loss, learnt": learnt,
            "gap": end[LOSS] - learnt,
            "answers": answers.scores["sighted"]["exact_match"],
            "blind answers": answers.scores["blind"]["exact_match"],
        }
        yield


def judge_frozen(runs: list[Run], args: argparse.Namespace) -> Judged:
    before, after = (over_seeds(runs, "frozen", column) for column in ("other text, before", TEXT))
    statements: list[Statement | Unchanged] = [
        Unchanged("frozen: the perplexity of other text is the same, to the last bit", before, after)
    ]
    for name in ("tuned", "LoRA"):
        statements += [
            compare(runs, f"{name}: other text gets more perplexing", (name, TEXT), (name, "other text, before")),
            compare(runs, f"{name} fits its captions better than frozen", ("frozen", "loss, learnt"), (name, "loss, learnt")),
            compare(runs, f"{name} has the larger gap to held-out captions", (name, "gap"), ("frozen", "gap")),
            compare(runs, f"{name} answers fewer questions, never asked before", ("frozen", "answers"), (name, "answers")),
        ]
    steps = [int(row.split()[1]) for row in runs[0] if row.startswith("frozen, ")]
    panels = {
        label: {name: {step: over_seeds(runs, f"{name}, {step} steps", column) for step in steps} for name in TUNED}
        for label, column in (("held-out captions: loss, nats per token", LOSS), ("other text: perplexity", TEXT))
    }
    return Judged(statements, panels, f"A language model frozen and tuned, {args.few} captioned pictures", "optimizer steps")


class Curve(TrainerCallback):
    """Measures a model every so many steps; `by_step` holds the figures by step."""

    def __init__(self, model: Any, measure: dict[str, Callable[[Any], float]], every: int):
        self.model, self.measure, self.every = model, measure, every
        self.by_step: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.model.eval()
            self.by_step[state.global_step] = {name: of(self.model) for name, of in self.measure.items()}
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
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        losses.append(model(**inputs).loss.item())
        counts.append(int((labels[:, 1:] != -100).sum()))
    return perplexity(losses, counts)


SMALL = {"mlp": {}, "transformer": {"num_layers": 2, "num_heads": 4, "hidden_size": 96}}


def measure_prefix_length(world: World, args: argparse.Namespace, run: Run) -> Iterator[None]:
    for connector, config in SMALL.items():
        for length in tqdm(args.lengths, desc=f"{connector}, seed {world.seed}"):
            if f"{connector}, {length}" in run:
                continue
            model, processor = world.join(
                "all labels", connector_type=connector, connector_config=config, prefix_length=length,
                vision_feature_select_strategy="pooled",
            )  # fmt: skip
            world.train(model, processor, world.stored("all labels", model, processor))
            parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
            scores = captions(model, processor, world.held_out)
            run[f"{connector}, {length}"] = {**scores, "parameters": float(parameters)}
            yield


def judge_prefix_length(runs: list[Run], args: argparse.Namespace) -> Judged:
    short, long = args.lengths[0], args.lengths[-1]
    cider = {c: [[run[f"{c}, {length}"]["CIDEr"] for length in args.lengths] for run in runs] for c in SMALL}
    mean = {connector: [statistics.fmean(values) for values in cider[connector]] for connector in SMALL}
    statements: list[Statement | Unchanged] = [
        compare(runs, f"{one}: {long} vectors > {short} (CIDEr)", (f"{one}, {long}", "CIDEr"), (f"{one}, {short}", "CIDEr"))
        for one in SMALL
    ]
    statements.append(Statement("the transformer beats the MLP, mean over lengths (CIDEr)", mean["transformer"], mean["mlp"]))
    lines = {
        name: {n: over_seeds(runs, f"{c}, {n}", column) for n in args.lengths}
        for c in SMALL
        for name, column in ((c, "CIDEr"), (f"{c}, blind", "blind CIDEr"))
    }
    best = {c: max(args.lengths, key=lambda n: statistics.fmean(over_seeds(runs, f"{c}, {n}", "CIDEr"))) for c in SMALL}
    remarks = ["best length by mean CIDEr: " + ", ".join(f"{connector} {length}" for connector, length in best.items())]
    x_name = "prefix length (vectors per image)"
    return Judged(statements, {"CIDEr-D": lines}, "Length of the prefix", x_name, log_x=True, remarks=remarks)


@dataclass
class Claim:
    """What a paper says, how one seed is measured, and how runs of all seeds are judged."""

    text: str
    measure: Callable[[World, argparse.Namespace, Run], Iterator[None]]  # adds rows that the run lacks, piece by piece
    judge: Callable[[list[Run], argparse.Namespace], Judged]


CLAIMS = {
    "shots": Claim("Frozen, figure 4: with more shots more queries are named right.", measure_shots, judge_shots),
    "towers": Claim(
        "LiMBeR: how much a linear map gets through depends on how much language the tower was trained with.",
        measure_towers,
        judge_towers,
    ),
    "frozen": Claim(
        "Frozen, section 3: what a frozen language model saves, on few captioned pictures, with the same steps and rate.",
        measure_frozen,
        judge_frozen,
    ),
    "prefix_length": Claim(
        "ClipCap, figure 4: score against prefix length, from one vector of the picture, as from CLIP's.",
        measure_prefix_length,
        judge_prefix_length,
    ),
}


# ------------------------------------------------------------------------------------------------------------------ main


def judge(name: str, by_seed: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Prints a claim's table, statements and verdict over the seeds at hand, draws its PNG, and gives it as JSON takes it."""
    whole = {seed: one for seed, one in by_seed.items() if one["whole"]}
    runs = [one["table"] for one in whole.values()]
    judged = CLAIMS[name].judge(runs, args)
    verdict = verdict_of(judged.statements)
    print(f"\n{name}. {CLAIMS[name].text}\n{table(runs)}")
    for one in judged.statements:
        print(f"  {one.verdict:<9} {one.text}")
    for remark in judged.remarks:
        print(f"  {remark}")
    seconds = sum(one["seconds"] for one in whole.values())
    print(f"  {name}: {verdict.upper()} (seeds {', '.join(whole)}; {seconds:.0f} seconds)", flush=True)
    draw_panels(args.output_dir / f"{name}.png", judged.title, judged.x_name, judged.panels, judged.log_x)
    facts = {"claim": CLAIMS[name].text, "verdict": verdict, "statements": [vars(one) for one in judged.statements]}
    return {**facts, "remarks": judged.remarks, "seeds": by_seed}


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


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
    parser.add_argument("--few_shot_options", nargs="*", default=[], metavar="NAME=VALUE", help="of few_shot.py")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    apart = ("only", "seeds", "output_dir", "parents_dir")
    settings = {key: value for key, value in vars(args).items() if key not in apart}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    machine |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    print("  ".join(f"{key} {value}" for key, value in {**settings, **machine}.items()))
    output = args.output_dir / "results.json"
    results = json.loads(output.read_text()) if output.exists() else {"settings": settings, "claims": {}}
    if results["settings"] != settings:
        raise ValueError(f"`{output}` holds figures of other settings ({results['settings']}): name another folder.")
    results["machine"] = machine
    with tempfile.TemporaryDirectory() as folder:
        worlds = [World(args, args.parents_dir or Path(folder), seed) for seed in args.seeds]
        for name in args.only:
            by_seed = results["claims"].get(name, {}).get("seeds", {})
            for world in worlds:
                one = by_seed.setdefault(str(world.seed), {"table": {}, "seconds": 0.0, "whole": False})
                begin, before = time.time(), one["seconds"]
                for _ in [] if one["whole"] else CLAIMS[name].measure(world, args, one["table"]):
                    # At once: a run that is cut short leaves what it measured.
                    one["seconds"] = round(before + time.time() - begin, 1)
                    results["claims"].setdefault(name, {})["seeds"] = by_seed
                    write(output, results)
                one["whole"] = True
            results["claims"][name] = judge(name, by_seed, args)
            write(output, results)
    print("\n" + "\n".join(f"{name:<14} {one.get('verdict', 'cut short')}" for name, one in results["claims"].items()))
    return results


if __name__ == "__main__":
    main()
