"""Videos and audio in rows: the ways in which they are written are read, counted and placed as images are, trained on, and
refused by row and field where they are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    load_image_text,
)
from modeling_frozen.data.checking import check_image_text
from tests.helpers.audio_towers import join_with_audio, save_parents_with_audio
from tests.helpers.formats import lay_out
from tests.helpers.tiny import join
from tests.helpers.videos import write_video


# Sample: the format found; of each row images, videos and audio; the order in which they stand in it; what is learnt.
SAMPLES: dict[str, tuple[str, list[tuple[int, int, int]], list[str], list[str]]] = {
    "video_llava.json": (
        "llava", [(0, 1, 0), (0, 1, 0), (1, 0, 0)], ["video", "video", "image"],
        ["black . </s>", "a square . </s>", "red . </s>"],
    ),
    "media_llama_factory.json": (
        "messages", [(1, 2, 0), (0, 0, 1)], ["video image video", "audio"], ["red . </s> black . </s>", "a picture . </s>"],
    ),
    "media_ms_swift.jsonl": ("messages", [(0, 0, 1), (1, 1, 0)], ["audio", "image video"], ["a square . </s>", "blue . </s>"]),
    "media_openai.jsonl": ("messages", [(1, 1, 0), (0, 0, 1)], ["video image", "audio"], ["red . </s>", "green . </s>"]),
    "video_captions.jsonl": (
        "captions", [(0, 1, 0), (0, 1, 0)], ["video", "video"], ["that is black . </s>", "a square . </s>"],
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "data")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parents_with_audio(tmp_path_factory.mktemp("parents"))


def counts(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(len(row.get(name) or ()) for name in ("images", "videos", "audios"))


def order(processor: Any, ids: list[int]) -> str:
    """The media of a row as they stand in it."""
    names = {getattr(processor, f"{modality}_token_id"): modality for modality in processor.tokens}
    lengths = {
        "image": processor.prefix_length,
        "video": processor.num_tokens("video"),
        "audio": processor.num_tokens("audio"),
    }
    found = [names[token] for token in ids if token in names]
    kept = []
    while found:
        kept.append(found[0])
        found = found[lengths[found[0]] :]
    return " ".join(kept)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_sample_is_read_and_trained_on(name: str, streaming: bool, folder: Path, parents: Path, tmp_path: Path) -> None:
    format, expected, places, said = SAMPLES[name]
    options = {"streaming": True, "buffer_size": 0} if streaming else {}
    rows = load_image_text(folder / name, **options)
    if not streaming:
        assert rows.info.description.endswith(f"read as {format}")
        files = [file for row in rows for column in ("videos", "audios") for file in row.get(column) or ()]
        assert files and all(set(file) == {"bytes", "path"} and Path(file["path"]).is_file() for file in files)
    assert list(map(counts, rows)) == expected
    if any(sounds for _, _, sounds in expected):
        pytest.importorskip("soundfile")
    model, processor = join_with_audio(parents)
    collator = DataCollatorForFrozenPrefix(processor)
    batch = collator(list(rows))
    assert [order(processor, ids) for ids in batch["input_ids"].tolist()] == places
    learnt = [processor.tokenizer.convert_ids_to_tokens(row[row != -100].tolist()) for row in batch["labels"]]
    assert list(map(" ".join, learnt)) == said
    assert len(batch.get("pixel_values_videos", ())) == sum(films for _, films, _ in expected)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "connector" in key}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)


TWINS = [
    ("video_llava.json", (0, "video"), "media/gone.gif", r"row 0 \(id 'v0'\): field 'video' names a video.*not there.*gone"),
    ("video_llava.json", (1, "conversations", 0, "value"), "<video> <video> ?", r"'v1'\): .* 2 <video> but 'video' has 1"),
    ("video_llava.json", (1, "video"), 7, r"row 1 \(id 'v1'\): field 'video' must be a path.*got 7"),
    ("video_llava.json", (1, "video"), "https://example.org/a.mp4", "field 'video' must be a video's file or bytes"),
    ("media_llama_factory.json", (0, "videos"), ["media/dark.gif"], "row 0: .* holds 2 <video> but 'videos' has 1"),
    ("media_llama_factory.json", (0, "images"), [], "row 0: field 'messages' holds 1 <image> but 'images' has 0"),
    ("media_llama_factory.json", (1, "audios", 0), "gone.wav", "row 1: field 'audios' names an audio file that is not there"),
    ("media_ms_swift.jsonl", (0, "messages", 0, "content"), "<audio><audio>", "row 0: .* holds 2 <audio> but 'audios' has 1"),
    ("media_ms_swift.jsonl", (0, "audios"), [["media/tone.wav"]], "row 0: field 'audios' must be a path.*waveform"),
    ("media_openai.jsonl", (0, "messages", 0, "content", 0, "video"), "gone.gif", "row 0: field 'messages' names a video"),
    ("media_openai.jsonl", (0, "messages", 0, "content", 0), {"type": "video"}, "holds 1 <video> but 'videos' has 0 videos"),
    ("video_captions.jsonl", (1, "caption"), "<video> <video>", "row 1: field 'caption' holds 2 <video> but the row has 1"),
    ("video_captions.jsonl", (1, "video"), {"frames": 3}, "row 1: field 'video' must be a path"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "value", "message"), TWINS)
def test_a_malformed_twin_is_refused_by_row_and_field(
    name: str, keys: tuple[Any, ...], value: Any, message: str, folder: Path
) -> None:
    text = (folder / name).read_text()
    content = list(map(json.loads, text.splitlines())) if name.endswith(".jsonl") else json.loads(text)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / name).write_text("\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_image_text(folder / name)
    assert len(load_image_text(folder / name, on_error="skip")) == len(content) - 1


def test_video_and_audio_in_angle_brackets_are_text_where_a_row_has_none() -> None:
    turns = [{"from": "human", "value": "what does <video> mean in HTML, and <audio> ?"}, {"from": "gpt", "value": "a film"}]
    with_image = [{"from": "human", "value": "<image> ?"}, {"from": "gpt", "value": "b"}]
    image = Image.new("RGB", (4, 4))
    rows = load_image_text([{"image": None, "conversations": turns}, {"image": image, "conversations": with_image}])
    assert rows[0]["messages"][0]["content"] == [{"type": "text", "text": turns[0]["value"]}]


def test_one_video_without_a_mark_stands_first(folder: Path, parents: Path) -> None:
    _, processor = join_with_audio(parents)
    rows = load_image_text(
        [
            {"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red ."}],
             "videos": "media/dark.gif", "images": "images/red.png"},
            {"messages": [{"role": "user", "content": "what <image> ?"}, {"role": "assistant", "content": "red ."}],
             "videos": ["media/dark.gif"], "images": ["images/red.png"]},
        ],
        image_root=folder,
    )  # fmt: skip
    batch = DataCollatorForFrozenPrefix(processor)(list(rows))
    assert [order(processor, ids) for ids in batch["input_ids"].tolist()] == ["image video", "video image"]
    plain = {"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red ."}]}
    batch = DataCollatorForFrozenPrefix(processor)(
        [{**plain, "video": str(folder / "media/dark.gif")}]
    )  # of a dataset as it is
    assert order(processor, batch["input_ids"][0].tolist()) == "video" and len(batch["pixel_values_videos"]) == 1


def test_a_video_that_can_not_be_opened_is_left_out_or_named(folder: Path, parents: Path) -> None:
    _, processor = join_with_audio(parents)
    (folder / "media" / "dark.gif").write_bytes(b"no film")
    rows = list(load_image_text(folder / "video_llava.json"))
    with pytest.raises(ValueError, match=r"Can't open video 0 of row 0 \(id 'v0'\)"):
        DataCollatorForFrozenPrefix(processor)(rows)
    collator = DataCollatorForFrozenPrefix(processor, on_error="skip")
    assert len(collator(rows)["labels"]) == 2 and collator.tally.counts() == {"rows left out": 1}
    assert not check_image_text(folder / "video_llava.json").fails
    check = check_image_text(folder / "video_llava.json", open_images=True)
    assert check.broken.count == 1 and "a video of" in check.broken.first[0]
    assert "  with 1 videos: 2\n" in str(check) and "user: <video>\nwhat is that ?\nassistant: «black .»" in str(check)


def test_a_model_of_images_alone_refuses_videos_in_turns(folder: Path, tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    rows = load_image_text(folder / "video_llava.json")
    with pytest.raises(ValueError, match=r"Row 0 has video in its turns, and the processor takes \['image'\] alone"):
        DataCollatorForFrozenPrefix(processor)(list(rows))


def test_an_mp4_is_read_at_its_sampled_frames(folder: Path, parents: Path) -> None:
    _, processor = join_with_audio(parents)
    write_video(folder / "film.mp4", list(range(20, 220, 5)))
    rows = load_image_text([{"video": "film.mp4", "text": "a square ."}], image_root=folder)
    film = DataCollatorForFrozenPrefix(processor)(list(rows))["pixel_values_videos"][0]
    kept = (folder / "film.mp4").read_bytes()
    again = DataCollatorForFrozenPrefix(processor)([{"videos": [{"bytes": kept, "path": None}], "text": "a square ."}])
    assert torch.equal(film, again["pixel_values_videos"][0]) and film[0].mean() < film[1].mean()


@pytest.mark.parametrize(("kind", "rate"), [("wav", 44100), ("flac", 8000), ("mp3", 22050)])
def test_sound_files_of_any_kind_and_rate(kind: str, rate: int, folder: Path, parents: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    _, processor = join_with_audio(parents)
    soundfile.write(folder / f"tone.{kind}", np.sin(np.arange(rate // 4) * 0.1), rate)
    rows = load_image_text([{"audio": f"tone.{kind}", "prompt": "what ?", "answer": "red ."}], image_root=folder)
    batch = DataCollatorForFrozenPrefix(processor)(list(rows))
    assert batch["input_features"].shape[-1] == pytest.approx(4000, abs=1200)  # a quarter of a second; mp3 pads
    held = Dataset.from_list([{"audio": str(folder / f"tone.{kind}"), "text": "red ."}]).cast_column("audio", Audio())
    again = DataCollatorForFrozenPrefix(processor)(list(load_image_text(held)))
    assert torch.equal(again["input_features"], batch["input_features"])


def test_waveforms_and_frames_in_memory_are_streamed_alone(parents: Path) -> None:
    _, processor = join_with_audio(parents)
    rows = [{"audio": {"array": np.zeros(1600, dtype=np.float32), "sampling_rate": 16000}, "text": "red ."}] * 2
    with pytest.raises(ValueError, match="row 0: field 'audios' holds frames or a waveform"):
        load_image_text(rows)
    batch = DataCollatorForFrozenPrefix(processor)(list(load_image_text(rows, streaming=True)))
    assert batch["input_features"].shape == (2, 1600)
