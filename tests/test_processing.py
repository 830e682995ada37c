"""FrozenPrefixProcessor: pictures of every kind, placeholders per sample, truncation, padding, chats, saving."""

import base64
import io
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    ByT5Tokenizer,
    CLIPImageProcessorPil,
)
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_frozen.processors import (
    INTERLEAVED_CHAT_TEMPLATE,
    FrozenPrefixProcessor,
    few_shot_messages,
    load_rgb_image,
)
from tests.helpers.processors import (
    CHATML,
    COLOURS,
    PRINTS_LISTS,
    WORDS,
    byte_tokenizer,
    image_processor,
    make,
    picture,
    saved,
    space_tokenizer,
    word_tokenizer,
    words,
)
from tests.helpers.tiny import is_before


DROPS_LISTS = (
    "{% macro turn(message) %}{{ messages | length }}{{ message.role }}={{ message.content }};{% endmacro %}"
    "{% for message in messages %}{% if message.content is string %}{{ turn(message) }}{% endif %}{% endfor %}"
)
RENDERS_IMAGES = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def rgb(image, **kwargs) -> list[int]:
    """The colour in the middle of the opened picture."""
    opened = load_rgb_image(image, **kwargs)
    assert opened.mode == "RGB"
    return list(opened.getpixel((opened.width // 2, opened.height // 2)))


# ------------------------------------------------------------------------------------------------------------ pictures
def test_colour_modes_become_the_right_rgb():
    assert rgb(picture("red", mode="CMYK")) == [255, 0, 0]
    assert rgb(saved(picture("red", mode="CMYK"), "JPEG", quality=100))[0] > 240
    assert rgb(picture("blue", mode="P")) == [0, 0, 255]
    assert rgb(picture("green", mode="HSV")) == pytest.approx([0, 128, 0], abs=2)
    assert rgb(picture("green", mode="YCbCr")) == pytest.approx([0, 128, 0], abs=3)
    assert rgb(Image.new("L", (4, 4), 90)) == [90] * 3
    assert rgb(Image.new("1", (4, 4), 1)) == [255] * 3
    assert rgb(Image.new("LAB", (4, 4), (255, 128, 128))) == pytest.approx([255] * 3, abs=3)


def test_transparency_is_composited_on_white():
    assert rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == [255] * 3
    assert rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 255))) == [255, 0, 0]
    assert rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 51))) == [204] * 3
    assert rgb(Image.new("LA", (4, 4), (0, 51))) == [204] * 3
    assert rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 51)).convert("RGBa")) == [204] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert rgb(saved(palette, "PNG")) == [255, 0, 0]
    assert rgb(saved(palette, "PNG", transparency=1)) == [255] * 3
    assert rgb(saved(palette, "GIF", transparency=1)) == [255] * 3
    assert rgb(saved(picture("blue"), "PNG", transparency=COLOURS["blue"])) == [255] * 3
    assert rgb(saved(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == [255] * 3


def test_deep_greys_are_scaled_not_clipped():
    ramp = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    expected = [0, 100, 255]
    png = saved(Image.fromarray(ramp), "PNG")
    assert Image.open(io.BytesIO(png)).mode.startswith("I")
    wide = ramp.astype(np.int32)
    for image in (png, Image.fromarray(ramp), ramp, Image.fromarray(wide), wide, torch.from_numpy(wide)):
        assert np.asarray(load_rgb_image(image))[0, :, 0].tolist() == expected
    assert np.asarray(load_rgb_image(Image.fromarray(ramp.astype(np.float32))))[0, :, 1].tolist() == expected
    assert rgb(saved(Image.fromarray(ramp.astype(">u2")), "TIFF")) == [100] * 3
    assert rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32))) == [128] * 3
    assert rgb(Image.fromarray(np.full((4, 4), 100.0, np.float32))) == [100] * 3
    assert rgb(Image.fromarray(np.full((4, 4), 100, np.int32))) == [100] * 3


def test_exif_rotation_and_first_frame():
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert load_rgb_image(saved(image, "JPEG", exif=exif)).size == (4, 8)
    frames = [picture("red"), picture("blue")]
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb(gif) == [255, 0, 0]
    opened = Image.open(io.BytesIO(gif))
    opened.seek(1)  # a frame that the caller chose stays
    assert rgb(opened) == [0, 0, 255]


def test_arrays_and_tensors_of_every_layout_and_range():
    array = np.asarray(picture("red", (6, 5)))
    for image in (array, array.transpose(2, 0, 1), array / 255, array.astype(np.float32), array.astype(np.int64)):
        assert rgb(image) == [255, 0, 0]
        assert rgb(torch.tensor(image.copy())) == [255, 0, 0]
    assert rgb(torch.tensor(array / 255, dtype=torch.bfloat16)) == [255, 0, 0]
    assert rgb(array[..., 0] > 0) == [255] * 3
    assert rgb(np.concatenate([array, np.zeros((5, 6, 1), np.uint8)], -1)) == [255] * 3  # transparent
    small = np.zeros((3, 3, 3), np.uint8)
    small[1, 1] = (1, 2, 3)
    assert rgb(small) == [1, 2, 3]
    assert rgb(torch.from_numpy(small)) != [1, 2, 3]  # tensors are channels first
    assert rgb(torch.from_numpy(small), channels_first=False) == [1, 2, 3]


def test_every_source(tmp_path):
    png = saved(picture("blue"), "PNG")
    path = tmp_path / "blue.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    sources = [str(path), path, png, text, "data:image/png;base64," + text, io.BytesIO(png), picture("blue")]
    sources += [{"bytes": png, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": png, "path": "gone.png"}]
    for source in sources:
        assert rgb(source) == [0, 0, 255]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert rgb(f"{address}/blue.png") == [0, 0, 255]
        with pytest.raises(ValueError, match=r"gone\.png"):
            load_rgb_image(f"{address}/gone.png")
    finally:
        server.shutdown()


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    whole = saved(Image.effect_noise((64, 64), 50), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("notes.txt", "cut.png", "gone.png"):
        with pytest.raises(ValueError, match=f"image 1.*{name}"):
            make()(images=[picture(), str(tmp_path / name)], text=["a", "a"])
    with pytest.raises(ValueError, match="image 1.*-3"):
        make()(images=[picture(), np.full((4, 4, 3), -3.0)], text=["a", "a"])
    for image in (5, {"bytes": None, "path": None}, np.zeros((5, 9, 9)), np.zeros(4), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="frame 7"):
            load_rgb_image(image, "frame 7")


def test_processor_opens_pictures_before_the_image_processor():
    processor = make()
    expected = processor(images=picture("red"))["pixel_values"]
    clear = Image.new("RGBA", (12, 10), (0, 0, 0, 0))
    for image in (picture("red", mode="CMYK"), np.asarray(picture("red")) / 255, saved(picture("red"), "PNG")):
        np.testing.assert_array_equal(processor(images=image)["pixel_values"], expected)
    np.testing.assert_array_equal(processor(images=clear)["pixel_values"], np.ones((1, 3, 8, 8)))
    scaled = np.full((3, 8, 8), -0.5, np.float32)  # normalised by the caller: left alone
    out = processor(images=scaled, do_rescale=False, do_normalize=False, do_resize=False)
    np.testing.assert_array_equal(out["pixel_values"][0], scaled)


# -------------------------------------------------------------------------------------------------------- placeholders
def test_placeholders_go_in_after_bos_and_before_the_text():
    processor = make()
    expected = ["<s>", "<image>", "<image>", "<image>", "a", "dog"]
    assert words(processor, processor(images=picture(), text="a dog")["input_ids"][0]) == expected
    assert words(processor, processor(images=picture(), text="<image>a dog")["input_ids"][0]) == expected
    assert words(
        make(word_tokenizer(bos=False)), make(word_tokenizer(bos=False))(images=picture(), text="a")["input_ids"][0]
    ) == ["<image>"] * 3 + ["a"]
    end = make(image_position="end")
    assert words(end, end(images=picture(), text="a dog")["input_ids"][0]) == ["<s>", "a", "dog"] + ["<image>"] * 3
    assert words(end, end(images=picture(), text="")["input_ids"][0]) == ["<s>"] + ["<image>"] * 3


def test_images_alone_and_text_alone():
    processor = make()
    assert list(processor(images=[picture(), picture()], return_tensors="pt")) == ["pixel_values"]
    assert processor(images=[picture(), picture()], return_tensors="pt")["pixel_values"].shape == (2, 3, 8, 8)
    # GPT-2 would add word embeddings for token_type_ids.
    with_types = make(word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"]))
    assert sorted(with_types(text="a dog")) == ["attention_mask", "input_ids"]
    with pytest.raises(ValueError, match="at least one input"):
        processor()


@pytest.mark.parametrize(
    ("images", "text", "order", "counts"),
    [
        ("RB", ["a", "dog"], "RB", [1, 1]),
        ("RB", ["a <image>", "<image> dog"], "RB", [1, 1]),
        ("RB", ["a <image>", "dog"], "RB", [1, 1]),
        ("RBG", ["a <image>", "<image> dog <image>"], "RBG", [1, 2]),
        ("RB", ["<image> <image>", "dog"], "RB", [2, 0]),
        (["R", "BG"], ["a", "dog"], "RBG", [1, 2]),
        (["R", "BG"], ["a", "<image> dog <image>"], "RBG", [1, 2]),
        (["RB", ""], ["a", "dog"], "RB", [2, 0]),
        (["", ""], ["a", "dog"], "", [0, 0]),
        ("R-", ["a", "dog"], "R", [1, 0]),
        ("RB", "a", "RB", [2]),
        (["RB"], "a", "RB", [2]),
        ("R", "a", "R", [1]),
    ],
)
def test_images_go_to_their_texts(images, text, order, counts):
    processor = make()
    pictures = {"R": picture("red"), "B": picture("blue"), "G": picture("green"), "-": None}
    images = [[pictures[c] for c in one] if isinstance(images, list) else pictures[one] for one in images]
    out = processor(images=images, text=text)
    assert [list(ids).count(processor.image_token_id) for ids in out["input_ids"]] == [3 * count for count in counts]
    assert len(out.get("pixel_values", [])) == len(order)
    if order:
        expected = processor(images=[pictures[c] for c in order])["pixel_values"]
        np.testing.assert_array_equal(np.stack(out["pixel_values"]), np.stack(expected))


def test_batched_array_is_a_list_of_images():
    batch = torch.stack([torch.tensor(np.asarray(picture(c))).permute(2, 0, 1) for c in ("red", "blue")])
    out = make()(images=batch, text=["a", "dog"])
    np.testing.assert_array_equal(out["pixel_values"][1], make()(images=picture("blue"))["pixel_values"][0])


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([["R"], ["R"]], ["<image> a", "<image><image>"], r"Sample 1: its text holds 2 <image> but it has 1 "),
        # Right in sum, wrong per sample: transformers' own check lets it pass.
        ([["R", "R"], ["R"]], ["<image> a", "<image><image>"], r"Sample 0: its text holds 1 <image> but it has 2 "),
        ([["R"], ["R"]], ["<image><image>", "a"], r"Sample 0: its text holds 2 <image> but it has 1 "),
        (["R"], ["<image>", "<image>"], r"Sample 1: its text holds 1 <image> but it has 0 "),
        (["R", "R", "R"], ["<image>", "<image>"], r"Sample 1: its text holds 1 <image> but it has 2 "),
        (None, ["a", "<image>"], r"Sample 1: its text holds 1 <image> but it has 0 "),
        (["R", "R"], "<image>", r"Sample 0: its text holds 1 <image> but it has 2 "),
        (["R", "R", "R"], ["a", "dog"], r"3 images for 2 texts: sample 2"),
        ([["R"]], ["a", "dog"], r"1 lists of images for 2 texts: sample 1"),
    ],
)
def test_wrong_counts_name_numbers_and_sample(images, text, message):
    if images is not None:
        images = [[picture() for _ in one] if isinstance(one, list) else picture() for one in images]
    with pytest.raises(ValueError, match=message):
        make()(images=images, text=text)


def test_bad_settings_are_refused():
    for kwargs in ({"prefix_length": 0}, {"image_position": "middle"}, {"image_token": " "}):
        name, value = next(iter(kwargs.items()))
        with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
            make(**kwargs)
    with pytest.raises(TypeError, match="prefixlength"):
        make(prefixlength=3)
    with pytest.raises(ValueError, match="prefix_length=model.config.num_image_tokens"):
        make(prefix_length=None)(images=picture(), text="a")


def test_number_of_tokens_has_one_source():
    class Longer(FrozenPrefixProcessor):
        def num_image_tokens(self, image_inputs=None, image_idx=0):
            return 1 + image_idx

    processor = Longer(image_processor(), word_tokenizer(), prefix_length=3)
    out = processor(images=[[picture()], [picture(), picture()]], text=["a", "<image> a <image>"])
    assert [list(ids).count(processor.image_token_id) for ids in out["input_ids"]] == [1, 5]
    assert make()._get_num_multimodal_tokens(image_sizes=[[9, 9], [2, 5]]).num_image_tokens == [3, 3]


def test_mm_token_type_ids():
    out = make()(images=picture(), text="a", return_mm_token_type_ids=True)
    assert out["mm_token_type_ids"] == [[0, 1, 1, 1, 0]]


# ----------------------------------------------------------------------------------------------- tokenizer and padding
def test_placeholder_is_one_special_token_past_the_vocabulary():
    tokenizer = word_tokenizer()
    processor = make(tokenizer)
    assert processor.image_token_id == len(WORDS) and len(tokenizer) == len(WORDS) + 1
    assert tokenizer.image_token == "<image>" and tokenizer.image_token_id == len(WORDS)
    assert processor.decode([3, len(WORDS), 4], skip_special_tokens=True) == "a red"
    make(tokenizer)
    assert len(tokenizer) == len(WORDS) + 1


def test_placeholder_that_the_vocabulary_has_keeps_its_id():
    tokenizer = word_tokenizer(extra_special_tokens=["<pic>", "<other>"])
    before = len(tokenizer)
    processor = make(tokenizer, image_token="<pic>")
    assert processor.image_token_id == len(WORDS) and len(tokenizer) == before
    assert words(processor, processor(images=picture(), text="<pic>a")["input_ids"][0])[:2] == ["<s>", "<pic>"]


def test_padding_with_eos_leaves_the_vocabulary_alone():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    processor = make(tokenizer)
    assert len(tokenizer) == size + 1  # the placeholder only
    out = processor(images=[picture(), picture()], text=["a", "a dog"], padding=True, return_tensors="pt")
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert out["input_ids"][0, 0] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert out["input_ids"][0, 1:4].tolist() == [processor.image_token_id] * 3


def test_padding_side():
    batch = {"text": ["a", "a dog"], "padding": True}
    assert make()(**batch)["attention_mask"][0] == [0, 1, 1]
    assert make(is_encoder_decoder=True)(**batch)["attention_mask"][0] == [1, 1, 0]
    assert make()(**batch, padding_side="right")["attention_mask"][0] == [1, 1, 0]
    assert make(word_tokenizer(padding_side="right"))(**batch)["attention_mask"][0] == [1, 1, 0]  # the user's word


# ---------------------------------------------------------------------------------------------------------- truncation
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_takes_text_and_no_placeholder(side):
    processor = make(word_tokenizer(truncation_side=side), prefix_length=2)
    cut = partial(processor, images=[picture(), picture()], truncation=True)
    text = "one <image> a red dog <image> two cat"
    for length in range(5, 12):
        ids = words(processor, cut(text=text, max_length=length)["input_ids"][0])
        kept = [word for word in ids[1:] if word != "<image>"]
        all_words = ["one", "a", "red", "dog", "two", "cat"]
        count = length - 5
        assert len(ids) == length and ids[0] == "<s>" and ids.count("<image>") == 4
        assert kept == (all_words[:count] if side == "right" else all_words[len(all_words) - count :])
    with pytest.raises(ValueError, match=r"Sample 0: its 2 images take 4 placeholders, 5 .* max_length is 4.*=5 or"):
        cut(text=text, max_length=4)


def test_truncation_equals_the_tokenizers_own_where_there_is_no_image():
    for tokenizer in (word_tokenizer(), byte_tokenizer(), space_tokenizer()):
        text = "a dog sees a red cat, a dog"
        for side in ("right", "left"):
            tokenizer.truncation_side = side
            for length in range(2, 9):
                expected = tokenizer(text, truncation=True, max_length=length)["input_ids"]
                ids = make(tokenizer)(text=text, truncation=True, max_length=length)["input_ids"][0]
                if side == "right":  # SentencePiece's inserted space is no text by itself
                    assert ids == expected or tokenizer.convert_ids_to_tokens(expected) == ["<s>", "▁"]
                else:  # a rest of a word may be written with other tokens, never with more
                    assert len(ids) <= length and tokenizer.decode(expected, skip_special_tokens=True).endswith(
                        tokenizer.decode(ids, skip_special_tokens=True).strip()
                    )


def test_truncation_with_a_tokenizer_that_has_no_offsets():
    for side, expected in (("right", "a red"), ("left", "sees it")):
        processor = make(ByT5Tokenizer(truncation_side=side), prefix_length=2, is_encoder_decoder=True)
        assert not processor.tokenizer.is_fast
        text = "a red <image>dog sees it"
        ids = processor(images=picture(), text=text, truncation=True, max_length=11)["input_ids"][0]
        assert len(ids) <= 11 and ids.count(processor.image_token_id) == 2
        assert ids[-1] == processor.tokenizer.eos_token_id
        assert processor.decode(ids, skip_special_tokens=True).strip() == expected


def test_truncation_never_cuts_inside_a_placeholder_with_a_space():
    for side in ("right", "left"):
        processor = make(ByT5Tokenizer(truncation_side=side), prefix_length=2, image_token="<my image>")
        for length in range(4, 9):
            ids = processor(images=picture(), text="a <my image> b", truncation=True, max_length=length)["input_ids"][0]
            assert ids.count(processor.image_token_id) == 2 and len(ids) <= length


def test_truncation_follows_model_max_length_and_only_if_asked():
    processor = make(word_tokenizer(model_max_length=6))
    assert len(processor(images=picture(), text="a red dog runs", truncation=True)["input_ids"][0]) == 6
    end = make(word_tokenizer(model_max_length=6), image_position="end")  # where a tokenizer's own truncation cuts
    assert len(end(images=picture(), text="a red dog runs", truncation=True)["input_ids"][0]) == 6
    assert len(processor(images=picture(), text="a red dog runs")["input_ids"][0]) == 8
    assert len(processor(images=picture(), text="a red dog runs", max_length=5)["input_ids"][0]) == 5
    assert len(processor(images=picture(), text="a red dog runs", text_kwargs={"max_length": 5})["input_ids"][0]) == 5
    unknown = make()
    assert len(unknown(images=picture(), text="a red dog runs", truncation=True)["input_ids"][0]) == 8


def test_truncated_batch_pads_and_keeps_each_samples_images():
    processor = make(prefix_length=2)
    out = processor(
        images=[[picture()], [picture(), picture()], []],
        text=["a red dog runs", "a red dog runs", "one"],
        truncation=True,
        max_length=6,
        padding=True,
        return_tensors="pt",
    )
    assert out["input_ids"].shape == (3, 6)
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [2, 4, 0]


# ------------------------------------------------------------------------------------------------------ chat templates
TURNS = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "image"}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\nwhat <image>?<|im_end|>\n"),
        (DROPS_LISTS, "1user=what <image>?;"),
        (PRINTS_LISTS, "<s>[what <image>?]"),
        (RENDERS_IMAGES, "what <image>\n?"),
        (None, "User: what <image>?\n"),
    ],
)
def test_templates_render_images(template, expected, tmp_path):
    processor = make(word_tokenizer(chat_template=template) if template else word_tokenizer())
    assert processor.apply_chat_template(TURNS) == expected
    strings = [{"role": "user", "content": "what <image>?"}]
    assert processor.apply_chat_template(strings) == expected.replace("<image>\n", "<image>")  # which that one adds
    # What is saved renders alike wherever it is read.
    processor.save_pretrained(tmp_path)
    file = (tmp_path / "chat_template.jinja").read_text()
    assert render_jinja_template(conversations=[TURNS], chat_template=file, bos_token="<s>")[0][0] == expected
    assert FrozenPrefixProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template == file


def test_template_of_the_user_and_named_templates():
    processor = make(chat_template={"default": CHATML, "other": PRINTS_LISTS})
    assert processor.apply_chat_template(TURNS).startswith("<|im_start|>user\nwhat <image>?")
    assert processor.apply_chat_template(TURNS, chat_template="other") == "<s>[what <image>?]"
    assert processor.apply_chat_template(TURNS, chat_template=DROPS_LISTS) == "1user=what <image>?;"
    for untouched in ("no messages at all", "{{ messages[0]['content'][0]['text'] }}"):
        assert make(chat_template=untouched).chat_template == untouched


def test_default_template_has_a_generation_prompt_that_answers_continue():
    processor = make()
    turns = [*TURNS, {"role": "assistant", "content": "a dog"}]
    whole = processor.apply_chat_template(turns)
    assert whole == "User: what <image>?\nAssistant: a dog</s>\n"
    assert whole.startswith(processor.apply_chat_template(TURNS, add_generation_prompt=True))
    started = [*TURNS, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert processor.apply_chat_template(started, continue_final_message=True).endswith("Assistant: a")


def test_chat_with_images_gives_model_inputs():
    processor = make()
    turns = [
        {"role": "user", "content": [{"type": "image", "image": picture("red")}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "url": saved_url(picture("blue"))}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    out = processor.apply_chat_template(turns, **options)
    assert (out["input_ids"] == processor.image_token_id).sum() == 6
    expected = processor(images=[picture("red"), picture("blue")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(out["pixel_values"], expected)
    assert words(processor, out["input_ids"][0])[:1] + words(processor, out["input_ids"][0])[-2:] == [
        "<s>", "Assistant", ":",
    ]  # fmt: skip
    batch = processor.apply_chat_template([turns, turns[:1]], **options, processor_kwargs={"padding": True})
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [6, 3]
    assert len(batch["pixel_values"]) == 3


def saved_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(saved(image, "PNG")).decode()


def test_chat_templates_with_bos_get_it_once():
    processor = make(word_tokenizer(chat_template=PRINTS_LISTS))
    turns = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "image", "image": picture()}]}]
    out = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
    assert words(processor, out["input_ids"][0]).count("<s>") == 1


def test_images_beside_a_chat():
    processor, beside = make(), {"processor_kwargs": {"images": [picture()]}}
    if is_before("5.23"):
        with pytest.raises(ValueError, match="write them there as .* or upgrade to transformers 5.23"):
            processor.apply_chat_template(TURNS, tokenize=True, return_dict=True, **beside)
        return
    out = processor.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_tensors="pt", **beside)
    assert torch.equal(out["pixel_values"], processor(images=[picture()], return_tensors="pt")["pixel_values"])


def test_assistant_mask_covers_the_answer_past_expanded_images():
    processor = make()
    turns = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "a dog"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = processor.apply_chat_template(turns, **options)
    marked = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert words(processor, marked) == ["a", "dog", "</s>"]
    left = make(word_tokenizer(truncation_side="left"))
    with pytest.raises(ValueError, match="Sample 0: the assistant mask"):
        left.apply_chat_template(turns, **options, processor_kwargs={"truncation": True, "max_length": 8})


def test_placeholder_that_a_user_smuggled_into_a_chat_is_text():
    processor = make(byte_tokenizer())
    turns = [{"role": "user", "content": [{"type": "text", "text": "a <image> dog"}]}]
    options = {"tokenize": True, "return_dict": True}
    if is_before("5.23"):
        with pytest.raises(ValueError, match="would be ignored.*Upgrade to transformers 5.23"):
            processor.apply_chat_template(turns, **options, sanitize_control_tokens=True)
        return
    out = processor.apply_chat_template(turns, **options, sanitize_control_tokens=True)
    assert processor.image_token_id not in out["input_ids"][0]
    with pytest.raises(ValueError, match="Sample 0: its text holds 1 <image> but it has 0"):
        processor.apply_chat_template(turns, **options)
    cut = processor.apply_chat_template(
        turns, **options, sanitize_control_tokens=True, processor_kwargs={"truncation": True, "max_length": 9}
    )
    assert len(cut["input_ids"][0]) <= 9 and processor.image_token_id not in cut["input_ids"][0]


def test_few_shot_messages():
    support = [(picture("red"), "a dog"), (picture("blue"), "what is it", "a cat")]
    support.append({"image": [picture("red"), picture("blue")], "answer": "two"})
    messages = few_shot_messages(support, (picture("green"), "what"), instruction="one : ")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    processor = make()
    plain = processor.apply_chat_template(messages, chat_template=INTERLEAVED_CHAT_TEMPLATE)
    assert plain == "one : <image>a dog\n<image>what is ita cat\n<image><image>two\n<image>what"
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert len(out["pixel_values"]) == 5 and list(out["input_ids"][0]).count(processor.image_token_id) == 15
    assert len(few_shot_messages([], picture())) == 1
    with pytest.raises(ValueError, match=r"support\[1\]"):
        few_shot_messages([support[0], (picture(),)], picture())
    with pytest.raises(ValueError, match=r"support\[0\].*answer=3"):
        few_shot_messages([(picture(), 3)], picture())


# ------------------------------------------------------------------------------------------------- saving and parents
@pytest.mark.parametrize("tokenizer", [word_tokenizer, byte_tokenizer, space_tokenizer])
def test_saved_processor_reloads_with_identical_outputs(tokenizer, tmp_path):
    processor = make(tokenizer(), 5, image_position="end", is_encoder_decoder=True)
    processor.save_pretrained(tmp_path)
    again = FrozenPrefixProcessor.from_pretrained(tmp_path)
    batch = {"images": [picture(), picture("blue")], "text": ["a dog", "a"], "padding": True, "return_tensors": "pt"}
    first, second = processor(**batch), again(**batch)
    assert sorted(first) == sorted(second)
    for name in first:
        assert torch.equal(first[name], second[name])
    for name in ("prefix_length", "image_token", "image_token_id", "image_position", "is_encoder_decoder"):
        assert getattr(processor, name) == getattr(again, name)
    assert again.tokenizer.image_token == "<image>" and again.to_dict() == processor.to_dict()
    assert len(again.tokenizer) == len(processor.tokenizer)
    saved_scalars = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved_scalars["image_position"] == "end" and "chat_template" not in saved_scalars


def test_decoding():
    processor = make()
    ids = torch.tensor([[1, processor.image_token_id, 3, 6, 2]])
    assert processor.post_process_image_text_to_text(ids) == ["a dog"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a dog"]


def parents(tmp_path: Path, **changes) -> SimpleNamespace:
    """Folders of two parents, and the config of a model that records them."""
    image_processor().save_pretrained(tmp_path / "vision")
    word_tokenizer(padding_side="right").save_pretrained(tmp_path / "text")
    config = {
        "vision_base_model": {"name_or_path": str(tmp_path / "vision"), "revision": None},
        "text_base_model": {"name_or_path": str(tmp_path / "text"), "revision": "0123abc"},
        "vision_config": SimpleNamespace(image_size=8, patch_size=4),
        "num_image_tokens": 4,
        "image_token_id": len(WORDS),
        "is_encoder_decoder": False,
    }
    return SimpleNamespace(config=SimpleNamespace(**{**config, **changes}))


def test_from_model(tmp_path, caplog):
    processor = FrozenPrefixProcessor.from_model(parents(tmp_path), local_files_only=True)
    out = processor(images=[picture(), picture()], text=["a", "a dog"], padding=True)
    assert list(out["input_ids"][1]).count(len(WORDS)) == 4
    assert out["attention_mask"][0][0] == 0  # the parent's own right side is a leftover of its training
    assert caplog.text == ""
    seq2seq = FrozenPrefixProcessor.from_model(parents(tmp_path, is_encoder_decoder=True))
    assert seq2seq.is_encoder_decoder and seq2seq(text=["a", "a a"], padding=True)["attention_mask"][0][-1] == 0


def test_processor_of_a_real_model_loads_through_the_auto_class(tmp_path):
    from tests.helpers.tiny import join  # tiny parents, joined

    model, processor = join(tmp_path)
    inputs = processor(images=[picture(), picture("blue")], text=["a picture", "what"], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [model.config.num_image_tokens] * 2
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape == (2, inputs["input_ids"].shape[1] + 2)
    processor.save_pretrained(tmp_path / "saved")
    model.config.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is FrozenPrefixProcessor
    outputs = again(images=[picture(), picture("blue")], text=["a picture", "what"], padding=True, return_tensors="pt")
    assert all(torch.equal(inputs[name], outputs[name]) for name in inputs)


def test_from_model_checks_the_placeholders_id(tmp_path):
    for wrong in (999, WORDS.index("dog")):
        message = rf"'<image>' has id {len(WORDS)}.*image_token_id={wrong}.*pass the tokenizer it was built"
        message += rf" with.*join it with tokenizer=… or image_token_id={len(WORDS)}"
        with pytest.raises(ValueError, match=message):
            FrozenPrefixProcessor.from_model(parents(tmp_path, image_token_id=wrong))
    reserved = word_tokenizer(extra_special_tokens=["<|pad_1|>"])
    model = parents(tmp_path)
    with pytest.raises(ValueError, match=rf"image_token_id={len(WORDS)}: .*pass image_token='<\|pad_1\|>'"):
        FrozenPrefixProcessor.from_model(model, tokenizer=reserved)
    processor = FrozenPrefixProcessor.from_model(model, tokenizer=reserved, image_token="<|pad_1|>")
    assert processor.image_token_id == len(WORDS)


def test_from_model_without_what_it_needs(tmp_path):
    model = parents(tmp_path)
    (tmp_path / "vision" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)vision tower '.*vision'.*preprocessor_config.json.*image_processor=…"):
        FrozenPrefixProcessor.from_model(model)
    assert FrozenPrefixProcessor.from_model(model, image_processor=image_processor()).prefix_length == 4
    with pytest.raises(ValueError, match=r"records no place of its language model.*tokenizer=…"):
        FrozenPrefixProcessor.from_model(parents(tmp_path, text_base_model=None))


def test_from_model_says_that_picture_sizes_differ(tmp_path, caplog):
    FrozenPrefixProcessor.from_model(parents(tmp_path, vision_config=SimpleNamespace(image_size=16, patch_size=4)))
    assert "8x8" in caplog.text and "16x16" in caplog.text
    caplog.clear()
    cropped = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    wanted = SimpleNamespace(image_size=[16, 16], patch_size=4)
    FrozenPrefixProcessor.from_model(parents(tmp_path, vision_config=wanted), image_processor=cropped)
    FrozenPrefixProcessor.from_model(parents(tmp_path, vision_config=SimpleNamespace(image_size=224)))  # a CNN
    assert caplog.text == ""
