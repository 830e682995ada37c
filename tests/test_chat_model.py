"""A language model that was trained to chat stays the one it was: its turns, its system prompt, what ends its answers; and
without an image its very bits. Images go into any turn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

import modeling_frozen  # noqa: F401  (registers the model type)
from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.evaluation import evaluate
from tests.helpers.tiny import COLOURS, WORDS, join, save_parents, text_config, tokenizer


CHAT_WORDS = [*WORDS, "system", "user", "assistant", "helpful", "<|im_start|>", "<|im_end|>"]
START, END = CHAT_WORDS.index("<|im_start|>"), CHAT_WORDS.index("<|im_end|>")
# SmolLM2's and Qwen's form: a system prompt where none is given, and content that is a string or trouble.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|> system helpful <|im_end|> ' }}{% endif %}"
    "{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": [one if isinstance(one, dict) else {"type": "text", "text": one} for one in content]}


def image(colour: str) -> dict[str, Any]:
    from PIL import Image

    return {"type": "image", "image": Image.new("RGB", (20, 18), COLOURS[colour])}


TEXT_ALONE = [
    turn("user", "what is a picture ?"),
    turn("assistant", "that is a square ."),
    turn("user", "what colour ?"),
]


@dataclass
class Chat:
    folder: Path
    model: Any
    processor: Any

    def inputs(self, chat: list[dict[str, Any]]) -> Any:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, **options)

    def bare(self) -> tuple[Any, Any]:
        place = self.folder / "words"
        return AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """The config says one end, as the model was born; the generation config those that it was trained to chat with."""
    folder = tmp_path_factory.mktemp("chat")
    save_parents(folder)
    torch.manual_seed(0)
    config = text_config(vocab_size=len(CHAT_WORDS) + 7, initializer_range=0.6, max_position_embeddings=128)
    parent = LlamaForCausalLM(config).to(getattr(torch, request.param))
    parent.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=[END, 2], pad_token_id=0)
    parent.save_pretrained(folder / "words")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    own = tokenizer(CHAT_WORDS, bos=False, **names)
    own.chat_template = TEMPLATE
    own.save_pretrained(folder / "words")
    model, processor = join(folder)
    model.model.connector.set_output_norm(3 * model.get_input_embeddings().weight.float().norm(dim=-1).mean().item())
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "eyes")
    return Chat(folder, loaded, AutoProcessor.from_pretrained(folder / "eyes"))


def test_without_an_image_the_answer_is_the_bare_models_bit_for_bit(chat: Chat) -> None:
    model, own = chat.bare()
    asked = [{**one, "content": one["content"][0]["text"]} for one in TEXT_ALONE]
    theirs = own.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ours = chat.inputs(TEXT_ALONE)
    assert torch.equal(ours["input_ids"], theirs["input_ids"]) and ours["input_ids"][0, :4].tolist()[::3] == [START, END]
    prompt = chat.processor(text=chat.processor.chat_prompt(TEXT_ALONE), return_tensors="pt")
    assert torch.equal(prompt["input_ids"], theirs["input_ids"])
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, said = model.generate(**theirs, **options), chat.model.generate(**ours, **options)
    assert torch.equal(said.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(said.logits, expected.logits, strict=True))
    sampled = []
    for one in (model, chat.model):
        torch.manual_seed(3)
        sampled.append(one.generate(**theirs, do_sample=True, max_new_tokens=12))
    assert torch.equal(*sampled)


def test_an_answer_ends_where_the_model_was_trained_to_end_it(chat: Chat) -> None:
    assert chat.model.generation_config.eos_token_id == [END, 2] and chat.model.generation_config.pad_token_id == 0

    def says(end: int) -> Any:
        return lambda ids, scores: torch.full_like(scores, -1e4).index_fill(
            1, torch.tensor([end if ids.shape[1] == length + 2 else 5]), 0.0
        )

    for asked in (TEXT_ALONE, [turn("user", image("red"), "what is that ?")]):
        inputs = chat.inputs(asked)
        length = inputs["input_ids"].shape[1]
        for end in (END, 2):
            ids = chat.model.generate(**inputs, max_new_tokens=9, do_sample=False, logits_processor=[says(end)])
            assert ids[0, length:].tolist() == [5, 5, end]


def test_images_stand_in_any_turn_and_each_counts(chat: Chat) -> None:
    def asked(*colours: str) -> list[dict[str, Any]]:
        first, second, third = (image(colour) for colour in colours)
        return [
            turn("system", "helpful"),
            turn("user", "what is", first, "?"),
            turn("assistant", "a square ."),
            turn("user", "that ?", second, third),
        ]

    inputs = chat.inputs(asked("red", "green", "blue"))
    ids = inputs["input_ids"][0]
    assert (ids == chat.processor.image_token_id).sum() == 3 * chat.processor.prefix_length
    turns = chat.processor.tokenizer.convert_ids_to_tokens(ids[ids != chat.processor.image_token_id])
    assert " ".join(turns) == (
        "<|im_start|> system helpful <|im_end|> <|im_start|> user what is ? <|im_end|> <|im_start|> assistant a square . "
        "<|im_end|> <|im_start|> user that ? <|im_end|> <|im_start|> assistant"
    )
    several = [("red", "green", "blue"), ("black", "green", "blue"), ("red", "black", "blue"), ("red", "blue", "green")]
    with torch.no_grad():
        logits = [chat.model(**chat.inputs(asked(*colours))).logits[0, -1].float() for colours in several]
    assert all((logits[0] - other).abs().max() > 1e-2 for other in logits[1:])


def test_training_learns_the_end_of_a_turn_in_the_models_own_words(chat: Chat) -> None:
    collator = DataCollatorForFrozenPrefix(chat.processor)
    row = {"messages": [turn("user", image("red"), "what colour ?"), turn("assistant", "red .")]}
    prompt = chat.processor.chat_prompt("what colour ?")
    as_answer = {"image": row["messages"][0]["content"][0]["image"], "prompt": prompt, "answer": "red ."}
    for one in (row, as_answer):
        batch = collator([one])
        learnt = batch["labels"][0][batch["labels"][0] != -100]
        assert chat.processor.tokenizer.convert_ids_to_tokens(learnt) == ["red", ".", "<|im_end|>"]
        asked = chat.inputs(row["messages"][:1])["input_ids"]
        assert torch.equal(batch["input_ids"][0, : asked.shape[1]], asked[0])


def test_evaluation_asks_in_the_models_own_turns(chat: Chat) -> None:
    question = "what colour ?"
    rows = [{"image": image(colour)["image"], "answer": [colour]} for colour in ("red", "green")]
    options = {"task": "vqa", "kinds": ("sighted",), "num_resamples": 0, "max_new_tokens": 4}
    said = evaluate(chat.model, chat.processor, rows, prompt=chat.processor.chat_prompt(question), **options)
    for colour, answer in zip(("red", "green"), said.predictions["sighted"], strict=True):
        inputs = chat.inputs([turn("user", image(colour), question)])
        ids = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == chat.processor.decode(ids, skip_special_tokens=True).strip()
