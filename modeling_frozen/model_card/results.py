"""What a model card tells of training and scores: hyperparameters, losses, and each score beside its blind baseline.

Facts come in many forms (a Trainer, its arguments, a results file of the examples, a dataset or its name), and leave
as text or as the Hub's own eval results.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import modelcard


_MAX_LOG_ROWS = 20

# Conditions that a results file of the examples holds beside the scores themselves, in the order of the table.
_CONDITIONS = {
    "sighted": "this model",
    "blind": "blind ({medium} replaced)",
    "random_connector": "random connector",
    "language_model": "language model alone",
}


def hub_id(name: str) -> str | None:
    """`name` if it can be an id on the Hub; a folder's absolute path can't."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if os.path.isdir(name) else name


def base_name(path: str) -> str:
    """The last part of a path of any system, or of an id."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_path(value: Any) -> Any:
    """Paths of this machine mean nothing elsewhere, and may tell who sat at it."""
    if isinstance(value, str | os.PathLike) and (os.path.isabs(value) or re.match(r"[A-Za-z]:[\\/]", str(value))):
        return base_name(str(value))
    return value


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("\n", " ") for cell in line) + " |" for line in lines)


def _number(value: Any) -> float | None:
    """A score as a plain finite number; None for what is none. A list (one score per seed) gives its mean."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, list | tuple):
        numbers = [number for number in map(_number, value) if number is not None]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(value) else None
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return round(value, 6) if abs(value) < float("inf") else None  # NaN compares false too


def _spread(value: Any) -> float | None:
    if isinstance(value, Mapping):
        return _number(value.get("std"))
    if isinstance(value, list | tuple) and len(value) > 1:
        mean = _number(value)
        return None if mean is None else (sum((float(x) - mean) ** 2 for x in value) / (len(value) - 1)) ** 0.5
    return None


def _shown(value: Any) -> str:
    number, spread = _number(value), _spread(value)
    if number is None:
        return "–"
    return f"{number:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def over_seeds(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Runs that stand one by one under `"seeds"` turned into one list per score."""
    runs = metrics.get("seeds")
    if not isinstance(runs, list) or not all(isinstance(run, Mapping) for run in runs):
        return dict(metrics)
    merged: dict[str, Any] = {key: value for key, value in metrics.items() if key != "seeds"}
    merged["seeds"] = ", ".join(str(run.get("seed", index)) for index, run in enumerate(runs))
    for condition in dict.fromkeys(key for run in runs for key, value in run.items() if isinstance(value, Mapping)):
        names = dict.fromkeys(name for run in runs for name in run.get(condition, {}))
        merged[condition] = {name: [run.get(condition, {}).get(name) for run in runs] for name in names}
    return merged


def _conditions(metrics: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """{condition: {metric: score}}, known conditions first; bare scores are those of the model as it is."""
    metrics = metrics or {}
    sighted = metrics.get("sighted", {key: value for key, value in metrics.items() if key not in _CONDITIONS})
    sighted = {name: value for name, value in sighted.items() if _number(value) is not None}
    others = {
        key: {name: value[name] for name in sighted if _number(value.get(name)) is not None}
        for key, value in metrics.items()
        if isinstance(value, Mapping) and key not in ("sighted", "dataset", *sighted)
    }
    others = {key: value for key, value in others.items() if value}
    order = [key for key in _CONDITIONS if key in others]
    return {"sighted": sighted} | {key: others[key] for key in [*order, *(key for key in others if key not in order)]}


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """{"id", "name", "split", "config", "revision", "rows", "description"}, of those that are known."""
    if dataset is None:
        return {}
    if isinstance(dataset, str | os.PathLike):
        text = str(dataset)
        is_path = os.path.exists(text) or without_path(text) != text
        repo_id = text if "/" in text and not is_path and hub_id(text) else None
        return {"id": repo_id, "name": base_name(text) if is_path else text}
    if isinstance(dataset, Mapping):
        facts = {key: without_path(value) for key, value in dataset.items()}
        facts.setdefault("name", facts.get("id"))
        return facts
    facts = {}
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)  # of `datasets`
    if name and name not in ("csv", "json", "pandas", "parquet", "text", "imagefolder", "generator", "arrow"):
        facts |= {"name": name, "split": str(dataset.split) if dataset.split else None}
    try:
        facts["rows"] = len(dataset)
    except TypeError:
        pass  # streamed
    return facts


def _dataset_line(label: str, facts: Mapping[str, Any]) -> str | None:
    if not facts.get("name") and not facts.get("rows"):
        return None
    name = facts.get("name") or "unnamed"
    line = f"[{name}](https://huggingface.co/datasets/{facts['id']})" if facts.get("id") else str(name)
    line += "".join(f", {key} `{facts[key]}`" for key in ("config", "split", "revision") if facts.get(key))
    line += f", {facts['rows']:,} rows" if isinstance(facts.get("rows"), int) else ""
    line += f": {facts['description']}" if facts.get("description") else ""
    return f"- {label}: {line}"


def _condition(key: str, medium: str) -> str:
    return _CONDITIONS.get(key, key).format(medium=medium)


def eval_results(
    metrics: Mapping[str, Any] | None, dataset: Mapping[str, Any], task_type: str, task_name: str, medium: str = "image"
) -> list[EvalResult]:
    """One entry per score and condition: a score stands nowhere without its blind baseline, where that is known."""
    conditions = _conditions(metrics)
    title = str(dataset.get("name") or "unnamed dataset")
    results = []
    for name in conditions["sighted"]:
        for condition in (key for key in conditions if name in conditions[key]):
            value = conditions[condition][name]
            number, spread = _number(value), _spread(value)
            label = "" if condition == "sighted" else f", {_condition(condition, medium)}"
            results.append(
                EvalResult(
                    task_type=task_type,
                    task_name=task_name,
                    dataset_type=str(dataset.get("id") or re.sub(r"[^\w.-]+", "-", title).strip("-").lower()),
                    dataset_name=title,
                    dataset_config=dataset.get("config"),
                    dataset_split=dataset.get("split"),
                    dataset_revision=dataset.get("revision"),
                    metric_type=name.lower().replace(" ", "_"),
                    metric_name=f"{name}{label}",
                    metric_value=number if spread is None else f"{number:.6g} ± {spread:.2g}",
                    metric_args={"condition": condition},
                )
            )
    return results


def evaluation_text(metrics: Mapping[str, Any] | None, dataset: Mapping[str, Any], medium: str = "image") -> str:
    conditions = _conditions(metrics)
    if not conditions["sighted"]:
        return (
            "No scores were recorded. When you measure some, put the blind baseline beside each: the same questions "
            f"with the {medium} replaced."
        )
    # Those that belong beside every score show that they lack; others stand where they were measured.
    known = [key for key in _CONDITIONS if key in conditions or key in ("blind", "random_connector")]
    columns = list(dict.fromkeys([*known, *conditions]))
    rows = [[name, *(_shown(conditions.get(key, {}).get(name)) for key in columns)] for name in conditions["sighted"]]
    lines = [_dataset_line("measured on", dataset)]
    if metrics and "sighted" in metrics:
        plain = {key: value for key, value in metrics.items() if key != "dataset" and isinstance(value, str | int | float)}
        lines += [f"- {key.replace('_', ' ')}: {without_path(value)}" for key, value in plain.items()]
    paragraphs = [
        "\n".join(line for line in lines if line),
        _table(["metric", *(_condition(key, medium).replace("_", " ") for key in columns)], rows),
        f"Blind is the same model when each {medium} is replaced: what it guesses from the words alone. Only what lies "
        f"above it comes from the {medium}. A random connector shows what training added.",
    ]
    if not conditions.get("blind"):
        paragraphs.append("The blind baseline was not measured, so nobody can tell how much of this was seen.")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _hyperparameters(training: Any) -> dict[str, Any]:
    if isinstance(training, Mapping):
        return dict(training)
    args = getattr(training, "args", training)
    values = modelcard.extract_hyperparameters_from_trainer(SimpleNamespace(args=args))
    values["weight_decay"] = args.weight_decay
    if args.bf16:
        values["mixed_precision_training"] = "bf16"
    return values


def _log_table(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss and scores over the steps; long histories are thinned evenly, first and last row kept."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        values = {
            {"loss": "training loss", "eval_loss": "validation loss"}.get(key, key.removeprefix("eval_")): value
            for key, value in entry.items()
            if (key in ("loss", "epoch") or key.startswith("eval_"))
            and not re.search(r"_(runtime|per_second)$|model_preparation_time", key)
        }
        if set(values) - {"epoch"}:
            rows.setdefault(entry.get("step", 0), {}).update(values)
    if not rows:
        return None
    columns = list(dict.fromkeys(["epoch", *(key for row in rows.values() for key in row)]))
    steps = sorted(rows)
    if len(steps) > _MAX_LOG_ROWS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (_MAX_LOG_ROWS - 1))] for i in range(_MAX_LOG_ROWS)]
    return _table(["step", *columns], [[step, *(_shown(rows[step].get(key)) for key in columns)] for step in steps])


def training_text(training: Any, dataset: Mapping[str, Any]) -> str:
    parts = []
    trainer = training if hasattr(training, "state") and hasattr(training, "args") else None
    rows = dataset_facts(getattr(trainer, "train_dataset", None)) if trainer else {}
    evaluated = getattr(trainer, "eval_dataset", None)
    evaluated = {} if isinstance(evaluated, Mapping) else dataset_facts(evaluated)
    lines = [_dataset_line("data", {**rows, **dataset}), _dataset_line("evaluated during training on", evaluated)]
    if any(lines):
        parts.append("\n".join(line for line in lines if line))
    if training is not None:
        rows_of = (f"- {key}: {without_path(value)}".replace("\n", " ") for key, value in _hyperparameters(training).items())
        parts.append("### Hyperparameters\n\n" + "\n".join(rows_of))
    if trainer is not None and (table := _log_table(trainer.state.log_history)):
        parts.append(f"### Training results\n\n{table}")
    return "\n\n".join(parts) or "How it was trained was not recorded."


__all__ = [
    "base_name", "dataset_facts", "eval_results", "evaluation_text", "hub_id", "over_seeds",
    "training_text", "without_path",
]  # fmt: skip
