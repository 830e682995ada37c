"""Each format that image-text data is kept in: its sample is read, trained on, and what is learnt is what it says; a malformed
twin is refused by row and field."""

import copy
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, cache_vision_features, load_image_text
from modeling_frozen.data.columns import as_list
from modeling_frozen.data.image_reading import inner_feature
from modeling_frozen.evaluation import evaluate
from modeling_frozen.processors import load_rgb_image
from tests.helpers.formats import lay_out
from tests.helpers.tiny import COLOURS, join


BLUE, RED = "that is blue . </s>", "a red square . </s>"
IMAGES = {"image_root": "images"}
# Sample: source, options, the format found, images of each row, what of each row is learnt.
SAMPLES: dict[str, tuple[Any, dict[str, Any], str, list[int], list[str]]] = {
    "captions": ("captions.jsonl", {}, "captions", [1, 1], [RED, BLUE]),
    "question and answer": ("question_answer.json", {}, "question_answer", [1, 1], ["red . </s>", "blue . </s>"]),
    "LLaVA": ("llava.json", {}, "llava", [1, 2, 0], ["red . </s> a square . </s>", "red blue . </s>", "a colour . </s>"]),
    "ShareGPT": ("sharegpt.json", {}, "sharegpt", [2, 0], ["green . </s> black . </s>", "a colour . </s>"]),
    "messages of TRL": ("messages_trl.jsonl", {}, "messages", [1, 1], ["red . </s>", "blue . </s>"]),
    "messages of LLaMA-Factory": (
        "messages_llama_factory.json", {}, "messages", [1, 1], ["a red square . </s> red . </s>", "blue . </s>"],
    ),
    "messages of ms-swift": ("messages_ms_swift.jsonl", {}, "messages", [2, 1], ["a square . </s>", "green . </s>"]),
    "messages of OpenAI": ("messages_openai.jsonl", {}, "messages", [1, 1], ["red . </s>", "that is black . </s>"]),
    "prompt and completion": ("prompt_completion.jsonl", {}, "prompt_completion", [1, 1], ["red . </s>", "blue . </s>"]),
    "chats of prompt and completion": (
        "prompt_completion_chat.jsonl", {}, "prompt_completion", [1, 1], ["red . </s>", "blue . </s>"],
    ),
    "The Cauldron": ("cauldron.jsonl", {}, "cauldron", [2, 1], ["red . </s> blue . </s>", "a green square . </s>"]),
    "imagefolder": ("imagefolder", {}, "imagefolder, rows of captions", [1, 1], [RED, BLUE]),
    "COCO captions": ("coco.json", IMAGES, "coco, rows of captions", [1, 1], [RED, BLUE]),
    "Karpathy": ("karpathy.json", {**IMAGES, "split": "train"}, "karpathy, rows of captions", [1, 1], [RED, BLUE]),
    "VQA v2": (
        ["vqav2_questions.json", "vqav2_annotations.json"], IMAGES, "vqav2, rows of question_answer", [1, 1],
        ["red </s>", "blue </s>"],
    ),
    "WebDataset": ("webdataset-*.tar", {}, "webdataset, rows of captions", [1, 1], [RED, BLUE]),
    "Hub captions": ("hub_captions.jsonl", {}, "captions", [1, 1], [RED, BLUE]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return lay_out(tmp_path / "data")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def load(folder: Path, source: Any, **options: Any) -> Any:
    options = {key: folder / value if key == "image_root" else value for key, value in options.items()}
    paths = [str(folder / one) for one in source] if isinstance(source, list) else str(folder / source)
    return load_image_text(paths, **options)


def learnt(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    return [
        " ".join(processor.tokenizer.convert_ids_to_tokens([i for i in row if i != -100])) for row in batch["labels"].tolist()
    ]


def opened(row: dict[str, Any]) -> list[Any]:
    return row["images"] if "images" in row else [row["image"]]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_read_and_trained_on(folder: Path, parents: Path, name: str, tmp_path: Path) -> None:
    source, options, format, images, expected = SAMPLES[name]
    rows = load(folder, source, **options)
    assert rows.info.description.endswith(f"read as {format}")
    assert [len(opened(row)) for row in rows] == images
    assert all(set(image) == {"bytes", "path"} for row in rows for image in opened(row))  # none is opened
    model, processor = join(parents)
    collator = DataCollatorForFrozenPrefix(processor)
    batch = collator(list(rows))
    assert learnt(processor, batch) == expected
    assert len(batch.get("image_index", batch["pixel_values"])) == sum(images)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    before = copy.deepcopy(model.model.connector.state_dict())
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.model.connector.state_dict().items())


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_as_a_stream_is_the_same(folder: Path, name: str) -> None:
    source, options, *_ = SAMPLES[name]
    rows, stream = load(folder, source, **options), load(folder, source, **options, streaming=True, buffer_size=0)
    kinds = [key for key in ("messages", "prompt", "completion", "text") if key in rows.column_names]

    def plain(row: dict[str, Any]) -> Any:
        turns = [{**turn, "loss": turn.get("loss")} for turn in row.get("messages", [])]
        images = [load_rgb_image(image).tobytes() for image in opened(row)]
        return images, turns, [as_list(row[key]) for key in kinds if key != "messages"]

    assert list(map(plain, stream)) == list(map(plain, rows))


def turns(*contents: Any, names: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ("user", "assistant")) -> Any:
    return [{names[0]: roles[number % 2], names[1]: content} for number, content in enumerate(contents)]


IMAGE, ITEM = "images/red.png", {"type": "image"}
ASKED = [ITEM, {"type": "text", "text": "what ?"}]
FROM = {"names": ("from", "value"), "roles": ("human", "gpt")}
# A row as the documentation of each package has it: how many images, and what is learnt of it.
DOCUMENTED: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "TRL: messages, image": ({"image": IMAGE, "messages": turns(ASKED, [{"type": "text", "text": "red"}])}, 1, ["red"]),
    "TRL: messages, images": (
        {"images": [IMAGE] * 2, "messages": turns([ITEM, *ASKED], [{"type": "text", "text": "a"}], [ASKED[1]], [
            {"type": "text", "text": "b"}])}, 2, ["a", "b"],
    ),
    "TRL: content of strings": ({"images": [IMAGE], "messages": turns("what ?", "red")}, 1, ["red"]),
    "TRL: no image": ({"images": [], "messages": turns("what ?", "red")}, 0, ["red"]),
    "TRL: prompt and completion": (
        {"images": [IMAGE], "prompt": turns(ASKED), "completion": [{"role": "assistant", "content": "red"}]}, 1, ["red"],
    ),
    "LLaMA-Factory: messages": ({"messages": turns("<image>who ?", "a", "and ?", "b"), "images": [IMAGE]}, 1, ["a", "b"]),
    "LLaMA-Factory: sharegpt": (
        {"conversations": turns("<image>who ?", "a", **FROM), "images": [IMAGE], "system": "be brief"}, 1, ["a"],
    ),
    "LLaMA-Factory: sharegpt with tools": (
        {"conversations": [
            {"from": "human", "value": "<image>who ?"}, {"from": "function_call", "value": "look"},
            {"from": "observation", "value": "seen"}, {"from": "gpt", "value": "a"},
        ], "images": [IMAGE]}, 1, ["look", "a"],
    ),
    "LLaMA-Factory: alpaca": ({"instruction": "<image>say", "input": "it", "output": "red", "images": [IMAGE]}, 1, ["red"]),
    "LLaMA-Factory: a string of images": ({"messages": turns("<image>who ?", "a"), "images": IMAGE}, 1, ["a"]),
    "ms-swift: messages": (
        {"messages": [{"role": "system", "content": "be brief"}, *turns("<image><image>both ?", "no")], "images": [IMAGE] * 2},
        2, ["no"],
    ),
    "ms-swift: loss by turn": (
        {"messages": [turns("<image>?")[0], {"role": "assistant", "content": "a", "loss": False}, *turns("and ?", "b")],
         "images": [IMAGE]}, 1, ["b"],
    ),
    "ms-swift: query and response": ({"query": "<image>what ?", "response": "red", "images": [IMAGE]}, 1, ["red"]),
    "ms-swift: image_url": (
        {"messages": turns([{"type": "image_url", "image_url": IMAGE}, {"type": "text", "text": "?"}], "red")}, 1, ["red"],
    ),
    "ms-swift: an image as bytes": (
        {"messages": turns("<image>?", "red"), "images": [{"bytes": b"\x89PNG", "path": None}]}, 1, ["red"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_rows_that_other_packages_document_are_read(name: str, folder: Path) -> None:
    row, images, said = DOCUMENTED[name]
    with_image = {"images": [IMAGE], "messages": turns("<image>", "x")} if "messages" in row else row  # a set has some
    read = load_image_text([row, with_image], image_root=folder)[0]
    assert len(read["images"]) == images
    chat = read.get("messages", [])
    learnt = [turn for turn in chat if turn["role"] == "assistant" and turn.get("loss") is not False]
    texts = ["".join(item["text"] or "" for item in turn["content"]) for turn in learnt]
    assert (texts if chat else [read["completion"]]) == said
    marks = sum(item["type"] == "image" for turn in chat for item in turn["content"])
    assert not chat or marks == images or name == "TRL: content of strings"  # there the processor puts it


# ------------------------------------------------------------------------------------------------------ malformed twins
def edit(*keys: Any, to: Any) -> Callable[[list[Any]], None]:
    def change(rows: Any) -> None:
        for key in keys[:-1]:
            rows = rows[key]
        rows[keys[-1]] = to

    return change


TWINS: list[tuple[str, Callable[[list[Any]], None], str]] = [
    (
        "captions.jsonl",
        edit(1, "text", to="<image> a <image>"),
        r"row 1: field 'text' holds 2 <image> but the row has 1 images",
    ),
    ("captions.jsonl", edit(1, "image", to="gone.png"), r"row 1: field 'image' .*not there.*gone\.png"),
    ("captions.jsonl", edit(1, "text", to=4), r"row 1: field 'text' must be a string, got 4"),
    ("captions.jsonl", edit(1, "text", to=["a", 4]), r"row 1: field 'text\[1\]' must be a string, got 4"),
    ("captions.jsonl", edit(1, "text", to=" "), "row 1: field 'text' is empty"),
    (
        "captions.jsonl",
        edit(1, to={"image": "images/red.png", "question": "a", "answer": "b"}),
        "row 1: field 'text'.*is not there",
    ),
    ("captions.jsonl", edit(1, to={"text": "a"}), "row 1: field 'image'.*is not there"),
    (
        "question_answer.json",
        edit(1, "question", to="<image> <image>"),
        r"row 1 \(id 'q1'\): field 'question' holds 2 <image>",
    ),
    ("question_answer.json", edit(1, "image", to="gone.png"), r"row 1 \(id 'q1'\): field 'image' .*not there"),
    ("question_answer.json", edit(1, "question", to=4), r"row 1 \(id 'q1'\): field 'question' must be a string"),
    ("question_answer.json", edit(1, "answer", to={"a": 1}), r"row 1 \(id 'q1'\): field 'answer' is empty"),
    ("question_answer.json", edit(1, "image", to=7), r"row 1 \(id 'q1'\): field 'image' must be a path"),
    (
        "llava.json",
        edit(1, "conversations", 0, "value", to="<image>"),
        r"row 1 \(id 1\): field 'conversations' holds 1 <image> but 'image' has 2",
    ),
    (
        "llava.json",
        edit(1, "conversations", 0, "value", to="what ?"),
        r"row 1 \(id 1\): field 'conversations' holds 0 <image> but 'image' has 2",
    ),
    (
        "llava.json",
        edit(2, "conversations", 0, "value", to="<image>"),
        r"row 2 \(id 'text'\): field 'conversations' holds 1 <image> but .* 0 images",
    ),
    ("llava.json", edit(1, "image", 1, to="gone.png"), r"row 1 \(id 1\): field 'image' .*not there.*gone\.png"),
    ("llava.json", edit(0, "image", to={"a": 1}), r"row 0 \(id '000'\): field 'image' must be a path"),
    (
        "llava.json",
        edit(1, "conversations", 0, "value", to=3),
        r"row 1 \(id 1\): field 'conversations\[0\]\.value' must be a string",
    ),
    (
        "llava.json",
        edit(1, "conversations", 1, "from", to="robot"),
        r"field 'conversations\[1\]\.from' must be one of .*'robot'",
    ),
    ("llava.json", edit(1, "conversations", to="a"), r"row 1 \(id 1\): field 'conversations' must be a list of turns"),
    (
        "llava.json",
        edit(1, "conversations", 1, "value", to=""),
        r"row 1 \(id 1\): field 'conversations' has no assistant turn",
    ),
    (
        "sharegpt.json",
        edit(0, "images", to=["images/red.png"]),
        "row 0: field 'conversations' holds 2 <image> but 'images' has 1",
    ),
    ("sharegpt.json", edit(0, "images", 0, to="gone.png"), "row 0: field 'images' .*not there"),
    ("sharegpt.json", edit(0, "system", to=4), "row 0: field 'system' must be a string"),
    ("sharegpt.json", edit(0, "conversations", 1, to="x"), r"row 0: field 'conversations\[1\]' must be a turn"),
    ("messages_trl.jsonl", edit(0, "images", to=[]), "row 0: field 'messages' holds 1 <image> but 'images' has 0"),
    ("messages_trl.jsonl", edit(0, "images", 0, to="gone.png"), "row 0: field 'images' .*not there"),
    (
        "messages_trl.jsonl",
        edit(0, "messages", 0, "content", 0, "type", to="film"),
        r"field 'messages\[0\]\.content\[0\]\.type' must be",
    ),
    (
        "messages_trl.jsonl",
        edit(0, "messages", 0, "content", 1, "text", to=2),
        r"field 'messages\[0\]\.content\[1\]\.text' must be a string",
    ),
    (
        "messages_llama_factory.json",
        edit(1, "images", to=["images/red.png"] * 2),
        "row 1: field 'messages' holds 1 <image> but 'images' has 2",
    ),
    (
        "messages_llama_factory.json",
        edit(1, "messages", 1, "content", to=None),
        r"row 1: field 'messages\[1\]\.content' must be a string or a list",
    ),
    (
        "messages_ms_swift.jsonl",
        edit(1, "messages", 3, "loss", to="no"),
        r"row 1: field 'messages\[3\]\.loss' must be true or false",
    ),
    ("messages_ms_swift.jsonl", edit(1, "messages", 3, "loss", to=False), "row 1: field 'messages' has no assistant turn"),
    (
        "messages_openai.jsonl",
        edit(0, "messages", 0, "content", 1, "image_url", "url", to="gone.png"),
        "row 0: field 'messages' .*not there",
    ),
    ("prompt_completion.jsonl", edit(1, "prompt", to="<image> <image>"), "row 1: field 'prompt' holds 2 <image>"),
    ("prompt_completion.jsonl", edit(1, "image", to="gone.png"), "row 1: field 'image' .*not there"),
    ("prompt_completion.jsonl", edit(1, "completion", to=3), "row 1: field 'prompt' must be a string, or a list of turns"),
    (
        "prompt_completion_chat.jsonl",
        edit(1, "completion", to="red"),
        "row 1: field 'completion' must be a string, or a list of turns",
    ),
    (
        "prompt_completion_chat.jsonl",
        edit(1, to={"image": "images/red.png", "prompt": "a", "completion": "b"}),
        "row 1: field 'messages' is what the rows before",
    ),
    ("cauldron.jsonl", edit(1, "images", to=["gone.png"]), "row 1: field 'images' .*not there"),
    ("cauldron.jsonl", edit(1, "texts", 0, "assistant", to=3), r"row 1: field 'texts\[0\]\.assistant' must be a string"),
    ("cauldron.jsonl", edit(0, "texts", 0, "user", to="<image> a"), "row 0: field 'texts' holds 1 <image> but 'images' has 2"),
    ("cauldron.jsonl", edit(1, "texts", to="a"), "row 1: field 'texts' must be a list of turns"),
    ("hub_captions.jsonl", edit(1, "caption_1", to=4), "row 1: field 'caption_1' must be a string"),
    ("hub_captions.jsonl", edit(1, "image", to="gone.png"), "row 1: field 'image' .*not there"),
    ("coco.json", edit("images", 0, "file_name", to="gone.png"), r"row 0 \(image_id 7\): field 'image' .*not there"),
    ("coco.json", edit("annotations", 0, "caption", to=5), r"row 1 \(image_id 3\): field 'captions\[0\]' must be a string"),
    (
        "coco.json",
        edit("annotations", 0, "image_id", to=99),
        r"coco\.json has captions of images that it does not list: \[99\]",
    ),
    (
        "karpathy.json",
        edit("images", 1, "sentences", 0, "raw", to=3),
        r"row 1 \(image_id 3\): field 'sentences\[0\]' must be a string",
    ),
    ("karpathy.json", edit("images", 1, "filename", to="gone.png"), r"row 1 \(image_id 3\): field 'image' .*not there"),
]


@pytest.mark.parametrize(("name", "change", "message"), TWINS)
def test_a_malformed_twin_is_refused_by_row_and_field(
    folder: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    text = (folder / name).read_text()
    content = list(map(json.loads, text.splitlines())) if name.endswith(".jsonl") else json.loads(text)
    change(content)
    lines = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content)
    (folder / name).write_text(lines)
    options = {"image_root": folder / "images"} if name in ("coco.json", "karpathy.json") else {}
    options |= {"split": "train"} if name == "karpathy.json" else {}
    with pytest.raises(ValueError, match=message):
        load_image_text(folder / name, **options)
    if "row" in message:
        left = load_image_text(folder / name, **options, on_error="skip") if name != "sharegpt.json" else None
        assert left is None or len(left) == len(content if isinstance(content, list) else [0, 1]) - 1


def test_malformed_twins_of_what_is_not_json(folder: Path) -> None:
    (folder / "imagefolder" / "metadata.csv").rename(folder / "imagefolder" / "metadata1.csv")
    with pytest.raises(ValueError, match=r"no metadata.csv.*exactly so called.*metadata1\.csv"):
        load_image_text(folder / "imagefolder", format="imagefolder")
    questions, answers = folder / "vqav2_questions.json", folder / "vqav2_annotations.json"
    content = json.loads(answers.read_text())
    answers.write_text(json.dumps({"annotations": content["annotations"][1:]}))
    with pytest.raises(ValueError, match=r"no answers to 1 questions, the first \[22\]"):
        load_image_text([questions, answers], image_root=folder / "images")
    content["annotations"][0]["multiple_choice_answer"] = 5
    answers.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"row 1 \(question_id 22\): field 'multiple_choice_answer' must be a string, got 5"):
        load_image_text([questions, answers], image_root=folder / "images")
    with pytest.raises(ValueError, match=r"row 0 \(question_id 11\): field 'image' .*COCO_val2014_000000000001\.jpg"):
        load_image_text([questions, answers])
    with tarfile.open(folder / "bare.tar", "w") as tar:
        tar.add(folder / "images" / "red.png", "0.png")
    with pytest.raises(ValueError, match=r"bare\.tar: row 0 \(__key__ '0'\): field 'text'.*is not there"):
        load_image_text(folder / "bare.tar", format="captions")


# ---------------------------------------------------------------------------------------------------------------- sources
def test_what_can_not_be_found_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json is not there"):
        load_image_text(folder / "gone.json")
    with pytest.raises(FileNotFoundError, match=r"No file matches .*none-\*\.tar"):
        load_image_text(folder / "none-*.tar")
    with pytest.raises(ValueError, match="format='lava' is unknown: choose 'auto' or one of"):
        load_image_text(folder / "llava.json", format="lava")
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\]: name one by `split=`"):
        load_image_text(folder / "karpathy.json", image_root=folder / "images")
    with pytest.raises(ValueError, match="'dev' is none of them"):
        load_image_text(folder / "karpathy.json", image_root=folder / "images", split="dev")
    with pytest.raises(ValueError, match=r"row 0|no known format has the fields \['picture', 'title'\]"):
        load_image_text([{"picture": "a.png", "title": "x"}])
    with pytest.raises(ValueError, match="No row of the list has an image"):
        load_image_text(
            [{"imgs": ["a.png"], "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
        )
    monkeypatch.chdir(folder)
    assert len(load_image_text("llava.json")) == 3
    (folder / "lines.json").write_text((folder / "captions.jsonl").read_text())
    assert len(load_image_text("lines.json")) == 2
    (folder / "bad.jsonl").write_text('{"image": "images/red.png", "text": "a"}\n{"image": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl: row 1: .*line 2 is not JSON"):
        load_image_text("bad.jsonl")
    assert len(load_image_text("bad.jsonl", on_error="skip")) == 1


@pytest.mark.parametrize("place", ["", "data"])
def test_files_of_a_folder_are_of_the_splits_in_their_names(folder: Path, place: str) -> None:
    (folder / "set" / place).mkdir(parents=True, exist_ok=True)
    for name, texts in {"train-00000-of-00002": "ab", "train-00001-of-00002": "c", "val-00000-of-00001": "d"}.items():
        rows = [{"image": Image.new("RGB", (8, 8)), "text": text} for text in texts]
        Dataset.from_list(rows).to_parquet(folder / "set" / place / f"{name}.parquet")
    assert load_image_text(folder / "set", split="train")["text"] == ["a", "b", "c"]
    assert [row["text"] for row in load_image_text(folder / "set", split="validation", streaming=True)] == ["d"]
    with pytest.raises(ValueError, match=r"has the splits \['train', 'validation'\]: name one by `split=`"):
        load_image_text(folder / "set")


def test_a_table_beside_the_folder_of_data_is_no_part_of_the_set(folder: Path) -> None:
    """As sets of the Hub have one of who took the photos."""
    home = folder / "credited"
    (home / "data").mkdir(parents=True)
    (home / "CREDITS.csv").write_text("photo,by\n0,me\n", encoding="utf-8")
    for split, text in (("train", "a red square ."), ("test", "a blue square .")):
        rows = Dataset.from_list([{"image": Image.new("RGB", (8, 8)), "text": text}])
        rows.to_parquet(home / "data" / f"{split}-00000-of-00001.parquet")
    assert load_image_text(str(home), split="test")["text"] == ["a blue square ."]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]: name one by `split=`"):
        load_image_text(str(home))


def test_karpathys_restval_is_train(folder: Path) -> None:
    options: dict[str, Any] = {"image_root": folder / "images"}
    assert load_image_text(folder / "karpathy.json", split="train", **options)["image_id"] == [7, 3]
    assert load_image_text(folder / "karpathy.json", split="test", **options)["text"] == ["that is green ."]


def test_vqa_is_joined_on_its_questions(folder: Path) -> None:
    rows = load(folder, *SAMPLES["VQA v2"][:1], image_root="images")
    assert rows["question_id"] == [11, 22] and rows["completion"] == ["red", "blue"]
    assert rows["answers"] == [["red", "red"], ["blue", "black"]]


def test_datasets_keep_their_images_where_they_are(folder: Path, parents: Path) -> None:
    _, processor = join(parents)
    images = [Image.new("RGB", (20, 18), COLOURS[name]) for name in ("red", "blue")]
    texts = [{"user": "what colour ?", "assistant": f"{name} ."} for name in ("red", "blue")]
    made = Dataset.from_list([{"images": [images[0], images[1]], "texts": texts}, {"images": [], "texts": texts[:1]}])
    # As files have it; datasets 3 makes another type of a list of images.
    made = made.cast_column("images", datasets.Sequence(datasets.Image()))
    rows = load_image_text(made)
    assert inner_feature(rows.features["images"]).decode is False and rows[1]["images"] == []
    buffers = [[buffer for buffer in one.data.column("images").chunk(0).buffers() if buffer] for one in (rows, made)]
    addresses = [max(own, key=lambda buffer: buffer.size).address for own in buffers]
    assert addresses[0] == addresses[1]  # of the bytes: the longest
    batch = DataCollatorForFrozenPrefix(processor)(list(rows))
    assert learnt(processor, batch) == ["red . </s> blue . </s>", "red . </s>"]
    singles = Dataset.from_list([{"image": image, "caption": "a square ."} for image in images])
    singles.save_to_disk(folder / "saved")
    DatasetDict({"train": singles, "test": singles.select([1])}).save_to_disk(folder / "splits")
    singles.to_parquet(folder / "rows.parquet")
    (folder / "repository" / "data").mkdir(parents=True)  # as repositories of the Hub are laid out
    singles.to_parquet(folder / "repository" / "data" / "train-00000-of-00001.parquet")
    singles.select([1]).to_parquet(folder / "repository" / "data" / "test-00000-of-00001.parquet")
    for source, options in (
        (singles, {}),
        (folder / "saved", {}),
        (folder / "splits", {"split": "train"}),
        (folder / "rows.parquet", {}),
        (folder / "repository", {"split": "train"}),
    ):
        rows = load_image_text(source, **options)
        assert rows.column_names == ["image", "text"] and rows["text"] == ["a square ."] * 2
        assert learnt(processor, DataCollatorForFrozenPrefix(processor)(list(rows))) == ["a square . </s>"] * 2
    picked = load_image_text(singles.select([1, 0, 1]))
    assert [row["image"]["bytes"] for row in picked] == [rows[i]["image"]["bytes"] for i in (1, 0, 1)]
    asked = Dataset.from_list(
        [{"image": images[0], "questions": ["what ?", "what colour ?"], "answers": ["a square .", "red ."]}]
    )
    several = load_image_text(asked)
    assert several["prompt"] == ["what ?", "what colour ?"] and several["completion"] == ["a square .", "red ."]
    assert several[0]["image"] == several[1]["image"]
    assert load_from_disk(str(folder / "saved")).column_names == ["image", "caption"]


@pytest.mark.parametrize("kind", ["a struct", "bytes", "lists of structs", "one by its path"])
def test_images_of_parquet_files_without_metadata_stay_in_their_file(kind: str, folder: Path, tmp_path: Path) -> None:
    """As pandas or polars write them; copied, the images of a large set would fill the memory."""
    data = {name: (folder / "images" / f"{name}.png").read_bytes() for name in ("red", "blue")}
    rows = [{"image": {"bytes": one, "path": None}, "text": name} for name, one in data.items()]
    if kind == "bytes":
        rows = [{**row, "image": row["image"]["bytes"]} for row in rows]
    elif kind == "lists of structs":
        rows = [{"images": [row["image"]] * (2 - index), "text": row["text"]} for index, row in enumerate(rows)]
    elif kind == "one by its path":
        rows[1]["image"] = {"bytes": None, "path": "blue.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = load_image_text(tmp_path / "rows.parquet", image_root=folder / "images")
    images = [as_list(row.get("image", row.get("images"))) for row in read]
    assert [len(one) for one in images] == ([2, 1] if kind == "lists of structs" else [1, 1])
    assert [load_rgb_image(one[0]).getpixel((0, 0)) for one in images] == [COLOURS["red"], COLOURS["blue"]]
    assert bool(read.cache_files) == (kind != "one by its path")  # mapped; a path is looked for below the folder


def test_images_of_every_kind_in_a_list_of_rows(folder: Path) -> None:
    path = folder / "images" / "red.png"
    kinds = [path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path), [str(path)]]
    rows = load_image_text([{"image": one, "text": "a"} for one in kinds])
    from modeling_frozen.processors import load_rgb_image

    assert [load_rgb_image(row["images"][0]).getpixel((0, 0)) for row in rows] == [COLOURS["red"]] * len(kinds)
    far = load_image_text([{"image": "https://example.org/a.png", "text": "a"}])
    assert far[0]["images"] == [{"bytes": None, "path": "https://example.org/a.png"}]


def test_rows_are_read_alike_by_store_and_evaluation(folder: Path, parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    for name in ("LLaVA", "captions", "VQA v2", "imagefolder"):
        source, options, *_ = SAMPLES[name]
        rows = load(folder, source, **options)
        direct = DataCollatorForFrozenPrefix(processor)(list(rows))
        stored = cache_vision_features(rows, model, processor, cache_dir=tmp_path / name)
        batch = DataCollatorForFrozenPrefix(processor)(list(stored))
        assert torch.equal(batch["labels"], direct["labels"]) and "vision_features" in batch
        result = evaluate(
            model, processor, rows, task="vqa", kinds=("sighted", "language_model"), max_new_tokens=2, num_resamples=0
        )
        assert len(result.predictions["sighted"]) == len(rows)
    rows = load(folder, "llava.json")
    result = evaluate(model, processor, rows, task="vqa", kinds=("sighted",), max_new_tokens=2, num_resamples=0)
    assert result.references == [["a square ."], ["red blue ."], ["a colour ."]]
    assert result.prompts[0].endswith("what is that ?\nAssistant:") and result.prompts[0].count("<image>") == 1
