"""Tower and connector alone: prefixes for a server that has the language model."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_frozen import FrozenPrefixModel, FrozenPrefixProcessor
from modeling_frozen.serving.prompt_embeds import begun, chat_request, prompt_embeds
from tests.helpers.processors import byte_tokenizer, make, space_tokenizer, word_tokenizer
from tests.helpers.talking import QUESTION, Talking, picture, talking
from tests.helpers.tiny import NOT_READERS, join, join_not_a_reader


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Talking:
    return talking(tmp_path_factory.mktemp("saved"))


def test_an_encoder_alone(saved: Talking, tmp_path: Path) -> None:
    whole, processor = saved.model, saved.processor
    encoder = FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False)
    pixels = processor(images=picture("red"), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.get_image_features(pixels).pooler_output[0], whole.get_image_features(pixels).pooler_output[0])
    encoder.save_pretrained(tmp_path / "again")
    again = type(whole).from_pretrained(tmp_path / "again")
    assert torch.equal(again.get_image_features(pixels).pooler_output[0], whole.get_image_features(pixels).pooler_output[0])
    whole.save_pretrained(tmp_path / "whole", include_base_models=True)
    encoder = FrozenPrefixModel.from_pretrained(tmp_path / "whole", load_language_model=False)
    with pytest.raises(ValueError, match="load_language_model=False"):
        encoder.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="language model is not loaded"):
        encoder(**processor(text=QUESTION, return_tensors="pt"))
    with pytest.raises(ValueError, match="contradict"):
        FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False, text_base_model="x")
    assert isinstance(FrozenPrefixProcessor.from_model(encoder), FrozenPrefixProcessor)


def test_a_part_holds_the_prefix_of_each_image(saved: Talking) -> None:
    encoder = FrozenPrefixModel.from_pretrained(saved.path, load_language_model=False)
    images = [picture("red"), picture("blue")]
    parts = prompt_embeds(encoder, saved.processor, images)
    assert [part["type"] for part in parts] == ["prompt_embeds"] * 2
    held = [torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True) for part in parts]
    pixels = saved.processor(images=images, return_tensors="pt")["pixel_values"]
    for one, prefix in zip(held, saved.model.get_image_features(pixels).pooler_output, strict=True):
        assert torch.equal(one, prefix)
    assert not torch.equal(*held)
    tiled = prompt_embeds(encoder, FrozenPrefixProcessor.from_model(encoder, crop_to_patches=True), images[0].resize((32, 16)))
    tiles = torch.load(io.BytesIO(base64.b64decode(tiled[0]["data"])), weights_only=True)
    assert len(tiles) > len(held[0]) and len(tiles) % len(held[0]) == 0


def test_prefixes_are_as_long_as_the_processor_says(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="resampler", prefix_lengths=[1, 3])
    pixels = processor(images=picture("red"), return_tensors="pt")["pixel_values"]
    for length in (1, 3):
        processor.prefix_length = length
        part = prompt_embeds(model, processor, picture("red"))[0]
        held = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
        assert torch.equal(held, model.get_image_features(pixels, prefix_length=length).pooler_output[0])


@pytest.mark.parametrize("kind", NOT_READERS)
def test_what_reads_no_prefix_among_words_is_refused(kind: str, tmp_path: Path) -> None:
    model, processor = join_not_a_reader(tmp_path, kind)
    with pytest.raises(ValueError, match=f"{NOT_READERS[kind]}.*frozen-prefix serve"):
        prompt_embeds(model, processor, picture("red"))


TOKENIZERS: dict[str, Any] = {
    "with BOS": word_tokenizer,
    "without": lambda: word_tokenizer(bos=False),
    "bytes": byte_tokenizer,
    "a space before the first word": space_tokenizer,
    "a space before each": lambda: space_tokenizer("always"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["dog do?", "<image>dog do?", "do <image> ?"])
def test_a_chat_begins_as_the_processor_begins_it(name: str, text: str) -> None:
    tokenizer = make(TOKENIZERS[name]()).tokenizer
    chat = begun(tokenizer, text)
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    assert begun(tokenizer, chat) == chat


def test_a_chat_as_a_request_reads_what_generate_reads(saved: Talking, tmp_path: Path) -> None:
    turn = {"role": "user", "content": [{"type": "image", "image": picture("red")}, {"type": "text", "text": QUESTION}]}
    request = chat_request(saved.model, saved.processor, [turn])
    (message,) = request["messages"]
    parts = message["content"]
    assert parts[1] == prompt_embeds(saved.model, saved.processor, picture("red"))[0]
    texts = [part.get("text", "<image>") for part in parts]
    template = request["extra_body"]["chat_template"]
    shown = [{**message, "content": [{"type": "text", "text": text} for text in texts]}]
    rendered = render_jinja_template(conversations=[shown], chat_template=template)[0][0]
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    read = saved.processor.apply_chat_template([turn], **asked)["input_ids"][0]
    ids = saved.processor.tokenizer(rendered, add_special_tokens=request["extra_body"]["add_special_tokens"])["input_ids"]
    own = saved.processor.image_token_id
    first = read.index(own)
    assert ids == [index for place, index in enumerate(read) if index != own or place == first]
    assert request["logit_bias"] == {}  # it is past the vocabulary
    going = [turn, {"role": "assistant", "content": "red"}]
    texts = [
        part.get("text")
        for part in chat_request(saved.model, saved.processor, going, continue_final_message=True)["messages"][0]["content"]
    ]
    assert texts[-1].endswith("red")
    alone = chat_request(saved.model, saved.processor, [{"role": "user", "content": QUESTION}])
    assert [part["type"] for part in alone["messages"][0]["content"]] == ["text"]
    model, processor = join(tmp_path)
    assert chat_request(model, processor, [turn])["logit_bias"] == {str(model.config.image_token_id): -100}
    with pytest.raises(ValueError, match="leave it out of the text"):
        chat_request(saved.model, saved.processor, [{"role": "user", "content": "what <image> ?"}])
