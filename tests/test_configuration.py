"""The config: what it refuses, what it stores, and that it comes back as it went."""

import copy
import json

import pytest
from transformers import AutoConfig, CLIPConfig, GPT2Config, OPTConfig, T5Config, ViTConfig

from modeling_frozen import FrozenPrefixConfig
from tests.helpers.tiny import text_config, vision_config


def make(**options: object) -> FrozenPrefixConfig:
    return FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(), **options)


def test_defaults_build_silently(caplog: pytest.LogCaptureFixture) -> None:
    config = FrozenPrefixConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("clip_vision_model", "gpt2")
    assert config.image_token_id == config.text_config.vocab_size
    assert not caplog.records


def test_geometry_is_probed() -> None:
    config = make()
    assert (config.num_leading_tokens, config.num_positions, config.vision_width) == (1, 4, 32)
    assert (config.embedding_dim, config.prefix_length) == (32, 4)


def test_embedding_width_is_asked_of_the_embeddings() -> None:
    """OPT-350m's layout: words are narrower than the layers."""
    opt = OPTConfig(hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32)
    assert FrozenPrefixConfig.from_vision_text_configs(vision_config(), opt).embedding_dim == 16


def test_the_vision_half_of_a_dual_config_is_taken() -> None:
    dual = CLIPConfig(vision_config=vision_config().to_dict())
    config = FrozenPrefixConfig.from_vision_text_configs(dual, text_config())
    assert config.vision_config.model_type == "clip_vision_model" and config.num_positions == 4


def test_sub_configs_are_kept_not_copied() -> None:
    text = text_config()
    text._attn_implementation = "eager"
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text)
    assert config.text_config is text
    assert config.text_config._attn_implementation == "eager"


def test_kernels_that_a_parent_chose_are_kept() -> None:
    text = text_config()
    text._attn_implementation, text._experts_implementation = "eager", "batched_mm"
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text)
    assert (config.text_config._attn_implementation, config.text_config._experts_implementation) == ("eager", "batched_mm")
    for name, wanted in (("attn_implementation", "sdpa"), ("experts_implementation", "eager")):  # unless the user says another
        config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text, **{name: wanted})
        assert getattr(config.text_config, f"_{name}") == wanted


@pytest.mark.parametrize("text", [text_config(tie_word_embeddings=True), T5Config(d_model=32, d_kv=8, num_heads=2)])
def test_facts_of_the_language_model_are_mirrored(text: object) -> None:
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text, connector_type="linear")
    assert config.is_encoder_decoder == text.is_encoder_decoder
    assert config.tie_word_embeddings == text.tie_word_embeddings


def test_round_trip(tmp_path) -> None:
    config = make(
        connector_type="resampler",
        prefix_length=3,
        connector_config={"num_layers": 2, "num_heads": 4},
        trainable=("connector", "vision"),
        vision_feature_layer=[-1, 1],
        vision_base_model={"name_or_path": "me/tower", "revision": "a" * 40, "dtype": "bfloat16", "fingerprint": "f"},
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.trainable == ("connector", "vision")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_lenght": 4}, "Did you mean `prefix_length`"),
        ({"num_layers": 4}, "connector_config"),
        ({"trainable": ("conector",)}, r"\['conector'\].*'connector', 'vision', 'text'"),
        ({"prefix_length": 0}, "prefix_length=0"),
        ({"connector_type": "resampler"}, "prefix_length"),
        ({"connector_type": "Resampler", "prefix_length": 4}, "Resampler.*resampler"),
        (
            {"connector_type": "resampler", "prefix_length": 4, "connector_config": {"num_heads": 3, "hidden_size": 32}},
            "3.*32|32.*3",
        ),
        ({"connector_type": "mlp", "connector_config": {"hiden_size": 4}}, "hidden_size"),
        ({"connector_type": "mlp", "prefix_length": 3}, "3.*4|4.*3"),
        ({"image_token_id": -5}, "-5"),
        ({"vision_feature_layer": 9}, "9"),
        ({"vision_feature_layer": []}, "vision_feature_layer"),
        ({"connector_type": "resampler", "prefix_length": 64}, "64 positions"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_identity_needs_equal_widths() -> None:
    narrow = text_config(hidden_size=16)
    with pytest.raises(ValueError, match="32.*16|16.*32"):
        FrozenPrefixConfig.from_vision_text_configs(vision_config(), narrow, connector_type="identity")


def test_a_model_that_writes_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="ViTConfig"):
        FrozenPrefixConfig.from_vision_text_configs(vision_config(), ViTConfig())


def test_unknown_keys_in_a_file_warn_are_kept_and_written_back(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    make().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prefx_length": 7, "written_by_a_later_release": {"a": 1}}))
    for _ in range(2):
        config = AutoConfig.from_pretrained(tmp_path)
        assert "`prefx_length`" in caplog.text and "Did you mean `prefix_length`?" in caplog.text
        assert "`written_by_a_later_release`" in caplog.text
        config.save_pretrained(tmp_path)
        caplog.clear()
    written = json.loads(file.read_text())
    assert (written["prefx_length"], written["written_by_a_later_release"]) == (7, {"a": 1})
    assert json.loads(copy.deepcopy(config).to_json_string())["prefx_length"] == 7
    with pytest.raises(ValueError, match="Did you mean `prefix_length`"):
        FrozenPrefixConfig(prefx_length=7)


def test_what_tools_hang_on_a_config_is_not_written(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = make()
    config.use_cache = False  # as Trainer does
    config.save_pretrained(tmp_path)
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())
    AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records


def test_gpt2_names_its_positions_otherwise() -> None:
    with pytest.raises(ValueError, match="8 positions"):
        FrozenPrefixConfig.from_vision_text_configs(
            vision_config(), GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=8),
            connector_type="resampler", prefix_length=8,
        )  # fmt: skip
