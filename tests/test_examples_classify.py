"""examples/classify.py: rows with labels and rows with answers; what it writes, and that it sees."""

import json
from pathlib import Path

import classify as example
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from safetensors.torch import load_file

from modeling_frozen import FrozenPrefixForSequenceClassification
from modeling_frozen.shapes.folders import write_data, write_parents
from tests.helpers.tiny import COLOURS, rows, save_parents


SMALL = '{"num_layers": 1, "num_heads": 2, "hidden_size": 16}'


BARE = object()  # a flag without a value


def run(**options: object) -> dict:
    options = {"use_cpu": True, "disable_tqdm": True, "connector_config": SMALL, "prefix_length": 2, **options}
    words = ((f"--{name}", *(() if value is BARE else str(value).split("|"))) for name, value in options.items())
    return example.main([word for some in words for word in some])


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
        vision=vision, text=text, dataset=own_rows, output_dir=folder, num_train_epochs=20, learning_rate=1e-2, balanced=BARE,
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
    args, _ = example.parse(["--dataset", str(tmp_path / "rows.json")])
    train, test = (example.read_rows(args)[split] for split in ("train", "test"))
    names = train.features["label"].names
    assert names == sorted([*COLOURS, "a square"]) and len(train) + len(test) == 80
    assert set(train["text"]) == set(test["text"]) == {"what colour", "a square ?"}
    for row in [*train, *test]:
        pixel = row["image"].getpixel((0, 0))
        answer = names[row["label"]]
        assert answer == "a square" if row["text"] == "a square ?" else COLOURS[answer] == pixel
    results = run(vision=vision, text=text, dataset=args.dataset[0], output_dir=tmp_path / "out", max_steps=2)
    assert set(results) == {"sighted", "blind", "random_connector"}


def test_no_picture_keeps_its_place_and_every_text_does(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=200, test_pictures=9)  # every class is learnt
    data = example.read_rows(example.parse(["--dataset", str(tmp_path / "questions")])[0])["test"]
    shuffled = example.blind(data, "image", 0)
    assert [row["text"] for row in shuffled] == data["text"][:] and [row["label"] for row in shuffled] == data["label"][:]
    data = data.select(range(0, len(data), 4))  # four questions to a picture
    shuffled = example.blind(data, "image", 0)
    assert all(a["image"].tobytes() != b["image"].tobytes() for a, b in zip(data, shuffled, strict=True))


def test_a_class_that_nobody_learns_is_named(tmp_path: Path) -> None:
    for split, colours in {"train": ("red", "blue"), "test": ("red", "green")}.items():
        data = [{"image": row["image"], "text": "what colour", "label": colours[i % 2]} for i, row in enumerate(rows(4))]
        Dataset.from_list(data).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="'green' is a class of the test rows, but of no row to train on"):
        example.read_rows(example.parse(["--dataset", str(tmp_path)])[0])


@pytest.mark.slow
def test_picture_and_question_together_tell_what_neither_tells_alone(tmp_path: Path) -> None:
    write_parents(tmp_path, tower_steps=400, language_model_steps=60)
    write_data(tmp_path, pictures=1000, test_pictures=96)
    own = {"vision": tmp_path / "tower", "text": tmp_path / "language_model", "dataset": tmp_path / "questions"}
    usual = {"connector_config": json.dumps(example.parse(["--dataset", ""])[0].connector_config), "prefix_length": 8}
    results = {
        inputs: run(output_dir=tmp_path / inputs.replace("|", "_"), fused_inputs=inputs, **own, **usual)
        for inputs in ("image|text", "image", "text")
    }
    both = results["image|text"]["sighted"]["accuracy"]
    assert both > 0.8 and both > max(results[one]["sighted"]["accuracy"] for one in ("image", "text")) + 0.3
    assert results["image|text"]["blind"]["accuracy"] < 0.45
