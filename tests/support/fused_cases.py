"""Fused kernels against the modules of transformers that they stand for: compiled on a CUDA machine, in Triton's interpreter
elsewhere. Run by test_triton.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama as llama

import families
from kvgraph.models import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16] + [torch.bfloat16] * (
    DEVICE.type == "cuda"
)  # the interpreter cuts bfloat16 off instead of rounding


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 96, 4096])
def test_norm(dtype, size):
    norm = llama.LlamaRMSNorm(size, eps=1e-5).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight += random(size, dtype=dtype)
        for x in (random(1, 3, size, dtype=dtype), random(1, 2, 3, size, dtype=dtype).transpose(1, 2) * 1e-2):
            assert fused._same(fused.rms_norm(x, norm.weight, 1e-5), norm(x))
            assert not fused._same(fused.rms_norm(x, norm.weight, 1e-3), norm(x * 1e-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_rotary(dtype, dim):
    q, k = (random(1, 5, heads, dim, dtype=dtype).transpose(1, 2) for heads in (3, 1))
    angle = random(1, 5, dim // 2, dtype=torch.float32).repeat(1, 1, 2) * 100
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for found, expected in zip(fused.rotary(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype):
    gate, up = random(2, 1, 3, 700, dtype=dtype) * 5
    assert fused._same(fused.gated_silu(gate, up), torch.nn.functional.silu(gate) * up)


# How many of a layer's norms, gates and attentions use the kernels, and whether the last norm does.
EXPECTED = {
    "llama": (2, 1, 1, 1), "mistral": (2, 1, 1, 1), "qwen2": (2, 1, 1, 1), "qwen3": (4, 1, 1, 1), "smollm3": (2, 1, 1, 1),
    "phi3": (2, 0, 1, 1), "gemma": (0, 0, 1, 0), "cohere": (0, 1, 0, 0), "glm4": (4, 0, 0, 1), "starcoder2": (0, 0, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", EXPECTED)
def test_models_run_with_them_and_are_unchanged_afterwards(family):
    hf = families.FAMILIES[family]().to(DEVICE, torch.float16)
    made = fused.Fused(hf)
    kinds = [fused._faster_norm, fused._faster_gate, fused._faster_attention]
    norms, gates, attentions, last = EXPECTED[family]
    counts = [sum(kind.__name__ in f.__qualname__ for f in made.forwards.values()) for kind in kinds[:2]]
    counts.append(len(made.forwards) - sum(counts))
    assert counts == [norms * families.LAYERS + last, gates * families.LAYERS, attentions * families.LAYERS]
    tokens = torch.arange(5, 12, device=DEVICE)[None]
    with torch.no_grad():
        own = hf(tokens, use_cache=False).logits
        with made.used():
            found = hf(tokens, use_cache=False).logits
        again = hf(tokens, use_cache=False).logits
    assert float((found - own).abs().max()) <= 2e-2 * float(own.abs().max())
    assert torch.equal(again, own) and not any("forward" in vars(m) for m in made.forwards)


def test_a_full_precision_model_keeps_its_own_code():
    assert not fused.Fused(families.FAMILIES["llama"]().to(DEVICE)).forwards
