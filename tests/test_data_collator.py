"""DataCollatorForFrozenPrefix: what is learnt and what is not, for every kind of row, tokenizer and template."""

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Sequence
from datasets import Image as ImageFeature
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_frozen.data.collator import DataCollatorForFrozenPrefix, assistant_spans
from modeling_frozen.processors import FrozenPrefixProcessor
from tests.helpers.processors import (
    CHATML,
    PRINTS_LISTS,
    byte_tokenizer,
    make,
    picture,
    saved,
    space_tokenizer,
    word_tokenizer,
)


IMAGE3 = ["<image>"] * 3
# Earlier turns lose their thoughts and only the last one has the empty ones, as in reasoning models.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think></think> ' }}{% endif %}"
    "{{ message.content.split('</think>')[-1].strip() + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
NO_END = "{% for message in messages %}{{ message.role | capitalize + ' : ' + message.content | trim + '\n' }}{% endfor %}"
CUTS = "{% for turn in messages %}{{ turn.content[:1] if turn.role == 'assistant' else turn.content }}{% endfor %}"


def chat_tokenizer(template: str = CHATML, **kwargs) -> PreTrainedTokenizerFast:
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return word_tokenizer(chat_template=template, extra_special_tokens=marks, **kwargs)


def tokens(collator: DataCollatorForFrozenPrefix, ids: torch.Tensor) -> list[str]:
    return collator.processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def learnt(collator: DataCollatorForFrozenPrefix, batch: dict[str, torch.Tensor], row: int = 0) -> list[str]:
    labels = batch["labels"][row]
    if not collator.is_encoder_decoder:
        assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
    return tokens(collator, labels[labels != -100])


def collate(rows, tokenizer=None, processor=None, **kwargs):
    collator = DataCollatorForFrozenPrefix(processor or make(tokenizer), **kwargs)
    return collator, collator(rows)


# ---------------------------------------------------------------------------------------------------------------- text
def test_captions_learn_text_and_eos_but_no_placeholder():
    rows = [{"image": picture(), "text": "a red dog"}, {"image": picture("blue"), "text": "one <image> two"}]
    collator, batch = collate(rows)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "a", "red", "dog", "</s>"]
    assert learnt(collator, batch) == ["a", "red", "dog", "</s>"]
    assert tokens(collator, batch["input_ids"][1])[:-1] == ["<s>", "one", *IMAGE3, "two", "</s>"]
    assert learnt(collator, batch, 1) == ["two", "</s>"]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.long


def test_several_images_learn_all_text_after_the_first():
    rows = [{"images": [picture(), picture("blue")], "text": "one <image> a dog <image> a cat"}]
    collator, batch = collate(rows)
    assert learnt(collator, batch) == ["a", "dog", "a", "cat", "</s>"]
    collator, batch = collate([{"images": [picture(), picture("blue")], "text": "a dog"}])
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, *IMAGE3, "a", "dog", "</s>"]


def test_eos_is_learnt_where_it_is_also_the_pad_token():
    rows = [{"image": picture(), "text": " dog"}, {"image": picture(), "text": " dog cat dog"}]
    collator, batch = collate(rows, byte_tokenizer())
    end = collator.processor.tokenizer.eos_token_id
    assert collator.processor.tokenizer.pad_token_id == end
    assert batch["input_ids"][0, 3:].tolist()[1:] == [end] * 3
    assert batch["labels"][0].tolist()[-3:] == [end, -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_pad_token_inside_a_text_is_learnt():
    collator, batch = collate([{"image": picture(), "text": "a dog"}], word_tokenizer(pad_token="dog"))
    assert learnt(collator, batch) == ["a", "dog", "</s>"]


def test_text_only_rows_share_a_batch():
    rows = [{"image": None, "text": "a dog"}, {"image": picture("blue"), "text": "a"}, {"image": [], "text": "one"}]
    collator, batch = collate(rows)
    assert tokens(collator, batch["input_ids"][0])[:4] == ["<s>", "a", "dog", "</s>"]
    assert learnt(collator, batch) == ["a", "dog", "</s>"]
    expected = collator.processor(images=picture("blue"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert "pixel_values" not in collator(rows[:1])


def test_eos_is_not_written_twice():
    tokenizer = word_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", special)
    for text in ("a dog", "a dog</s>"):
        collator, batch = collate([{"image": picture(), "text": text}], tokenizer)
        assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "a", "dog", "</s>"]


def test_ids_are_those_of_the_processor():
    for tokenizer in (word_tokenizer, byte_tokenizer, space_tokenizer):
        for text in ("a dog", " a dog", "what <image>is it <image> ?", "<image>\ndog"):
            images = [picture()] * max(text.count("<image>"), 1)
            collator, batch = collate([{"image": images, "text": text}], tokenizer())
            expected = collator.processor(images=[images], text=text)["input_ids"][0]
            assert batch["input_ids"][0].tolist() == [*expected, collator.processor.tokenizer.eos_token_id]


def test_tokenizer_without_offsets():
    collator, batch = collate([{"messages": chat("what?", "a dog", "is it?", "no")}], ByT5Tokenizer())
    ids = batch["labels"][0][batch["labels"][0] != -100]
    assert collator.processor.decode(ids) == " a dog</s> no</s>"


def test_bos_is_known_where_the_tokenizer_drops_unknown_words():
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "d": 2}, []))
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    collator, batch = collate([{"image": picture(), "text": "dad"}], tokenizer)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "d", "d", "</s>"]


def test_several_captions_are_drawn_by_torchs_generator():
    rows = [{"image": None, "text": ["one", "two", "cat"]}] * 40
    collator = DataCollatorForFrozenPrefix(make())
    torch.manual_seed(0)
    first, second = collator(rows)["input_ids"], collator(rows)["input_ids"]
    torch.manual_seed(0)
    assert torch.equal(first, collator(rows)["input_ids"]) and not torch.equal(first, second)
    assert len(first[:, 1].unique()) == 3


def test_all_texts_of_a_row_are_samples_about_one_image():
    dog, cat = picture(), picture()
    rows = [
        {"image": dog, "text": ["a dog", "one"]},
        {"image": cat, "prompt": ["what ?", "Question :"], "answer": ["a cat", "cat"]},
        {"image": cat, "prompt": "it:", "answer": ["one", "two"]},
        {"image": dog, "text": "dog"},
    ]
    collator = DataCollatorForFrozenPrefix(make(), all_texts=True)
    batch = collator(rows)
    texts = ["a dog", "one", "what ? a cat", "Question : cat", "it: one", "it: two", "dog"]
    apart = [{"image": None, "text": text} for text in texts]
    expected = [tokens(collator, row) for row in DataCollatorForFrozenPrefix(make())(apart)["input_ids"]]
    results = [[word for word in tokens(collator, row) if word not in IMAGE3] for row in batch["input_ids"]]
    assert [" ".join(one) for one in results] == [" ".join(one) for one in expected]
    assert learnt(collator, batch, 2) == ["a", "cat", "</s>"] and learnt(collator, batch, 5) == ["two", "</s>"]
    assert len(batch["pixel_values"]) == 2 and batch["image_index"].tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_a_system_prompt_that_rows_begin_with_is_told_to_the_model():
    """`image_index` is what tells it that something can be read once; the rows are the same without it."""
    rows = [{"image": picture(), "text": text, "prompt": None} for text in ("a dog", "one", "two")]
    behind = [{"image": row["image"], "prompt": "it: it: it: <image>", "answer": row["text"]} for row in rows]
    assert "image_index" not in collate(rows)[1]  # at most a first token in common
    assert collate(behind)[1]["image_index"].tolist() == [0, 1, 2]
    assert "image_index" not in collate(behind[:1])[1]
    assert "image_index" not in collate(behind, share_images=False)[1]
    other = {**behind[0], "image": picture(), "prompt": "one: it: it: <image>"}
    assert "image_index" not in collate([*behind, other])[1]  # the first word differs
    text = {"image": None, "prompt": "it: it: it:", "answer": "a dog"}
    assert collate([*behind, text])[1]["image_index"].tolist() == [0, 1, 2]


def test_prompts_that_do_not_fit_the_texts_are_refused():
    collator = DataCollatorForFrozenPrefix(make(), all_texts=True)
    with pytest.raises(ValueError, match="Row 0 has 1 in 'prompt' and 2 in 'answer'"):
        collator([{"image": None, "prompt": ["what ?"], "answer": ["one", "two"]}])
    with pytest.raises(ValueError, match="Row 1"):
        collator([{"image": None, "text": "one"}, {"image": None, "text": []}])


# --------------------------------------------------------------------------------------------------- prompt and answer
def test_prompt_and_answer_learn_the_answer_alone():
    rows = [
        {"image": picture(), "prompt": "Question : what is it ? Answer :", "answer": "a dog"},
        {"image": picture(), "prompt": "what <image>", "answer": "cat"},
        {"image": None, "prompt": "what ?", "answer": "one"},
    ]
    collator, batch = collate(rows)
    assert tokens(collator, batch["input_ids"][0])[:6] == ["<s>", *IMAGE3, "Question", ":"]
    assert learnt(collator, batch) == ["a", "dog", "</s>"]
    assert tokens(collator, batch["input_ids"][1])[:7] == ["<s>", "what", *IMAGE3, "cat", "</s>"]
    assert learnt(collator, batch, 1) == ["cat", "</s>"]
    assert learnt(collator, batch, 2) == ["one", "</s>"]


def test_prompt_has_the_tokens_of_inference_and_one_space_follows_it():
    for prompt, answer, joined in (("it:", "dog", "it: dog"), ("it: ", "dog", None), ("it:", " dog", "it: dog")):
        for tokenizer in (byte_tokenizer, space_tokenizer):
            row = {"image": picture(), "prompt": prompt, "answer": answer}
            collator, batch = collate([row], tokenizer())
            ids = batch["input_ids"][0].tolist()
            start = collator.processor(images=picture(), text=prompt)["input_ids"][0]
            assert ids[: len(start)] == start
            assert batch["labels"][0].tolist() == [-100] * len(start) + ids[len(start) :]
            if joined:
                whole = collator.processor(images=picture(), text=joined)["input_ids"][0]
                assert ids == [*whole, collator.processor.tokenizer.eos_token_id]


def test_columns_by_other_names():
    rows = [{"photo": picture(), "question": "what ?", "label": ["a dog"], "text": "no"}]
    names = {"image_column": "photo", "prompt_column": "question", "answer_column": "label"}
    collator, batch = collate(rows, **names)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "what", "?", "a", "dog", "</s>"]
    collator, batch = collate([{"image": picture(), "caption": "a dog"}], text_column="caption")
    assert learnt(collator, batch) == ["a", "dog", "</s>"]


# ------------------------------------------------------------------------------------------------------------ messages
def chat(*contents, image=True) -> list[dict]:
    """A conversation of user and assistant in turn, with an image in the first turn."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    if image:
        turns[0]["content"] = [{"type": "image", "image": picture()}, {"type": "text", "text": contents[0]}]
    return turns


def test_messages_learn_each_assistant_turn_with_its_end_token():
    rows = [{"messages": chat("what ?", "a dog", "is it red ?", "it is")}]
    collator, batch = collate(rows, chat_tokenizer())
    assert learnt(collator, batch) == ["a", "dog", "<|im_end|>", "it", "is", "<|im_end|>"]
    assert (batch["input_ids"] == collator.processor.image_token_id).sum() == 3
    options = {"tokenize": True, "return_dict": True}
    expected = collator.processor.apply_chat_template(rows[0]["messages"], **options)["input_ids"]
    assert batch["input_ids"].tolist() == [list(ids) for ids in expected]
    prompt = collator.processor.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, **options)
    start = (batch["labels"][0] != -100).nonzero()[0].item()
    assert batch["input_ids"][0, :start].tolist() == list(prompt["input_ids"][0])  # what inference gives


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), space_tokenizer(), space_tokenizer("always")])
def test_chat_ids_are_those_of_the_whole_chat(tokenizer):
    rows = [{"messages": chat("what?", "a dog", "is it?", "do dog")}]
    collator, batch = collate(rows, tokenizer)
    expected = collator.processor.apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=True)
    assert batch["input_ids"].tolist() == [list(ids) for ids in expected["input_ids"]]
    answers = batch["labels"][0][batch["labels"][0] != -100]
    assert collator.processor.decode(answers, skip_special_tokens=True).split() == ["a", "dog", "do", "dog"]


def test_generation_markers_are_used():
    collator, batch = collate([{"messages": chat("what ?", "a dog", "is it ?", "it is")}])  # the default template
    assert learnt(collator, batch) == ["a", "dog", "</s>", "it", "is", "</s>"]
    marked = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% else %}{{ message.content }}{% endif %} . {% endfor %}"
    )
    collator, batch = collate([{"messages": chat("what", "a dog", "is")}], chat_tokenizer(marked))
    assert learnt(collator, batch) == ["a", "dog"]


def test_templates_that_rewrite_earlier_turns():
    messages = chat("what ?", "<think> one </think> a dog ", "is it ?", " it is")
    with pytest.raises(ValueError, match="Row 0: the chat template changes what the assistant says"):
        collate([{"messages": messages}], chat_tokenizer(REASONING))
    messages = chat("what ?", "a dog ", "is it ?", " it is")
    collator, batch = collate([{"messages": messages}], chat_tokenizer(REASONING))
    assert learnt(collator, batch) == [
        "a", "dog", "<|im_end|>", "<think>", "</think>", "it", "is", "<|im_end|>",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Row 1: .*generation"):
        collate([{"image": picture(), "text": "a"}, {"messages": messages}], chat_tokenizer(CUTS))


def test_templates_without_an_end_token_get_eos():
    collator, batch = collate([{"messages": chat("what ?", "a dog", "is it ?", " it is ")}], chat_tokenizer(NO_END))
    assert learnt(collator, batch) == ["Assistant", ":", "a", "dog", "Assistant", ":", "it", "is", "</s>"]
    assert tokens(collator, batch["input_ids"][0])[-1] == "</s>"
    collator, batch = collate([{"messages": chat("what ?", "a dog", "is it ?")}], chat_tokenizer(NO_END))
    assert learnt(collator, batch)[-1] == "dog"


def test_bos_that_the_template_writes_is_not_added_again():
    collator, batch = collate([{"messages": chat("what", "a dog")}], chat_tokenizer(PRINTS_LISTS))
    assert tokens(collator, batch["input_ids"][0]).count("<s>") == 1
    collator, batch = collate([{"messages": chat("what", "a dog")}], chat_tokenizer())
    assert tokens(collator, batch["input_ids"][0])[:2] == ["<s>", "<|im_start|>"]


def test_images_of_a_chat_come_from_turns_or_from_a_column():
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    turns = chat("what ?", "a dog", image=False)
    rows = [
        {"messages": chat("what ?", "a dog")},
        {"messages": turns, "image": picture()},
        {"messages": chat("<image>what ?", "a dog", image=False), "images": [picture()]},
        {"messages": [{"role": "user", "content": [{"type": "image", "text": None, "url": None},
                                                   {"type": "text", "text": "what ?", "url": None}]}, turns[1]],
         "images": [picture()]},
    ]  # fmt: skip
    collator, batch = collate(rows, chat_tokenizer())
    assert len(batch["pixel_values"]) == 4
    assert all(torch.equal(batch["input_ids"][0], ids) for ids in batch["input_ids"])
    assert collator([{"messages": turns}])["labels"].shape == (1, len(batch["labels"][0]) - 3)  # text only
    url["image_url"]["url"] += base64.b64encode(saved(picture(), "PNG")).decode()
    rows = [{"messages": [{"role": "user", "content": [url, {"type": "text", "text": "what ?"}]}, turns[1]]}]
    assert torch.equal(collator(rows)["input_ids"][0], batch["input_ids"][0])


def test_chat_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="Row 0: its messages have no assistant turn"):
        collate([{"messages": chat("what ?")}])


def test_spans_say_where_the_answers_are():
    text, spans = assistant_spans(make(chat_tokenizer()), chat("what", "a dog", "is", "it", image=False))
    assert [text[start:end] for start, end in spans] == ["a dog<|im_end|>", "it<|im_end|>"]


# ---------------------------------------------------------------------------------------------------- encoder-decoders
def seq2seq_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """As T5's: EOS after every text."""
    tokenizer = word_tokenizer(bos=False, **kwargs)
    post = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def test_encoder_decoder_reads_the_prompt_and_writes_the_answer():
    rows = [
        {"image": picture(), "prompt": "what ?", "answer": "a dog"},
        {"image": picture(), "text": "a red dog"},
        {"image": picture(), "text": "one <image> a cat"},
        {"messages": chat("what", "one", "is", "it is")},
    ]
    processor = make(seq2seq_tokenizer(), is_encoder_decoder=True)
    collator, batch = collate(rows, processor=processor)
    texts = [tokens(collator, ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert texts[:3] == [[*IMAGE3, "what", "?", "</s>"], [*IMAGE3, "</s>"], ["one", *IMAGE3, "</s>"]]
    assert texts[3][:2] == ["User", ":"] and texts[3][-3:] == ["Assistant", ":", "</s>"]
    assert [learnt(collator, batch, i) for i in range(4)] == [
        ["a", "dog", "</s>"], ["a", "red", "dog", "</s>"], ["a", "cat", "</s>"], ["it", "is", "</s>"],
    ]  # fmt: skip
    assert texts[0] == tokens(collator, torch.tensor(processor(images=picture(), text="what ?")["input_ids"][0]))
    assert DataCollatorForFrozenPrefix(make(), is_encoder_decoder=True).is_encoder_decoder
    plain = make(word_tokenizer(), is_encoder_decoder=True)  # no EOS of its own: still learnt
    collator, batch = collate(rows[:1], processor=plain)
    assert learnt(collator, batch)[-1] == "</s>"


# ---------------------------------------------------------------------------------------------------------- truncation
def test_truncation_takes_prompts_first_and_never_placeholders():
    row = {"image": picture(), "prompt": "one two what is it", "answer": "a dog"}
    collator, batch = collate([row], max_length=9)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "one", "two", "a", "dog", "</s>"]
    collator, batch = collate([row], word_tokenizer(truncation_side="left"), max_length=9)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "is", "it", "a", "dog", "</s>"]
    collator, batch = collate([row], max_length=6)
    assert learnt(collator, batch) == ["a", "dog"]
    with pytest.raises(ValueError, match=r"Row 1: 1 images and special tokens take 4 .*its text 8; max_length=4 leaves"):
        collate([{"image": None, "text": "a"}, row], max_length=4)
    with pytest.raises(ValueError, match=r"2 images .* take 7 .*max_length=5"):
        collate([{"image": [picture(), picture()], "text": "a"}], max_length=5)
    text = {"image": picture(), "text": "a red <image> dog runs"}
    collator, batch = collate([text], max_length=7)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", "a", "red", *IMAGE3, "dog"]
    collator, batch = collate([text], word_tokenizer(truncation_side="left"), max_length=7)
    assert tokens(collator, batch["input_ids"][0]) == ["<s>", *IMAGE3, "dog", "runs", "</s>"]


def test_truncation_defaults_to_what_the_tokenizer_says():
    row = {"image": picture(), "text": "a red dog runs"}
    assert collate([row], word_tokenizer(model_max_length=6))[1]["labels"].shape == (1, 6)
    assert collate([row], word_tokenizer(model_max_length=6), max_length=8)[1]["labels"].shape == (1, 8)
    assert collate([row])[1]["labels"].shape == (1, 9)
    collator, batch = collate([row], processor=make(seq2seq_tokenizer(), is_encoder_decoder=True), max_length=4)
    assert batch["labels"].shape == (1, 4) and batch["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        DataCollatorForFrozenPrefix(make(), max_length=0)


def test_pad_to_multiple_of():
    batch = collate([{"image": picture(), "text": "a"}], pad_to_multiple_of=8)[1]
    assert {value.shape for name, value in batch.items() if name != "pixel_values"} == {(1, 8)}


# -------------------------------------------------------------------------------------------------------------- errors
def test_dropped_columns_are_explained():
    with pytest.raises(ValueError, match=r"Row 0 has no image column 'image' or 'images'.*remove_unused_columns=False"):
        collate([{"text": "a dog"}])
    with pytest.raises(ValueError, match=r"Row 0 has no 'messages', 'text' or 'answer'.*remove_unused_columns=False"):
        collate([{"labels": 1}])
    with pytest.raises(ValueError, match="'prompt' alone has nothing to learn"):
        collate([{"prompt": "what ?", "image": None}])
    with pytest.raises(ValueError, match="'photo'"):
        collate([{"text": "a dog", "image": picture()}], image_column="photo")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "<image> a <image>", "image": picture()}, "Row 1 holds 2 <image> but has 1 images"),
        ({"text": "<image> a", "image": None}, "Row 1 holds 1 <image> but has 0 images"),
        ({"text": 3, "image": None}, "Row 1: column 'text' must be a string or a list"),
        ({"text": [], "image": None}, "Row 1: column 'text' must be a string or a list"),
        ({"prompt": 3, "answer": "a", "image": None}, "Row 1: column 'prompt' must be a string"),
        ({"text": "a", "image": "gone.png"}, r"image 0 of row 1 .*gone\.png"),
    ],
)
def test_wrong_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        collate([{"text": "a", "image": picture()}, row])


# ------------------------------------------------------------------------------------------------- datasets and reuse
def test_rows_of_datasets(tmp_path: Path):
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(saved(picture(name), "PNG"))
    paths = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    columns = {"image": [paths[0], None], "text": ["a red dog", "a dog"]}
    data = Dataset.from_dict(columns).cast_column("image", ImageFeature())
    raw = data.cast_column("image", ImageFeature(decode=False))
    collator = DataCollatorForFrozenPrefix(make())
    batches = [collator(list(one)) for one in (data, raw, Dataset.from_dict(columns))]
    for batch in batches:
        assert torch.equal(batch["input_ids"], batches[0]["input_ids"]) and len(batch["pixel_values"]) == 1
        torch.testing.assert_close(batch["pixel_values"], batches[0]["pixel_values"])
    several = Dataset.from_dict({"images": [paths, []], "text": ["a", "one"]})
    several = several.cast_column("images", Sequence(ImageFeature()))
    assert len(collator(list(several))["pixel_values"]) == 2
    chats = Dataset.from_list([{"messages": [
        {"role": "user", "content": [{"type": "image", "path": paths[0]}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]}])  # fmt: skip
    batch = collator(list(chats))  # Arrow fills the missing keys with None
    assert learnt(collator, batch) == ["a", "dog", "</s>"] and len(batch["pixel_values"]) == 1


def test_mixed_kinds_of_rows_and_image_types_in_reading_order():
    array = np.asarray(picture("blue"))
    rows = [
        {"image": picture("red"), "text": "a dog"},
        {"image": torch.from_numpy(array.copy()).permute(2, 0, 1), "prompt": "what", "answer": "cat"},
        {"messages": chat("what", "one")},
        {"image": array, "text": "a"},
    ]
    collator, batch = collate(rows)
    expected = collator.processor(images=[picture(c) for c in ("red", "blue", "red", "blue")], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    alone = [collator([row]) for row in rows]
    for i, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, :length], one["input_ids"][0])
        assert torch.equal(batch["labels"][i, :length], one["labels"][0])


def test_images_per_token_follow_the_processor():
    class Longer(FrozenPrefixProcessor):
        def num_image_tokens(self, image_inputs=None, image_idx=0):
            return 1 + image_idx

    processor = Longer(ViTImageProcessorPil(size={"height": 8, "width": 8}), word_tokenizer(), prefix_length=3)
    _, batch = collate([{"image": picture(), "text": "a"}, {"image": [picture()] * 2, "text": "a"}], processor=processor)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 5]


def test_features_may_come_from_elsewhere():
    class Cached(DataCollatorForFrozenPrefix):
        def process_images(self, images):
            return {"mm_encoder_outputs": torch.tensor(images)}

    batch = Cached(make())([{"image": 7, "text": "a"}, {"image": [8, 9], "text": "a"}])
    assert batch["mm_encoder_outputs"].tolist() == [7, 8, 9] and "pixel_values" not in batch
    assert replace(Cached(make()), max_length=5).max_length == 5
