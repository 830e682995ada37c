"""transformers.js says what `generate()` says: in Node, in Chromium, and on the page of the examples."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.export import export_transformers_js
from tests.helpers.javascript import PACKAGE, Chromium, in_node, node_modules, served
from tests.helpers.talking import talking
from tests.helpers.tiny import WORDS, join, skip_before, tokenizer, vision_config


PAGE = Path(__file__).parents[1] / "examples" / "browser"
NEW = 12
SIZE = 16
PROMPT = "<image> what colour ?"
ROTARY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": ROTARY,
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # learned positions
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # slopes in place of positions
    # scaled embeddings, and a window shorter than what is read, in the first layer
    "gemma2": {**ROTARY, **GEMMA2, "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture
def exporters() -> None:
    skip_before("5.23.0", "exports no graph that can be saved and read back")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'frozen-prefix[export]'")


def pictures(size: tuple[int, int] = (SIZE, SIZE)) -> list[Image.Image]:
    drawn = np.random.default_rng(3).integers(0, 256, (3, *reversed(size), 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in drawn]


def joined(
    tower: str = "clip", words: str = "llama", text: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, FrozenPrefixProcessor]:
    """A model that says other words for other images, in memory."""
    torch.manual_seed(0)
    if tower == "clip":
        vision: Any = CLIPVisionModel(vision_config())
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIZE, patch_size=8))
        images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.6}
    config = AutoConfig.for_model(words, **{**LANGUAGE_MODELS[words], **ids, **(text or {})})
    language_model = AutoModelForCausalLM.from_config(config)
    if words == "gemma2":  # it scales its embeddings, which would drown what is attended to
        language_model.get_input_embeddings().weight.data *= 0.1
    options = {"connector_type": "resampler", "prefix_length": 3, **options}
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        vision, language_model, tokenizer=tokenizer(), **options
    )
    embedded = model.get_input_embeddings()(torch.arange(len(WORDS)))
    model.model.connector.set_output_norm(3 * embedded.norm(dim=-1).mean().item())
    return model.eval(), FrozenPrefixProcessor.from_model(model, image_processor=images, tokenizer=tokenizer())


def said(model: Any, processor: Any, image: Image.Image | None, text: str = PROMPT, new: int = NEW) -> list[int]:
    inputs = processor(images=image, text=text, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=new, do_sample=False)[0].tolist()


def jobs(folder: Path, images: list[Image.Image], **options: Any) -> list[dict[str, Any]]:
    made = []
    for index, image in enumerate(images):
        file = folder / f"{image.width}x{image.height}-{index}.png"
        image.save(file)
        made.append({"model": str(folder / "js"), "image": str(file), "text": PROMPT, "tokens": NEW, **options})
    return made


def by_graphs(folder: Path, suffix: str, processor: Any, image: Image.Image, new: int = NEW) -> list[int]:
    """The greedy words of the three graphs, as onnxruntime computes them here."""
    import onnxruntime

    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    see, embed, decode = (onnxruntime.InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx") for name in names)
    inputs = processor(images=image, text=PROMPT, return_tensors="np")
    ids: list[int] = inputs["input_ids"][0].tolist()
    prefix = see.run(None, {"pixel_values": inputs["pixel_values"]})[0].reshape(-1, processor_width(embed))
    embeds = embed.run(None, {"input_ids": np.array([ids])})[0]
    embeds[0, np.array(ids) == processor.image_token_id] = prefix
    past = {
        one.name: np.zeros([1, one.shape[1], 0, one.shape[3]], np.float32)
        for one in decode.get_inputs()
        if one.name.startswith("past")
    }
    for _ in range(new):
        seen = len(ids)
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, seen), np.int64), **past}
        feeds["position_ids"] = np.arange(seen - embeds.shape[1], seen)[None]
        outputs = decode.run(None, {one.name: feeds[one.name] for one in decode.get_inputs()})
        past = dict(zip(past, outputs[1:], strict=True))
        ids.append(int(outputs[0][0, -1].argmax()))
        if ids[-1] == 2:
            break
        embeds = embed.run(None, {"input_ids": np.array([ids[-1:]])})[0]
    return ids


def processor_width(embed: Any) -> int:
    return embed.get_outputs()[0].shape[-1]


# ------------------------------------------------------------------------------------------------------------------ Node
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "words", "options"),
    [
        ("clip", "llama", {}),
        ("clip", "gpt2", {"connector_type": "mlp", "prefix_length": None}),
        ("siglip", "qwen2", {"connector_type": "mlp", "prefix_length": None}),
        ("siglip", "qwen3", {}),
        ("clip", "opt", {"connector_type": "lstm"}),
        ("siglip", "bloom", {"connector_type": "qformer"}),
        ("clip", "gemma2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("connector_type", "resampler"),
)
def test_node_says_the_words_of_generate(tower: str, words: str, options: dict, tmp_path: Path, exporters: None) -> None:
    node_modules()
    model, processor = joined(tower, words, **options)
    export_transformers_js(model, tmp_path / "js", processor)
    expected = [said(model, processor, image) for image in pictures()]
    assert len({tuple(ids) for ids in expected}) > 1, "the images change nothing"
    assert [by_graphs(tmp_path / "js", "", processor, image) for image in pictures()] == expected
    assert [answer["ids"] for answer in in_node(jobs(tmp_path, pictures()))] == expected


@pytest.mark.slow
def test_quantised_graphs_text_alone_and_a_chat(tmp_path: Path, exporters: None) -> None:
    """Quantised by onnxruntime, the words are those of the same graphs here; and chats are written as in Python."""
    node_modules()
    saved = talking(tmp_path)
    model, processor = saved.model, saved.processor
    export_transformers_js(model, tmp_path / "js", processor, dtypes=("q8", "fp32", "q4", "uint8"))
    image = pictures()[0]
    for dtype, suffix in (("q8", "_quantized"), ("uint8", "_uint8"), ("q4", "_q4")):
        assert in_node(jobs(tmp_path, [image], dtype=dtype))[0]["ids"] == by_graphs(
            tmp_path / "js", suffix, processor, image
        ), dtype
    assert in_node(jobs(tmp_path, [image]))[0]["ids"] == by_graphs(tmp_path / "js", "_quantized", processor, image)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "js" / "onnx").iterdir()}
    whole = sizes["decoder_model_merged.onnx"]
    assert sizes["decoder_model_merged_q4.onnx"] < sizes["decoder_model_merged_quantized.onnx"] < 0.7 * whole

    alone = {"model": str(tmp_path / "js"), "dtype": "fp32", "text": "that is", "tokens": NEW}
    content = [{"type": "image"}, {"type": "text", "text": "what is that ?"}]
    messages = [{"role": "user", "content": content}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, content[1]]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    text, chat = in_node([alone, *jobs(tmp_path, [image], dtype="fp32", messages=messages)])
    assert text["ids"] == said(model, processor, None, "that is")
    assert chat["prompt"] == written["input_ids"][0].tolist()
    assert chat["ids"] == model.generate(**written, max_new_tokens=NEW, do_sample=False)[0].tolist()


@pytest.mark.slow
def test_an_answer_ends_where_learned_positions_do_and_holds_no_placeholder(tmp_path: Path, exporters: None) -> None:
    node_modules()
    model, processor = joined("clip", "gpt2", text={"n_positions": 14, "vocab_size": len(WORDS) + 7})
    transformer, placeholder = model.model.language_model.transformer, model.config.image_token_id
    assert placeholder < len(transformer.wte.weight)
    with torch.no_grad():  # left to itself, it would write nothing else, and never end
        transformer.ln_f.bias.fill_(0.5)
        transformer.wte.weight[placeholder] = 10
        transformer.wte.weight[2] = -10
    export_transformers_js(model, tmp_path / "js", processor)
    expected = [said(model, processor, image) for image in pictures()]
    assert all(len(ids) == 15 and ids.count(placeholder) == 3 for ids in expected)
    answers = [answer["ids"] for answer in in_node(jobs(tmp_path, pictures()))]
    assert answers == [[*ids[:14], 2] for ids in expected]  # the last word, which nothing reads any more, is the end


# -------------------------------------------------------------------------------------------------------------- the images
def run_node(script: str, given: Any) -> Any:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, version 18 or later, is not installed")
    command = [node, "--input-type=module", "-e", script]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RESIZE = f"""
import {{ readFileSync }} from 'node:fs';
const {{ resize }} = await import({json.dumps((PAGE / "pillow_resize.js").as_uri())});
const jobs = JSON.parse(readFileSync(0, 'utf-8'));
console.log(JSON.stringify(jobs.map(({{ pixels, from, to, filter }}) =>
    Array.from(resize(Uint8ClampedArray.from(pixels), ...from, ...to, 3, filter)))));
"""


def test_the_resize_of_the_page_is_that_of_pillow() -> None:
    sizes = [((90, 70), (16, 16)), ((20, 18), (17, 16)), ((5, 7), (40, 30)), ((33, 16), (16, 16)), ((16, 200), (16, 16))]
    given, expected = [], []
    for before, after in sizes:
        image = pictures(before)[0]
        for kind in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
            pixels = np.asarray(image).ravel().tolist()
            given.append({"pixels": pixels, "from": before, "to": after, "filter": int(kind)})
            expected.append(np.asarray(image.resize(after, kind)).ravel().tolist())
    assert run_node(RESIZE, given) == expected


@pytest.mark.slow
def test_the_resize_of_transformers_js_is_another(tmp_path: Path, exporters: None) -> None:
    """None is needed at the tower's size; elsewhere pixels differ, and not with the page's resize before it."""
    node_modules()
    model, processor = joined()
    export_transformers_js(model, tmp_path / "js", processor)
    sizes = [(SIZE, SIZE), (90, 70), (20, 18)]
    images = [pictures((4, 4))[0].resize(size, Image.Resampling.BICUBIC) for size in sizes]
    module = str(PAGE / "pillow_resize.js")
    for resize, bounds in ((None, (0, 0.02)), (module, (0, 0))):
        answers = in_node(jobs(tmp_path, images, pixels=True, resize=resize))
        for image, answer in zip(images, answers, strict=True):
            ours = processor(images=image, return_tensors="np")["pixel_values"].ravel()
            difference = np.abs(np.array(answer["pixels"]) - ours)
            if bounds[image.size != (SIZE, SIZE)]:
                assert difference.max() > bounds[1], image.size
            else:
                assert difference.max() < 1e-5, (image.size, resize)
                assert answer["ids"] == said(model, processor, image)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_weights_and_photos(assets: Path, tmp_path: Path, exporters: None) -> None:
    """Words as in Python with the page's resize; the figures of `docs/browser.md` are printed (`-s`)."""
    node_modules()
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        str(assets / "vision/mobilenet_v2_1.0_224"),
        str(assets / "lm/stories260k"),
        connector_type="resampler",
        prefix_length=8,
        dtype=torch.float32,
    ).eval()
    processor = FrozenPrefixProcessor.from_model(model)
    model.model.connector.set_output_norm(2 * model.get_input_embeddings().weight.norm(dim=-1).mean().item())
    export_transformers_js(model, tmp_path / "js", processor, dtypes=("fp32", "q8", "q4"))
    photos = [Image.open(file).convert("RGB") for file in sorted((assets / "vision/sample_photos").glob("*.jpg"))]
    text, new = "<image> One day,", 24
    expected = [said(model, processor, photo, text, new) for photo in photos]
    prompt = len(expected[0]) - new
    module = str(PAGE / "pillow_resize.js")
    for dtype, resize in (("fp32", module), ("fp32", None), ("q8", module), ("q4", module)):
        answers = in_node(jobs(tmp_path, photos, dtype=dtype, resize=resize, pixels=True, text=text, tokens=new))
        for photo, answer, ids in zip(photos, answers, expected, strict=True):
            ours = processor(images=photo, return_tensors="np")["pixel_values"].ravel()
            difference = np.abs(np.array(answer["pixels"]) - ours)
            equal = next((i for i, (a, b) in enumerate(zip(answer["ids"], ids, strict=False)) if a != b), len(ids)) - prompt
            how = "page's resize" if resize else "its own resize"
            figures = f"pixels differ {difference.mean():.4f}, at most {difference.max():.3f} of {ours.std():.2f}"
            print(f"{dtype}, {how}, {photo.size}: {figures}; {equal} of {new} tokens equal")
            if (dtype, resize) == ("fp32", module):
                assert answer["ids"] == ids and difference.max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------- Chromium
@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()


def library() -> tuple[dict[str, Path], dict[str, str]]:
    """Where a page finds on this machine what it asks a network of copies for, and the page itself, asking here."""
    page, cdn = (PAGE / "index.html").read_text(encoding="utf-8"), "https://cdn.jsdelivr.net/npm/"
    modules = node_modules()
    versions = {
        f"/npm/{name}@{json.loads((modules / name / 'package.json').read_text(encoding='utf-8'))['version']}/": modules / name
        for name in (PACKAGE, "onnxruntime-web")
    }
    assert page.count(cdn) == 1
    return versions, {"/": page.replace(cdn, "/npm/")}


def settled(page: Chromium, *endings: str) -> list[str]:
    """Answer and status of the page, once the status holds one of these."""
    return page.evaluate(f"""new Promise((resolve) => {{
        const look = () => {{
            const [answer, status] = ['answer', 'status'].map((id) => document.getElementById(id)?.textContent ?? '');
            if ({json.dumps(endings)}.some((one) => status.includes(one))) resolve([answer, status]);
            else setTimeout(look, 50);
        }};
        look();
    }})""")


def drop(chromium: Chromium, *files: Path) -> list[str]:
    """Drags files onto the page, as a hand does, and gives its answer and its status."""
    chromium.evaluate("document.getElementById('status').textContent = ''")
    where = chromium.evaluate("(({x, y}) => [x + 50, y + 50])(document.getElementById('drop').getBoundingClientRect())")
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        chromium.call("Input.dispatchDragEvent", type=kind, x=where[0], y=where[1], data=data)
    return settled(chromium, "tokens in", "did not", "could not", "no image")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(SIZE, SIZE), (90, 70)])
def test_the_page_captions_what_is_dropped_on_it(
    size: tuple[int, int], tmp_path: Path, exporters: None, chromium: Chromium
) -> None:
    versions, pages = library()
    saved = talking(tmp_path)
    export_transformers_js(saved.model, tmp_path / "js", saved.processor)
    files = [Path(job["image"]) for job in jobs(tmp_path, pictures(size))]
    expected = [
        saved.processor.tokenizer.decode(
            said(saved.model, saved.processor, image, "<image>", 60)[5:], skip_special_tokens=True
        )
        for image in pictures(size)
    ]
    assert len(set(expected)) > 1
    places = {"/": PAGE, "/model/": tmp_path / "js", **versions}
    with served(places, pages) as address:
        chromium.call("Page.navigate", url=f"{address}/")
        assert settled(chromium, "Ready.", "could not")[1] == "Ready."
        answers = [drop(chromium, file) for file in files]
        (tmp_path / "text.txt").write_text("no image", encoding="utf-8")
        assert drop(chromium, tmp_path / "text.txt")[1] == "That is no image."
        if folder := os.environ.get("FROZEN_PREFIX_SCREENSHOTS"):
            shot = base64.b64decode(chromium.call("Page.captureScreenshot")["data"])
            Path(folder, f"page-{size[0]}x{size[1]}.png").write_bytes(shot)
    # By the letter: the two tokenizers put other spaces before punctuation.
    assert ["".join(words.split()) for words, _ in answers] == ["".join(words.split()) for words in expected], answers
    assert all("on this machine alone" in status for _, status in answers)


# ------------------------------------------------------------------------------------------------------------ what is refused
def test_what_can_not_be_said_is_refused_by_name(tmp_path: Path) -> None:
    model, processor = joined()
    with pytest.raises(ValueError, match=r"dtypes=\['q3'\]: choose some of \['fp32', 'q8'"):
        export_transformers_js(model, tmp_path, processor, dtypes=["q3"])
    with pytest.raises(ValueError, match=r"weights in torch.bfloat16.*load it with dtype=torch.float32"):
        export_transformers_js(joined()[0].to(torch.bfloat16), tmp_path, processor)
    processor.tiles = {"crop_to_patches": True}
    processor.image_processor = ConvNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_pct=0.875)
    with pytest.raises(ValueError, match=r"tiles.*ConvNextImageProcessorPil, which does more than.*frozen-prefix serve"):
        export_transformers_js(model, tmp_path, processor)
    across, processor = join(tmp_path, connector_type="resampler", prefix_length=3, fusion="cross_attention")
    with pytest.raises(ValueError, match=r"has fusion='cross_attention'.*export_for_generation"):
        export_transformers_js(across, tmp_path / "js", processor)
    assert not (tmp_path / "js").exists()


def test_a_language_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    LANGUAGE_MODELS["mamba"] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model, processor = joined(words="mamba")
    with pytest.raises(ValueError, match="MambaForCausalLM, which keeps no keys and values"):
        export_transformers_js(model, tmp_path, processor)


@pytest.mark.slow
def test_files_name_no_place_of_this_machine(tmp_path: Path, exporters: None) -> None:
    saved = talking(tmp_path)
    export_transformers_js(saved.model, tmp_path / "js", saved.processor, dtypes=("fp32", "q8"))
    for file in (tmp_path / "js").rglob("*.*"):
        assert str(Path(__file__).parents[1]).encode() not in file.read_bytes(), file
        assert str(tmp_path).encode() not in file.read_bytes(), file
