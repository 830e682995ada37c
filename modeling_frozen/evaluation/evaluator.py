"""Scores that can't fool their reader: beside every score, from the same run, those of the same model without its eyes.

A language model guesses much without looking: Frozen answers 26.2 % of VQAv2 blind, and 29.5 % with its eyes open
(Tsimpoukelli et al. 2021, arXiv 2106.13884, table 1). So each split is predicted under four conditions:

- *sighted*: as it is;
- *blind*: each row with the picture of another (no row keeps its own, nor another copy of it);
- *random_connector*: own pictures, through a connector that never trained;
- *language_model*: the words of the prompt alone.

Predictions go to a JSONL file as they are made, so that a run that was killed goes on where it was.
"""

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.image_reading import digest_of_image
from ..freezing import CONNECTING
from ..metrics.scores import caption_metrics, caption_scores, exact_match, token_f1, vqa_scores


KINDS = ("sighted", "blind", "random_connector", "language_model")


def _caption_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    scores = caption_scores(predictions, references)
    return {name: scores[name] for name in ("cider", "rouge_l")}


def _answer_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    pairs = [([one], [list(some)]) for one, some in zip(predictions, references, strict=True)]
    scores = {
        "exact_match": [exact_match(*pair) for pair in pairs],
        "token_f1": [token_f1(*pair) for pair in pairs],
    }
    if all(len(some) > 3 for some in references):  # with fewer people the official rule can't reach 1
        scores = {"vqa_accuracy": vqa_scores(predictions, references), **scores}
    return scores


# What is scored over the whole split, and the scores of single rows whose mean that is.
TASKS: dict[str, tuple[Callable[..., dict[str, float]] | None, Callable[..., dict[str, list[float]]]]] = {
    "captioning": (caption_metrics, _caption_rows),
    "vqa": (None, _answer_rows),
}


@dataclass
class Evaluation:
    """
    What [`evaluate`] found.

    Args:
        task (`str`): of `TASKS`.
        scores (`dict[str, dict[str, float]]`): by condition (`KINDS`), then by metric; fractions, CIDEr in [0, 10].
        intervals (`dict[str, dict[str, tuple[float, float]]]`):
            95 % bootstrap intervals over rows, for metrics that are means over rows (BLEU is none); under `"gain"` those
            of sighted minus blind, row by row.
        predictions (`dict[str, list[str]]`): by condition, in the order of the dataset.
        references (`list[list[str]]`), prompts (`list[str]`): of the dataset.
        settings (`dict`): how it was run.
    """

    task: str
    scores: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    predictions: dict[str, list[str]] = field(default_factory=dict)
    references: list[list[str]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Scores by condition, as a model card takes them, with `intervals`, `settings`, `task` and `rows` beside."""
        facts = {"task": self.task, "rows": len(self.references), "settings": self.settings, "intervals": self.intervals}
        return {**self.scores, **facts}

    def table(self) -> str:
        """One line per condition, with the intervals."""
        names = list(next(iter(self.scores.values())))
        lines = [f"{len(self.references)} rows".ljust(18) + "".join(f"{name:>24}" for name in names)]
        for kind, scores in self.scores.items():
            lines.append(kind.ljust(18) + "".join(f"{self._cell(scores[n], kind, n):>24}" for n in names))
        if "gain" in self.intervals:
            gains = {name: self.scores["sighted"][name] - self.scores["blind"][name] for name in names}
            cells = [f"{self._cell(gain, 'gain', name):>24}" for name, gain in gains.items()]
            lines.append("sighted - blind".ljust(18) + "".join(cells))
        return "\n".join(lines)

    def _cell(self, value: float, kind: str, name: str) -> str:
        interval = self.intervals.get(kind, {}).get(name)
        return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def evaluate(
    model: Any,
    processor: Any,
    dataset: Sequence[Mapping[str, Any]],
    *,
    task: str = "captioning",
    kinds: Sequence[str] = KINDS,
    image_column: str = "image",
    prompt_column: str = "prompt",
    references_column: str | None = None,
    prompt: str = "",
    batch_size: int = 16,
    output_dir: str | Path | None = None,
    postprocess: Callable[[str], str] = str.strip,
    seed: int = 0,
    num_resamples: int = 1000,
    **generate_kwargs: Any,
) -> Evaluation:
    """
    Predicts a split under each condition and scores it.

    Args:
        model: a `FrozenPrefixForConditionalGeneration`; it is in eval mode meanwhile.
        processor: its `FrozenPrefixProcessor`.
        dataset: rows with an image (or a list of images; None for none), maybe a prompt, and references.
        task (`str`): "captioning" (BLEU, ROUGE-L, CIDEr-D) or "vqa" (exact match, token F1, and
            VQA accuracy where every question has more than three answers).
        kinds: which of `KINDS`; "sighted" must be among them.
        image_column, prompt_column, references_column:
            Names of the columns. References: one string, a list of them, or VQA's list of `{"answer": …}`; by default the
            first of `captions`, `answers`, `references`, `answer`, `text`, `caption` that is there.
        prompt (`str`): for rows without a prompt column.
        batch_size (`int`): rows of a batch; batches hold prompts of similar length.
        output_dir (`str`, *optional*):
            Folder for `predictions.jsonl` (a line per prediction, as soon as it is made; a second run with the same model,
            rows and settings takes what is there) and `results.json`.
        postprocess: makes of the generated text what is scored.
        seed (`int`): of the shuffle, the random connector and the bootstrap.
        num_resamples (`int`): bootstrap resamples (Efron 1979); 0 for no intervals.
        generate_kwargs: as for `generate`; `do_sample=False` by default.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: for an unknown task or kind, rows without references, or fewer than two different pictures for "blind".
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown: choose one of {sorted(TASKS)}.")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds hold {sorted(unknown)}: the choices are {list(KINDS)}.")
    if "sighted" not in kinds:
        raise ValueError(f"kinds={list(kinds)} lack 'sighted', beside which the others stand.")
    generate_kwargs = {"do_sample": False, **generate_kwargs}
    rows = _read(dataset, image_column, prompt_column, references_column, prompt)
    settings = {"prompt": prompt, "seed": seed, "generate": generate_kwargs}
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = _PredictionLog(None if folder is None else folder / "predictions.jsonl", _run_of(model, rows, settings))
    blind = _others_pictures(rows, seed) if "blind" in kinds else None
    predictions: dict[str, list[str]] = {}
    known: dict[tuple[str, ...], str] = {}  # what the model said of the same pictures and prompt
    for kind in kinds:
        if kind == "random_connector":
            with random_connectors(model, seed):
                predictions[kind] = _predict(model, processor, rows, kind, log, {}, batch_size, postprocess, generate_kwargs)
            continue
        seen = [row if kind == "sighted" else {**row, "images": [], "keys": []} for row in rows]
        if kind == "blind":
            seen = [{**row, "images": rows[j]["images"], "keys": rows[j]["keys"]} for row, j in zip(rows, blind, strict=True)]
        memory = known if not generate_kwargs["do_sample"] else {}
        predictions[kind] = _predict(model, processor, seen, kind, log, memory, batch_size, postprocess, generate_kwargs)

    references = [row["references"] for row in rows]
    over_all, by_row = TASKS[task]
    scores: dict[str, dict[str, float]] = {}
    single: dict[str, dict[str, list[float]]] = {}
    for kind, said in predictions.items():
        single[kind] = by_row(said, references)
        means = {name: statistics.fmean(values) for name, values in single[kind].items()}
        scores[kind] = means if over_all is None else over_all(said, references)
    if "blind" in single:
        single["gain"] = {
            name: [a - b for a, b in zip(values, single["blind"][name], strict=True)]
            for name, values in single["sighted"].items()
        }
    intervals = bootstrap(single, num_resamples, seed) if num_resamples else {}
    result = Evaluation(task, scores, intervals, predictions, references, [row["prompt"] for row in rows], settings)
    if folder is not None:
        (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    return result


def over_seeds(results: Sequence[Evaluation], seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Evaluations of several trainings as one results file: `{"seeds": [{"seed", condition: scores}, …], "mean", "std"}`.
    Standard deviations are the sample's (n - 1)."""
    runs = [{"seed": s, **one.scores} for s, one in zip(seeds or range(len(results)), results, strict=True)]
    found: dict[str, Any] = {"task": results[0].task, "rows": len(results[0].references), "seeds": runs}
    for title, count in (("mean", statistics.fmean), ("std", lambda v: statistics.stdev(v) if len(v) > 1 else 0.0)):
        found[title] = {
            kind: {name: count([one.scores[kind][name] for one in results]) for name in scores}
            for kind, scores in results[0].scores.items()
        }
    return found


def table_over_seeds(found: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """
    One line per condition: mean, and the deviation where there are several seeds.

    Args:
        found: of [`over_seeds`].
        names: which of the metrics; all by default.
    """
    mean, std, count = found["mean"], found["std"], len(found["seeds"])
    names = list(next(iter(mean.values()))) if names is None else names
    lines = [" " * 18 + "".join(f"{name:>18}" for name in names)]
    for kind, values in mean.items():
        cells = [f"{values[name]:.3f}" + (f" ± {std[kind][name]:.3f}" if count > 1 else "") for name in names]
        lines.append(kind.ljust(18) + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def bootstrap(
    single: Mapping[str, Mapping[str, Sequence[float]]], num_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, tuple[float, float]]]:
    """Percentile intervals of means over rows, each resample the same rows for all (Efron and Tibshirani 1993, chapter 13)."""
    count = len(next(iter(next(iter(single.values())).values())))
    draws = torch.randint(count, (num_resamples, count), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, metrics in single.items():
        intervals[kind] = {}
        for name, values in metrics.items():
            means = torch.tensor(values, dtype=torch.float64)[draws].mean(1)
            low, high = torch.quantile(means, ends).tolist()
            intervals[kind][name] = (low, high)
    return intervals


@contextmanager
def random_connectors(model: Any, seed: int = 0) -> Iterator[None]:
    """The model with connectors (and gated blocks) as before any training, drawn from `seed`; put back afterwards."""
    modules = [module for module in model.modules() if isinstance(module, CONNECTING)]
    kept = [{name: tensor.detach().clone() for name, tensor in module.state_dict().items()} for module in modules]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in modules:
            for parameter in module.parameters():
                # transformers marks what it loaded, and draws nothing anew that bears the mark.
                parameter.__dict__.pop("_is_hf_initialized", None)
            model._reset_connector(module)
    try:
        yield
    finally:
        for module, state in zip(modules, kept, strict=True):
            module.load_state_dict(state)


class EvaluationCallback(TrainerCallback):
    """
    Generates over a split whenever Trainer evaluates, and logs its scores beside the blind ones.

        trainer.add_callback(EvaluationCallback(trainer, processor, dataset["validation"], task="captioning"))

    The scores join those of `Trainer.evaluate` as `eval_cider`, `eval_blind_cider` and so on, so that
    `metric_for_best_model="cider"` works. `callback.results` holds the last [`Evaluation`].

    Args:
        trainer: the Trainer whose model is evaluated.
        processor, dataset, options: as for [`evaluate`]; `kinds` is ("sighted", "blind") by default.
    """

    def __init__(self, trainer: Trainer, processor: Any, dataset: Any, **options: Any):
        self.trainer, self.processor, self.dataset = trainer, processor, dataset
        self.options = {"kinds": ("sighted", "blind"), "num_resamples": 0, **options}
        self.results: Evaluation | None = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Scores the split; the numbers go into `metrics`, by which Trainer chooses the best checkpoint, and into the log."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.results = evaluate(model, self.processor, self.dataset, **self.options)
        found = {
            f"eval_{'' if kind == 'sighted' else f'{kind}_'}{name}": value
            for kind, scores in self.results.scores.items()
            for name, value in scores.items()
        }
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(dict(found))


# ----------------------------------------------------------------------------------------------------------------- rows


def _read(
    dataset: Any, image_column: str, prompt_column: str, references_column: str | None, prompt: str
) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(dataset):
        images = row.get(image_column)
        images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        rows.append(
            {
                "index": index,
                "images": images,
                "keys": [digest_of_image(image, None, {}).hex() for image in images],
                "prompt": row[prompt_column] if row.get(prompt_column) is not None else prompt,
                "references": _references(index, row, references_column),
            }
        )
    if not rows:
        raise ValueError("The dataset has no rows to evaluate.")
    return rows


_REFERENCES = ("captions", "answers", "references", "answer", "text", "caption")


def _references(index: int, row: Mapping[str, Any], column: str | None) -> list[str]:
    names = (column,) if column else _REFERENCES
    found = next((row[name] for name in names if row.get(name)), None)
    if found is None:
        raise ValueError(f"Row {index} has no references in {list(names)} (its columns: {sorted(row)}): name the column.")
    found = [found] if isinstance(found, str) else list(found)
    return [one["answer"] if isinstance(one, Mapping) else str(one) for one in found]


def _others_pictures(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """For each row, a row whose pictures it gets when blind: one cycle through all different pictures, of equal counts."""
    rng, given = random.Random(seed), [0] * len(rows)
    counts: dict[int, dict[tuple[str, ...], int]] = {}
    for index, row in enumerate(rows):
        counts.setdefault(len(row["keys"]), {}).setdefault(tuple(row["keys"]), index)
    for count, first in counts.items():
        if count and len(first) < 2:
            raise ValueError(
                f"All rows with {count} image(s) show the same: to be blind, a row needs another's picture. "
                'Leave "blind" out of `kinds`, or evaluate on more.'
            )
        order = rng.sample(list(first), len(first))
        after = dict(zip(order, order[1:] + order[:1], strict=True))
        for index, row in enumerate(rows):
            if len(row["keys"]) == count:
                given[index] = first[after[tuple(row["keys"])]]
    return given


# ---------------------------------------------------------------------------------------------------------- predictions


def _run_of(model: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Names a run: the same model, rows and settings."""
    digest = hashlib.sha256(repr(sorted(settings.items(), key=str)).encode())
    for row in rows:
        digest.update(repr((row["keys"], row["prompt"])).encode())
    for name, parameter in model.named_parameters():
        value = parameter.detach().reshape(-1)
        # Parents by a few values: they are the same unless somebody changed them, and a connector is small.
        value = value if parameter.requires_grad else value[:: max(1, value.numel() // 64)]
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _PredictionLog:
    """A JSONL file of predictions, a line each; lines of other runs are dropped when it is opened."""

    def __init__(self, path: Path | None, run: str):
        self.path, self.run = path, run
        self.known: dict[tuple[str, int], str] = {}
        if path is None:
            return
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off where the run was killed
                    continue
                if entry.get("run") == run:
                    kept.append(line)
                    self.known[entry["kind"], entry["row"]] = entry["prediction"]
        whole = path.with_name(f"{path.name}.new")
        whole.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        whole.replace(path)

    def add(self, kind: str, row: dict[str, Any], prediction: str) -> None:
        self.known[kind, row["index"]] = prediction
        if self.path is None:
            return
        images = [getattr(image, "filename", None) or key for image, key in zip(row["images"], row["keys"], strict=True)]
        entry = {
            "run": self.run,
            "kind": kind,
            "row": row["index"],
            "images": images,
            "prompt": row["prompt"],
            "prediction": prediction,
            "references": row["references"],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _predict(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    kind: str,
    log: _PredictionLog,
    memory: dict[tuple[str, ...], str],
    batch_size: int,
    postprocess: Callable[[str], str],
    generate_kwargs: dict[str, Any],
) -> list[str]:
    """What the model says of each row, in order. `memory` spares what it said of the same pictures and prompt before."""
    todo: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["prompt"], *row["keys"])
        if (kind, row["index"]) in log.known:
            memory.setdefault(key, log.known[kind, row["index"]])
        elif key in memory:
            log.add(kind, row, memory[key])
        else:
            todo.setdefault(key, []).append(row)
    # Long prompts first: what does not fit into memory fails at once, and each batch has little padding.
    length = {key: len(processor.tokenizer(key[0])["input_ids"]) for key in todo}
    order = sorted(todo, key=lambda key: (-length[key], len(key)))
    bar = tqdm(total=len(rows), initial=len(rows) - sum(map(len, todo.values())), desc=kind, disable=not todo)
    for start in range(0, len(order), batch_size):
        keys = order[start : start + batch_size]
        batch = [todo[key][0] for key in keys]
        for key, text in zip(keys, _generate(model, processor, batch, generate_kwargs), strict=True):
            memory[key] = postprocess(text)
            for row in todo[key]:
                log.add(kind, row, memory[key])
                bar.update()
    bar.close()
    return [log.known[kind, row["index"]] for row in rows]


@torch.no_grad()
def _generate(model: Any, processor: Any, batch: list[dict[str, Any]], generate_kwargs: dict[str, Any]) -> list[str]:
    texts = [_with_placeholders(processor, row) for row in batch]
    images = [_opened(row["images"]) for row in batch]
    given = {"images": images} if any(images) else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **given).to(model.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        ids = model.generate(**inputs, **{"pad_token_id": processor.tokenizer.pad_token_id, **generate_kwargs})
    finally:
        for module, training in modes.items():
            module.training = training
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return processor.batch_decode(ids[:, start:], skip_special_tokens=True)


def _with_placeholders(processor: Any, row: dict[str, Any]) -> str:
    if not row["images"]:
        text = row["prompt"].replace(processor.image_token, "")
        # A model that reads nothing can't go on: what starts a text stands for it.
        return text or processor.tokenizer.bos_token or processor.tokenizer.eos_token or " "
    return processor.place_images(row["prompt"], len(row["images"]))


def _opened(images: list[Any]) -> list[Any]:
    return [{key: value for key, value in one.items() if value} if isinstance(one, Mapping) else one for one in images]


__all__ = [
    "KINDS",
    "TASKS",
    "Evaluation",
    "EvaluationCallback",
    "bootstrap",
    "evaluate",
    "over_seeds",
    "random_connectors",
    "table_over_seeds",
]
