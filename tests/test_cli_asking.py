"""`frozen-prefix caption` and `chat`: what they print is what the model writes, asked as it was trained."""

import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from modeling_frozen.cli import main
from modeling_frozen.cli.chat import Conversation
from modeling_frozen.data.asking import Asking, AskingCollator, has_own_turns
from modeling_frozen.serving.answering import NOTHING, StopWriting, load, stream_answer
from tests.helpers import fresh_python
from tests.helpers.tiny import join, rows


TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant] {% endif %}"
QUESTION = "is what colour ?"  # to most others the random language model says nothing but special tokens


def in_turns(processor: Any) -> Any:
    """The processor of a language model that brought a template, for text alone."""
    processor.tokenizer.chat_template = TURNS
    processor.chat_template = processor._with_images(TURNS)
    return processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asking")
    model, processor = join(folder)
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    (folder / "photos").mkdir()
    for index, row in enumerate(rows(3)):
        row["image"].save(folder / "photos" / f"{index}.png")
    (folder / "photos" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def eyes(folder: Path) -> tuple[Any, Any]:
    return load(folder / "eyes", "cpu")


def expected(eyes: tuple[Any, Any], image: Any, prompt: str, tokens: int) -> str:
    model, processor = eyes
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --------------------------------------------------------------------------------------------------------------- asking


def test_rows_are_asked_as_photos_are(eyes: tuple[Any, Any], folder: Path) -> None:
    _, processor = load(folder / "eyes", "cpu")
    assert not has_own_turns(processor)
    plain = Asking(processor)
    caption = {"image": None, "text": "a red square ."}
    assert plain.prompt() == "" and plain.row(caption) == caption
    assert Asking(processor, "a picture").row(caption) == {"image": None, "prompt": "a picture", "answer": "a red square ."}
    in_turns(processor)
    assert has_own_turns(processor)
    asked, photo = Asking(processor), rows(1)[0]["image"]
    assert asked.prompt() == "[user] <image>Describe the photo. [assistant] "
    assert asked.row({"images": [photo], "text": ["a", "b"]}) == {
        "images": [photo], "prompt": asked.prompt(), "answer": ["a", "b"]
    }  # fmt: skip
    two = asked.row({"image": photo, "prompt": ["what ?", "that <image>"], "answer": ["a", "b"]})
    assert two["prompt"] == ["[user] <image>what ? [assistant] ", "[user] that <image> [assistant] "]
    chat = {"messages": [{"role": "user", "content": "a"}], "image": photo}
    assert asked.row(chat) == chat
    assert Asking(processor, chat=False).row(caption) == caption


def test_videos_are_asked_about_too(tmp_path: Path) -> None:
    _, processor = join(tmp_path, num_frames=2)
    asked = Asking(in_turns(processor)).row({"images": [], "videos": ["a.gif"], "prompt": "what ?", "completion": "a"})
    assert asked["prompt"] == "[user] <video>what ? [assistant] "


def test_the_collator_learns_the_answer_behind_the_question(folder: Path) -> None:
    _, processor = load(folder / "eyes", "cpu")
    row = rows(1)[0]
    batch = AskingCollator(processor, asking=Asking(processor, "a picture"))([row])
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.decode(learnt).split() == [*row["text"].split(), "</s>"]
    assert "a picture a" in processor.decode(batch["input_ids"][0]).replace("<image>", "").replace("  ", " ")
    assert torch.equal(
        AskingCollator(processor)([row])["input_ids"], AskingCollator(processor, asking=Asking(processor))([row])["input_ids"]
    )


# ------------------------------------------------------------------------------------------------------------ answering


def test_words_stream_as_generate_writes_them(eyes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eyes[0].generation_config, "min_new_tokens", 6)  # random weights may end at once
    image = rows(1)[0]["image"]
    pieces = list(stream_answer(*eyes, [image], QUESTION, max_new_tokens=12))
    assert pieces[-1] == expected(eyes, image, QUESTION, 12) != ""
    assert all(after.startswith(before) for before, after in zip(pieces, pieces[1:], strict=False))


def test_writing_ends_when_the_reader_goes_and_tells_what_went_wrong(eyes: tuple[Any, Any]) -> None:
    image, before = rows(1)[0]["image"], threading.active_count()
    stream = stream_answer(*eyes, [image], QUESTION, max_new_tokens=12)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(*eyes, [image], QUESTION, max_new_tokens=0))
    stop = StopWriting(eyes[1].tokenizer, first_sentence=True)
    ids = eyes[1].tokenizer(["a square .", "a . square"], return_tensors="pt")["input_ids"]
    assert stop(ids, None).tolist() == [True, False]
    stop.gone.set()
    assert stop(ids, None).tolist() == [True, True]


# ------------------------------------------------------------------------------------------------------------- caption


def test_captions_a_line_each(folder: Path, eyes: tuple[Any, Any], capsys: pytest.CaptureFixture) -> None:
    photos = [str(folder / "photos" / f"{index}.png") for index in range(3)]
    said = [expected(eyes, Image.open(photo), QUESTION, 6) for photo in photos]
    assert len(set(said)) > 1
    asked = ["--model", str(folder / "eyes"), "--question", QUESTION, "--max_new_tokens", "6", "--batch_size", "2"]
    assert main(["caption", *photos, *asked]) == 0
    assert capsys.readouterr().out == "".join(f"{photo}: {text}\n" for photo, text in zip(photos, said, strict=True))
    assert main(["caption", str(folder / "photos"), *asked, "--json", "--blind"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["image"], one["text"]) for one in lines] == list(zip(photos, said, strict=True))
    grey = expected(eyes, Image.new("RGB", (20, 18), (128, 128, 128)), QUESTION, 6)
    assert {one["blind"] for one in lines} == {grey}


def test_photos_that_are_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photo, notes = str(folder / "photos" / "0.png"), str(folder / "photos" / "notes.txt")
    asked = ["--model", str(folder / "eyes"), "--max_new_tokens", "2"]
    assert main(["caption", photo, notes, *asked]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("frozen-prefix caption: ") and "notes.txt" in said.err and not said.out
    assert main(["caption", notes, photo, *asked, "--on_error", "skip"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{photo}: ") and "notes.txt" in said.err
    assert main(["caption", str(tmp_path), *asked]) == 1
    assert f"The folder {tmp_path} holds no images." in capsys.readouterr().err
    assert main(["caption", photo, "--model", str(tmp_path / "gone")]) == 1
    assert "gone" in capsys.readouterr().err


def test_it_runs_as_a_process(folder: Path, eyes: tuple[Any, Any]) -> None:
    photo = folder / "photos" / "0.png"
    arguments = ["caption", str(photo), "--model", str(folder / "eyes"), "--question", QUESTION, "--max_new_tokens", "6"]
    done = fresh_python.run("-m", "modeling_frozen.cli", *arguments, env=fresh_python.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{photo}: {expected(eyes, Image.open(photo), QUESTION, 6)}\n"


# ---------------------------------------------------------------------------------------------------------------- chat


def test_a_chat_in_the_terminal(
    folder: Path, eyes: tuple[Any, Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (str(folder / "photos" / f"{index}.png") for index in (0, 1))
    typed = [QUESTION, f"/image {other}", QUESTION, "/image gone.png", "/what", "/new", "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    assert main(["chat", str(folder / "eyes"), "--image", first, "--max_new_tokens", "6", "--device", "cpu"]) == 0
    shown = [line for line in re.sub(r"^(> )+", "", capsys.readouterr().out, flags=re.MULTILINE).splitlines() if line]
    assert len(shown) == 5 and shown[0].startswith("/image FILE") and shown[4] == shown[0] and "gone.png" in shown[3]
    assert shown[1:3] == [expected(eyes, Image.open(name), QUESTION, 6) or NOTHING for name in (first, other)]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(folder / "eyes"), "--device", "cpu"]) == 0  # Ctrl-D
    assert main(["chat", str(folder / "eyes"), "--image", "gone.png"]) == 1
    assert "gone.png" in capsys.readouterr().err


def test_turns_are_remembered_where_there_are_turns(folder: Path) -> None:
    model, processor = load(folder / "eyes", "cpu")
    photo = rows(1)[0]["image"]
    in_turns(processor)
    talk = Conversation(model, processor, Asking(processor), photo)
    (first,) = list(talk.ask("what", 4))[-1:]
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] and first == talk.turns[1]["content"][0]["text"]
    (second,) = list(talk.ask("that", 4))[-1:]
    prompt = f"[user] <image>what [assistant] {first} [user] that [assistant] "
    assert second == expected((model, processor), photo, prompt, 4)
    talk.start(None)
    assert list(talk.ask("what", 4))[-1:] and "<image>" not in str(talk.turns)
    plain = Conversation(model, processor, Asking(processor, chat=False), photo)
    list(plain.ask(QUESTION, 4))
    assert not plain.turns


def test_the_model_is_in_eval_mode(eyes: tuple[Any, Any]) -> None:
    assert not eyes[0].training and isinstance(eyes[0], AutoModelForImageTextToText._model_mapping[type(eyes[0].config)])
