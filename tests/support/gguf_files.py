"""Small GGUF files, written as llama.cpp's converter writes them, for the families that transformers reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def write(
    hf: PreTrainedModel,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "",
    lacks: str = "",
    parts: int = 1,
) -> dict[str, np.ndarray]:
    """Write a model with a tokenizer of bytes; returns its matrices as they are in the file, dequantised, by their names.

    lacks: leave out tensors whose names in the file begin so. parts: how many files it says that it was split into.
    """
    config, kept = hf.config, {}
    name = architecture or config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet, "he", "ll"]
    words += [f"<extra_{i}>" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for key, weight in hf.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, last = key.rpartition(".")
        array = weight.float().numpy()
        if stem in OUTER:
            to = OUTER[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            to = f"blk.{layer}.{PARTS[part]}"
        if lacks and to.startswith(lacks):
            continue
        quantised = array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32
        laid = array
        if name == "llama" and to.endswith(("attn_q", "attn_k")):  # llama.cpp turns neighbours, not halves
            heads = config.num_attention_heads if to.endswith("q") else config.num_key_value_heads
            laid = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if not quantised:
            writer.add_tensor(f"{to}.{last}", np.ascontiguousarray(laid))
            kept[key] = array
            continue
        writer.add_tensor(f"{to}.{last}", quantize(laid, kind), raw_dtype=kind)
        kept[key] = gguf.dequantize(quantize(array, kind), kind)  # rows move whole, so their blocks stay
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
