"""Cards of models that are no captioners of pictures: their words are their own, and their code runs as it stands."""

import re
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from modeling_frozen import (
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.model_card.card import write_model_card
from tests.helpers.audio_towers import AUDIO_TOWERS
from tests.helpers.tiny import save_parents


METRICS = {"sighted": {"accuracy": 0.9}, "blind": {"accuracy": 0.2}, "random_connector": {"accuracy": 0.3}}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parents")
    tower, words = save_parents(folder)
    config, kind, extractor = AUDIO_TOWERS["wav2vec2"]
    kind(config).save_pretrained(folder / "audio")
    extractor().save_pretrained(folder / "audio")
    return {"vision": tower, "text": words, "audio": str(folder / "audio")}


def card(folder: Path, model: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    """Saves a model as people do; returns its card's text and metadata."""
    model.save_pretrained(folder)
    FrozenPrefixProcessor.from_model(model).save_pretrained(folder)
    text = write_model_card(folder, model, repo_id="me/model", **options).read_text(encoding="utf-8")
    return text, ModelCard(text).data.to_dict()


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What the first code block of a card prints, in a folder with a photo and an audio file."""
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    Image.new("RGB", (30, 20), "red").save(folder / "photo.jpg")
    with wave.open(str(folder / "audio.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(bytes(3200))
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(block.replace("me/model", str(folder)), {})
    return capsys.readouterr().out.strip()


def audio_model(parents: dict[str, str], sees: bool) -> FrozenPrefixForConditionalGeneration:
    options = {"audio_prefix_length": 3, "audio_connector_config": {"num_heads": 2, "hidden_size": 16, "num_layers": 1}}
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        parents["vision"] if sees else None, parents["text"], parents["audio"], **options
    )


def test_audio_alone_never_speaks_of_images(parents: dict[str, str], tmp_path: Path) -> None:
    text, data = card(tmp_path, audio_model(parents, sees=False), metrics=METRICS)
    assert not re.search(r"\bimages?\b|\beyes?\b|\bseen\b|\bpictures?\b", text.split("<!--")[0], re.IGNORECASE), text
    assert data["pipeline_tag"] == "audio-text-to-text"
    assert "Audio input for a frozen language model. Each audio clip is written as 3 prefix vectors" in text
    assert "blind (audio clip replaced)" in text and "| type | `resampler` |" in text
    assert "of width 16" in text and "`audio_feature_layer=-1`" in text
    assert "Calls without audio are answered as by the language model alone." in text
    assert {result["task"]["type"] for result in data["model-index"][0]["results"]} == {"audio-text-to-text"}


def test_the_code_for_audio_runs(
    parents: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("soundfile")
    text, _ = card(tmp_path, audio_model(parents, sees=False))
    run(text, tmp_path, monkeypatch, capsys)


def test_images_and_audio(parents: dict[str, str], tmp_path: Path) -> None:
    text, data = card(tmp_path, audio_model(parents, sees=True))
    assert data["pipeline_tag"] == "image-text-to-text"
    said = "Each image is written as 4 prefix vectors and each audio clip is written as 3 prefix vectors that the language"
    assert "Image and audio input for a frozen language model." in text and said in text
    assert "## Connector\n" in text and "## Connector of audio\n" in text
    assert text.count("| trained parameters |") == 1


@pytest.mark.parametrize(
    ("options", "auto_class", "tag", "words"),
    [
        (
            {"id2label": {0: "cat", 1: "dog"}},
            "AutoModelForSequenceClassification",
            None,
            ["predicts one of 2 classes from image and text", "| predicts | 2: `cat`, `dog` (single label classification) |"],
        ),
        (
            {"num_labels": 3, "fused_inputs": ("image",)},
            "AutoModelForImageClassification",
            "image-classification",
            ["from image", "| reads | the embedding of the image, of norm 1 |", "how often each class stood"],
        ),
        (
            {"num_labels": 3, "fused_inputs": ("text",), "problem_type": "multi_label_classification"},
            "AutoModelForSequenceClassification",
            "text-classification",
            ["which of 3 classes apply", "`last`"],
        ),
        (
            {"num_labels": 1, "problem_type": "regression", "image_embedding": "tower"},
            "AutoModelForSequenceClassification",
            None,
            ["predicts numbers from image and text", "the connector has no part in it"],
        ),
        (
            {"num_labels": 2, "class_weights": [1.0, 2.5], "prompt_sees_media": True},
            "AutoModelForSequenceClassification",
            None,
            ["| class weights | 1, 2.5 |", "it reads the prefix among the words"],
        ),
    ],
)
def test_classifiers(
    parents: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: dict[str, Any],
    auto_class: str,
    tag: str | None,
    words: list[str],
) -> None:
    model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(parents["vision"], parents["text"], **options)
    text, data = card(tmp_path, model, metrics=METRICS)
    assert data.get("pipeline_tag") == tag
    assert f"from transformers import {auto_class}, AutoProcessor" in text and ".generate(" not in text
    assert all(word in text for word in words), text
    assert "Trained parts: connector and head (" in text and "answered as by the language model" not in text
    assert "accuracy, blind (image replaced)" in text
    assert run(text, tmp_path, monkeypatch, capsys)


def test_retrieval(
    parents: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        parents["vision"], parents["text"], projection_dim=8, trainable=("connector", "text")
    )
    text, data = card(tmp_path, model)
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert "Finds images by words and words by images" in text and "| space | 8 numbers, compared by cosine |" in text
    assert "Trained parts: connector and head, language model (" in text and ".generate(" not in text
    with torch.no_grad():
        assert "tensor" in run(text, tmp_path, monkeypatch, capsys)
