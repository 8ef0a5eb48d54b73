"""The forward pass of a packed sequence for training: every layer's attention, the logits, and the loss.

Attention is PyTorch's: SDPA with explicit masks, or FlexAttention with a block mask, which skips blocks that nothing sees.
SDPA takes an example at once on a GPU. On the CPU it takes a few of its rows at a time with the columns that they see, which
is faster (benchmarks/training.py), most of all where documents don't see each other. For 16-bit training on a CPU that
multiplies bfloat16, it is written out, which is faster again: PyTorch's kernel takes as long in 16 bits as in 32. With sinks it
is written out everywhere, as is softcapping without FlexAttention. Attention dropout isn't applied.
Shapes: H query heads, G key/value heads, D, Dv head sizes, V vocabulary; T, N as in kvgraph.train.pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvgraph.models import Attend, Trainable
from kvgraph.models.gguf import multiplies_bf16
from kvgraph.train.pack import Packed

# Not cuDNN's: it makes a plan for every new shape, and nearly every example has its own shape.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

ROWS = 128  # of a strip on the CPU: fewer cost more calls, more see columns in vain


class Strip(NamedTuple):
    """Rows of an example, the columns that any of them sees (None: all), and the mask [rows, columns] to add to scores."""

    rows: slice
    columns: Tensor | None
    mask: Tensor


def logits(model: Trainable, packed: Packed, *, module: Callable[..., Any] | None = None, flex: bool = False) -> Tensor:
    """Logits [N, V] float32 of packed.rows; `packed` lies on the model's device.

    module: called instead of model.hf if something wraps it. flex: use FlexAttention. On GPUs it is compiled again for
    every T, so use `Packed.padded`; on the CPU it has no backward pass.
    """
    return model.forward(packed.tokens, packed.positions, _attention(model, packed, flex), packed.rows, module)


def loss(
    logits: Tensor, packed: Packed, *, document_weight: float = 0.0, totals: tuple[int, int] | None = None
) -> Tensor:
    """Mean cross-entropy of the answers' tokens + document_weight * that of the documents' tokens.

    logits [N, V]: of packed.rows. totals: the divisors of the sums. They are the numbers of answer and document tokens of a
    whole optimizer step (sums of `Packed.counts`), so that the losses of its sequences add up; by default this one's.
    """
    answers, documents = totals or packed.counts
    each = cross_entropy(logits, packed.targets, reduction="none")
    weights = torch.where(packed.documents, document_weight / max(documents, 1), 1 / max(answers, 1))
    return (each * weights).sum()


def _attention(model: Trainable, packed: Packed, flex: bool) -> Attend:
    """Every layer's attention. Masks are made once for all layers with the same window."""
    device = packed.tokens.device
    halves = device.type == "cpu" and multiplies_bf16()

    @cache
    def strips(window: int | None, dtype: torch.dtype) -> list[list[Strip]]:
        return [_strips(packed.visible(window, here), dtype) for here in packed.slices]

    @cache
    def blocks(window: int | None) -> BlockMask:
        sizes = None, None, len(packed), len(packed)
        return create_block_mask(packed.mask_mod(window), *sizes, device)

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        window = model.layers[layer].window
        dtype = v.dtype
        # Autocast leaves some in float32, which FlexAttention may refuse. PyTorch's kernel for CPUs is faster in float32.
        wide = dtype if v.is_cuda else torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(wide) for t in (q, k, v))
        if flex and sinks is None:
            return _flex(q, k, v, blocks(window), scale, softcap)
        # Split, not sliced: the gradient of a slice is a tensor of the whole size.
        split = [t.split(packed.lengths, 1) for t in (q, k, v)]
        examples = zip(*split, strips(window, q.dtype), strict=True)
        if halves and dtype == torch.bfloat16 and softcap is None and sinks is None:
            return torch.cat([_Half.apply(*example, scale) for example in examples], 1)
        with sdpa_kernel(KERNELS):
            seen = [_strip(q, k, v, strip, scale, softcap, sinks) for q, k, v, own in examples for strip in own]
        return torch.cat(seen, 1).to(dtype)

    return attend


def _strips(visible: Tensor, dtype: torch.dtype) -> list[Strip]:
    """The strips of an example. visible [T, T]: whether row sees column."""
    size = len(visible) if visible.is_cuda else ROWS
    found = []
    for lo in range(0, len(visible), size):
        rows = visible[lo : lo + size]
        columns = None if visible.is_cuda else rows.any(0).nonzero()[:, 0]
        seen = rows if columns is None else rows[:, columns]
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, -torch.inf
        )  # as kernels want it
        found.append(Strip(slice(lo, lo + size), columns, mask))
    return found


def _strip(
    q: Tensor, k: Tensor, v: Tensor, strip: Strip, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The rows of one strip, of an example's q, k and v."""
    return _masked(q[:, strip.rows], _seen(k, strip), _seen(v, strip), strip.mask, scale, softcap, sinks)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [H, R, D], k [G, C, D], v [G, C, Dv], mask [R, C] -> [H, R, Dv]. sinks [H]: scores that take weight and contribute no value."""
    if softcap is None and sinks is None:
        shared = not q.is_cuda  # the GPU kernel with masks doesn't support shared heads
        k, v = (t if shared else t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        q, k, v = q[None], k[None], v[None]
        with torch.autocast(q.device.type, enabled=False):  # it would convert them to 16 bits again
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shared)[0]
    dtype, (heads, rows, _), columns = q.dtype, q.shape, k.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(wide), *(t.to(wide).repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, rows, 1)], -1)
    return (torch.softmax(scores, -1)[..., :columns] @ v).to(dtype)


class _Half(torch.autograd.Function):
    """An example's attention on a CPU: q [H, T, D], k [G, T, D], v [G, T, Dv] float32 -> [H, T, Dv] bfloat16.

    Products take operands of 16 bits and add in float32, as GPU kernels do. As there, the backward pass computes the weights
    again, so that they take no memory in between.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, strips: list[Strip], scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.strips, ctx.scale = strips, scale
        out = q.new_empty(*q.shape[:2], v.shape[-1], dtype=torch.bfloat16)
        values = v.bfloat16()
        with _sixteen_bits():
            for strip in strips:
                seen = _weights(q, k, strip, scale).bfloat16() @ _seen(values, strip)
                out[:, strip.rows] = seen.view(len(q), -1, v.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad, keys = grads[0].float(), k.bfloat16()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with _sixteen_bits():
            for strip in ctx.strips:
                weights, above = _weights(q, k, strip, ctx.scale), _folded(grad, strip, len(k))
                dv.index_add_(1, strip.columns, (weights.bfloat16().mT @ above.bfloat16()).float())
                products = above @ _seen(v, strip).mT
                scores = torch._softmax_backward_data(products, weights, -1, torch.float32).mul_(ctx.scale).bfloat16()
                dq[:, strip.rows] = (scores @ _seen(keys, strip)).view(len(q), -1, k.shape[-1]).float()
                dk.index_add_(1, strip.columns, (scores.mT @ _folded(q, strip, len(k)).bfloat16()).float())
        return dq, dk, dv, None, None


@contextmanager
def _sixteen_bits() -> Iterator[None]:
    """A block in which products of float32 tensors round their operands to 16 bits, but neither sums nor results."""
    backend: Any = torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)  # not before torch 2.9: there these products are exact, and slower
    before = matmul and matmul.fp32_precision
    with torch.autocast("cpu", enabled=False):
        try:
            if matmul:
                matmul.fp32_precision = "bf16"
            yield
        finally:
            if matmul:
                matmul.fp32_precision = before


def _weights(q: Tensor, k: Tensor, strip: Strip, scale: float) -> Tensor:
    """Softmax of a strip's scores: [G, H / G * rows, columns] float32."""
    scores = _folded(q, strip, len(k)) @ _seen(k, strip).mT
    masked = scores.view(len(q), -1, scores.shape[-1]).mul_(scale).add_(strip.mask)
    return torch.softmax(masked, -1).view_as(scores)


def _folded(t: Tensor, strip: Strip, groups: int) -> Tensor:
    """A strip's rows of t [H, T, D], those of heads that share keys together: [G, H / G * rows, D]."""
    return t[:, strip.rows].reshape(groups, -1, t.shape[-1])


def _seen(t: Tensor, strip: Strip) -> Tensor:
    """The columns of a strip, of t [G, T, D]: [G, columns, D]."""
    return t if strip.columns is None else t.index_select(1, strip.columns)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """The same over all examples at once, without sinks."""
    score_mod = None if softcap is None else _capped(softcap)
    kernel = _compiled() if q.is_cuda else flex_attention
    return kernel(q[None], k[None], v[None], score_mod, blocks, scale, enable_gqa=True)[0]


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return score_mod
