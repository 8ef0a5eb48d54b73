"""Tiny random models of every supported family: the matrix that the model, attention and engine tests run over.

Hidden size 64, heads of 16, 4 query and 2 key/value heads, vocabulary 128. Weights are large (0.2) and norms are noisy,
so that attention, rotation and every norm change the logits visibly. Windows are 8, so short prompts reach beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from soak import SOAK

LAYERS = 3 if SOAK else 2
WINDOW = 8
LIMIT = 131072
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LIMIT // 4}
DUAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
# A layer's keys depend on other tokens from the second layer on, so each kind of layer comes second in some family.
SLIDING_FIRST = ["sliding_attention", "full_attention", "sliding_attention"][:LAYERS]
FULL_FIRST = ["full_attention", "sliding_attention", "full_attention"][:LAYERS]


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A causal LM with a `<family>Config`, float32, in eval mode; the same weights every time."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def rope(theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": partial(build, "Llama"),
    "llama3": partial(build, "Llama", rope_parameters=LLAMA3),
    "mistral": partial(build, "Mistral", sliding_window=WINDOW),
    "qwen2": partial(build, "Qwen2", rope_parameters=YARN),
    "qwen3": partial(build, "Qwen3"),
    "qwen3_moe": partial(
        build, "Qwen3Moe", num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma": partial(build, "Gemma"),
    "gemma2": partial(
        build,
        "Gemma2",
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3_text": partial(
        build,
        "Gemma3Text",
        sliding_window=WINDOW,
        layer_types=FULL_FIRST,
        rope_parameters=DUAL,
        query_pre_attn_scalar=24,
    ),
    "phi3": partial(build, "Phi3", rope_parameters=rope(partial_rotary_factor=0.5)),
    "olmo2": partial(build, "Olmo2"),
    "olmo3": partial(build, "Olmo3", sliding_window=WINDOW, layer_types=SLIDING_FIRST, rope_parameters=DUAL),
    "smollm3": partial(build, "SmolLM3", no_rope_layers=[1, 0, 1][:LAYERS]),
    "granite": partial(
        build,
        "Granite",
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
    "cohere": partial(build, "Cohere", use_qk_norm=True, logit_scale=0.5),
    "cohere2": partial(build, "Cohere2", sliding_window=WINDOW, layer_types=SLIDING_FIRST, logit_scale=0.5),
    "glm4": partial(build, "Glm4", rope_parameters=rope(partial_rotary_factor=0.5)),
    "gpt_oss": partial(
        build,
        "GptOss",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST,
        rope_parameters={**YARN, "truncate": False},
    ),
    "starcoder2": partial(build, "Starcoder2", sliding_window=WINDOW),
}
