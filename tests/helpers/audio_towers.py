"""Tiny audio towers, one of each kind: the config, the class that such checkpoints are saved by, the feature extractor."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.tiny import save_parents


_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_WAV2VEC2 = {
    **_SMALL, "conv_dim": (8, 8), "conv_stride": (16, 16), "conv_kernel": (32, 16), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
AUDIO_TOWERS: dict[str, tuple[PreTrainedConfig, type, Any]] = {
    "whisper": (
        WhisperConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=50, max_target_positions=8,
            vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        WhisperForConditionalGeneration,
        lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    ),
    "wav2vec2": (Wav2Vec2Config(**_WAV2VEC2), Wav2Vec2ForCTC, lambda: Wav2Vec2FeatureExtractor()),
    "wav2vec2 with layer norm": (
        Wav2Vec2Config(**_WAV2VEC2, **_LAYER_NORM), Wav2Vec2ForCTC, lambda: Wav2Vec2FeatureExtractor()
    ),
    "ast": (
        ASTConfig(**_SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=32, num_mel_bins=8),
        ASTForAudioClassification,
        lambda: ASTFeatureExtractor(num_mel_bins=8, max_length=32),
    ),
    "clap": (
        ClapConfig(
            text_config={**_SMALL, "vocab_size": 12},
            audio_config={
                "spec_size": 32, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2,
                "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16,
                "projection_dim": 16, "num_hidden_layers": 2,
            },
            projection_dim=16,
        ),
        ClapModel,
        lambda: ClapFeatureExtractor(
            feature_size=16, sampling_rate=16000, hop_length=500, max_length_s=1, frequency_max=8000,
            truncation="rand_trunc",
        ),
    ),
}  # fmt: skip


def save_audio_tower(folder: Path, kind: str) -> str:
    """Writes one as its own tool would; returns its folder."""
    config, model_class, extractor = AUDIO_TOWERS[kind]
    torch.manual_seed(1)
    model_class(copy.deepcopy(config)).save_pretrained(folder)
    extractor().save_pretrained(folder)
    return str(folder)


def save_parents_with_audio(folder: Path) -> Path:
    """Parents of a model of images, videos and audio."""
    save_parents(folder, text={"max_position_embeddings": 128})
    save_audio_tower(folder / "audio", "wav2vec2")
    return folder


def join_with_audio(parents: Path) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """The model of images, videos and audio, with its processor."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        str(parents / "tower"), str(parents / "words"), str(parents / "audio"), connector_type="resampler", prefix_length=2,
        connector_config=sizes, audio_prefix_length=2, audio_connector_config=sizes, num_frames=2,
    )  # fmt: skip
    return model, FrozenPrefixProcessor.from_model(model)
