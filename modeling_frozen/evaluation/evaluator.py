"""Evaluation: beside every score, from the same run, those of the same model without its images, videos or audio.

A language model guesses much from the words alone: Frozen answers 26.2 % of VQAv2 blind, and 29.5 % with the images
(Tsimpoukelli et al. 2021, arXiv 2106.13884, table 1). So each split is predicted under four conditions:

- *sighted*: as it is;
- *blind*: each row with the image of another (no row keeps its own, nor another copy of it);
- *random_connector*: own images, through a connector that never trained;
- *language_model*: the words of the prompt alone.

What is said of images holds for videos and audio too, where the model takes them.

Predictions go to a JSONL file as they are made, so that a run that was killed goes on where it was.
"""

import functools
import hashlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..connectors import in_eval_mode
from ..data.collator import OTHERS, clean_messages, open_media, others_of, place_in_turns, place_media, plain_text
from ..data.columns import images_of, no_image_column, unread_image
from ..data.feature_store import StoredImage
from ..data.image_reading import digest_of_image, digest_of_media
from ..data.processes import Processes, refuse_parts
from ..freezing import CONNECTING
from ..metrics.scores import caption_metrics, caption_scores, exact_match, token_f1, vqa_scores
from ..weights import replaced, root_gathered, weights_digest


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
    What [`evaluate`] returns.

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
    image_column: str | None = None,
    prompt_column: str | None = None,
    references_column: str | None = None,
    prompt: str = "",
    batch_size: int = 16,
    output_dir: str | Path | None = None,
    postprocess: Callable[[str], str] = str.strip,
    seed: int = 0,
    num_resamples: int = 1000,
    distributed: bool = False,
    **generate_kwargs: Any,
) -> Evaluation:
    """
    Predicts a split under each condition and scores it.

    Args:
        model: a `FrozenPrefixForConditionalGeneration`; it is in eval mode meanwhile.
        processor: its `FrozenPrefixProcessor`.
        dataset: rows with an image (or a list of images; None for a row of text alone), a video or audio (columns as the
            collator reads them), maybe a prompt, and references. Rows of `messages` are prompted with what stands before
            their last assistant turn, which is the reference. For rows of `cache_vision_features` no tower is run; of an
            image with several views the one is asked about that is drawn when the row is read.
        task (`str`): "captioning" (BLEU, ROUGE-L, CIDEr-D) or "vqa" (exact match, token F1, and
            VQA accuracy where every question has more than three answers).
        kinds: which of `KINDS`; "sighted" must be among them.
        image_column, prompt_column, references_column:
            Names of the columns, by default `image`, else `images`; `prompt`; and of references the first of `captions`,
            `answers`, `references`, `answer`, `completion`, `text`, `caption` that holds something: a string or number, a list
            of them, or VQA's list of `{"answer": …}`.
        prompt (`str`): for a dataset without a column of prompts.
        batch_size (`int`): rows of a batch; batches hold prompts of similar length.
        output_dir (`str`, *optional*):
            Folder for `predictions.jsonl` (a line per prediction, as soon as it is made) and `results.json`. A second run
            takes what is there, if model, processor, generation config, rows, their order and settings are the same to the
            last value; `batch_size` may differ, so that a run which was out of memory can go on.
        postprocess: makes of the generated text what is scored.
        seed (`int`): of the shuffle, the random connector and the bootstrap.
        num_resamples (`int`): bootstrap resamples (Efron 1979); 0 for no intervals.
        distributed (`bool`): whether all processes of torch.distributed call this, with the same arguments. They share the
            batches, unless the model itself is sharded over them, have the same result, and the first one writes.
        generate_kwargs: as for `generate`; `do_sample=False` unless a `generation_config` is among them.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: for an unknown task or kind; rows without references, without the image column or with another number of
            images than of placeholders; no image in any row; fewer than two different images for "blind"; several answers
            to a row (`num_return_sequences`).
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown: choose one of {sorted(TASKS)}. [errors.md#choices]")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds hold {sorted(unknown)}: the choices are {list(KINDS)}. [errors.md#choices]")
    if not distributed:
        refuse_parts(model, "call `evaluate(…, distributed=True)` on all processes, or ")
    if "sighted" not in kinds:
        raise ValueError(f"kinds={list(kinds)} lack 'sighted', beside which the others stand. [errors.md#evaluation]")
    if "generation_config" not in generate_kwargs:
        generate_kwargs = {"do_sample": False, **generate_kwargs}
    used = generate_kwargs.get("generation_config") or model.generation_config
    if (several := generate_kwargs.get("num_return_sequences", used.num_return_sequences) or 1) != 1:
        raise ValueError(
            f"num_return_sequences={several}: one answer to each row is scored, so leave it at 1. [errors.md#range]"
        )
    sampled = bool(generate_kwargs.get("do_sample", used.do_sample))
    rows = _read(processor, dataset, image_column, prompt_column, references_column, prompt)
    settings = {"prompt": prompt, "seed": seed, "generate": generate_kwargs}
    folder, processes = None if output_dir is None else Path(output_dir), Processes(alone=not distributed)
    run, path = "", None
    if folder is not None:
        run = _run_of(model, processor, rows, settings)
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "predictions.jsonl"
    log = _PredictionLog(path, run, rows, postprocess)
    log.outputs = processes.gather(log.outputs)[0]
    predict = functools.partial(_predict, model, processor, processes, log, batch_size, generate_kwargs)
    others = _rows_of_others(rows, seed) if "blind" in kinds else list(range(len(rows)))
    predictions: dict[str, list[str]] = {}
    known: dict[tuple[str, ...], str] = {}  # the output for the same images and prompt
    with root_gathered(model):
        for kind in kinds:
            if kind == "random_connector":
                with random_connectors(model, seed):
                    predictions[kind] = predict(kind, rows, {})
                continue
            seen = rows
            if kind == "blind":
                pairs = ((row, rows[other]) for row, other in zip(rows, others, strict=True))
                seen = [{**row, "media": other["media"], "keys": other["keys"]} for row, other in pairs]
            if kind == "language_model":
                seen = [{**row, "media": {}, "keys": []} for row in rows]
            predictions[kind] = predict(kind, seen, {} if sampled else known)

    references = [row["references"] for row in rows]
    over_all, by_row = TASKS[task]
    scores: dict[str, dict[str, float]] = {}
    single: dict[str, dict[str, list[float]]] = {}
    for kind, texts in predictions.items():
        single[kind] = by_row(texts, references)
        means = {name: statistics.fmean(values) for name, values in single[kind].items()}
        scores[kind] = means if over_all is None else over_all(texts, references)
    if "blind" in single:
        single["gain"] = _gains(single["sighted"], single["blind"])
    intervals = bootstrap(single, num_resamples, seed) if num_resamples else {}
    result = Evaluation(task, scores, intervals, predictions, references, [row["prompt"] for row in rows], settings)
    if folder is not None and processes.rank == 0:
        (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    return result


def over_seeds(
    results: Sequence[Evaluation], seeds: Sequence[int] | None = None, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """
    Evaluations of several trainings as one results file: `{"seeds": [{"seed", condition: scores}, …], "mean", "std", "gain"}`.
    Standard deviations are the sample's (n - 1). `gain` is sighted minus blind, where both were scored: its mean and deviation
    over the trainings, and under `"interval"` its 95 % bootstrap interval over rows, of each row's mean over the trainings.
    """
    runs = [{"seed": s, **one.scores} for s, one in zip(seeds or range(len(results)), results, strict=True)]
    summary: dict[str, Any] = {"task": results[0].task, "rows": len(results[0].references), "seeds": runs}
    for title, count in (("mean", statistics.fmean), ("std", lambda v: statistics.stdev(v) if len(v) > 1 else 0.0)):
        summary[title] = {
            kind: {name: count([one.scores[kind][name] for one in results]) for name in scores}
            for kind, scores in results[0].scores.items()
        }
    if all({"sighted", "blind"} <= one.predictions.keys() for one in results):
        of_runs = [
            {name: value - one.scores["blind"][name] for name, value in one.scores["sighted"].items()} for one in results
        ]
        _, by_row = TASKS[results[0].task]
        of_rows = [
            _gains(*(by_row(one.predictions[kind], one.references) for kind in ("sighted", "blind"))) for one in results
        ]
        means = {
            name: [statistics.fmean(row) for row in zip(*(one[name] for one in of_rows), strict=True)] for name in of_rows[0]
        }
        summary["gain"] = {
            "mean": {name: statistics.fmean(one[name] for one in of_runs) for name in of_runs[0]},
            "std": {name: statistics.stdev(one[name] for one in of_runs) if len(of_runs) > 1 else 0.0 for name in of_runs[0]},
            "interval": bootstrap({"gain": means}, num_resamples, seed)["gain"],
        }
    return summary


def _gains(sighted: Mapping[str, Sequence[float]], blind: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Sighted minus blind, row by row."""
    return {name: [a - b for a, b in zip(values, blind[name], strict=True)] for name, values in sighted.items()}


def table_over_seeds(summary: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """
    One line per condition: mean, and the deviation where there are several seeds; and of sighted minus blind the interval too.

    Args:
        summary: of [`over_seeds`].
        names: which of the metrics; all by default.
    """
    mean, std, count = summary["mean"], summary["std"], len(summary["seeds"])
    names = list(next(iter(mean.values()))) if names is None else names
    lines = [" " * 18 + "".join(f"{name:>18}" for name in names)]
    for kind, values in mean.items():
        cells = [f"{values[name]:.3f}" + (f" ± {std[kind][name]:.3f}" if count > 1 else "") for name in names]
        lines.append(kind.ljust(18) + "".join(f"{cell:>18}" for cell in cells))
    if "gain" in summary:
        gain, interval = summary["gain"], summary["gain"]["interval"]
        cells = [f"{gain['mean'][name]:.3f}" + (f" ± {gain['std'][name]:.3f}" if count > 1 else "") for name in names]
        lines.append("sighted - blind".ljust(18) + "".join(f"{cell:>18}" for cell in cells))
        ends = [f"[{interval[name][0]:.3f}, {interval[name][1]:.3f}]" if name in interval else "" for name in names]
        lines.append("  95 % over rows".ljust(18) + "".join(f"{cell:>18}" for cell in ends))
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

    def draw() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in modules:
                for parameter in module.parameters():
                    # transformers marks what it loaded, and draws nothing anew that bears the mark.
                    parameter.__dict__.pop("_is_hf_initialized", None)
                model._reset_connector(module)

    with replaced(model, modules, draw):
        yield


class EvaluationCallback(TrainerCallback):
    """
    Generates over a split whenever Trainer evaluates, and logs its scores beside the blind ones.

        trainer.add_callback(EvaluationCallback(trainer, processor, dataset["validation"], task="captioning"))

    The scores join those of `Trainer.evaluate` as `eval_cider`, `eval_blind_cider` and so on, so that
    `metric_for_best_model="cider"` works. `callback.results` holds the last [`Evaluation`]. Several processes share the work.

    Args:
        trainer: the Trainer whose model is evaluated.
        processor, dataset, options: as for [`evaluate`]; `kinds` is ("sighted", "blind") by default.
    """

    def __init__(self, trainer: Trainer, processor: Any, dataset: Any, **options: Any):
        self.trainer, self.processor, self.dataset = trainer, processor, dataset
        self.options = {"kinds": ("sighted", "blind"), "num_resamples": 0, "distributed": True, **options}
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
        scores_by_name = {
            f"eval_{'' if kind == 'sighted' else f'{kind}_'}{name}": value
            for kind, scores in self.results.scores.items()
            for name, value in scores.items()
        }
        if metrics is not None:
            metrics.update(scores_by_name)
        self.trainer.log(dict(scores_by_name))


# ----------------------------------------------------------------------------------------------------------------- rows


def _read(
    processor: Any,
    dataset: Any,
    image_column: str | None,
    prompt_column: str | None,
    references_column: str | None,
    prompt: str,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    digests: dict[str, bytes] = {}
    for index, row in enumerate(dataset):
        if prompt_column is not None and prompt_column not in row:
            raise ValueError(
                f"Row {index} has no prompt column {prompt_column!r} (its columns: {sorted(row)}): name another."
                " [errors.md#evaluation]"
            )
        images, said, others = images_of(row, image_column), None, others_of(processor, row)
        if row.get("messages") is not None:
            unread = images is None and not others and (image_column is not None or unread_image(row) is not None)
            text, said, own = _chat(index, row["messages"], {"image": images or [], **others}, processor)
            media = own if any(own.values()) or not unread else None
        else:
            text = row.get(prompt_column or "prompt")
            text = prompt if text is None else text
            media = None if images is None and not others else {"image": images or [], **others}
        if media is None:
            raise ValueError(
                f"Row {index} has {no_image_column(row, image_column)}: name it; a row of text alone has None in it."
                " [errors.md#evaluation]"
            )
        media = {modality: own for modality, own in media.items() if own}
        for modality, token in processor.tokens.items():
            placeholders, count = processor.count_image_tokens(text, modality), len(media.get(modality, ()))
            if placeholders and placeholders != count:
                nouns = "audio inputs" if modality == "audio" else f"{modality}s"
                raise ValueError(
                    f"Row {index} has {count} {nouns}, and its prompt {text!r:.80} holds {placeholders} {token}: write one "
                    f"per {'input' if modality == 'audio' else modality}, or none. [errors.md#evaluation]"
                )
        keys = [
            _key(processor, modality, one, digests, f"{modality} of row {index}")
            for modality, own in media.items()
            for one in own
        ]
        of = {**row, "answer": said} if said is not None and row.get("answer") is None else row
        references = _references(index, of, references_column)
        rows.append({"index": index, "media": media, "keys": keys, "prompt": text, "references": references})
    if not rows:
        raise ValueError("The dataset has no rows to evaluate. [errors.md#evaluation]")
    if not any(row["media"] for row in rows):
        takes = " or ".join({"image": "an image", "video": "a video", "audio": "audio"}[one] for one in processor.tokens)
        column = image_column or "image"
        raise ValueError(
            f"No row has {takes} (in {column!r} …): what is scored as sighted would see nothing. [errors.md#evaluation]"
        )
    return rows


def _key(processor: Any, modality: str, one: Any, known: dict[str, bytes], name: str) -> str:
    """What is the same for the same input; of an image in a store, for the same features of it."""
    if isinstance(one, StoredImage):
        return "-".join([one.digest.hex(), str(one.view), *(Path(each.store).name for each in (one, *one.further))])
    if modality == "image":
        return digest_of_image(one, known=known, name=name).hex()
    return digest_of_media(one, lambda media: open_media(processor, modality, media, name), known).hex()


def _chat(index: int, messages: Any, columns: dict[str, list[Any]], processor: Any) -> tuple[str, str, dict[str, list[Any]]]:
    """The prompt of a chat, rendered up to its last assistant turn; what that says; and the media before it: those of the
    turns, else of the columns."""
    turns, in_turns = clean_messages(messages)
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(
            f"Row {index}: its messages have no assistant turn, which would be the reference. [errors.md#evaluation]"
        )
    media = {modality: in_turns[modality] or columns.get(modality, []) for modality in in_turns}
    turns = [{**turn, "content": turn["content"]} for turn in turns]
    for modality in processor.tokens:
        turns = place_in_turns(processor, turns, len(media[modality]), modality)
    return processor.chat_prompt(turns[:last]), plain_text(turns[last]["content"]), media


_REFERENCES = ("captions", "answers", "references", "answer", "completion", "text", "caption")


def _references(index: int, row: Mapping[str, Any], column: str | None) -> list[str]:
    names = (column,) if column else _REFERENCES
    value = next((row[name] for name in names if row.get(name) is not None and str(row[name]) not in ("", "[]")), None)
    if value is None:
        raise ValueError(
            f"Row {index} has no references in {list(names)} (its columns: {sorted(row)}): name the column."
            " [errors.md#evaluation]"
        )
    if isinstance(value, Mapping):  # `datasets` turns a list of tables into a table of lists
        value = value.get("answer", value.get("text"))
    value = value.tolist() if hasattr(value, "tolist") else value
    several = list(value) if isinstance(value, list | tuple) else [value]
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in several]
    if not all(isinstance(one, str | int | float) for one in texts):
        raise ValueError(
            f"Row {index}: references must be strings or numbers, a list of them or of {{'answer': …}}, got {several!r:.150}."
            " [errors.md#evaluation]"
        )
    return [str(one) for one in texts]


def _rows_of_others(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """For each row, a row whose media it gets when blind: one cycle through all that are different, of equal counts."""
    rng, others = random.Random(seed), [0] * len(rows)
    counts: dict[tuple[tuple[str, int], ...], dict[tuple[str, ...], int]] = {}
    for index, row in enumerate(rows):
        counts.setdefault(_counts(row), {}).setdefault(tuple(row["keys"]), index)
    for count, first in counts.items():
        if count and len(first) < 2:
            said = " and ".join(f"{number} {'audio input' if one == 'audio' else one}(s)" for one, number in count)
            raise ValueError(
                f"All rows with {said} show the same: to be blind, a row needs another's. "
                'Leave "blind" out of `kinds`, or evaluate on more. [errors.md#evaluation]'
            )
        order = rng.sample(list(first), len(first))
        after = dict(zip(order, order[1:] + order[:1], strict=True))
        for index, row in enumerate(rows):
            if _counts(row) == count:
                others[index] = first[after[tuple(row["keys"])]]
    return others


def _counts(row: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((modality, len(own)) for modality, own in row["media"].items())


# ---------------------------------------------------------------------------------------------------------- predictions


# What a tokenizer's files say of how it was loaded, and of its last call. All else that they hold may change an answer.
_PASSING = {
    "tokenizer.json": ("padding", "truncation"),
    "tokenizer_config.json": (
        "is_local", "local_files_only", "model_specific_special_tokens", "name_or_path", "processor_class",
        "max_length", "pad_to_multiple_of", "pad_token_type_id", "stride", "truncation_strategy",
    ),
}  # fmt: skip


def _run_of(model: Any, processor: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Names a run by all that can change an answer, rounding and what `batch_size` does to it apart."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "saved_parts")}
    parts: list[Any] = [
        weights_digest(model),
        config,
        model.generation_config.to_dict(),
        _adapters(model),
        settings,
    ]
    parts += [[row["keys"], row["prompt"]] for row in rows]
    with tempfile.TemporaryDirectory() as folder:  # a processor is what it saves: tokenizer, templates, sizes, positions
        processor.save_pretrained(folder)
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.suffix != ".py"):
            content: Any = file.read_text(encoding="utf-8", errors="replace")
            if (passing := _PASSING.get(file.name)) is not None:
                content = {key: value for key, value in json.loads(content).items() if key not in passing}
            parts.append([file.name, content])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def _adapters(model: Any) -> list[Any]:
    """Which of PEFT's adapters answer, and how strongly: no weight says that."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [[name, one.active_adapters, one.disable_adapters, getattr(one, "scaling", None)] for name, one in layers]


_FIELDS = {"image": "images", **OTHERS}  # by modality, the processor's argument and the field of a line


class _PredictionLog:
    """A JSONL file of predictions, a line each; lines of other runs are dropped when it is opened."""

    def __init__(self, path: Path | None, run: str, rows: list[dict[str, Any]], postprocess: Callable[[str], str]):
        self.path, self.run, self.postprocess = path, run, postprocess
        self.outputs: dict[tuple[str, int], str] = {}
        if path is None:
            return
        kept = []
        # Bytes, for a killed run may have been cut inside a letter, and lines end at "\n" alone.
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if not isinstance(entry, dict) or entry.get("run") != run or not {"kind", "row", "output"} <= entry.keys():
                continue
            kind, row, output = entry["kind"], entry["row"], entry["output"]
            self.outputs[kind, row] = output
            kept.append({**entry, "prediction": postprocess(output), "references": rows[row]["references"]})
        whole = path.with_name(f"{path.name}.new")
        whole.write_bytes(b"".join(map(_line, kept)))
        whole.replace(path)

    def add(self, kind: str, row: dict[str, Any], output: str) -> None:
        self.outputs[kind, row["index"]] = output
        if self.path is None:
            return
        named = zip(chain(*row["media"].values()), row["keys"], strict=True)
        names = iter([getattr(one, "filename", None) or key for one, key in named])
        media = {_FIELDS[modality]: [next(names) for _ in own] for modality, own in {"image": [], **row["media"]}.items()}
        entry = {
            "run": self.run,
            "kind": kind,
            "row": row["index"],
            **media,
            "prompt": row["prompt"],
            "output": output,
            "prediction": self.postprocess(output),
            "references": row["references"],
        }
        with self.path.open("ab") as file:
            file.write(_line(entry))

    def predictions(self, kind: str, rows: list[dict[str, Any]]) -> list[str]:
        return [self.postprocess(self.outputs[kind, row["index"]]) for row in rows]


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _predict(
    model: Any,
    processor: Any,
    processes: Processes,
    log: _PredictionLog,
    batch_size: int,
    generate_kwargs: dict[str, Any],
    kind: str,
    rows: list[dict[str, Any]],
    memory: dict[tuple[str, ...], str],
) -> list[str]:
    """Predictions of each row, in order. `memory` spares outputs for the same images and prompt as before."""
    todo: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["prompt"], *row["keys"])
        if (kind, row["index"]) in log.outputs:
            memory.setdefault(key, log.outputs[kind, row["index"]])
        elif key in memory:
            log.add(kind, row, memory[key])
        else:
            todo.setdefault(key, []).append(row)
    # Long prompts first: what does not fit into memory fails at once, and each batch has little padding.
    length = {key: len(processor.tokenizer(key[0])["input_ids"]) for key in todo}
    order = sorted(todo, key=lambda key: (-length[key], len(key)))
    # Rows that are generated, and the time left by their mean time: copies cost nothing, and a batch comes at once.
    bar = tqdm(total=len(order), desc=kind, unit="row", smoothing=0, disable=not todo or processes.rank > 0)
    # A batch for each process at a time; all have the same where each holds but a part of the model.
    shares, rank = (1, 0) if _is_sharded(model) else (processes.count, processes.rank)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for start in range(0, len(batches), shares):
        at_once = batches[start : start + shares]
        own = [todo[key][0] for keys in at_once[rank : rank + 1] for key in keys]
        outputs = processes.gather(_generate(model, processor, own, generate_kwargs) if own else [])[:shares]
        for key, output in zip(chain(*at_once), chain(*outputs), strict=True):
            memory[key] = output
            for row in todo[key]:
                log.add(kind, row, output)
        bar.update(sum(map(len, at_once)))
    bar.close()
    return log.predictions(kind, rows)


def _is_sharded(model: Any) -> bool:
    """Whether a process holds but a part of the model, so that all must call it together: FSDP, DeepSpeed, tensor parallel."""
    return any(hasattr(one, "ds_id") or hasattr(one, "full_tensor") for one in model.parameters())


@torch.no_grad()
def _generate(model: Any, processor: Any, batch: list[dict[str, Any]], generate_kwargs: dict[str, Any]) -> list[str]:
    texts = [_with_placeholders(processor, row) for row in batch]
    media = {
        _FIELDS[modality]: [_opened(row["media"].get(modality, [])) for row in batch]
        for modality in _FIELDS
        if any(row["media"].get(modality) for row in batch)
    }
    inputs = processor(text=texts, **media, padding=True, return_tensors="pt").to(model.device)
    with in_eval_mode(model):
        ids = model.generate(**inputs, **{"pad_token_id": processor.tokenizer.pad_token_id, **generate_kwargs})
    ids = getattr(ids, "sequences", ids)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return processor.batch_decode(ids[:, start:], skip_special_tokens=True)


def _with_placeholders(processor: Any, row: dict[str, Any]) -> str:
    if not row["media"]:
        text = row["prompt"]
        for token in processor.tokens.values():
            text = text.replace(token, "")
        # A model that reads nothing can't go on: what starts a text stands for it.
        return text or processor.tokenizer.bos_token or processor.tokenizer.eos_token or " "
    media = dict(row["media"])
    return place_media(processor, row["prompt"], media.pop("image", []), media)


def _opened(media: list[Any]) -> list[Any]:
    held = (
        {key: value for key, value in one.items() if value is not None} if isinstance(one, Mapping) else one for one in media
    )
    return list(held)


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
