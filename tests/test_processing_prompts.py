"""Prompts: what a tokenizer puts around them, texts and media of the wrong kind, and the names of what is returned."""

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ASTFeatureExtractor,
    ByT5Tokenizer,
    ClapFeatureExtractor,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from modeling_frozen.processors import FrozenPrefixProcessor
from tests.helpers import tiny


IMAGE = Image.new("RGB", (8, 8), "red")
WORDS = "<unk> <s> </s> [CLS] [SEP] a dog what is it ? User Assistant : .".split()


def image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def make(tokenizer: Any, **options: Any) -> FrozenPrefixProcessor:
    return FrozenPrefixProcessor(image_processor(), tokenizer, 3, **options)


def word_tokenizer(post_processor: Any, **special: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        backend.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def byte_tokenizer(post_processor: Any, **special: Any) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = post_processor(vocab)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **special)


def template(single: str, *tokens: str) -> Any:
    return processors.TemplateProcessing(
        single, single.replace("$A", "$A $B"), [(token, WORDS.index(token)) for token in tokens]
    )


def behind_bytes(vocab: dict[str, int]) -> Any:
    ends = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [(one, vocab[one]) for one in ("<s>", "</s>")])
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), ends])


# Name -> tokenizer that ends every text with a special token, and what a prompt begins with.
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
APPENDING: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bos and eos": (lambda: word_tokenizer(template("<s> $A </s>", "<s>", "</s>"), **BOTH), ["<s>"]),
    "eos": (lambda: word_tokenizer(template("$A </s>", "</s>"), **BOTH), []),
    "bos is eos": (
        lambda: word_tokenizer(template("</s> $A </s>", "</s>"), bos_token="</s>", eos_token="</s>"), ["</s>"],
    ),
    "bert": (
        lambda: word_tokenizer(processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)), cls_token="[CLS]", sep_token="[SEP]"),
        ["[CLS]"],
    ),
    "asked for": (lambda: word_tokenizer(None, add_bos_token=True, add_eos_token=True, **BOTH), ["<s>"]),
    "roberta": (
        lambda: byte_tokenizer(lambda vocab: processors.RobertaProcessing(("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))),
        ["<s>"],
    ),
    "sequence": (lambda: byte_tokenizer(behind_bytes), ["<s>"]),
    "python": (ByT5Tokenizer, []),
}  # fmt: skip


def tokens(processor: FrozenPrefixProcessor, ids: Any) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(list(map(int, ids)))


@pytest.mark.parametrize("kind", APPENDING)
def test_a_prompt_of_a_decoder_stays_open(kind: str, tmp_path: Path) -> None:
    build, start = APPENDING[kind]
    original = build()
    ended = original("a dog")["input_ids"]
    processor = make(original)
    bare = tokens(processor, processor.tokenizer("a dog", add_special_tokens=False)["input_ids"])
    prompt = [*start, "<image>", "<image>", "<image>", *bare]
    inputs = {"images": IMAGE, "text": "a dog"}
    assert tokens(processor, processor(**inputs)["input_ids"][0]) == prompt
    assert tokens(processor, processor(text="")["input_ids"][0]) == start
    assert tokens(processor, processor(images=IMAGE, text="")["input_ids"][0]) == prompt[: len(start) + 3]
    # Alike in a batch, cut, in a chat, and read again.
    batch = processor(images=[IMAGE, IMAGE], text=["a dog", "a"], padding=True, return_tensors="pt")
    assert tokens(processor, batch["input_ids"][0]) == prompt and batch["attention_mask"][:, -1].tolist() == [1, 1]
    cut = processor(**inputs, truncation=True, max_length=len(start) + 4)["input_ids"][0]
    assert len(cut) <= len(start) + 4 and tokens(processor, cut)[-1] in (*bare, "<image>")
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what"}]}]
    said = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"][0]
    assert tokens(processor, said)[-1] == ":"
    processor.save_pretrained(tmp_path)
    for again in (
        FrozenPrefixProcessor.from_pretrained(tmp_path),
        copy.deepcopy(processor),
        pickle.loads(pickle.dumps(processor)),
    ):
        assert tokens(again, again(**inputs)["input_ids"][0]) == prompt
        assert again.tokenizer.eos_token == processor.tokenizer.eos_token
    assert original("a dog")["input_ids"] == ended  # the caller's own still ends its texts
    # An encoder reads texts as its tokenizer ends them, and so does a model that only reads.
    for options in ({"is_encoder_decoder": True}, {"text_headless": True}):
        whole = make(build(), **options)
        assert whole(text="a dog")["input_ids"][0] == ended
        whole.save_pretrained(tmp_path / "whole")
        assert FrozenPrefixProcessor.from_pretrained(tmp_path / "whole")(text="a dog")["input_ids"][0] == ended


@pytest.mark.parametrize("kind", APPENDING)
def test_training_tokenises_as_inference_does(kind: str) -> None:
    processor = make(APPENDING[kind][0]())
    row = {"image": IMAGE, "prompt": "what is it ?", "answer": "a dog"}
    batch = DataCollatorForFrozenPrefix(processor)([row])
    prompt = processor(images=IMAGE, text="what is it ?")["input_ids"][0]
    ids, learnt = batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()
    assert ids[: len(prompt)] == prompt and not any(learnt[: len(prompt)]) and all(learnt[len(prompt) :])
    assert ids[-1] == processor.tokenizer.eos_token_id is not None  # and answers end with what ended the texts
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what"}]}]
    batch = DataCollatorForFrozenPrefix(processor)([{"messages": [*chat, {"role": "assistant", "content": "a dog"}]}])
    prompt = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"][0]
    ids = batch["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    assert (batch["labels"][0] != -100).tolist().index(True) == len(prompt)


def test_what_only_reads_is_known_of_processors_saved_before(tmp_path: Path) -> None:
    whole = make(APPENDING["bert"][0](), text_headless=True)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    del saved["text_headless"]
    file.write_text(json.dumps(saved))
    assert tokens(whole, FrozenPrefixProcessor.from_pretrained(tmp_path)(text="a")["input_ids"][0]) == ["[CLS]", "a"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "frozen-prefix", "text_headless": True}))
    assert tokens(whole, FrozenPrefixProcessor.from_pretrained(tmp_path)(text="a")["input_ids"][0]) == ["[CLS]", "a", "[SEP]"]


# ------------------------------------------------------------------------------------------ templates that take lists alone
SMOLVLM = (
    "<s>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}"
    "{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% for line in message['content'] %}{% if line['type'] == 'image' %}<image>{% elif "
    "message['role'] == 'assistant' %}{% generation %}{{ line['text'] }}</s>{% endgeneration %}{% else %}{{ line['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("lists", [SMOLVLM, MARKED, SMOLVLM.replace("{{line['text']}}", "{{line['text'] | trim}}")])
@pytest.mark.parametrize("as_lists", [True, False])
def test_templates_that_take_lists_alone_train_and_take_strings(lists: str, as_lists: bool) -> None:
    processor = make(APPENDING["bos and eos"][0](), chat_template=lists)
    user: Any = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what is it ?"}]
    turns = [("user", user), ("assistant", "a dog"), ("user", "what ?"), ("assistant", "a . dog")]
    chat = [
        {"role": role, "content": [{"type": "text", "text": said}] if as_lists and isinstance(said, str) else said}
        for role, said in turns
    ]
    batch = DataCollatorForFrozenPrefix(processor)([{"messages": chat}])
    learnt = tokens(processor, batch["input_ids"][0][batch["labels"][0] != -100])
    assert [token for token in learnt if token != ":"] == ["a", "dog", "</s>", "a", ".", "dog", "</s>"]
    whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert batch["input_ids"][0].tolist()[: len(whole)] == whole


# ------------------------------------------------------------------------------------------------- loaded models, wrong kinds
def test_a_model_joined_from_loaded_ones_is_told_how_to_join(tmp_path: Path) -> None:
    """With rows to spare behind the words, the placeholder's id is unknown without a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

    tower, words = tiny.save_parents(tmp_path)
    loaded = CLIPVisionModel.from_pretrained(tower), AutoModelForCausalLM.from_pretrained(words)
    tokenizer = AutoTokenizer.from_pretrained(words)
    parts = {"tokenizer": tokenizer, "image_processor": image_processor()}
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(*loaded)
    with pytest.raises(ValueError, match=rf"join it with tokenizer=… or image_token_id={len(tiny.WORDS)}\."):
        FrozenPrefixProcessor.from_model(model, **parts)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(*loaded, image_token_id=len(tiny.WORDS))
    processor = FrozenPrefixProcessor.from_model(model, **{**parts, "tokenizer": AutoTokenizer.from_pretrained(words)})
    assert processor.image_token_id == model.config.image_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, r"`text` is an empty list"),
        ({"text": (), "images": [IMAGE]}, r"`text` is an empty list"),
        ({"text": 5}, r"`text` must be a string or a list of strings, got a int: 5"),
        ({"text": b"a"}, r"`text` must be a string or a list of strings, got a bytes"),
        ({"text": {"a": 1}}, r"`text` must be a string or a list of strings, got a dict"),
        ({"text": ["a", 5], "images": [IMAGE, IMAGE]}, r"`text` must hold strings, but sample 1 is a int: 5"),
        ({"text": [["a", "dog"]]}, r"`text` must hold strings, but sample 0 is a list"),
        ({"text": np.array(["a", None], dtype=object)}, r"`text` must hold strings, but sample 1 is a NoneType"),
        ({"images": []}, r"at least one input"),
        ({"images": 5}, r"Can't open image 0 \(of type int\)"),
        ({"images": [IMAGE, {"bytes": None, "path": None}]}, r"Can't open image 1"),
        ({"images": np.zeros((4, 4, 3)).astype(object)}, r"Can't open image 0"),
        ({"images": [np.array([[None]])]}, r"Can't open image 0 .*object, but an image's are numbers"),
        ({"images": np.array(["2020-01-01"], dtype="datetime64[D]").reshape(1, 1)}, r"datetime64.*an image's are numbers"),
        ({"images": np.zeros((4, 4), dtype=complex)}, r"complex128, but an image's are numbers"),
        ({"videos": 5}, r"takes \['image'\] and text, and was given video"),
    ],
)
def test_wrong_inputs_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(tiny.tokenizer())(**arguments)


def test_arrays_and_columns_of_texts_and_images_are_lists() -> None:
    from datasets import Dataset

    processor = make(tiny.tokenizer())
    expected = processor(text=["a", "what"], images=[IMAGE, IMAGE], return_tensors="pt", padding=True)
    rows = Dataset.from_dict({"text": ["a", "what"], "image": [IMAGE, IMAGE]})
    objects = np.empty(2, dtype=object)
    objects[:] = [IMAGE, IMAGE]
    for text in (np.array(["a", "what"]), np.array(["a", "what"], dtype=object), rows["text"], ("a", "what")):
        for images in (objects, rows["image"], (IMAGE, IMAGE)):
            made = processor(text=text, images=images, return_tensors="pt", padding=True)
            assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


# ------------------------------------------------------------------------------------------------------ model_input_names
EXTRACTORS = {
    "none": None,
    "wav2vec2": Wav2Vec2FeatureExtractor,
    "whisper": WhisperFeatureExtractor,
    "ast": ASTFeatureExtractor,
    "clap": ClapFeatureExtractor,
    "seamless": SeamlessM4TFeatureExtractor,
}


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize(("images", "videos"), [(True, True), (True, False), (False, False)])
def test_model_input_names_are_those_of_a_call(extractor: str, images: bool, videos: bool) -> None:
    if not images and extractor == "none":
        return
    feature_extractor = EXTRACTORS[extractor] and EXTRACTORS[extractor]()
    lengths = {"prefix_length": 2, "video_prefix_length": 2, "audio_prefix_length": 2, "num_frames": 2 if videos else None}
    processor = FrozenPrefixProcessor(
        image_processor() if images else None, tiny.tokenizer(), feature_extractor=feature_extractor, **lengths
    )
    inputs: dict[str, Any] = {"text": "a", "images": IMAGE, "videos": [IMAGE, IMAGE], "audio": np.zeros(16000, np.float32)}
    taken = {"images": images, "videos": videos, "audio": feature_extractor is not None}
    made = processor(**{name: one for name, one in inputs.items() if taken.get(name, True)})
    assert sorted(made) == sorted(processor.model_input_names)
    for count in range(1, 4):  # and of fewer media, some of them
        for names in itertools.combinations([name for name in taken if taken[name]], count):
            assert set(processor(**{name: inputs[name] for name in names})) <= set(processor.model_input_names)
