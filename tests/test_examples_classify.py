"""examples/classify.py: drawn scenes and rows of one's own; what it writes, and that it sees."""

import json
from pathlib import Path

import classify as example
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from safetensors.torch import load_file

from modeling_frozen import FrozenPrefixForSequenceClassification
from tests.helpers.tiny import COLOURS, rows, save_parents


SMALL = '{"num_layers": 1, "num_heads": 2, "hidden_size": 16}'


def run(**options: object) -> dict:
    options = {"use_cpu": True, "disable_tqdm": True, "connector_config": SMALL, "prefix_length": 2, **options}
    return example.main([word for name, value in options.items() for word in (f"--{name}", *str(value).split("|"))])


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Squares whose class is their colour, by name."""
    folder = tmp_path_factory.mktemp("squares")
    data = [{"photo": row["image"], "words": "what colour", "class": list(COLOURS)[i % 4]} for i, row in enumerate(rows(16))]
    features = Features({"photo": Image(), "words": Value("string"), "class": Value("string")})
    splits = {"train": data, "test": data[:8]}
    for name, split in DatasetDict({k: Dataset.from_list(v, features=features) for k, v in splits.items()}).items():
        split.to_parquet(folder / f"{name}.parquet")
    return str(folder)


def test_rows_of_ones_own_are_learnt_by_their_pictures(own_rows: str, tmp_path: Path) -> None:
    vision, text = save_parents(tmp_path)
    folder = tmp_path / "out"
    results = run(
        vision=vision, text=text, dataset=own_rows, output_dir=folder, num_train_epochs=20, learning_rate=1e-2, balanced=True,
        image_column="photo", text_column="words", label_column="class", per_device_train_batch_size=8,
    )  # fmt: skip
    assert results["sighted"]["accuracy"] == results["sighted"]["f1"] == 1
    assert results["blind"]["accuracy"] < 0.7 and results["random_connector"]["accuracy"] < 0.7
    assert json.loads((folder / "results.json").read_text()) == results
    names = {name.split(".")[0] for name in load_file(folder / "model.safetensors")}
    assert names == {"model", "classifier"}
    model = FrozenPrefixForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(sorted(COLOURS))) and model.config.class_weights == [1.0] * 4
    card = (folder / "README.md").read_text()
    assert "| accuracy | 1 |" in card and "one of 4 classes" in card


def test_answers_of_any_form_are_classes(tmp_path: Path) -> None:
    """LLaVA's JSON, with two questions to an image; without splits of its own."""
    vision, text = save_parents(tmp_path)
    data = []
    for number, row in enumerate(rows(40)):
        row["image"].putpixel((7, 7), (number, 0, 0))  # no two are the same
        row["image"].save(tmp_path / f"{number}.png")
        colour = list(COLOURS)[number % 4]
        turns = ["<image> what colour", colour, "a square ?", "a square"]
        senders = ("human", "gpt") * 2
        said = [{"from": who, "value": value} for who, value in zip(senders, turns, strict=True)]
        data.append({"id": number, "image": f"{number}.png", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(data))
    args = example.Arguments(dataset=[str(tmp_path / "rows.json")])
    train, test, names = example.read_rows(args, 0)
    assert names == sorted([*COLOURS, "a square"]) and len(train) + len(test) == 80
    assert set(train["text"]) == set(test["text"]) == {"what colour", "a square ?"}
    for row in [*train, *test]:
        pixel = row["image"].getpixel((0, 0))
        answer = names[row["label"]]
        assert answer == "a square" if row["text"] == "a square ?" else COLOURS[answer] == pixel
    results = run(vision=vision, text=text, dataset=args.dataset[0], output_dir=tmp_path / "out", max_steps=2)
    assert set(results) == {"sighted", "blind", "random_connector"}


def test_drawn_scenes(tmp_path: Path) -> None:
    results = run(
        output_dir=tmp_path / "out", train_rows=32, test_rows=16, tower_steps=2, language_model_steps=2, max_steps=2,
        fused_inputs="image|text",
    )  # fmt: skip
    assert set(results) == {"sighted", "blind", "random_connector"}
    assert all(set(one) == {"accuracy", "f1", "loss"} for one in results.values())


def test_no_picture_keeps_its_place_and_every_text_does() -> None:
    data = example.draw_rows(9, True, 0)
    shuffled = example.blind(data, "image", 0)
    assert [row["text"] for row in shuffled] == data["text"] and [row["label"] for row in shuffled] == data["label"]
    assert all(a["image"].tobytes() != b["image"].tobytes() for a, b in zip(data, shuffled, strict=True))


@pytest.mark.slow
def test_picture_and_question_together_tell_what_neither_tells_alone(tmp_path: Path) -> None:
    results = {}
    options = {"connector_config": example.Arguments().connector_config, "prefix_length": 8}
    parents: dict[str, object] = {}
    for inputs in ("image|text", "image", "text"):
        folder = tmp_path / inputs.replace("|", "_")
        results[inputs] = run(output_dir=folder, fused_inputs=inputs, **options, **parents)
        parents = parents or {"vision": folder / "tower", "text": folder / "language_model"}
    both = results["image|text"]["sighted"]["accuracy"]
    assert both > 0.8 and both > max(results[one]["sighted"]["accuracy"] for one in ("image", "text")) + 0.3
    assert results["image|text"]["blind"]["accuracy"] < 0.45
