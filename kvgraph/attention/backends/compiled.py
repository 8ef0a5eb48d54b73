"""Attention of few query columns on a CPU, compiled by Numba: what a decoding step consists of.

PyTorch's fused kernel takes a call for each part and wants 16-bit keys and values in float32. Here all parts are one call, and a tile
of keys becomes float32 in the processor's cache. Scores, log-sum-exp and sums are float32, as in `kvgraph.attention.backends.cpu`.
Shapes: H query heads, G key/value heads, R = H / G, C query columns, P parts, N keys of a part, D and Dv head sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import compress

import numba
import numpy as np
from torch import Tensor

from kvgraph.attention.backends.base import Part
from kvgraph.attention.backends.jit import ZERO, exponential, in_threads, inline, jit, pointer, prefetch
from kvgraph.store.record import PackedSide

TILE = 64  # keys at a time; as float32 they fit in the processor's first cache
# Scores, or numbers to merge, from which on threads share the work: waking one takes as long as half of them.
SHARED = 1 << 17
KEYS, START, COLUMNS, WIDTH = range(6, 10)  # columns of the kernel's table, after addresses and strides; see `_row`


def attend(q: Tensor, parts: Sequence[Part], scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of the parts' columns of q [H, C, D] float32, written to out [H, C, Dv] and lse [H, C], both float32.

    The last dimension of keys and values is contiguous, as in records and rows. Packed ones are unpacked a part at a time.
    """
    packed = [isinstance(part.keys, PackedSide) or isinstance(part.values, PackedSide) for part in parts]
    if not all(packed):
        _attend_all(q, list(compress(parts, map(operator.not_, packed))), scale, out, lse)
    for part in compress(parts, packed):
        k, v = (side.to(side.dtype) for side in (part.keys, part.values))
        _attend_all(q, [part._replace(keys=k, values=v)], scale, out, lse)


def _attend_all(q: Tensor, parts: Sequence[Part], scale: float, out: Tensor, lse: Tensor) -> None:
    groups = parts[0].keys.shape[0]
    table = np.array([_row(part) for part in parts], dtype=np.int64)
    arguments = (q.contiguous().numpy(), out.numpy(), lse.numpy(), table, np.float32(scale), groups)
    scores = table[:, KEYS] * table[:, COLUMNS] * (len(q) // groups)
    in_threads(_attend, arguments, np.repeat(scores, groups), SHARED)


def merge(
    out: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor, order: np.ndarray, ends: np.ndarray, sinks: Tensor | None
) -> None:
    """Merge other parts into out [H, T, D], as one softmax. T: tokens; E: pairs of a token and a part.

    seen [H, E, D], seen_lse [H, E]: the other parts'. order [E]: the pairs of token 0, of token 1, ...; ends [T]: where a token's end.
    sinks [H]: attention sinks, for tokens that have other parts.
    """
    none = np.empty(0, np.float32) if sinks is None else sinks.float().numpy()
    arguments = (out.numpy(), lse.numpy(), seen.numpy(), seen_lse.numpy(), order, ends, none)
    if seen.numel() < SHARED:
        _merge(*arguments, 0, len(ends))
    else:
        in_threads(_merge, arguments, np.diff(ends, prepend=0), 0)


def _row(part: Part) -> tuple[int, ...]:
    """A part as the kernel reads it: addresses, strides in numbers, sizes."""
    k, v, here = part.keys, part.values, part.columns
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    (kg, kn, _), (vg, vn, _) = k.stride(), v.stride()
    n = k.shape[1]
    return k.data_ptr(), v.data_ptr(), kg, kn, vg, vn, n, here.start, here.stop - here.start, k.dtype.itemsize


@inline  # type: ignore[untyped-decorator]
def _tile(address, stride, n, size, width, half_like, bits, tile):  # type: ignore[no-untyped-def]
    """n rows of numbers at an address, as float32 [n, size or more]; in `tile` if they were bfloat16. bits: the same memory."""
    for j in range(n):  # a processor fetches ahead within a page of memory, and a page is half a tile
        for b in range(0, width * size, 64):
            prefetch(address + width * (j + 2 * TILE) * stride + b)
    if width == 4:
        return numba.carray(pointer(address, tile), (n, stride))
    for j in range(n):
        upper = numba.carray(pointer(address + 2 * j * stride, half_like), size)
        for d in range(size):
            bits[j, d] = np.uint32(upper[d]) << np.uint32(16)
    return tile


@jit
def _merge(out, lse, seen, seen_lse, order, ends, sinks, first, last):  # type: ignore[no-untyped-def]
    """Tokens first..last."""
    heads, _, size = out.shape
    for t in range(first, last):
        start = ends[t - 1] if t else 0
        if start == ends[t]:
            continue
        for h in range(heads):
            top = lse[h, t]
            for e in range(start, ends[t]):
                top = max(top, seen_lse[h, order[e]])
            mine = np.exp(lse[h, t] - top)
            total = mine
            for d in range(size):
                out[h, t, d] *= mine
            for e in range(start, ends[t]):
                weight = np.exp(seen_lse[h, order[e]] - top)
                total += weight
                for d in range(size):
                    out[h, t, d] += weight * seen[h, order[e], d]
            if len(sinks):
                total += np.exp(sinks[h] - top)
            for d in range(size):
                out[h, t, d] /= total


@jit
def _attend(q, out, lse, table, scale, groups, first, last):  # type: ignore[no-untyped-def]
    """Units first..last, each a part and a group, by a softmax over tiles of keys that keeps its maximum."""
    repeat = q.shape[0] // groups
    dim, value_dim = q.shape[2], out.shape[2]
    rows = 0
    for p in range(len(table)):
        rows = max(rows, table[p, COLUMNS] * repeat)
    key_bits, value_bits = np.empty((TILE, dim), np.uint32), np.empty((TILE, value_dim), np.uint32)
    key_tile, value_tile = key_bits.view(np.float32), value_bits.view(np.float32)
    half_like = np.empty(0, np.uint16)
    scores = np.empty((rows, TILE), np.float32)
    query, sums = np.empty((rows, dim), np.float32), np.empty((rows, value_dim), np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for unit in range(first, last):
        p, g = unit // groups, unit % groups
        n, start, columns, width = table[p, KEYS], table[p, START], table[p, COLUMNS], table[p, WIDTH]
        mine = columns * repeat
        for r in range(mine):
            for d in range(dim):
                query[r, d] = q[g * repeat + r // columns, start + r % columns, d] * scale
            for d in range(value_dim):
                sums[r, d] = 0
            top[r], total[r] = -np.inf, 0
        for at in range(0, n, TILE):
            here = min(TILE, n - at)
            address = table[p, 0] + width * (g * table[p, 2] + at * table[p, 3])
            keys = _tile(address, table[p, 3], here, dim, width, half_like, key_bits, key_tile)
            address = table[p, 1] + width * (g * table[p, 4] + at * table[p, 5])
            values = _tile(address, table[p, 5], here, value_dim, width, half_like, value_bits, value_tile)
            for r in range(mine):
                highest = top[r]
                fours = here // 4 * 4
                for j in range(0, fours, 4):
                    a, b, c, e = ZERO, ZERO, ZERO, ZERO
                    for d in range(dim):
                        x = query[r, d]
                        a += x * keys[j, d]
                        b += x * keys[j + 1, d]
                        c += x * keys[j + 2, d]
                        e += x * keys[j + 3, d]
                    scores[r, j], scores[r, j + 1], scores[r, j + 2], scores[r, j + 3] = a, b, c, e
                for j in range(fours, here):
                    a = ZERO
                    for d in range(dim):
                        a += query[r, d] * keys[j, d]
                    scores[r, j] = a
                for j in range(here):
                    highest = max(highest, scores[r, j])
                if highest > top[r]:
                    less = np.exp(top[r] - highest)
                    top[r] = highest
                    total[r] *= less
                    for d in range(value_dim):
                        sums[r, d] *= less
                sum_here = ZERO
                for j in range(here):
                    scores[r, j] = exponential(scores[r, j] - highest)
                    sum_here += scores[r, j]
                total[r] += sum_here
                for j in range(0, fours, 4):
                    a, b, c, e = scores[r, j], scores[r, j + 1], scores[r, j + 2], scores[r, j + 3]
                    for d in range(value_dim):
                        sums[r, d] += (
                            a * values[j, d] + b * values[j + 1, d] + c * values[j + 2, d] + e * values[j + 3, d]
                        )
                for j in range(fours, here):
                    for d in range(value_dim):
                        sums[r, d] += scores[r, j] * values[j, d]
        for r in range(mine):
            h, c = g * repeat + r // columns, start + r % columns
            for d in range(value_dim):
                out[h, c, d] = sums[r, d] / total[r]
            lse[h, c] = top[r] + np.log(total[r])
