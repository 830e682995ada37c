"""The parents: their records, their fingerprints, and what is refused on loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ImageProcessorPil,
    MobileNetV2Model,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.backbones import (
    fingerprint,
    language_model_geometry,
    load_base_model,
    max_learned_positions,
    skips_padding,
    word_embedding_norm,
)
from tests.helpers.families_text import language_model
from tests.helpers.tiny import WORDS, join, save_parents, text_config, vision_config


@pytest.fixture
def parents(tmp_path: Path) -> tuple[str, str]:
    return save_parents(tmp_path)


def test_record_names_the_parent(parents: tuple[str, str]) -> None:
    model, record = load_base_model("text", parents[1], dtype=torch.bfloat16)
    assert record["name_or_path"] == parents[1] and record["revision"] is None
    assert record["dtype"] == "bfloat16" and len(record["fingerprint"]) == 64
    assert not model.training


def test_fingerprint_sees_one_changed_tensor(parents: tuple[str, str]) -> None:
    before = fingerprint(parents[1])
    file = Path(parents[1]) / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(parents[1]) != before


def test_fingerprint_is_of_the_tensors_not_of_the_files(parents: tuple[str, str], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(parents[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(str(tmp_path / "sharded")) == fingerprint(parents[1])


def test_no_safetensors_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path)) is None


def test_a_headless_checkpoint_is_refused(parents: tuple[str, str]) -> None:
    """Without its head the model would speak at random."""
    file = Path(parents[1]) / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight.*head included"):
        load_base_model("text", parents[1])


def test_a_model_that_reads_ahead_is_refused(tmp_path: Path) -> None:
    """BERT with a language head would see the word that it is to predict."""
    config = BertConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=9, initializer_range=0.5
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="reads ahead.*is_decoder=True"):
        load_base_model("text", str(tmp_path / "bert"))
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    assert load_base_model("text", str(tmp_path / "decoder"))[0].config.is_decoder


def test_a_missing_parent_says_where_to_say_where(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    shutil.rmtree(tmp_path / "words")
    with pytest.raises(OSError, match="language model.*could not be loaded.*text_base_model="):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_changed_parent_is_refused_unless_named(tmp_path: Path, part: str) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    folder = tmp_path / {"vision": "tower", "text": "words"}[part]
    file = folder / "model.safetensors"
    tensors = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    recorded = getattr(model.config, f"{part}_base_model")["fingerprint"]
    with pytest.raises(ValueError, match=f"(?s){recorded}.*{part}_base_model="):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    options = {f"{part}_base_model": str(folder)}
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes", **options)
    assert getattr(again.config, f"{part}_base_model")["fingerprint"] == fingerprint(str(folder)) != recorded


def test_another_parent_must_fit(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    narrow = LlamaForCausalLM(text_config(hidden_size=16))
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="width 32.*width 16"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes", text_base_model=str(tmp_path / "narrow"))
    type(model.model.vision_tower)(vision_config(hidden_size=16)).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="width 32.*gives 16"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes", vision_base_model=str(tmp_path / "small"))


def test_no_home_and_no_weights_is_an_error(tmp_path: Path) -> None:
    model, _ = join(tmp_path)
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "config.json"
    config = json.loads(file.read_text())
    config["text_base_model"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='text_base_model="id or folder"'):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")


def test_the_placeholder_falls_into_an_unused_row(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    assert model.config.image_token_id == len(WORDS) == processor.image_token_id
    assert model.config.image_token_id < model.config.text_config.vocab_size


def test_loaded_models_are_joined_with_their_tokenizer(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    tokenizer, image_processor = AutoTokenizer.from_pretrained(words), AutoImageProcessor.from_pretrained(tower)
    known = len(tokenizer)

    def joined(**options: Any) -> FrozenPrefixForConditionalGeneration:
        loaded = CLIPVisionModel.from_pretrained(tower), LlamaForCausalLM.from_pretrained(words)
        return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(*loaded, **options)

    def processor(model: Any) -> FrozenPrefixProcessor:
        return FrozenPrefixProcessor.from_model(model, tokenizer=tokenizer, image_processor=image_processor)

    model = joined(tokenizer=tokenizer)
    assert len(tokenizer) == known, "the user's own stays as it is"
    assert model.config.image_token_id == len(WORDS) < model.config.text_config.vocab_size
    assert processor(model).image_token_id == len(WORDS)
    with pytest.raises(ValueError, match=f"join it with tokenizer=… or image_token_id={len(WORDS)}"):
        processor(joined())
    processor(joined(image_token_id=len(WORDS)))


def test_geometry_and_norm_are_those_of_the_embedding_module() -> None:
    opt = language_model("opt_350m")
    assert language_model_geometry(opt).embedding_dim == 24
    gemma = language_model("gemma")
    norms = gemma.get_input_embeddings()(torch.arange(99)).norm(dim=-1)
    assert word_embedding_norm(gemma) == pytest.approx(norms.median().item())


@pytest.mark.parametrize(
    ("family", "positions"), [("gpt2", 256), ("opt", 256), ("llama", None), ("bloom", None), ("t5", None), ("bart", 256)]
)
def test_learned_positions_are_distinguished_from_computed_ones(family: str, positions: int | None) -> None:
    assert max_learned_positions(language_model(family)) == positions


@pytest.mark.parametrize(("family", "skips"), [("mamba", True), ("mamba2", True), ("rwkv", False)])
def test_recurrent_models_are_asked_whether_they_skip_padding(family: str, skips: bool) -> None:
    assert skips_padding(language_model(family)) is skips


def test_one_attention_for_all_is_given_to_the_parts_that_have_it(tmp_path: Path) -> None:
    """A convolutional tower has no attention to choose, so transformers' own model refuses every choice but "eager"."""
    save_parents(tmp_path)
    torch.manual_seed(0)
    MobileNetV2Model(MobileNetV2Config(image_size=32, depth_multiplier=0.35)).save_pretrained(tmp_path / "mobile")
    MobileNetV2ImageProcessorPil().save_pretrained(tmp_path / "mobile")
    parents = (str(tmp_path / "mobile"), str(tmp_path / "words"))
    options = {"connector_type": "mlp", "vision_feature_select_strategy": "pooled", "prefix_length": 2}
    join = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained
    model = join(*parents, **options, attn_implementation="sdpa")
    assert model.model.language_model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "eyes")
    for cls in (FrozenPrefixForConditionalGeneration, AutoModelForImageTextToText):
        loaded = cls.from_pretrained(tmp_path / "eyes", attn_implementation="sdpa")
        assert loaded.model.language_model.config._attn_implementation == "sdpa"
        assert loaded.model.vision_tower.config._attn_implementation == "eager"
    eager = join(*parents, **options, attn_implementation="eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    eager.set_attn_implementation("sdpa")
    assert eager.model.language_model.config._attn_implementation == "sdpa"
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    # What is meant for one part, or is no attention at all, is refused as in transformers.
    with pytest.raises(ValueError, match="MobileNetV2Model does not support"):
        join(*parents, **options, vision_attn_implementation="sdpa")
    for choose in (eager.set_attn_implementation, lambda name: join(*parents, **options, attn_implementation=name)):
        with pytest.raises(ValueError, match='`attn_implementation="sdpo"` is not supported'):
            choose("sdpo")
