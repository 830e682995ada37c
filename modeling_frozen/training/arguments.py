"""`TrainingArguments` from a command line: what flags say, then what a script chose, then what the sizes recommend."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


def training_arguments(
    flags: Sequence[str],
    *,
    model: Any = None,
    rows: Any = None,
    prog: str | None = None,
    others: Iterable[str] = (),
    **chosen: Any,
) -> Any:
    """
    `TrainingArguments` from flags: every field is one (`--learning_rate 1e-3`).

    A script that has flags of its own leaves these to it by `parser.parse_known_args()`.

    Args:
        flags: words of the command line.
        model, rows (*optional*):
            As [`recommended_arguments`] takes them, which then fills in what neither `flags` nor `chosen` say, and prints
            every number with its reason (in the first process alone).
        prog (`str`, *optional*): the program that errors name; by default the script.
        others: flags that the script reads itself, which may be meant by one that is misspelt.
        chosen: fields that stand where no flag says otherwise; `output_dir` is one.

    Raises:
        ValueError: a flag that is no field; it names the nearest.

    Example:

    ```python
    >>> args, flags = parser.parse_known_args()
    >>> training = training_arguments(flags, model=model, rows=rows, output_dir=args.output_dir)
    ```"""
    training, by_flags = _parse(flags, chosen, prog, others)
    if model is None:
        return training
    from .recommended import recommended_arguments

    given = {**{name: getattr(training, name) for name in chosen}, **{name: getattr(training, name) for name in by_flags}}
    recommended = recommended_arguments(model, rows, given=given, verbose=training.process_index == 0)
    return _parse(flags, {**recommended, **chosen}, prog, others)[0]


def _parse(flags: Sequence[str], chosen: dict[str, Any], prog: str | None, others: Iterable[str]) -> tuple[Any, list[str]]:
    """The arguments, and the names of those that flags set."""
    from transformers import HfArgumentParser, TrainingArguments

    prog = prog or Path(sys.argv[0]).name
    usage = f"{prog} [flags of `{prog} --help`] [fields of TrainingArguments]"
    parser = HfArgumentParser(TrainingArguments, prog=prog, usage=usage, allow_abbrev=False)  # type: ignore[arg-type]
    # As a file says it: a number in it may be a string ("1e-3" in YAML), which is read as a flag's would be.
    parser.set_defaults(**{name: str(one) if _is_number(one) else one for name, one in chosen.items()})
    training, unknown = parser.parse_args_into_dataclasses(
        list(flags), return_remaining_strings=True, look_for_args_file=False
    )
    names = [field.name for field in fields(TrainingArguments) if field.init]
    if unknown:
        raise ValueError(
            f"argument {_nearest(unknown[0].lstrip('-').partition('=')[0], {*names, *others})} [errors.md#choices]"
        )
    absent = object()
    given, _ = parser.parse_known_args(list(flags), argparse.Namespace(**dict.fromkeys(names, absent)))
    return training, [name for name in names if getattr(given, name) is not absent]


def _nearest(name: str, known: set[str]) -> str:
    """What is said of a name that nobody knows."""
    from ..connectors import did_you_mean

    return f"{name!r} is unknown. {did_you_mean(name, known)}".rstrip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["training_arguments"]
