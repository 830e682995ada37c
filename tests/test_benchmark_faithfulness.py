"""benchmarks/shapes/faithfulness.py: verdicts follow from the figures alone, measures measure, and all of it runs in small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetModel, Trainer, TrainingArguments

from benchmarks.shapes import faithfulness
from benchmarks.shapes.faithfulness import (
    Statement,
    Unchanged,
    caption_loss,
    compare,
    table,
    text_perplexity,
    verdict_of,
    words_right,
)
from benchmarks.shapes.towers import WAYS, Pictures, train_tower_by
from modeling_frozen import DataCollatorForFrozenPrefix
from tests.helpers import tiny


TEXTS = ["a red square .", "what colour ? that is blue .", "red"]


@pytest.mark.parametrize(
    "larger, smaller, expected",
    [
        ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], "holds"),
        ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], "contrary"),
        ([0.5, 0.6, 0.7], [0.45, 0.55, 0.65], "open"),  # less apart than seeds of one are
        ([0.5, 0.5, 0.5], [0.0, 0.4, 0.8], "open"),  # the larger of both deviations counts
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "open"),
        ([0.6], [0.5], "holds"),  # one seed has no deviation
    ],
)
def test_a_statement_holds_beyond_both_deviations(larger: list[float], smaller: list[float], expected: str) -> None:
    assert Statement("a > b", larger, smaller).verdict == expected


def test_unchanged_means_to_the_last_bit() -> None:
    assert Unchanged("same", [1.5, 2.5], [1.5, 2.5]).verdict == "holds"
    assert Unchanged("same", [1.5, 2.5], [1.5, 2.5 + 1e-12]).verdict == "contrary"


def test_a_claim_is_reproduced_where_all_holds() -> None:
    holds, contrary, open_ = (Statement("", [a], [b]) for a, b in ((1, 0), (0, 1), (0, 0)))
    assert verdict_of([holds, holds]) == "reproduced"
    assert verdict_of([holds, contrary]) == verdict_of([open_, holds]) == "partly"
    assert verdict_of([contrary, open_]) == "not reproduced"
    with pytest.raises(ValueError, match="without statements"):
        verdict_of([])


def test_a_table_has_means_deviations_and_gaps() -> None:
    runs = [{"one": {"score": value, "parameters": 18816.0}, "two": {"other": 1.0}} for value in (0.25, 0.75)]
    head, one, two = table(runs).splitlines()
    assert head.split() == ["score", "parameters", "other"] and len(head) == len(one) == len(two)
    assert one.split() == ["one", "0.500", "±", "0.354", "18,816"]
    assert two.split() == ["two", "1.000", "±", "0.000"] and two.index("1.000") > one.index("18,816")
    statement = compare(runs, "score > other", ("one", "score"), ("two", "other"))
    assert statement.larger == [0.25, 0.75] and statement.smaller == [1.0, 1.0] and statement.verdict == "contrary"


@pytest.mark.parametrize("trainable", [("connector",), ("connector", "text")])
def test_only_a_tuned_language_model_forgets(tmp_path: Path, trainable: tuple[str, ...]) -> None:
    model, processor = tiny.join(tmp_path, trainable=trainable)
    rows, collator = tiny.rows(8), DataCollatorForFrozenPrefix(processor)
    before, learnt = text_perplexity(model, processor.tokenizer, TEXTS), caption_loss(model, collator, rows)
    options: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.01, "remove_unused_columns": False, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path / "run"), save_strategy="no", **options)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    after = text_perplexity(model, processor.tokenizer, TEXTS)
    assert (after == before) is (trainable == ("connector",))
    assert caption_loss(model, collator, rows) < learnt


def test_perplexity_and_loss_are_over_words_not_batches(tmp_path: Path) -> None:
    model, processor = tiny.join(tmp_path)
    one = [text_perplexity(model, processor.tokenizer, [text]) for text in TEXTS]
    counts = torch.tensor([len(processor.tokenizer(text)["input_ids"]) - 1 for text in TEXTS])
    expected = ((torch.tensor(one).log() * counts).sum() / counts.sum()).exp().item()
    assert text_perplexity(model, processor.tokenizer, TEXTS) == pytest.approx(expected, rel=1e-4)
    counts = counts * torch.tensor([10, 40, 50])  # batches of unequal lengths
    expected = ((torch.tensor(one).log() * counts).sum() / counts.sum()).exp().item()
    texts = [text for text, count in zip(TEXTS, (10, 40, 50), strict=True) for _ in range(count)]
    assert text_perplexity(model, processor.tokenizer, texts) == pytest.approx(expected, rel=1e-5)
    rows, collator = tiny.rows(4), DataCollatorForFrozenPrefix(processor)
    assert caption_loss(model, collator, rows * 17) == pytest.approx(caption_loss(model, collator, rows), rel=1e-4)


def test_words_of_a_caption_are_scored_by_property() -> None:
    said = ["a large red circle in the middle .", "a small red circle at the top left .", "a large red ring .", "a"]
    scores = words_right(said, ["a large red circle in the middle ."] * 4)
    assert scores == {"shape, colour": 2 / 4, "size, place": 1 / 4}
    assert words_right(["a large blue ring in the middle ."], ["a large red circle in the middle ."])["size, place"] == 1


def test_every_way_of_training_starts_from_the_same_tower(tmp_path: Path) -> None:
    pictures, weights = Pictures(16, seed=0), {}
    assert torch.equal(pictures.batches()(), pictures.batches()())
    for way in WAYS:
        train_tower_by(way, tmp_path / way, 2, pictures)
        weights[way] = ResNetModel.from_pretrained(tmp_path / way).embedder.embedder.convolution.weight
        assert weights[way].shape == weights["language"].shape
    gaps = {way: (weights[way] - weights["random"]).abs().max().item() for way in WAYS if way != "random"}
    assert all(0 < gap < 0.02 for gap in gaps.values())  # two steps away, each by itself
    assert len({round(gap, 9) for gap in gaps.values()}) > 1
    with pytest.raises(ValueError, match="is unknown: choose one of"):
        train_tower_by("luck", tmp_path / "luck", 2, pictures)


SMALL = {"tower_steps": 2, "language_model_steps": 2, "steps": 6, "pictures": 64, "held_out": 8, "few": 32}


@pytest.mark.slow
def test_everything_in_small(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    arguments = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    few = ["--few_shot_options", "tower_steps=2", "language_model_steps=2", "steps=2", "batch_size=2", "episodes=2"]
    arguments += ["--lengths", "1", "2", "--shots", "1", "2", "--output_dir", str(tmp_path)]
    arguments += [*few, "--seeds", "0"]
    first = faithfulness.main([*arguments, "--only", "prefix_length"])["claims"]["prefix_length"]
    results = faithfulness.main(arguments)  # takes what is there
    assert results["claims"]["prefix_length"] == first and results["claims"].keys() == set(faithfulness.CLAIMS)
    assert json.loads((tmp_path / "results.json").read_text())["claims"].keys() == set(faithfulness.CLAIMS)
    out = capsys.readouterr().out
    for name, claim in results["claims"].items():
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and list(claim["seeds"]) == ["0"]
        assert f"{name}: {claim['verdict'].upper()}" in out and all(one["text"] in out for one in claim["statements"])
    unchanged = results["claims"]["frozen"]["statements"][0]
    assert unchanged["verdict"] == "holds" and unchanged["before"] == unchanged["after"]
    with pytest.raises(ValueError, match="figures of other settings"):
        faithfulness.main(["--only", "frozen", "--output_dir", str(tmp_path)])
