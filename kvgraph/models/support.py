"""Which models can be composed, and why others can't."""

from __future__ import annotations

from transformers import PreTrainedConfig

from kvgraph.errors import ModelError
from kvgraph.models.config import rope_parameters

# Model types whose composed logits are tested against a plain forward. All others need allow_untested.
TESTED = frozenset(
    "llama mistral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 olmo2 olmo3 smollm3 granite cohere cohere2 glm4 "
    "gpt_oss starcoder2".split()
)

_RECURRENT = "has recurrent or linear-attention layers, whose state can't be composed like a KV cache"
_LEARNED = "has learned absolute positions, so a cached segment can't be moved"
_ALIBI = "biases its scores by position (ALiBi)"
_BY_TYPE = {
    **dict.fromkeys(
        "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 recurrent_gemma rwkv xlstm".split(), _RECURRENT
    ),
    **dict.fromkeys(
        "nemotron_h granitemoehybrid qwen3_next minimax lfm2 lfm2_moe kimi_linear olmo_hybrid".split(), _RECURRENT
    ),
    **dict.fromkeys("gpt2 openai-gpt gpt_neo gpt_bigcode opt xglm biogpt ctrl xlnet".split(), _LEARNED),
    **dict.fromkeys("bloom mpt".split(), _ALIBI),
    "ministral3": "scales queries by position",
}


def _reason(config: PreTrainedConfig) -> str | None:
    """Why a model of this config can't be composed; None if it can."""
    ropes = rope_parameters(config)
    types = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes}
    layer_types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention", "attention"}
    if config.model_type in _BY_TYPE:
        return _BY_TYPE[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if any(rope.get("mrope_section") for rope in ropes) or "mrope" in types:
        return "has multi-dimensional rotary positions (mrope)"
    if any("llama_4_scaling_beta" in rope for rope in ropes) or getattr(config, "attn_temperature_tuning", False):
        return "scales queries by position"
    if any("dynamic" in t for t in types):
        return "has dynamic NTK rotary scaling: keys would depend on the length of the whole context"
    if types & {"longrope", "su"}:
        return "has longrope rotary scaling: keys would depend on the length of the whole context"
    if getattr(config, "kv_lora_rank", None):
        return "has multi-head latent attention (MLA), whose compressed KV isn't supported"
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in layer_types:
        return "has chunked attention, which depends on absolute positions"
    if layer_types:
        return f"has {', '.join(sorted(layer_types))} layers; only full and sliding-window attention can be composed"
    if getattr(config, "alibi", False):
        return _ALIBI
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "has bidirectional attention"
    return None


def refuse(config: PreTrainedConfig, allow_untested: bool) -> None:
    """Raise ModelError if a model of this config can't be run, or is untested and that isn't allowed."""
    text = config.get_text_config()
    reason = _reason(text) or (None if text is config else "isn't a text-only causal LM; save its text model by itself")
    if reason:
        raise ModelError(f"model type {config.model_type} isn't supported: it {reason}")
    if config.model_type not in TESTED and not allow_untested:
        raise ModelError(
            f"model type {config.model_type} isn't among the tested ones ({', '.join(sorted(TESTED))}); "
            "--allow-untested tries it anyway"
        )
