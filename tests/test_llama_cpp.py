"""llama.cpp says what `generate()` says: prefixes handed to it in process, and by its own reader of images."""

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.export import LlamaCppModel, export_mmproj
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import NOT_READERS, join_not_a_reader, save_parents, skip_before


pytest.importorskip("gguf", reason="GGUF files are read and written by the package gguf")

FILE = "words.gguf"
NEW = 24
SIZE = 16


@pytest.fixture
def binding() -> Any:
    return pytest.importorskip("xllamacpp", reason="llama.cpp is called by the package xllamacpp")


def pictures() -> list[Image.Image]:
    """Square, and of the tower's size, which every resize leaves alone."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 256, (3, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in drawn]


def siglip(folder: Path, **options: Any) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = SiglipVisionModel(SiglipVisionConfig(**{**sizes, "image_size": SIZE, "patch_size": 8, **options}))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    tower.save_pretrained(folder / "siglip")
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "siglip")
    return str(folder / "siglip")


def loud(folder: Path, tower: str | None = None, architecture: Any = "llama", **options: Any) -> tuple[Any, Any, Path]:
    """A model whose words follow the picture, its processor, and the language model's file."""
    words = write_gguf(folder / "gguf" / FILE, quantized=False, architecture=architecture)
    torch.manual_seed(1)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower or save_parents(folder)[0], words, text_gguf_file=FILE, **options
    )
    if architecture == "gemma2":  # the file doesn't say it, and transformers' default is that of heads of 256
        for layer in model.model.language_model.model.layers:
            layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    embedded = model.get_input_embeddings()(torch.arange(200)).norm(dim=-1)
    model.model.connector.set_output_norm(4 * embedded.mean().item())
    return model.eval(), FrozenPrefixProcessor.from_model(model), folder / "gguf" / FILE


def said(model: Any, processor: Any, image: Image.Image, text: str = "that is<image> at") -> tuple[Any, list[int]]:
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return inputs, out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"connector_type": "resampler", "prefix_length": 4},
        {"connector_type": "lstm", "prefix_length": 3},
        {"connector_type": "mlp"},
        {"connector_type": "mlp", "architecture": "gemma2"},  # which scales embeddings
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_in_process_the_words_are_those_of_generate(options: dict, tmp_path: Path, binding: Any) -> None:
    if options.get("architecture") == "gemma2":
        skip_before("5.19.0", "takes the words in every Gemma's file for SentencePiece's")
    model, processor, file = loud(tmp_path, **options)
    reader = LlamaCppModel(model, file, n_ctx=64)
    answers = []
    for image in pictures():
        inputs, new = said(model, processor, image)
        out = reader.generate(**inputs, max_new_tokens=NEW)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == new
        answers.append(new)
    assert len({tuple(new) for new in answers}) > 1


@pytest.mark.slow
def test_several_images_tiles_none_and_padding(tmp_path: Path, binding: Any) -> None:
    model, processor, file = loud(tmp_path, connector_type="mlp")
    reader = LlamaCppModel(model, file, n_ctx=64)
    wide = pictures()[0].resize((2 * SIZE, SIZE))
    for images, text, options in (
        (pictures()[:2], "<image> at<image> is", {}),
        (wide, "<image> at", {"crop_to_patches": True}),
        (None, "that is", {}),
    ):
        inputs = processor(images=images, text=text, return_tensors="pt", **options)
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(reader.generate(**inputs, max_new_tokens=NEW), expected)
    padded = {"input_ids": torch.cat([torch.zeros(1, 2).long(), inputs["input_ids"]], 1)}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    assert torch.equal(reader.generate(**padded, max_new_tokens=NEW)[:, 2:], expected)
    with pytest.raises(ValueError, match="don't go into n_ctx"):
        reader.generate(**inputs, max_new_tokens=1000)
    reader.close()


@pytest.mark.slow
def test_another_file_is_refused(tmp_path: Path, binding: Any) -> None:
    model, _, file = loud(tmp_path, connector_type="mlp")
    other = Path(write_gguf(tmp_path / "other" / FILE, seed=7, quantized=False)) / FILE
    with pytest.raises(ValueError, match="another language model"):
        LlamaCppModel(model, other, n_ctx=64)
    file.with_name("broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="can't read .*broken"):
        LlamaCppModel(model, file.with_name("broken.gguf"))


def server_says(server: Any, image: Image.Image, text: str) -> list[int]:
    written = BytesIO()
    image.save(written, "PNG")
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()}},
        {"type": "text", "text": text},
    ]
    answer = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": NEW,
            "temperature": 0,
            "return_tokens": True,
            "verbose": True,
        }
    )
    return answer["__verbose"]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connector", "options"),
    [
        ("mlp", {"vision_feature_layer": -2}),
        ("linear", {"vision_feature_layer": -2}),
        ("mlp", {"vision_feature_layer": -1, "connector_config": {"input_norm": False}}),
    ],
)
def test_its_own_server_says_the_words_of_generate(connector: str, options: dict, tmp_path: Path, binding: Any) -> None:
    model, processor, file = loud(tmp_path, siglip(tmp_path), connector_type=connector, **options)
    params = binding.CommonParams()
    params.model.path, params.mmproj.path = str(file), str(export_mmproj(model, tmp_path / "mmproj.gguf", processor))
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 64, 1, False, False
    params.cache_type_k = params.cache_type_v = binding.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = binding.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    server = binding.Server(params)
    answers = [said(model, processor, image, "<image> at")[1] for image in pictures()]
    assert len({tuple(new) for new in answers}) == 3
    for image, new in zip(pictures(), answers, strict=True):
        assert server_says(server, image, " at") == new


def test_the_file_holds_what_llama_cpp_reads(tmp_path: Path) -> None:
    import gguf

    model, processor, _ = loud(tmp_path, siglip(tmp_path), connector_type="linear", vision_feature_layer=-2)
    reader = gguf.GGUFReader(export_mmproj(model, tmp_path / "mmproj.gguf", processor))
    assert reader.fields["clip.projector_type"].contents() == "mlp"
    assert reader.fields["clip.vision.block_count"].contents() == 2
    assert reader.fields["clip.vision.feature_layer"].contents() == [2]
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    features = torch.randn(5, 32)
    hidden = features @ tensors["mm.0.weight"].T + tensors["mm.0.bias"]
    written = torch.nn.functional.gelu(hidden, approximate="tanh") @ tensors["mm.2.weight"].T + tensors["mm.2.bias"]
    torch.testing.assert_close(written, model.model.connector.output(features))
    norm = model.model.connector.input_norm
    assert torch.equal(tensors["v.post_ln.weight"], norm.weight) and torch.equal(tensors["v.post_ln.bias"], norm.bias)
    assert not any(name.startswith("v.blk.2") for name in tensors)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"connector_type": "resampler", "prefix_length": 4, "vision_feature_layer": -2}, "the connector 'resampler'"),
        ({"connector_type": "mlp"}, "two norms in a row"),
        ({"connector_type": "mlp", "vision_feature_layer": [-2, -3]}, "several layers"),
        ({"connector_type": "linear", "vision_feature_select_strategy": "pooled", "prefix_length": 3}, "pooled"),
    ],
)
def test_what_its_programs_do_not_have_is_refused_by_name(options: dict, named: str, tmp_path: Path) -> None:
    model, processor, _ = loud(tmp_path, siglip(tmp_path), **options)
    with pytest.raises(ValueError, match=f"{named}.*LlamaCppModel"):
        export_mmproj(model, tmp_path / "mmproj.gguf", processor)


def test_other_towers_and_fusions_are_refused_by_name(tmp_path: Path) -> None:
    model, processor, _ = loud(tmp_path, connector_type="mlp", vision_feature_layer=-2)
    with pytest.raises(ValueError, match="'clip_vision_model'.*LlamaCppModel"):
        export_mmproj(model, tmp_path / "mmproj.gguf", processor)
    processor.tiles = {"crop_to_patches": True}
    with pytest.raises(ValueError, match="tiles"):
        export_mmproj(model, tmp_path / "mmproj.gguf", processor)


def test_several_towers_are_refused_by_name(tmp_path: Path) -> None:
    towers: Any = [siglip(tmp_path), save_parents(tmp_path)[0]]
    model, processor, _ = loud(tmp_path, towers, connector_type="mlp", vision_feature_layer=-2)
    with pytest.raises(ValueError, match="2 vision towers.*LlamaCppModel"):
        export_mmproj(model, tmp_path / "mmproj.gguf", processor)


@pytest.mark.slow
def test_several_towers_in_process(tmp_path: Path, binding: Any) -> None:
    towers: Any = [siglip(tmp_path), save_parents(tmp_path)[0]]
    model, processor, file = loud(tmp_path, towers, connector_type="mlp")
    inputs, new = said(model, processor, pictures()[0])
    out = LlamaCppModel(model, file, n_ctx=64).generate(**inputs, max_new_tokens=NEW)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == new


@pytest.mark.parametrize("kind", NOT_READERS)
def test_what_reads_no_prefix_among_words_is_refused_both_ways(kind: str, tmp_path: Path) -> None:
    model, processor = join_not_a_reader(tmp_path, kind)
    with pytest.raises(ValueError, match=NOT_READERS[kind]):
        LlamaCppModel(model, "words.gguf")
    with pytest.raises(ValueError, match=NOT_READERS[kind]):
        export_mmproj(model, tmp_path / "mmproj.gguf", processor)


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, binding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = loud(tmp_path, siglip(tmp_path), connector_type="mlp", vision_feature_layer=-2)
    monkeypatch.chdir(tmp_path / "gguf")
    model.save_pretrained("eyes")
    processor.save_pretrained("eyes")
    pictures()[0].save("photo.png")
    page = (Path(__file__).parents[1] / "docs" / "llama_cpp.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.+?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/llama_cpp.md", "exec"), names)
    assert (
        names["ids"][0, names["inputs"]["input_ids"].shape[1] :].tolist()
        == said(model, processor, pictures()[0], "<image> at")[1]
    )
    assert Path("mmproj.gguf").is_file()
