"""`pipeline("image-text-to-text")`: says what processor and `generate` say by hand, from a folder and from the Hub."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    ImageTextToTextPipeline,
    TextIteratorStreamer,
    pipeline,
)

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers import fresh_python
from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401
from tests.helpers.talking import QUESTION, TOKENS, Talking, picture, talking, user
from tests.helpers.tiny import COLOURS, save_encoder_decoder, save_parents


PROMPT = f"<image> {QUESTION}"
NEW = {"max_new_tokens": TOKENS, "return_full_text": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Talking:
    return talking(tmp_path_factory.mktemp("eyes"))


@pytest.fixture(scope="module")
def pipe(saved: Talking) -> ImageTextToTextPipeline:
    return pipeline("image-text-to-text", model=saved.path)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a web server with one picture per colour, and the folder where they lie."""
    folder = tmp_path_factory.mktemp("web")
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def texts_of(results: Any) -> list[str]:
    """The texts of a pipeline's results, as `batch_decode` writes them."""
    return [texts_of(one)[0] if isinstance(one, list) else one["generated_text"].strip() for one in results]


# ------------------------------------------------------------------------------------------------- images and prompts


def test_it_gets_all_its_parts(pipe: ImageTextToTextPipeline) -> None:
    assert isinstance(pipe.model, FrozenPrefixForConditionalGeneration)
    assert isinstance(pipe.processor, FrozenPrefixProcessor)
    assert pipe.tokenizer is pipe.processor.tokenizer and pipe.image_processor is pipe.processor.image_processor


def test_no_complaint_about_the_class(saved: Talking) -> None:
    """A model that transformers' tables don't list is used, after an error in the log: not ours."""
    code = f"import modeling_frozen; from transformers import pipeline; pipeline('image-text-to-text', model={saved.path!r})"
    done = fresh_python.run("-c", code, timeout=120)
    assert done.returncode == 0 and "not supported" not in done.stderr, done.stderr


def test_one_image_and_a_prompt(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    by_hand = {
        colour: saved.continues(saved.processor(images=picture(colour), text=PROMPT, return_tensors="pt"))
        for colour in COLOURS
    }
    assert len({text for [text] in by_hand.values()}) > 1, "a blind model would pass"
    for colour, texts in by_hand.items():
        assert texts_of(pipe(picture(colour), text=PROMPT, **NEW)) == texts
        assert texts_of(pipe(picture(colour), text=QUESTION, **NEW)) == texts  # the placeholder is put in


def test_a_list_of_images_and_prompts(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    images, texts = [picture("red"), picture("blue")], [PROMPT, "<image> what"]
    inputs = saved.processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert texts_of(pipe(images, text=texts, **NEW)) == saved.continues(inputs)


def test_paths_and_addresses(pipe: ImageTextToTextPipeline, saved: Talking, web: tuple[str, Path]) -> None:
    address, folder = web
    by_hand = saved.continues(saved.processor(images=picture("blue"), text=PROMPT, return_tensors="pt"))
    for image in (f"{address}/blue.png", str(folder / "blue.png")):
        assert texts_of(pipe(image, text=PROMPT, **NEW)) == by_hand
        chat = [user(image)]
        assert texts_of(pipe(text=chat, **NEW)) == [saved.says(user("blue"))]


def test_text_alone(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    assert texts_of(pipe(text=QUESTION, **NEW)) == saved.continues(saved.processor(text=QUESTION, return_tensors="pt"))


def test_a_missing_image_is_named(pipe: ImageTextToTextPipeline) -> None:
    with pytest.raises(ValueError, match="nowhere.png"):
        pipe("/nowhere.png", text=PROMPT, **NEW)
    with pytest.raises(ValueError, match="Sample 0: its text holds 2 <image> but it has 1 images"):
        pipe(picture("red"), text=f"<image> {PROMPT}", **NEW)


# --------------------------------------------------------------------------------------------------------------- chats


def test_chats_single_and_batched(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    chats = [[user("red")], [user("blue", text="what")], [user("red", "green", text="is that a square ?")]]
    by_hand = [saved.says(*chat) for chat in chats]
    assert [texts_of(pipe(text=chat, **NEW))[0] for chat in chats] == by_hand
    assert texts_of(pipe(chats, **NEW)) == by_hand  # also as the first argument
    # Different lengths in a batch: padded on the left, or the words would go on after padding.
    assert texts_of(pipe(text=chats, batch_size=3, **NEW)) == by_hand


def test_the_answer_can_be_answered(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    chat = pipe(text=[user("red")], max_new_tokens=TOKENS)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant" and chat[-1]["content"].strip() == saved.says(user("red"))
    again = [*chat, user("blue", text="what")]
    assert texts_of(pipe(text=again, **NEW)) == [saved.says(*again)]


def test_an_answer_that_was_begun_is_gone_on_with(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    chat = [user("red"), {"role": "assistant", "content": [{"type": "text", "text": "a red"}]}]
    inputs = saved.processor.apply_chat_template(
        chat, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    [by_hand] = saved.continues(inputs)
    assert texts_of(pipe(text=chat, **NEW)) == [by_hand]
    whole = pipe(text=chat, max_new_tokens=TOKENS)[0]["generated_text"]
    assert whole[-1]["content"][-1]["text"] == f"a red {by_hand}"


# ------------------------------------------------------------------------------------------------------------- options


def test_what_is_returned(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    image = picture("red")
    inputs = saved.processor(images=image, text=PROMPT, return_tensors="pt")
    [by_hand] = saved.continues(inputs)
    [whole] = pipe(image, text=PROMPT, max_new_tokens=TOKENS)
    assert whole == {"input_text": PROMPT, "generated_text": f"{PROMPT} {by_hand}"}
    [tensors] = pipe(image, text=PROMPT, max_new_tokens=TOKENS, return_tensors=True)
    expected = saved.model.generate(**inputs, max_new_tokens=TOKENS)[0]
    assert tensors["generated_token_ids"].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="mutually exclusive"):
        pipe(image, text=PROMPT, return_tensors=True, return_full_text=True)


def test_generation_options_reach_generate(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    inputs = saved.processor(images=picture("red"), text=PROMPT, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    beams = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5, "max_new_tokens": TOKENS}
    out = saved.model.generate(**inputs, **beams)
    texts = saved.processor.batch_decode(out[:, start:], skip_special_tokens=True)
    answered = texts_of(pipe(picture("red"), text=PROMPT, generate_kwargs=beams, return_full_text=False))
    # transformers before 5.21 hands out one answer per text, whatever the model.
    assert answered == texts if len(answered) > 1 else answered == texts[:1]
    torch.manual_seed(3)
    sampled = saved.model.generate(**inputs, do_sample=True, top_k=5, max_new_tokens=TOKENS)
    torch.manual_seed(3)
    options = {"do_sample": True, "top_k": 5}
    [got] = texts_of(pipe(picture("red"), text=PROMPT, generate_kwargs=options, **NEW))
    assert got == saved.processor.decode(sampled[0, start:], skip_special_tokens=True)


def test_words_stream_through_it(pipe: ImageTextToTextPipeline, saved: Talking) -> None:
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    options = {"text": [user("red")], "generate_kwargs": {"streamer": streamer}, **NEW}
    thread = threading.Thread(target=pipe, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == saved.says(user("red")) and len([piece for piece in pieces if piece]) > 2


def test_half_precision_and_models_that_are_loaded_already(saved: Talking) -> None:
    pipe = pipeline("image-text-to-text", model=saved.path, dtype=torch.bfloat16)
    assert pipe.model.model.language_model.dtype == torch.bfloat16 and isinstance(
        texts_of(pipe(text=[user("red")], **NEW))[0], str
    )
    pipe = pipeline("image-text-to-text", model=saved.model, processor=saved.processor)
    assert texts_of(pipe(text=[user("red")], **NEW)) == [saved.says(user("red"))]


def test_an_encoder_decoder(tmp_path: Path) -> None:
    tower, _ = save_parents(tmp_path)
    words = save_encoder_decoder(tmp_path / "t5", initializer_factor=4.0)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words, connector_type="mlp")
    processor = FrozenPrefixProcessor.from_model(model)
    model.save_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "eyes"))
    images, texts = [picture("red"), picture("blue")], [PROMPT, "<image> what"]
    out = model.generate(**processor(images=images, text=texts, padding=True, return_tensors="pt"), max_new_tokens=TOKENS)
    expected = processor.batch_decode(out, skip_special_tokens=True)
    assert [one.strip() for one in expected] == texts_of(pipe(images, text=texts, **NEW)) and any(expected)


# ---------------------------------------------------------------------------------------------------- saved and pushed


def test_what_it_saves_loads_though_it_leaves_the_processor_out(
    pipe: ImageTextToTextPipeline, saved: Talking, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    saved.model.save_pretrained(tmp_path / "alone")  # not even a tokenizer
    assert not (tmp_path / "saved" / "processor_config.json").exists(), "transformers has learnt it: drop the mend"
    assert not list((tmp_path / "alone").glob("*token*"))
    for name in ("saved", "alone"):
        folder = str(tmp_path / name)
        processor = AutoProcessor.from_pretrained(folder)
        assert isinstance(processor, FrozenPrefixProcessor)
        assert processor.to_dict() == saved.processor.to_dict()
        assert processor.chat_template == saved.processor.chat_template
        assert texts_of(pipeline("image-text-to-text", model=folder)(text=[user("red")], **NEW)) == [saved.says(user("red"))]


def test_a_part_saved_beside_the_model_is_preferred_to_the_parents(saved: Talking, tmp_path: Path) -> None:
    saved.model.save_pretrained(tmp_path)
    changed = AutoProcessor.from_pretrained(saved.path)
    changed.image_processor.image_mean = [0.1, 0.2, 0.3]
    changed.image_processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.tokenizer.get_vocab() == saved.processor.tokenizer.get_vocab()


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_load_the_folder(saved: Talking, auto_class: Any) -> None:
    model, processor = auto_class.from_pretrained(saved.path), AutoProcessor.from_pretrained(saved.path)
    assert type(model) is FrozenPrefixForConditionalGeneration and type(processor) is FrozenPrefixProcessor
    assert Talking(model, processor, saved.path).says(user("red")) == saved.says(user("red"))


PUSH = """
import json, tempfile
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.talking import talking, user
made = talking(Path(tempfile.mkdtemp()))
tower, words = (str(Path(made.path).parent / name) for name in ("tower", "words"))
CLIPVisionModel.from_pretrained(tower).push_to_hub("me/tower")
AutoImageProcessor.from_pretrained(tower).push_to_hub("me/tower")
AutoModelForCausalLM.from_pretrained(words).push_to_hub("me/words")
AutoTokenizer.from_pretrained(words).push_to_hub("me/words")
model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words", connector_type="mlp")
model.model.connector.load_state_dict(made.model.model.connector.state_dict())
processor = FrozenPrefixProcessor.from_model(model)
pipe = pipeline("image-text-to-text", model=model, processor=processor)
pipe.push_to_hub("me/piped")
pipe.model.push_to_hub("me/eyes")
pipe.processor.push_to_hub("me/eyes")
print(json.dumps(made.says(user("red"))))
"""

ASK = """
import json
from PIL import Image
from transformers import pipeline
pipe = pipeline("image-text-to-text", model={name!r}, trust_remote_code={trust!r})
image = Image.new("RGB", (20, 18), {colour!r})
chat = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": {question!r}}}]}}]
print(json.dumps(pipe(text=chat, max_new_tokens={tokens}, return_full_text=False)[0]["generated_text"].strip()))
"""


@pytest.mark.hub
@pytest.mark.slow
def test_from_the_hub_with_the_package_and_without(module_hub: Hub) -> None:  # noqa: F811
    """What a pipeline itself pushes holds no code: for people without the package, push its model and its processor."""
    text = json.loads(module_hub.run(PUSH).splitlines()[-1])
    options = {"colour": COLOURS["red"], "question": QUESTION, "tokens": TOKENS}
    files = module_hub.files("me/piped")
    assert "processor_config.json" not in files and "modeling_frozen_prefix.py" not in files
    for name, package in (("me/eyes", True), ("me/piped", True), ("me/eyes", False)):
        code = ASK.format(name=name, trust=None if package else True, **options)
        code = code if not package else f"import modeling_frozen\n{code}"
        assert json.loads(module_hub.run(code, package=package).splitlines()[-1]) == text
