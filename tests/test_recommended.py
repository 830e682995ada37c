"""Recommended arguments: they follow sizes, a user's own win, each number has its source, `TrainingArguments` takes them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForImageTextToText, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.data.lengths import add_lengths
from modeling_frozen.training.arguments import training_arguments
from modeling_frozen.training.recommended import recommended_arguments
from tests.helpers.tiny import join


def of(size: float = 1.35e8, rows: int | None = 762, connector: str = "mlp", loaded: bool = False, **options: Any) -> dict:
    """The recommendation for sizes that no test could load."""
    trainable = options.pop("trainable", ("connector",))
    model: Any = SimpleNamespace(
        backbones={"text": SimpleNamespace(num_parameters=lambda: int(size))},
        config=SimpleNamespace(connector_type=connector, trainable=trainable),
        name_or_path="me/eyes" if loaded else "",
    )
    return recommended_arguments(model, iter(()) if rows is None else range(rows), **options)


def test_the_rate_follows_the_language_model() -> None:
    rates = {1.35e8: 3e-3, 5e8: 1e-3, 1.6e9: 5e-4, 2.8e9: 5e-4, 3.8e9: 1e-3, 7e9: 1e-3}
    assert {size: of(size)["learning_rate"] for size in rates} == rates
    attending = {
        connector: of(size, connector=connector)["learning_rate"]
        for connector, size in (("qformer", 1e9), ("transformer", 1e8))
    }
    assert attending == {"qformer": 1e-4, "transformer": 5e-4}
    assert of(loaded=True)["learning_rate"] == 2e-4
    assert "learning_rate" not in of(trainable=("connector", "text"))


def test_batch_and_length_follow_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(chosen: dict[str, Any]) -> int:
        return chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]

    assert [batch(of(rows=rows)) for rows in (762, 20_000, 558_128, None)] == [32, 64, 256, 256]
    assert [of(rows=rows).get("num_train_epochs") for rows in (10, 762, 9_000, 20_000, 558_128, None)] == [
        30,
        21,
        3,
        3,
        1,
        None,
    ]
    assert of(rows=None)["max_steps"] == 2181 and "max_steps" not in of()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert batch(of(rows=558_128)) == 64


def test_what_is_given_wins_and_the_rest_follows_it(capsys: pytest.CaptureFixture) -> None:
    chosen = of(rows=558_128, given={"per_device_train_batch_size": 4, "learning_rate": 7e-5})
    assert chosen["gradient_accumulation_steps"] == 64
    assert not {"per_device_train_batch_size", "learning_rate"} & set(chosen)
    assert "7e-05 (yours; else 0.003)" in capsys.readouterr().out
    assert of(rows=558_128, given={"gradient_accumulation_steps": 32})["per_device_train_batch_size"] == 8
    assert "num_train_epochs" not in of(given={"max_steps": 9})
    assert of(rows=9_000, given={"per_device_train_batch_size": 300})["num_train_epochs"] == 16


def test_rows_with_lengths_are_grouped_by_them(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    plain = Dataset.from_list([{"image": "a.png", "text": f"{'a red square ' * count}."} for count in range(1, 9)])
    counted = add_lengths(plain, DataCollatorForFrozenPrefix(processor))
    chosen = recommended_arguments(model, counted, verbose=False)
    assert TrainingArguments(str(tmp_path), **chosen).train_sampling_strategy == "group_by_length"
    assert "train_sampling_strategy" not in recommended_arguments(model, plain, verbose=False)
    assert "train_sampling_strategy" not in recommended_arguments(model, counted.to_iterable_dataset(), verbose=False)
    named, own = counted.rename_column("length", "tokens"), {"length_column_name": "tokens"}
    assert recommended_arguments(model, named, given=own, verbose=False)["train_sampling_strategy"] == "group_by_length"


def test_each_number_says_where_it_is_from(capsys: pytest.CaptureFixture) -> None:
    for options in ({}, {"loaded": True}, {"rows": None}, {"size": 7e9, "rows": 20_000}, {"connector": "qformer"}):
        chosen = of(**options)
        first, *lines = capsys.readouterr().out.splitlines()
        assert f"{int(options.get('size', 1.35e8)):,} parameters" in first
        assert [line.split()[0] for line in lines] == list(chosen)
        sources = ("published: ", "seen here", "rule of ours", "memory is short", "the collator reads", "float32")
        assert all(any(source in line for source in sources) for line in lines), lines


def test_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = join(tmp_path)
    chosen = recommended_arguments(model, range(762), verbose=False)
    assert chosen["learning_rate"] == 3e-3 and not capsys.readouterr().out
    args = TrainingArguments(str(tmp_path / "run"), **chosen)
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(1000) == 30
    model.save_pretrained(tmp_path / "eyes")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes")
    assert recommended_arguments(again, range(762), verbose=False)["learning_rate"] == 2e-4


def test_arguments_come_from_flags_then_from_the_script_then_from_the_sizes(tmp_path: Path) -> None:
    (model, _), out = join(tmp_path), str(tmp_path / "out")
    flags = ["--num_train_epochs", "7", "--per_device_train_batch_size", "4"]
    training = training_arguments(flags, model=model, rows=range(64), output_dir=out, weight_decay=0.1, logging_steps=5)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (7, 4)
    assert (training.weight_decay, training.logging_steps, training.output_dir) == (0.1, 5, out)
    assert (training.learning_rate, training.gradient_accumulation_steps) == (3e-3, 8)  # 32 rows a step, by fours
    assert training_arguments(["--weight_decay", "0.2"], output_dir=out, weight_decay=0.1).weight_decay == 0.2
    with pytest.raises(ValueError, match="argument 'learning_rat' is unknown. Did you mean `learning_rate`?"):
        training_arguments(["--learning_rat", "1"], output_dir=out)
    with pytest.raises(ValueError, match="argument 'visoin' is unknown. Did you mean `vision`?"):
        training_arguments(["--visoin", "a"], others=["vision"], output_dir=out)
