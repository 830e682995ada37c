"""benchmarks/learning_curve.py in small: all candidates train on the same rows, each is stopped at its points, and what is
done to a connector before it trains is what it says."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import learning_curve
from modeling_frozen import FrozenPrefixProcessor
from modeling_frozen.backbones import word_embedding_norm
from tests.helpers.tiny import captions_in, join, save_parents, tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    save_parents(folder, text={"max_position_embeddings": 128, "num_hidden_layers": 4})
    save_parents(folder / "smaller", text={"max_position_embeddings": 128, "hidden_size": 8})  # with more words than that
    captions_in(folder / "captions", 40)
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    where = {"--vision": folder / "tower", "--text": folder / "words", "--dataset": folder / "captions"}
    small = [
        "--epochs",
        "1",
        "--points",
        "0.5",
        "1",
        "--test_photos",
        "4",
        "--prefix_length",
        "2",
        "--prompt",
        "what is that ?",
    ]
    stored = ["--store", str(folder / "store"), "--output", str(out / "runs.json")]
    return [*(str(word) for pair in where.items() for word in pair), *small, *stored, *more]


def data_of(folder: Path, store: Path) -> learning_curve.Data:
    parents = {"vision": str(folder / "tower"), "text": str(folder / "words"), "from_text": str(folder / "smaller" / "words")}
    rows = {"dataset": str(folder / "captions"), "photos": None, "split": "test", "test_photos": 4, "epochs": 1.0}
    return learning_curve.Data(
        argparse.Namespace(**parents, **rows, no_chat=True, prompt="", prefix_length=2, store=str(store))
    )


def test_candidates_are_stopped_at_their_points_and_kept(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--only", "ours", "transformers' LLaVA, rate 0.001", "five captions of each of four photos in a step"]
    only += ["half the layers for half the steps", "three crops of each photo beside it"]
    found = learning_curve.main(arguments(places, tmp_path, *only, "--seeds", "0", "--table", str(tmp_path / "table.md")))
    assert json.loads((tmp_path / "runs.json").read_text())["runs"] == found["runs"]
    points = {name: [point["step"] for point in runs["0"]["points"]] for name, runs in found["runs"].items() if runs}
    assert points == {  # 80 captions, of which a step reads 20, five of them of one photo or all of others
        "peers: ours": [2, 4],
        "peers: transformers' LLaVA, rate 0.001": [1, 2],
        "changes: five captions of each of four photos in a step": [2, 4],
        "changes: half the layers for half the steps": [4],  # no caption is written with half a language model
        "changes: three crops of each photo beside it": [2, 4],
    }
    for runs in found["runs"].values():
        seconds = [point["seconds"] for point in runs.get("0", {"points": []})["points"]]
        assert seconds == sorted(seconds) and 0 not in seconds
    last = found["runs"]["changes: half the layers for half the steps"]["0"]["points"][-1]
    assert last["nats"] > 0 and last["nats_of_another"] != last["nats"]
    table = (tmp_path / "table.md").read_text()
    assert "| ours | 1 | 80 |" in table and "| transformers' LLaVA, rate 0.001 | 1 | 40 |" in table

    def none(*args: object) -> None:
        raise AssertionError("what stands in the file is not made again")

    monkeypatch.setattr(learning_curve, "RUNS", dict.fromkeys(learning_curve.RUNS, none))
    assert learning_curve.main(arguments(places, tmp_path, *only, "--seeds", "0"))["runs"] == found["runs"]
    with pytest.raises(ValueError, match="figures of other settings"):
        learning_curve.main(arguments(places, tmp_path, *only, "--seeds", "0", "--no_chat"))


def test_a_start_in_closed_form_is_the_best_linear_map_at_the_norm_of_words(places: Path, tmp_path: Path) -> None:
    data = data_of(places, tmp_path)
    model, processor = data.build("pooled")
    targets, hidden = learning_curve._targets(model, processor, data)
    assert targets.shape == (40, 2 * model.config.embedding_dim)
    word = processor.tokenizer(data.answers("train")[0], add_special_tokens=False)["input_ids"]
    first = torch.stack([model.model.embed_words(torch.tensor(ids))[0] for ids in word]).mean(0)
    assert torch.allclose(targets[0, : model.config.embedding_dim], first)

    def error() -> float:
        with torch.no_grad():
            return (model.model.connector.output(hidden) - targets).square().mean().item()

    before = error()
    learning_curve.regression(model, processor, data)
    after = error()
    assert after < 0.5 * before
    with torch.no_grad():  # less than any other constant part: the gradient there is 0
        model.model.connector.output.bias.add_(1e-2)
        assert error() > after

    fresh, _ = data.build("pooled")
    norms = []
    for start in (None, learning_curve.regression_to_norm):
        if start is not None:
            start(fresh, processor, data)
        with torch.no_grad():
            norms.append(fresh.model.connector(data.features("pooled", "train")).norm(dim=-1).mean().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_convex_combinations_lie_among_the_words(places: Path, tmp_path: Path) -> None:
    data = data_of(places, tmp_path)
    model, processor = data.build("pooled")
    learning_curve.convex(model, processor, data)
    features = data.features("pooled", "train")
    prefix = model.model.connector(features)
    words = model.model.get_input_embeddings().weight
    assert prefix.shape == (40, 2, model.config.embedding_dim)
    assert (prefix <= words.max(0).values + 1e-5).all() and (prefix >= words.min(0).values - 1e-5).all()
    prefix.sum().backward()
    assert model.model.connector.output.inner.weight.grad.abs().max() > 0 and words.grad is None


@torch.no_grad()
def test_a_connector_is_taken_over_by_the_words_that_both_language_models_have(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(40)]
    pairs = []
    for width, known in ((16, [*words, "its", "own"]), (32, ["another", *words[::-1]])):
        folder = tmp_path / str(width)
        save_parents(folder, text={"hidden_size": width, "vocab_size": len(known) + 9})
        tokenizer(["<pad>", "<s>", "</s>", "<unk>", *known]).save_pretrained(folder / "words")
        options = {"connector_config": {"hidden_size": 24}, "prefix_length": 3, "vision_feature_select_strategy": "pooled"}
        pairs.append(join(folder, **options))
    (source, its_processor), (model, processor) = pairs
    turn, shift = torch.randn(16, 32), torch.randn(32)
    first, second = (one.get_input_embeddings().weight for one in (source, model))
    for word in words:  # all others lie elsewhere
        places = [one.tokenizer.convert_tokens_to_ids(word) for one in (its_processor, processor)]
        second[places[1]] = first[places[0]] @ turn + shift
    for parameter in source.model.connector.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # as if trained
    learning_curve.take_over(model, processor, source, its_processor)
    features = torch.randn(5, 1, source.config.vision_width)
    its, made = (one.model.connector.eval()(features) for one in (source, model))
    expected = its @ turn + shift
    scale = (made * expected).sum() / expected.square().sum()
    torch.testing.assert_close(made, scale * expected, atol=1e-3, rtol=1e-3)
    norm = word_embedding_norm(model.model.language_model)
    assert made.norm(dim=-1).mean().item() == pytest.approx(norm, rel=0.3)  # of these features, as of those it is scaled by


def test_a_connector_is_moved_from_one_that_is_trained_first(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, small, train = data_of(places, tmp_path), [], learning_curve.run_trainer

    def trained(model: object, *args: object) -> None:
        train(model, *args)
        small.append(model)

    monkeypatch.setattr(learning_curve, "run_trainer", trained)
    model, processor = data.build("pooled")
    fresh = [value.clone() for value in model.model.connector.state_dict().values()]
    learning_curve.moved(model, processor, data)
    expected, _ = data.build("pooled")
    learning_curve.take_over(expected, processor, small[0], FrozenPrefixProcessor.from_model(small[0]))
    pairs = zip(model.model.connector.parameters(), expected.model.connector.parameters(), fresh, strict=True)
    for value, wanted, before in pairs:
        assert torch.equal(value, wanted) and not torch.equal(value, before)


@pytest.mark.real_data
@pytest.mark.slow
def test_clipcaps_own_code_is_stopped_at_points(tmp_path: Path, assets: Path) -> None:
    checkout = os.environ.get("FROZEN_PREFIX_CLIPCAP")
    if checkout is None:
        pytest.skip("no checkout of github.com/rmokady/CLIP_prefix_caption: name it by FROZEN_PREFIX_CLIPCAP")
    found = learning_curve.main(
        [
            *("--vision", str(assets / "vision" / "mobilenet_v1_0.25_128"), "--clipcap", checkout, "--no_chat"),
            *("--text", str(assets / "lm" / "stories260k"), "--dataset", str(assets / "captions" / "coco_open")),
            *(
                "--epochs",
                "1",
                "--points",
                "0.5",
                "1",
                "--seeds",
                "0",
                "--test_photos",
                "4",
                "--only",
                "ClipCap's code, rate 0.001",
            ),
            *("--store", str(tmp_path / "store"), "--output", str(tmp_path / "runs.json")),
        ]
    )  # a Llama, which has no `.transformer.wte`
    points = found["runs"]["peers: ClipCap's code, rate 0.001"]["0"]["points"]
    assert [point["step"] for point in points] == [8, 16] and all(point["said"] for point in points)
