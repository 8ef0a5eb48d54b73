"""The forward pass of a packed sequence for training: every layer's attention, the logits, and the loss.

Attention is PyTorch's: SDPA with explicit masks, or FlexAttention with a block mask, which skips blocks that nothing sees.
SDPA takes an example at once on a GPU. On the CPU it takes a few of its rows at a time with the columns that they see, which
is faster (benchmarks/training.py), most of all where documents don't see each other. PyTorch's kernel for CPUs takes as long in
16 bits as in 32, so 16-bit training has a kernel of its own (kvgraph.train.halves) on a CPU that multiplies bfloat16. With sinks
attention is written out, as is softcapping without FlexAttention. Attention dropout isn't applied.
Shapes: H query heads, G key/value heads, D, Dv head sizes, V vocabulary; T, N as in kvgraph.train.pack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvgraph.attention.backends import cpu
from kvgraph.models import Attend, Trainable
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
    halves = device.type == "cpu" and cpu.halves() is not None

    @cache
    def strips(window: int | None, dtype: torch.dtype) -> list[list[Strip]]:
        return [_strips(packed.visible(window, here), dtype) for here in packed.slices]

    @cache
    def visibility(window: int | None, repeat: int) -> Any:
        from kvgraph.train.halves import Visibility

        return Visibility([packed.visible(window, here) for here in packed.slices], repeat)

    @cache
    def blocks(window: int | None) -> BlockMask:
        sizes = None, None, len(packed), len(packed)
        return create_block_mask(packed.mask_mod(window), *sizes, device)

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        window = model.layers[layer].window
        dtype = v.dtype
        even = not (q.shape[-1] % 2 or v.shape[-1] % 2)
        if halves and even and not flex and dtype == torch.bfloat16 and softcap is None and sinks is None:
            from kvgraph.train.halves import PackedAttention  # it needs Numba

            return PackedAttention.apply(q, k, v, visibility(window, len(q) // len(k)), scale)
        # Autocast leaves some in float32, which FlexAttention may refuse. PyTorch's kernel for CPUs is faster in float32.
        wide = dtype if v.is_cuda else torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(wide) for t in (q, k, v))
        if flex and sinks is None:
            return _flex(q, k, v, blocks(window), scale, softcap)
        # Split, not sliced: the gradient of a slice is a tensor of the whole size.
        split = [t.split(packed.lengths, 1) for t in (q, k, v)]
        examples = zip(*split, strips(window, q.dtype), strict=True)
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
