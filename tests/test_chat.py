"""Whole conversations through the processor, by its own template, a parent's, and the interleaved one: what users of
`apply_chat_template` count on."""

from typing import Any

import pytest
import torch

from modeling_frozen.processors import INTERLEAVED_CHAT_TEMPLATE, few_shot_messages
from tests.helpers.processors import CHATML, make, picture, words


TEMPLATES: dict[str, str | None] = {"own": None, "parent's": CHATML, "interleaved": INTERLEAVED_CHAT_TEMPLATE}
every_template = pytest.mark.parametrize("template", TEMPLATES)


def processor(template: str) -> Any:
    return make(chat_template=TEMPLATES[template])


def user(*items: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in items]
    return {"role": "user", "content": content}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def chat() -> list[dict[str, Any]]:
    """A system turn, several pictures in a turn, words on both sides of one, two answers."""
    first, second = user(picture("red"), picture("blue"), "what is it ?"), user("what", picture("green"), "?")
    return [said("one two", "system"), first, said("a dog ."), second, said("a cat")]


RENDERED = {
    "own": "one two\nUser: <image><image>what is it ?\nAssistant: a dog .</s>\nUser: what<image>?\nAssistant: a cat",
    "parent's": "<|im_start|>system\none two<|im_end|>\n<|im_start|>user\n<image><image>what is it ?<|im_end|>\n"
    "<|im_start|>assistant\na dog .<|im_end|>\n<|im_start|>user\nwhat<image>?<|im_end|>\n<|im_start|>assistant\na cat",
    "interleaved": "one two<image><image>what is it ?a dog .\nwhat<image>?a cat",
}


@every_template
def test_many_turns_and_a_last_one_that_goes_on(template: str) -> None:
    one = processor(template)
    assert one.apply_chat_template(chat(), tokenize=False, continue_final_message=True) == RENDERED[template]
    whole = one.apply_chat_template(chat(), tokenize=False)
    assert whole.startswith(RENDERED[template]) and whole.endswith("\n")
    prompt = one.apply_chat_template(chat()[:-1], tokenize=False, add_generation_prompt=True)
    assert RENDERED[template].startswith(prompt.rstrip()) and RENDERED[template][len(prompt) :].strip() == "a cat"
    with pytest.raises(ValueError, match="not compatible"):
        one.apply_chat_template(chat(), continue_final_message=True, add_generation_prompt=True)


@every_template
def test_turns_as_plain_strings_are_the_same(template: str) -> None:
    one, lists = processor(template), [said("one two", "system"), user("what is it ?"), said("a dog .")]
    strings = [{**turn, "content": turn["content"][0]["text"]} for turn in lists]
    assert one.apply_chat_template(lists, tokenize=False) == one.apply_chat_template(strings, tokenize=False)


@every_template
def test_tokenised_as_model_inputs(template: str) -> None:
    one = processor(template)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    out = one.apply_chat_template(chat()[:-1], **options)
    assert (out["input_ids"] == one.image_token_id).sum() == 3 * one.prefix_length
    colours = [picture(name) for name in ("red", "blue", "green")]
    assert torch.equal(out["pixel_values"], one(images=colours, return_tensors="pt")["pixel_values"])
    batch = one.apply_chat_template([chat()[:2], chat()[:4]], **options, processor_kwargs={"padding": True})
    assert (batch["input_ids"] == one.image_token_id).sum(1).tolist() == [2 * one.prefix_length, 3 * one.prefix_length]
    assert torch.equal(batch["input_ids"][1][batch["attention_mask"][1].bool()], out["input_ids"][0])
    ids = one.apply_chat_template(chat()[:-1], tokenize=True, add_generation_prompt=True)
    assert list(ids[0]) == out["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("template", "expected"),
    [("own", ["a", "dog", ".", "</s>", "a", "cat", "</s>"]), ("interleaved", ["a", "dog", ".", "a", "cat"])],
)
def test_masks_of_what_the_assistant_said(template: str, expected: list[str]) -> None:
    one = processor(template)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    for side in ("left", "right"):
        padding = {"padding": True, "padding_side": side}
        out = one.apply_chat_template([chat()[:3], chat()], **options, processor_kwargs=padding)
        masks = out["assistant_masks"].bool()
        masked = [words(one, ids[mask]) for ids, mask in zip(out["input_ids"], masks, strict=True)]
        assert masked == [expected[: expected.index("a", 1)], expected]


@every_template
def test_tools_that_no_template_knows_change_nothing(template: str) -> None:
    one = processor(template)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    assert one.apply_chat_template(chat(), tools=[tool]) == one.apply_chat_template(chat())
    called = [user("what"), {"role": "assistant", "content": None, "tool_calls": []}]
    assert "None" not in one.apply_chat_template(called, tokenize=False)


@every_template
def test_shots_before_a_question(template: str) -> None:
    one = processor(template)
    messages = few_shot_messages(
        [(picture("red"), "a dog"), (picture("blue"), "what", "a cat")], (picture("green"), "what"), instruction="one : "
    )
    text = one.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    order = ["one : ", "<image>", "a dog", "<image>what", "a cat", "<image>what"]
    at = 0
    for piece in order:
        at = text.index(piece, at) + len(piece)
    assert text.count("<image>") == 3
