"""Attention of packed examples and its gradients, for 16-bit training on a CPU that multiplies bfloat16, compiled by Numba.

The forward pass is the engine's kernel, `kvgraph.attention.backends.halves`, and the backward pass is made of the same products:
operands of 16 bits, sums in float32. It computes the weights again from the log-sum-exp, a tile at a time, so that they never
lie in memory (FlashAttention, arXiv 2205.14135, appendix B.2).

Shapes: H query heads, G key/value heads, R = H / G, T tokens, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvgraph.attention.backends import halves
from kvgraph.attention.backends.base import Part
from kvgraph.attention.backends.halves import UNIT
from kvgraph.attention.backends.jit import exponential, in_threads, inline, jit, pointer
from kvgraph.attention.backends.products import (
    ROWS,
    WIDTH,
    add_product,
    aligned,
    lay_keys,
    lay_values,
    rounded,
    set_product,
)

SHARED = 1 << 18  # scores from which on threads share the work
OFFSET, LENGTH, VISIBLE, TILES = range(4)  # columns of the kernel's table: an example's first token, tokens, addresses


class Visibility:
    """What the rows of every example of a sequence see: masks, and which tiles of them aren't empty.

    visible: a mask [t, t] bool of every example, in order. repeat: R.
    """

    def __init__(self, visible: Sequence[Tensor], repeat: int):
        self.strip = max(1, UNIT // repeat)  # rows that share a tile of keys
        self.visible = [one.contiguous() for one in visible]
        self.tiles = [_tiles(one, self.strip) for one in self.visible]
        offsets = np.cumsum([0, *map(len, visible)])
        self.table = np.array(
            [
                (offset, len(one), one.data_ptr(), tiles.data_ptr())
                for offset, one, tiles in zip(offsets, self.visible, self.tiles, strict=False)
            ]
        )
        self.work = np.array([int(tiles.sum()) * self.strip * WIDTH * repeat for tiles in self.tiles])

    def parts(self, k: Tensor, v: Tensor) -> list[Part]:
        """A part for every strip: its rows, and the keys from the first to the last that one of them sees."""
        found = []
        for (offset, length, *_), visible, tiles in zip(self.table, self.visible, self.tiles, strict=True):
            for number, at in enumerate(range(0, length, self.strip)):
                seen = tiles[number].nonzero()
                lo, hi = int(seen[0]) * WIDTH, min(length, (int(seen[-1]) + 1) * WIDTH)
                rows, keys = slice(at, min(length, at + self.strip)), slice(offset + lo, offset + hi)
                columns = slice(offset + rows.start, offset + rows.stop)
                found.append(Part(columns, k[:, keys], v[:, keys], visible[rows, lo:hi]))
        return found


def _tiles(visible: Tensor, strip: int) -> Tensor:
    """[strips, tiles] bool: whether any row of a strip sees any key of a tile."""
    length = len(visible)
    whole = pad(visible, (0, -length % WIDTH, 0, -length % strip))
    return whole.view(-1, strip, whole.shape[1] // WIDTH, WIDTH).any(3).any(1)


class PackedAttention(torch.autograd.Function):
    """A sequence's attention: q [H, T, D], k [G, T, D], v [G, T, Dv] of any dtype -> [H, T, Dv] bfloat16.

    D and Dv are even. `seen` says what a row sees.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, scale: float) -> Tensor:
        rounded = [t.to(torch.bfloat16).contiguous() for t in (q, k, v)]
        out = torch.empty(*q.shape[:2], v.shape[-1])
        lse = torch.empty(*q.shape[:2])
        halves.attend(rounded[0].float(), seen.parts(*rounded[1:]), scale, out, lse)
        ctx.save_for_backward(*rounded, out, lse)
        ctx.seen, ctx.scale, ctx.dtypes = seen, scale, (q.dtype, k.dtype, v.dtype)
        return out.bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        above = grads[0].contiguous()
        inner = (above.float() * out).sum(-1)  # of a row: the mean of its weights' gradients, by the weights
        found = [torch.empty(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)]
        inputs = [t.view(torch.uint16).numpy() for t in (q, k, v, above.to(torch.bfloat16))]
        arguments = (*inputs, inner.numpy(), lse.numpy(), ctx.seen.table, ctx.seen.strip, np.float32(ctx.scale))
        in_threads(_gradients, (*arguments, *(t.numpy() for t in found)), np.repeat(ctx.seen.work, len(k)), SHARED)
        return *(t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True)), None, None


@inline  # type: ignore[untyped-decorator]
def _add_turned(factor, pairs, n, turned, target, here, dim):  # type: ignore[no-untyped-def]
    """Add the product of `factor` [dim or more, 2n] and `pairs` [n, WIDTH], turned, to the first `here` rows of target [., dim]."""
    step = 2 * factor.shape[1]
    for r0 in range(0, factor.shape[0], ROWS):
        set_product(
            factor.ctypes.data + r0 * step, step, pairs.ctypes.data, turned.ctypes.data + 4 * r0 * WIDTH, 4 * WIDTH, n
        )  # fmt: skip
    for j in range(here):
        for d in range(dim):
            target[j, d] += turned[d, j]


@jit
def _gradients(q, k, v, above, inner, lse, table, strip, scale, dq, dk, dv, begin, end):  # type: ignore[no-untyped-def]
    """Units begin..end, each an example and a group: sets their rows of dq, and adds to those of dk and dv, all float32.

    q, k, v, above: the bits of bfloat16. With weights P, and O' the gradient of the output (`above`): P' = O' V^T;
    S' = scale * P * (P' - inner); dq = S' K, dk = S'^T Q, dv = P^T O'. For the last two, a strip's P and S' are kept as
    pairs of rows, which is a product's second factor: the products are (dk)^T = Q^T S' and (dv)^T = O'^T P.
    """
    groups, dim, value_dim = k.shape[0], q.shape[2], v.shape[2]
    repeat = q.shape[0] // groups
    most = (strip * repeat + ROWS - 1) // ROWS * ROWS
    pairs, value_pairs, blocks = dim // 2, value_dim // 2, (dim + WIDTH - 1) // WIDTH
    tall, value_tall = (dim + ROWS - 1) // ROWS * ROWS, (value_dim + ROWS - 1) // ROWS * ROWS
    word_like, half_like, flag_like = np.empty(0, np.uint32), np.empty(0, np.uint16), np.empty(0, np.uint8)
    query, query_turned = np.zeros((most, dim), np.uint16), np.zeros((tall, most), np.uint16)
    wanted, wanted_turned = np.zeros((most, value_dim), np.uint16), np.zeros((value_tall, most), np.uint16)
    keys, values = aligned(pairs, WIDTH), aligned(value_pairs, WIDTH)
    key_rows = aligned(blocks * (WIDTH // 2), WIDTH)
    weight_pairs, score_pairs = aligned(most // 2, WIDTH), aligned(most // 2, WIDTH)
    weights, scores = np.zeros((ROWS, WIDTH), np.uint16), np.zeros((ROWS, WIDTH), np.uint16)
    products = aligned(ROWS, WIDTH).view(np.float32)
    others = aligned(ROWS, WIDTH).view(np.float32)
    sums = aligned(most, blocks * WIDTH).view(np.float32)
    turned = aligned(max(tall, value_tall), WIDTH).view(np.float32)
    sum_bytes = 4 * blocks * WIDTH
    for u in range(begin, end):
        offset, length = table[u // groups, OFFSET], table[u // groups, LENGTH]
        group = u % groups
        tiles = (length + WIDTH - 1) // WIDTH
        filled = numba.carray(pointer(table[u // groups, TILES], flag_like), (length + strip - 1) // strip * tiles)
        for first in range(0, length, strip):
            rows = (min(length, first + strip) - first) * repeat
            for r in range(rows):
                h, c = group * repeat + r % repeat, offset + first + r // repeat
                for d in range(dim):
                    query[r, d] = q[h, c, d]
                    query_turned[d, r] = q[h, c, d]
                for d in range(value_dim):
                    wanted[r, d] = above[h, c, d]
                    wanted_turned[d, r] = above[h, c, d]
                sums[r] = 0
            whole = (rows + ROWS - 1) // ROWS * ROWS
            for tile in range(tiles):
                if not filled[first // strip * tiles + tile]:
                    continue
                at = tile * WIDTH
                here = min(WIDTH, length - at)
                key, value = k[group, offset + at :], v[group, offset + at :]
                lay_keys(key.ctypes.data, 2 * dim, here, pairs, keys, word_like)
                lay_keys(value.ctypes.data, 2 * value_dim, here, value_pairs, values, word_like)
                lay_values(key.ctypes.data, 2 * dim, here, dim, key_rows, half_like)
                for r0 in range(0, whole, ROWS):
                    set_product(
                        query.ctypes.data + 2 * r0 * dim, 2 * dim, keys.ctypes.data, products.ctypes.data, 4 * WIDTH, pairs
                    )  # fmt: skip
                    set_product(
                        wanted.ctypes.data + 2 * r0 * value_dim, 2 * value_dim, values.ctypes.data,
                        others.ctypes.data, 4 * WIDTH, value_pairs,
                    )  # fmt: skip
                    for r in range(ROWS):
                        if r0 + r >= rows:
                            weights[r] = 0
                            scores[r] = 0
                            continue
                        h, c = group * repeat + (r0 + r) % repeat, first + (r0 + r) // repeat
                        shown = numba.carray(pointer(table[u // groups, VISIBLE] + c * length + at, flag_like), WIDTH)
                        top, mean = lse[h, offset + c], inner[h, offset + c]
                        for j in range(here):
                            weight = exponential(min(products[r, j] * scale - top, np.float32(0)))
                            weight *= np.float32(shown[j])
                            weights[r, j] = rounded(weight)
                            scores[r, j] = rounded(weight * (others[r, j] - mean) * scale)
                        for j in range(here, WIDTH):
                            weights[r, j] = 0
                            scores[r, j] = 0
                    for i in range(ROWS // 2):
                        for j in range(WIDTH):
                            low, high = np.uint32(weights[2 * i, j]), np.uint32(weights[2 * i + 1, j])
                            weight_pairs[r0 // 2 + i, j] = low | high << np.uint32(16)
                            low, high = np.uint32(scores[2 * i, j]), np.uint32(scores[2 * i + 1, j])
                            score_pairs[r0 // 2 + i, j] = low | high << np.uint32(16)
                    for b in range(blocks):
                        add_product(
                            scores.ctypes.data, 2 * WIDTH, key_rows.ctypes.data + b * 2 * WIDTH * WIDTH,
                            sums.ctypes.data + r0 * sum_bytes + 4 * b * WIDTH, sum_bytes, (here + 1) // 2,
                        )  # fmt: skip
                _add_turned(query_turned, score_pairs, whole // 2, turned, dk[group, offset + at :], here, dim)
                _add_turned(wanted_turned, weight_pairs, whole // 2, turned, dv[group, offset + at :], here, value_dim)
            for r in range(rows):
                h, c = group * repeat + r % repeat, offset + first + r // repeat
                for d in range(dim):
                    dq[h, c, d] = sums[r, d]
