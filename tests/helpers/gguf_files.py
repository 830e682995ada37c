"""A tiny Llama, or Gemma 2, in one GGUF file, tokenizer included, as llama.cpp's tools write it."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig

from tests.helpers.tiny import text_config


SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"


def write_gguf(
    file: Path,
    seed: int = 0,
    words: tuple[str, ...] = ("at", "is"),
    quantized: bool = True,
    architecture: Literal["llama", "gemma2"] = "llama",
) -> str:
    """Writes it; `words`, of two letters each, are one token. Returns its folder."""
    import gguf

    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *words]
    config: LlamaConfig = text_config(vocab_size=len(tokens))
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "gemma2":
        writer.add_key_length(config.hidden_size // config.num_attention_heads)
        writer.add_value_length(config.hidden_size // config.num_attention_heads)
        writer.add_sliding_window(config.max_position_embeddings)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(letters) + len(words)))
    writer.add_token_merges([" ".join(word) for word in words])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(seed)

    def add(name: str, *shape: int) -> None:
        values = 0.2 * torch.randn(*shape, generator=generator).numpy()
        if quantized and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32) if len(shape) == 1 else values)

    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    add("token_embd.weight", len(tokens), width)
    if architecture == "llama":
        add("output.weight", len(tokens), width)
    add("output_norm.weight", width)
    for layer in range(config.num_hidden_layers):
        for name, rows in (("attn_q", width), ("attn_k", narrow), ("attn_v", narrow), ("attn_output", width)):
            add(f"blk.{layer}.{name}.weight", rows, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", inner, width)
        add(f"blk.{layer}.ffn_down.weight", width, inner)
        for name in ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if architecture == "gemma2" else ())):
            add(f"blk.{layer}.{name}.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file.parent)
