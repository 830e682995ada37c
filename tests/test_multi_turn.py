"""Chats of many turns: which are learnt, where they are cut, and rows that are left out because an image can't be opened."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, load_image_text
from modeling_frozen.training.skipped_rows import SkippedRowsCallback
from tests.helpers.formats import lay_out
from tests.helpers.processors import CHATML, make, picture, word_tokenizer
from tests.helpers.tiny import join


# As Idefics', SmolVLM's and others' templates: content is a list, or nothing is printed of it.
LISTS_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for item in message['content'] %}"
    "{% if item.type == 'image' %}{{ '<image>' }}{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def collator(template: str | None = CHATML, **options: Any) -> DataCollatorForFrozenPrefix:
    marks = ["<|im_start|>", "<|im_end|>"]
    return DataCollatorForFrozenPrefix(make(word_tokenizer(chat_template=template, extra_special_tokens=marks)), **options)


def turns(*texts: str, **flags: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": text, **({"loss": flags[f"l{i}"]} if f"l{i}" in flags else {})}
        for i, text in enumerate(texts)
    ]


def learnt(own: DataCollatorForFrozenPrefix, row: dict[str, Any]) -> list[str]:
    labels = own([row])["labels"][0]
    return own.processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LISTS_ONLY, "<|im_end|>"), (GENERATION, "</s>"), (None, "</s>")]
)
def test_each_answer_and_its_end_and_nothing_else(template: str | None, end: str) -> None:
    chat = turns("what is it ?", "a red dog", "what runs ?", "a blue cat")
    lists = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    lists[0]["content"].insert(0, {"type": "image"})
    lists[2]["content"].insert(0, {"type": "image"})
    expected = ["a", "red", "dog", end, "a", "blue", "cat", end]
    assert learnt(collator(template), {"messages": chat, "image": picture()}) == expected
    assert learnt(collator(template), {"messages": lists, "images": [picture(), picture("blue")]}) == expected
    assert learnt(collator(template, train_on="last"), {"messages": chat, "image": picture()}) == expected[4:]
    flagged = turns("what is it ?", "a red dog", "what runs ?", "a blue cat", l1=False)
    assert learnt(collator(template), {"messages": flagged, "image": picture()}) == expected[4:]
    flagged = turns("what is it ?", "a red dog", "what runs ?", "a blue cat", l3=False)
    assert learnt(collator(template), {"messages": flagged, "image": picture()}) == expected[:4]


def test_a_template_of_lists_alone_reads_the_whole_of_a_string() -> None:
    own = collator(LISTS_ONLY)
    ids = own([{"messages": turns("what is it ?", "a dog"), "image": picture()}])["input_ids"][0]
    assert own.processor.tokenizer.decode(ids).count("what") == 1 and (ids == own.processor.image_token_id).sum() == 3


def test_an_image_in_an_answer_is_not_learnt() -> None:
    content = [{"type": "text", "text": "a dog"}, {"type": "image"}, {"type": "text", "text": "a cat"}]
    chat = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": content}]
    assert learnt(collator(), {"messages": chat, "images": [picture()]}) == ["a", "dog", "a", "cat", "<|im_end|>"]


def test_nothing_to_learn_is_an_error() -> None:
    for chat in (turns("what ?"), turns("what ?", "a", l1=False), turns("what ?", "a dog", "what ?", "a", l1=False, l3=False)):
        with pytest.raises(ValueError, match="Row 0: .*nothing to learn"):
            collator()([{"messages": chat, "image": picture()}])
    silent = (
        "{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'user' %}"
        "{{ m['content'] }}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="Row 0 has nothing to learn"):
        collator(silent)([{"messages": turns("what ?", "a dog"), "image": picture()}])
    with pytest.raises(ValueError, match=r"2 assistant turns, but the template's .* marks 3"):
        thrice = GENERATION.replace("{{ m['content'] + '</s>' }}", "{{ m['content'] }}").replace(
            "{% endif %}{{ '\n' }}",
            "{% endif %}{% if loop.last %}{% generation %}{{ '</s>' }}{% endgeneration %}{% endif %}{{ '\n' }}",
        )
        collator(thrice)([{"messages": turns("a", "a dog", "a", "a cat", l1=False), "image": picture()}])


def test_a_long_chat_is_cut_at_its_turns_with_their_images() -> None:
    chat = turns("<image> what is it ?", "a red dog", "<image> what runs ?", "a blue cat", "<image> one ?", "two")
    images = [picture(), picture("blue"), picture("green")]
    own = collator()
    whole = own([{"messages": chat, "images": images}])["input_ids"].shape[1]
    shorter = own([{"messages": chat[:4], "images": images[:2]}])["input_ids"].shape[1]
    assert not own.tally.counts()
    for length in range(shorter - 1, whole):
        cut = collator(max_length=length)
        batch = cut([{"messages": chat, "images": images}])
        kept = 2 if length >= shorter else 1
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
        assert ids.count(cut.processor.image_token_id) == 3 * kept == 3 * len(batch["pixel_values"])
        assert cut.processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())[-1] == "<|im_end|>"
        assert cut.tally.read() == [("chats cut", f"row 0: {3 - kept} of 3 assistant turns are past max_length={length}")]
    one = own([{"messages": chat[:2], "images": images[:1]}])["input_ids"].shape[1]
    batch = collator(max_length=one - 3)([{"messages": chat, "images": images}])  # not even the first answer: words are cut
    assert batch["input_ids"].shape[1] == one - 3 and batch["input_ids"].eq(own.processor.image_token_id).sum() == 3
    with pytest.raises(ValueError, match="Row 0: .*max_length=4 leaves nothing to learn"):
        collator(max_length=4)([{"messages": chat, "images": images}])


# -------------------------------------------------------------------------------------------------------- broken images
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = lay_out(tmp_path / "data")
    (folder / "images" / "blue.png").write_bytes((folder / "images" / "blue.png").read_bytes()[:40])
    return folder


def test_a_broken_image_is_named_with_its_row(folder: Path, tmp_path: Path) -> None:
    _, processor = join(tmp_path / "parents")
    rows = list(load_image_text(folder / "question_answer.json"))
    with pytest.raises(ValueError, match=r"image 0 of row 1 \(id 'q1'\) \('.*blue\.png'\)"):
        DataCollatorForFrozenPrefix(processor)(rows)
    own = DataCollatorForFrozenPrefix(processor, on_error="skip")
    batch, alone = own(rows), DataCollatorForFrozenPrefix(processor)(rows[:1])
    assert all(torch.equal(batch[name], alone[name]) for name in alone)  # never another row in its place
    assert own.tally.counts() == {"rows left out": 1} and "(id 'q1')" in own.tally.read()[0][1]
    with pytest.raises(ValueError, match="on_error='ignore' must be one of"):
        DataCollatorForFrozenPrefix(processor, on_error="ignore")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_left_out_are_counted_and_named_at_the_end_of_an_epoch(
    folder: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, processor = join(tmp_path / "parents")
    rows = load_image_text(folder / "question_answer.json")
    own = DataCollatorForFrozenPrefix(processor, on_error="skip")
    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=1, learning_rate=1e-2, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
        dataloader_num_workers=workers,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=own, callbacks=[SkippedRowsCallback(own)])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert own.tally.counts() == {"rows left out": 2}
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("rows left out")]
    assert len(said) == 2 and all("rows left out: 1 in epoch" in one and "blue.png" in one for one in said)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())  # a batch of none teaches nothing
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(loss == 0 for loss in losses) == [False, False, True, True]


def test_images_as_the_processor_opens_them(tmp_path: Path) -> None:
    from PIL import ImageOps

    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.new("RGB", (16, 8), "red")
    half.paste("blue", (0, 0, 8, 8))
    half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    half.convert("CMYK").save(tmp_path / "cmyk.jpg")
    half.convert("P").save(tmp_path / "palette.png")
    Image.new("I;16", (8, 8), 65535).save(tmp_path / "deep.png")
    names = ["clear.png", "turned.jpg", "cmyk.jpg", "palette.png", "deep.png"]
    rows = load_image_text([{"image": tmp_path / name, "text": "a dog"} for name in names])
    own = collator()
    white = own.processor(images=Image.new("RGB", (8, 8), "white"), return_tensors="pt")["pixel_values"][0]
    upright = own.processor(images=ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg")), return_tensors="pt")
    batch = own(list(rows))["pixel_values"]
    assert torch.equal(batch[0], white) and torch.equal(batch[4], white)
    assert torch.equal(batch[1], upright["pixel_values"][0])
    assert batch[2].shape == batch[3].shape == white.shape
