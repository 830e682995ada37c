"""Scores beside blind ones: what each condition shows the model, exact numbers, resuming, and the Trainer callback."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, cache_vision_features
from modeling_frozen.evaluation.evaluator import (
    EvaluationCallback,
    bootstrap,
    evaluate,
    over_seeds,
    random_connectors,
    table_over_seeds,
)
from modeling_frozen.metrics.scores import caption_metrics, exact_match, token_f1, vqa_accuracy
from tests.helpers import fresh_python
from tests.helpers.audio_towers import join_with_audio, save_parents_with_audio
from tests.helpers.feature_stores import seen
from tests.helpers.tiny import COLOURS, captioned_rows, join, rows


GENERATE = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = join(tmp_path_factory.mktemp("parents"))
    with torch.no_grad():  # so that different pictures get different words
        model.model.connector.output.weight.mul_(4)
    return model, processor


def said(model: Any, processor: Any, image: Image.Image | None, prompt: str) -> str:
    """One row by hand."""
    text = prompt if image is None else f"{processor.image_token}{prompt}"
    media = {} if image is None else {"images": image}
    inputs = processor(text=text or processor.tokenizer.bos_token, return_tensors="pt", **media)
    ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **GENERATE)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_each_condition_is_what_it_says(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    data = captioned_rows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate(model, processor, data, batch_size=3, **GENERATE)
    by_hand = {(i % 4, row["prompt"]): said(model, processor, row["image"], row["prompt"]) for i, row in enumerate(data)}
    assert len(set(by_hand.values())) > 2
    assert result.predictions["sighted"] == [by_hand[i % 4, row["prompt"]] for i, row in enumerate(data)]
    for i, (row, text) in enumerate(zip(data, result.predictions["blind"], strict=True)):
        others = [said(model, processor, data[j]["image"], row["prompt"]) for j in range(4) if j != i % 4]
        assert text in others
    assert result.predictions["language_model"] == [said(model, processor, None, row["prompt"]) for row in data]
    with random_connectors(model, 0):
        assert not torch.equal(model.model.connector.output.weight, before["model.connector.output.weight"])
        drawn = [said(model, processor, row["image"], row["prompt"]) for row in data]
    assert result.predictions["random_connector"] == drawn
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    references = [row["captions"] for row in data]
    for kind, scores in result.scores.items():
        assert scores == pytest.approx(caption_metrics(result.predictions[kind], references))
    assert "sighted - blind" in result.table() and result.table().count("\n") == 5


def test_stored_images_are_scored_as_the_images_are(joined: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = joined
    data = captioned_rows()
    dataset = datasets.Dataset.from_list(data)
    rows = cache_vision_features(dataset, model, processor, cache_dir=tmp_path / "store", dtype="float32", num_workers=0)
    expected = evaluate(model, processor, dataset, batch_size=3, output_dir=tmp_path, **GENERATE)
    with seen(model) as images:
        result = evaluate(model, processor, rows, batch_size=3, output_dir=tmp_path, **GENERATE)
    assert not images and result.predictions == expected.predictions and result.intervals == expected.intervals
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["kind"] == "sighted"]
    assert len({line["run"] for line in lines}) == 1 and len({*sum([line["images"] for line in asked], [])}) == 4
    assert all(line["images"] == [] for line in lines if line["kind"] == "language_model")
    less = cache_vision_features(dataset, model, processor, cache_dir=tmp_path / "store", dtype="int8", num_workers=0)
    evaluate(model, processor, less, output_dir=tmp_path, kinds=["sighted"], **GENERATE)
    assert {json.loads(line)["run"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()}.isdisjoint(
        {line["run"] for line in lines}  # features that were rounded may be answered otherwise
    )


def media_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a video in frames, of one in a file, of audio in samples and of audio in a file, a chat and a column each."""
    rows = []
    for number, name in enumerate(("black", "white", "red", "blue")):
        colour = Image.new("RGB", (8, 8), name)
        colour.save(folder / f"{number}.gif", save_all=True, append_images=[colour.rotate(90)])
        wave = np.sin(np.arange(1600) * (0.05 + number / 9)).astype(np.float32)
        dark = colour.point(lambda value: value // 3 + 20)
        rows.append({"video": [dark, dark], "audio": None, "prompt": "a", "answer": "a black square"})
        rows.append({"video": str(folder / f"{number}.gif"), "prompt": "the", "answer": "a red square"})
        rows.append({"audio": {"array": wave, "sampling_rate": 16000}, "prompt": "a", "answer": "a red square"})
        content = [{"type": "video", "path": str(folder / f"{number}.gif")}, {"type": "audio", "audio": wave}]
        content.append({"type": "text", "text": "what is it"})
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a square"}]
        rows.append({"messages": turns})
    return rows


def test_videos_and_audio_are_scored_beside_those_of_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = join_with_audio(save_parents_with_audio(tmp_path))
    with torch.no_grad():  # so that different videos get different words
        model.model.connector.output.weight.mul_(20)
        model.model.audio_connector.output.weight.mul_(20)
    data = media_rows(tmp_path)

    def by_hand(index: int, of: int | None) -> str:
        row, media = data[index], {}
        video, audio = "<video>" * (index % 4 in (0, 1, 3)), "<audio>" * (index % 4 in (2, 3))
        if of is not None:
            turns = data[of].get("messages", [{}])[0].get("content", [{}, {}])
            media = {"videos": data[of].get("video") or turns[0].get("path"), "audio": data[of].get("audio")}
            media["audio"] = turns[1].get("audio") if media["audio"] is None else media["audio"]
            media = {name: [[one]] for name, one in media.items() if one is not None}
        prompt = row["prompt"] if "prompt" in row else processor.chat_prompt(row["messages"][:1])
        text = (video + audio if "prompt" in row else "") + prompt
        text = text if media else text.replace("<video>", "").replace("<audio>", "")
        inputs = processor(text=text, return_tensors="pt", **media)
        ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **GENERATE)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    result = evaluate(model, processor, data, task="vqa", batch_size=3, output_dir=tmp_path / "out", **GENERATE)
    own = [by_hand(index, index) for index in range(len(data))]
    assert result.predictions["sighted"] == own and len(set(own)) > 4
    assert result.predictions["language_model"] == [by_hand(index, None) for index in range(len(data))]
    for index, text in enumerate(result.predictions["blind"]):
        kinds = (0, 1) if index % 4 < 2 else (index % 4,)  # rows of one video each, however it came
        assert text in [by_hand(index, of) for of in range(len(data)) if of % 4 in kinds and of != index]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    sighted = {line["row"]: line for line in lines if line["kind"] == "sighted"}
    assert len(sighted[3]["videos"]) == len(sighted[3]["audio"]) == 1 and sighted[3]["images"] == []
    # The same file is the same video, by whichever name, and none of its own to be shown as another's.
    copies = [{**data[1]}, {**data[1], "video": (tmp_path / "0.gif").read_bytes()}]
    with pytest.raises(ValueError, match=r"All rows with 1 video\(s\) show the same"):
        evaluate(model, processor, copies, task="vqa", **GENERATE)
    with pytest.raises(ValueError, match=r"Row 0 has 0 videos, and its prompt .* holds 1 <video>"):
        evaluate(model, processor, [{"image": None, "prompt": "<video> a", "answer": "a"}], task="vqa", **GENERATE)


def test_a_random_connector_differs_from_a_loaded_one_too(joined: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = joined
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    trained = loaded.model.connector.output.weight.clone()
    with random_connectors(loaded, 3):
        assert not torch.allclose(loaded.model.connector.output.weight, trained)
    assert torch.equal(loaded.model.connector.output.weight, trained)


def test_blind_never_shows_another_copy_of_the_own_picture(joined: tuple[Any, Any]) -> None:
    from modeling_frozen.evaluation.evaluator import _read, _rows_of_others

    data = [{**row, "text": "a"} for row in captioned_rows(12)]
    for seed in range(20):
        read = _read(joined[1], data, None, None, None, "")
        others = _rows_of_others(read, seed)
        assert all(read[i]["keys"] != read[j]["keys"] for i, j in enumerate(others))
        assert {read[j]["keys"][0] for j in others} == {row["keys"][0] for row in read}
    with pytest.raises(ValueError, match="show the same"):
        evaluate(*joined, captioned_rows(1), **GENERATE)


def test_copies_under_another_name_are_the_same_picture(joined: tuple[Any, Any], tmp_path: Path) -> None:
    from modeling_frozen.evaluation.evaluator import _read

    names = ["first.png", "copy.png", "other.png"]
    for name, colour in zip(names, ("red", "red", "blue"), strict=True):
        Image.new("RGB", (4, 4), COLOURS[colour]).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in names]
    for images in (paths, [{"path": path, "bytes": None} for path in paths]):
        data = [{"image": one, "text": "a"} for one in images]
        keys = [row["keys"] for row in _read(joined[1], data, None, None, None, "")]
        assert keys[0] == keys[1] != keys[2]


def test_answers_of_vqa(joined: tuple[Any, Any]) -> None:
    data = [
        {"image": row["image"], "prompt": "what colour ?", "answers": [{"answer": "red"}] * 10} for row in captioned_rows(4)
    ]
    result = evaluate(*joined, data, task="vqa", kinds=("sighted", "blind"), postprocess=lambda text: "red", **GENERATE)
    assert result.scores["sighted"] == {"vqa_accuracy": 1.0, "exact_match": 1.0, "token_f1": 1.0}
    result = evaluate(*joined, data, task="vqa", kinds=("sighted", "blind"), **GENERATE)
    one = [{**row, "answers": ["red"]} for row in data]
    alone = evaluate(*joined, one, task="vqa", kinds=("sighted",), postprocess=lambda text: "red", **GENERATE)
    assert alone.scores["sighted"] == {"exact_match": 1.0, "token_f1": 1.0}
    references = [["red"] * 10] * 4
    for name, score in (("vqa_accuracy", vqa_accuracy), ("exact_match", exact_match), ("token_f1", token_f1)):
        assert result.scores["sighted"][name] == pytest.approx(score(result.predictions["sighted"], references))


def test_intervals_hold_the_mean_and_narrow_with_rows() -> None:
    values = [float(i % 2) for i in range(400)]
    wide = bootstrap({"sighted": {"x": values[:40]}})["sighted"]["x"]
    narrow = bootstrap({"sighted": {"x": values}})["sighted"]["x"]
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    # The normal approximation: 1.96 standard errors.
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.15)
    assert bootstrap({"gain": {"x": [0.25] * 9}})["gain"]["x"] == (0.25, 0.25)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import modeling_frozen.evaluation.evaluator as evaluation
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.tiny import captioned_rows
model = FrozenPrefixForConditionalGeneration.from_pretrained(sys.argv[1])
processor = FrozenPrefixProcessor.from_pretrained(sys.argv[1])
whole, calls = evaluation._generate, []
def generate(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)
evaluation._generate = generate
evaluation.evaluate(model, processor, captioned_rows(), batch_size=2, output_dir=sys.argv[2], max_new_tokens=4)
"""


def test_a_killed_run_goes_on_where_it_was(joined: tuple[Any, Any], tmp_path: Path, monkeypatch: Any) -> None:
    model, processor = joined
    model.save_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    out = tmp_path / "out"
    done = fresh_python.run("-c", KILLED, str(tmp_path / "eyes"), str(out), env=fresh_python.environment())
    assert done.returncode == -signal.SIGKILL
    path = out / "predictions.jsonl"
    first = [json.loads(line) for line in path.read_text().splitlines()]
    assert first
    with path.open("a") as file:
        file.write('{"run": "another", "kind": "sighted", "row": 7, "prediction": "stale"}\n{"cut off')
    calls: list[list[Any]] = []
    from modeling_frozen.evaluation import evaluator as evaluation

    whole = evaluation._generate
    monkeypatch.setattr(evaluation, "_generate", lambda *args: calls.append(args[2]) or whole(*args))
    model = type(model).from_pretrained(tmp_path / "eyes")
    result = evaluate(model, processor, captioned_rows(), batch_size=2, output_dir=out, **GENERATE)
    resumed = len(calls)
    calls.clear()
    assert result.predictions == evaluate(model, processor, captioned_rows(), batch_size=2, **GENERATE).predictions
    assert resumed == len(calls) - 2  # the batches that were done
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4 * 8 and len({(line["kind"], line["row"]) for line in lines}) == 32
    assert lines[: len(first)] == first
    assert set(lines[0]) == {"run", "kind", "row", "images", "prompt", "output", "prediction", "references"}
    written = json.loads((out / "results.json").read_text())
    assert written["sighted"] == pytest.approx(result.scores["sighted"])
    # A finished run is not run again; a changed connector is.
    calls.clear()
    evaluate(model, processor, captioned_rows(), batch_size=2, output_dir=out, **GENERATE)
    assert not calls
    with torch.no_grad():
        model.model.connector.output.bias.add_(1)
    evaluate(model, processor, captioned_rows(), batch_size=2, output_dir=out, **GENERATE)
    assert calls


def test_several_seeds_in_one_file(joined: tuple[Any, Any]) -> None:
    results = []
    for scale in (1.0, 1.5):
        with torch.no_grad():
            joined[0].model.connector.output.weight.mul_(scale)
        results.append(evaluate(*joined, captioned_rows(), kinds=("sighted", "blind"), **GENERATE))
    with torch.no_grad():
        joined[0].model.connector.output.weight.div_(1.5)
    result = over_seeds(results, [3, 4])
    assert [run["seed"] for run in result["seeds"]] == [3, 4]
    values = [one.scores["sighted"]["cider"] for one in results]
    assert result["mean"]["sighted"]["cider"] == pytest.approx(sum(values) / 2)
    assert result["std"]["sighted"]["cider"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    gains = [one.scores["sighted"]["rouge_l"] - one.scores["blind"]["rouge_l"] for one in results]
    assert result["gain"]["mean"]["rouge_l"] == pytest.approx(sum(gains) / 2)
    low, high = result["gain"]["interval"]["rouge_l"]
    assert low <= sum(gains) / 2 <= high and "bleu_4" not in result["gain"]["interval"]
    assert over_seeds(results[:1])["gain"]["interval"] == results[0].intervals["gain"]
    lines = table_over_seeds(result, ["rouge_l"]).splitlines()
    assert lines[-2].split()[:4] == ["sighted", "-", "blind", f"{sum(gains) / 2:.3f}"]
    assert lines[-1].split(maxsplit=4)[4] == f"[{low:.3f}, {high:.3f}]"
    assert "gain" not in over_seeds([replace(one, predictions={}) for one in results])


def test_scores_while_training_choose_the_best_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = join(tmp_path)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "out"), max_steps=4, eval_steps=2, save_steps=2, eval_strategy="steps", save_strategy="steps",
            load_best_model_at_end=True, metric_for_best_model="rouge_l", greater_is_better=True, learning_rate=0.05,
            remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=rows(8),
        eval_dataset=rows(8),
        data_collator=DataCollatorForFrozenPrefix(processor),
    )  # fmt: skip
    callback = EvaluationCallback(trainer, processor, captioned_rows(4), max_new_tokens=6)
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_blind_cider" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert trainer.state.best_metric == max(entry["eval_rouge_l"] for entry in logged)
    assert callback.results is not None and set(callback.results.scores) == {"sighted", "blind"}
    assert "eval_cider" in trainer.evaluate()


def test_mistakes_are_named(joined: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="captioning"):
        evaluate(*joined, captioned_rows(), task="captions")
    with pytest.raises(ValueError, match="sighted"):
        evaluate(*joined, captioned_rows(), kinds=("blind",))
    with pytest.raises(ValueError, match="references"):
        evaluate(*joined, [{"image": None, "label": 3}])


# --------------------------------------------------------------------------------------------- what is shown, what is kept


def calls_of_generate(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that the model is asked, as they are asked."""
    from modeling_frozen.evaluation import evaluator

    calls, whole = [], evaluator._generate
    monkeypatch.setattr(evaluator, "_generate", lambda *args: calls.append(args[2]) or whole(*args))
    return calls


def test_the_column_images_is_read_as_the_collator_reads_it(joined: tuple[Any, Any]) -> None:
    data = captioned_rows()
    expected = evaluate(*joined, data, kinds=("sighted", "blind"), **GENERATE).predictions
    lists = [{"images": [row["image"]], **{k: v for k, v in row.items() if k != "image"}} for row in data]
    assert evaluate(*joined, lists, kinds=("sighted", "blind"), **GENERATE).predictions == expected
    named = [{"photo": row["image"], **{k: v for k, v in row.items() if k != "image"}} for row in data]
    assert evaluate(*joined, named, image_column="photo", kinds=("sighted", "blind"), **GENERATE).predictions == expected


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"image_column": "imgae"}, "Row 0 has no image column 'imgae'"),
        ({"photo": None, "image": ...}, {}, "Row 2 has no image column 'image' or 'images'"),
        ({"prompt": "<image> what ?", "image": None}, {}, "Row 2 has 0 images, and its prompt .* holds 1 <image>"),
        ({"prompt": "<image> or <image> ?"}, {}, "Row 2 has 1 images, and its prompt .* holds 2 <image>"),
        ({}, {"prompt_column": "qestion"}, "Row 0 has no prompt column 'qestion'"),
        ({"answers": {"n": [1]}, "captions": None}, {}, "Row 2: references must be strings or numbers"),
        ({"captions": [None]}, {}, "Row 2: references must be strings or numbers"),
        ({"captions": []}, {}, "Row 2 has no references"),
        ({}, {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    ],
)
def test_a_row_that_would_be_read_wrongly_is_refused(
    joined: tuple[Any, Any], change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    data = captioned_rows(4)
    data[2] = {key: value for key, value in {**data[2], **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        evaluate(*joined, data, kinds=("sighted",), **{**GENERATE, **options})


def test_a_split_without_any_image_is_refused(joined: tuple[Any, Any]) -> None:
    data = [{**row, "image": None} for row in captioned_rows(4)]
    with pytest.raises(ValueError, match="No row has an image"):
        evaluate(*joined, data, kinds=("sighted",), **GENERATE)
    data[0]["image"] = captioned_rows(1)[0]["image"]  # rows of text alone may be among others
    assert len(evaluate(*joined, data, kinds=("sighted",), **GENERATE).predictions["sighted"]) == 4


def test_a_chat_whose_images_stand_elsewhere_is_refused(joined: tuple[Any, Any]) -> None:
    chat = [{"role": "user", "content": "what is that ?"}, {"role": "assistant", "content": "a red square ."}]
    data: list[dict[str, Any]] = [{"messages": chat, "image": row["image"]} for row in captioned_rows(2)]
    data.append({"messages": chat})  # of text alone
    assert len(evaluate(*joined, data, kinds=("sighted",), **GENERATE).predictions["sighted"]) == 3
    data[2]["photo"] = data[0]["image"]
    with pytest.raises(ValueError, match="Row 2 has no image column 'image' or 'images'.*photo"):
        evaluate(*joined, data, kinds=("sighted",), **GENERATE)
    with pytest.raises(ValueError, match="Row 0 has no image column 'foto'"):
        evaluate(*joined, data, kinds=("sighted",), image_column="foto", **GENERATE)


def test_references_may_be_numbers_and_tables(joined: tuple[Any, Any]) -> None:
    for answers in (3, [3, 3], {"answer": ["3", "3"]}, {"text": ["3"], "answer_start": [0]}, torch.tensor([3]), 3.0):
        data = [{**row, "captions": None, "answers": answers} for row in captioned_rows(4)]
        result = evaluate(
            *joined, data, task="vqa", kinds=("sighted",), postprocess=lambda text: "3", num_resamples=0, **GENERATE
        )
        expected = float(not isinstance(answers, float))  # "3.0" is not "3"
        assert result.scores["sighted"]["exact_match"] == expected, answers


def test_an_output_with_scores_is_read_too(joined: tuple[Any, Any]) -> None:
    options = {"kinds": ("sighted",), **GENERATE}
    expected = evaluate(*joined, captioned_rows(4), **options).predictions
    assert (
        evaluate(*joined, captioned_rows(4), **options, return_dict_in_generate=True, output_scores=True).predictions
        == expected
    )


def change_one_value(model: Any, processor: Any) -> None:
    model.model.language_model.model.layers[0].mlp.up_proj.weight.data[1, 3] += 1e-3


CHANGES = {
    "image_position": lambda model, processor: setattr(processor, "image_position", "end"),
    "image processor": lambda model, processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "chat template": lambda model, processor: setattr(processor, "chat_template", "{{ messages[0]['content'] }}"),
    "tokenizer": lambda model, processor: processor.tokenizer.add_tokens(["square ."]),
    "generation config": lambda model, processor: setattr(model.generation_config, "repetition_penalty", 1.7),
    "config": lambda model, processor: setattr(model.config.text_config, "rms_norm_eps", 1e-3),
    "one value of a frozen parent": change_one_value,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_can_change_an_answer_is_asked_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = join(tmp_path)
    calls = calls_of_generate(monkeypatch)
    options = {"kinds": ("sighted",), "output_dir": tmp_path / "out", **GENERATE}
    evaluate(model, processor, captioned_rows(), **options)
    calls.clear()
    evaluate(model, processor, captioned_rows(), batch_size=3, **options)
    assert not calls
    CHANGES[change](model, processor)
    fresh = evaluate(model, processor, captioned_rows(), **{**options, "output_dir": None})
    calls.clear()
    assert evaluate(model, processor, captioned_rows(), **options).predictions == fresh.predictions
    assert calls


def test_adapters_switched_off_and_another_order_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config

    model, processor = join(tmp_path)
    tuned = peft.get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    calls = calls_of_generate(monkeypatch)
    options = {"kinds": ("sighted",), "output_dir": tmp_path / "out", **GENERATE}
    evaluate(tuned.get_base_model(), processor, captioned_rows(), **options)
    calls.clear()
    with tuned.disable_adapter():
        evaluate(tuned.get_base_model(), processor, captioned_rows(), **options)
    assert calls
    calls.clear()
    evaluate(tuned.get_base_model(), processor, captioned_rows()[::-1], **options)
    assert calls


def test_another_postprocess_is_applied_to_what_was_generated(
    joined: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_generate(monkeypatch)
    options = {"kinds": ("sighted",), "output_dir": tmp_path, **GENERATE}
    first = evaluate(*joined, captioned_rows(), **options).predictions["sighted"]
    calls.clear()
    data = [{**row, "captions": ["another"]} for row in captioned_rows()]
    upper = evaluate(*joined, data, postprocess=str.upper, **options).predictions["sighted"]
    assert not calls and [text.strip() for text in upper] == [text.upper() for text in first] != first
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in sorted(lines, key=lambda line: line["row"])] == upper
    assert all(line["references"] == ["another"] for line in lines)


@pytest.mark.parametrize("prompt", ["schö", "a\u2028b \u0085 c\x0b d", "lone \ud800"])
def test_a_log_of_any_bytes_is_resumed(
    joined: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    data = [{**row, "prompt": prompt.replace("\ud800", "")} for row in captioned_rows(4)]  # which tokenizers refuse
    options = {"kinds": ("sighted",), "output_dir": tmp_path, "postprocess": lambda text: prompt, **GENERATE}
    whole = evaluate(*joined, data, **options).predictions
    path = tmp_path / "predictions.jsonl"
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 5
    broken = json.dumps({"run": json.loads(lines[0])["run"], "output": "x"}).encode()
    cut = "schö".encode()[:-1]
    path.write_bytes(b"\n".join([b"[]", b"3", b"null", broken, b"", *lines[:3], lines[3] + b"\n" + b'{"prompt": "' + cut]))
    calls = calls_of_generate(monkeypatch)
    assert evaluate(*joined, data, **options).predictions == whole
    assert not calls
    assert len(path.read_bytes().splitlines()) >= 4


def test_progress_counts_generated_rows_at_their_mean_time(joined: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_frozen.evaluation import evaluator

    bars: list[Any] = []

    class Recorded(evaluator.tqdm):  # a bar as it is, whose numbers are looked at
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": False, "mininterval": 0})
            bars.append((self, []))

        def update(self, n: float = 1) -> Any:
            done = super().update(n)
            facts = self.format_dict
            bars[-1][1].append((facts["n"], facts["rate"], facts["unit"]))
            return done

    monkeypatch.setattr(evaluator, "tqdm", Recorded)
    data = [{**row, "prompt": f"a {'picture ' * (i % 3)}"} for i, row in enumerate(captioned_rows(8))] * 2
    evaluate(*joined, data, kinds=("sighted",), batch_size=3, **GENERATE)
    ((bar, updates),) = bars
    distinct = len({(row["prompt"], row["image"].tobytes()) for row in data})
    assert bar.total == distinct < len(data) and [n for n, _, _ in updates] == [3, 6, 8]
    assert bar.unit == "row" and bar.smoothing == 0  # the mean over all rows until now, and not of the last call alone
