"""Every language-model family the package answers for: one line each, a tiny random configuration.

The checks over the tables are elsewhere; here is only what they run on. Where a family has a quirk that a composite
model can trip over (multipliers on embeddings or logits, soft-capping, sliding windows, a width of embeddings of its
own, a decoder deeper than its encoder), the tiny configuration turns it on, or the row would prove nothing.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel


VOCAB_SIZE = 99
PAD, BOS, EOS = 0, 1, 2

# the names that one idea bears in different configurations
_BASE: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HEAD_DIM = {**_LLAMA, "head_dim": 8}
_GEMMA2 = {
    **_HEAD_DIM,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "window_size": 8}
_NEOX = {**_LLAMA, "rotary_pct": 0.5}
_OPT = {**_LLAMA, "ffn_dim": 64, "dropout": 0.1}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
_MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2}
_XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 256}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
_RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256, "rescale_every": 1}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
_LONGT5 = {**_T5, "local_radius": 4}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
_LED = {**_BART, "attention_window": 8, "max_encoder_position_embeddings": 256, "max_decoder_position_embeddings": 256}

# family: (model type, what its tiny configuration says beside the ids)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt_neo": ("gpt_neo", {**_NEO, "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "opt": ("opt", _OPT),
    "opt_350m": ("opt", {**_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "bloom": ("bloom", _BLOOM),
    "mpt": ("mpt", _MPT),
    "falcon": ("falcon", {**_LLAMA, "ffn_hidden_size": 64}),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 64}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _HEAD_DIM),
    "qwen3_moe": ("qwen3_moe", {**_HEAD_DIM, **_MOE}),
    "gemma": ("gemma", _HEAD_DIM),
    "gemma2": ("gemma2", _GEMMA2),
    "gemma3_text": ("gemma3_text", _GEMMA2),
    "phi": ("phi", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _LLAMA),
    "stablelm": ("stablelm", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", _LLAMA),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {**_LLAMA, **_MULTIPLIERS}),
    "cohere": ("cohere", _LLAMA),
    "biogpt": ("biogpt", _LLAMA),
    "xglm": ("xglm", _XGLM),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 4}),
    "mamba": ("mamba", _MAMBA),
    "mamba2": ("mamba2", _MAMBA2),
    "rwkv": ("rwkv", _RWKV),
    "ctrl": ("ctrl", {**_GPT, "dff": 64}),
}

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "umt5": ("umt5", _T5),
    "longt5": ("longt5", _LONGT5),
    "bart": ("bart", _BART),
    "bart_deep_decoder": ("bart", {**_BART, "decoder_layers": 3}),
    "mbart": ("mbart", {**_BART, "scale_embedding": True}),
    "pegasus": ("pegasus", {**_BART, "scale_embedding": True, "decoder_start_token_id": PAD}),
    "blenderbot-small": ("blenderbot-small", {**_BART, "scale_embedding": True}),
    "m2m_100": ("m2m_100", {**_BART, "scale_embedding": True}),
    "marian": ("marian", {**_BART, "scale_embedding": True, "decoder_start_token_id": PAD}),
    "led": ("led", _LED),
}

FAMILIES = {**DECODERS, **ENCODER_DECODERS}


def text_config(family: str) -> PreTrainedConfig:
    """The tiny configuration of a family; weights wide enough (0.1) that differences are no rounding."""
    model_type, options = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **_BASE, **options)
    for name in ("initializer_range", "init_std"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    return config


def language_model(family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny random language model of a family, head included, in eval mode; options go to `from_config`."""
    auto_class = AutoModelForCausalLM if family in DECODERS else AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class.from_config(text_config(family), **options).eval()
