"""Arguments of `Trainer` for a connector, by a rule that reads sizes: each number with where it comes from.

The numbers are of three kinds, and each says which: seen in a training of this repository, published by others for frozen
backbones and a connector that trains, or a rule of ours between the two that nobody has measured. A rate depends on the pair
of tower and language model (Bunny's differ twentyfold), so three rates on a few hundred steps are worth more than any table.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Choice:
    value: Any
    why: str


# Parameters of the language model, below which the rate of a new connector is that one.
_RATES = (
    (0.3e9, _Choice(3e-3, "seen here: SmolLM2-135M, an MLP, 480 steps on 762 photos, one seed (docs/real_parents.md)")),
    (1e9, _Choice(1e-3, "published: TinyLLaVA, batches of 256; not tried here at this size")),
    (3.3e9, _Choice(5e-4, "published: Bunny with Phi-2, StableLM2-1.6B and Qwen1.5-1.8B; not tried here")),
    (math.inf, _Choice(1e-3, "published: LLaVA-1.5 at 7 and 13 B, Bunny at 3.8 and 8 B; not tried here")),
)
# The same of connectors that attend to the tower's positions.
_ATTENDING = (
    (
        0.3e9,
        _Choice(5e-4, "seen here: ClipCap's transformer on a 3.4 M story model, 190 steps (python -m benchmarks.clipcap)"),
    ),
    (math.inf, _Choice(1e-4, "published: BLIP-2's second stage, and the upper end of ClipCap's; not tried here")),
)
_TRAINED = _Choice(2e-4, "a rule of ours for a connector that was trained before: a fifth of LLaVA-1.5's rate for a new one")
_STEPS = 480  # of docs/real_parents.md: what another image adds to the loss is 0.23 nats a token at step 50, 0.80 at 480
_PUBLISHED_BATCH, _PUBLISHED_STEPS = 256, 2181  # LLaVA-1.5: 558,128 pairs, one epoch


def recommended_arguments(
    model: Any, dataset: Any, *, given: Mapping[str, Any] | None = None, verbose: bool = True
) -> dict[str, Any]:
    """
    Fields of `TrainingArguments` for training a connector between frozen backbones.

    Args:
        model: a frozen-prefix model. Its language model's parameters, its connector and whether that was trained before
            (it was loaded, not joined) are looked at.
        dataset: the training rows; of a stream, which has no length, `max_steps` is set. Rows with a column of lengths
            ([`add_lengths`] makes it) are put into batches of like length.
        given (`Mapping`, *optional*): fields that you chose yourself. They are left out, and the others follow them
            (`gradient_accumulation_steps` the batch of a device).
        verbose (`bool`): prints every number with its reason.

    Returns:
        `dict`: for `TrainingArguments(output_dir, **recommended_arguments(model, rows))`. No rate where more than the
        connector trains: nobody has published one for that.

    Example:

    ```python
    >>> args = TrainingArguments("eyes", **recommended_arguments(model, rows))
    ```"""
    given = dict(given or {})
    language_model = model.backbones["text"]
    size, rows = language_model.num_parameters(), len(dataset) if hasattr(dataset, "__len__") else None
    choices = {**_rate(model, size), **_length(rows, given), **_schedule(model), **_order(dataset, given)}
    own = {name: value for name, value in given.items() if name in choices}
    if verbose:
        counted = "a stream" if rows is None else f"{rows:,} rows"
        print(f"Arguments for a language model of {size:,} parameters and {counted}:")
        for name, choice in choices.items():
            said = f"{_shown(own[name])} (yours; else {_shown(choice.value)})" if name in own else _shown(choice.value)
            print(f"  {name:<29}{said:<10}  {choice.why}")
    return {name: choice.value for name, choice in choices.items() if name not in own}


def _rate(model: Any, size: int) -> dict[str, _Choice]:
    config = model.config
    if set(config.trainable) != {"connector"}:
        return {}
    if getattr(model, "name_or_path", ""):  # loaded, not joined
        return {"learning_rate": _TRAINED}
    rates = _ATTENDING if config.connector_type in ("transformer", "qformer") else _RATES
    return {"learning_rate": next(choice for below, choice in rates if size < below)}


def _length(rows: int | None, given: Mapping[str, Any]) -> dict[str, _Choice]:
    """How many rows a step has, on each device too, and how many steps there are."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if rows is None or rows >= 100_000:
        batch = _Choice(_PUBLISHED_BATCH, "published: LLaVA-1.5, TinyLLaVA, LiMBeR")
    elif rows >= 10_000:
        batch = _Choice(64, "a rule of ours, between the others")
    else:
        batch = _Choice(32, "a rule of ours for few rows; seen here: 20 captions a step (docs/real_parents.md)")
    per_device = min(batch.value, 32)
    if "gradient_accumulation_steps" in given and "per_device_train_batch_size" not in given:
        per_device = max(1, batch.value // (given["gradient_accumulation_steps"] * processes))
    chosen = given.get("per_device_train_batch_size", per_device)
    accumulated = max(1, round(batch.value / (chosen * processes)))
    whole = f"with the accumulation {batch.value} rows a step on {processes} process(es); {batch.why}"
    choices = {
        "per_device_train_batch_size": _Choice(per_device, whole),
        "gradient_accumulation_steps": _Choice(accumulated, "raise it as you lower the batch, where memory is short"),
    }
    real = chosen * processes * given.get("gradient_accumulation_steps", accumulated)
    if rows is None:
        steps = _Choice(_PUBLISHED_STEPS, "published: LLaVA-1.5, 558,128 pairs in batches of 256 once")
        return {**choices, "max_steps": steps}
    if given.get("max_steps", 0) > 0:
        return choices
    epochs = _Choice(1, "published: LLaVA-1.5, one epoch of 558,128 pairs")
    if rows < 100_000:
        needed = math.ceil(_STEPS * real / rows)
        why = f"a rule of ours: {_STEPS} steps, after which SmolLM2-135M saw (docs/real_parents.md); 3 to 30 epochs"
        epochs = _Choice(min(max(3, needed), 30), why)
    return {**choices, "num_train_epochs": epochs}


def _schedule(model: Any) -> dict[str, _Choice]:
    choices = {
        "lr_scheduler_type": _Choice("cosine", "published: LLaVA-1.5, TinyLLaVA; seen here (docs/real_parents.md)"),
        "warmup_steps": _Choice(0.03, "a part of all steps; published: LLaVA-1.5, TinyLLaVA, Bunny, Prismatic"),
        "weight_decay": _Choice(0.0, "published: LLaVA-1.5"),
        "max_grad_norm": _Choice(1.0, "published: Prismatic, LiMBeR"),
        "remove_unused_columns": _Choice(False, "the collator reads the columns"),
    }
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        choices["bf16"] = _Choice(True, "this GPU computes in it; the connector's weights stay in float32")
    return choices


def _order(dataset: Any, given: Mapping[str, Any]) -> dict[str, _Choice]:
    column = given.get("length_column_name", "length")
    if not hasattr(dataset, "__len__") or column not in (getattr(dataset, "column_names", None) or ()):
        return {}
    why = f"rows have a column {column!r}; seen here: 0.59 to 0.80 of the time of an epoch at random (docs/features.md)"
    return {"train_sampling_strategy": _Choice("group_by_length", why)}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


__all__ = ["recommended_arguments"]
