"""What stands around attention in a layer, on NVIDIA GPUs: Triton kernels of norms, rotations and gated activations.

Each rounds to the dtype of its inputs where transformers' Llama does. Without a GPU they run in Triton's interpreter, which
cuts bfloat16 off instead of rounding it.

Shapes: T tokens, H query heads, G key/value heads, D head size, N numbers of a norm, I of a gated activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a gated activation, per program


@triton.jit
def rms_norm_kernel(x, weight, out, stride, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """One row [N]: normalised in float32, rounded, multiplied by the weight, rounded."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    v = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / N + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + at, (w * v.to(out.dtype.element_ty).to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn(source, to, cos, sin, D: tl.constexpr, BLOCK: tl.constexpr):
    """One head [D]: dimension i makes a pair with i + D / 2. Each product and the sum are rounded."""
    d = tl.arange(0, BLOCK)
    inside = d < D
    first = d < D // 2
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + tl.where(first, d + D // 2, d - D // 2), mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    a = (x * c).to(to.dtype.element_ty).to(tl.float32)
    b = (tl.where(first, -y, y) * s).to(to.dtype.element_ty).to(tl.float32)
    tl.store(to + d, (a + b).to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "groups"])
def rotary_kernel(
    q, k, cos, sin, out_q, out_k, heads, groups, q_head, q_token, k_head, k_token, angle_token,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one token, of the queries and then of the keys."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cos, sin = cos + token * angle_token, sin + token * angle_token
    if head < heads:
        _turn(q + head * q_head + token * q_token, out_q + (token * heads + head) * D, cos, sin, D, BLOCK)
    else:
        head -= heads
        _turn(k + head * k_head + token * k_token, out_k + (token * groups + head) * D, cos, sin, D, BLOCK)


@triton.jit
def gated_silu_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    """silu(gate) * up, rounded after each of the two."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (activated * u).to(out.dtype.element_ty), mask=at < n)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] normalised by its root mean square, times weight [N]; all of one 16-bit dtype."""
    n = x.shape[-1]
    rows, block = x.reshape(-1, n), triton.next_power_of_2(n)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    warps = min(16, max(1, block // 512))
    rms_norm_kernel[(len(rows),)](rows, weight, out, rows.stride(0), eps, N=n, BLOCK=block, num_warps=warps)
    return out.view(x.shape)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D] and k [1, G, T, D] rotated by cos and sin [1, T, D]; all of one 16-bit dtype."""
    _, heads, tokens, dim = q.shape
    groups = k.shape[1]
    out_q, out_k = (torch.empty(1, tokens, t.shape[1], dim, dtype=t.dtype, device=t.device) for t in (q, k))
    rotary_kernel[(tokens, heads + groups)](
        q, k, cos, sin, out_q, out_k, heads, groups, q.stride(1), q.stride(2), k.stride(1), k.stride(2), cos.stride(1),
        D=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each [..., I], contiguous and of one 16-bit dtype."""
    out = torch.empty_like(gate)
    gated_silu_kernel[(triton.cdiv(out.numel(), ELEMENTS),)](gate, up, out, out.numel(), BLOCK=ELEMENTS, num_warps=4)
    return out
