"""Attention of few query columns on a CPU, compiled by Numba: what a decoding step consists of.

PyTorch's fused kernel takes a call for each part and wants 16-bit keys and values in float32. Here all parts are one call, and a tile
of keys becomes float32 in the processor's cache. Scores, log-sum-exp and sums are float32, as in `kvgraph.attention.backends.cpu`.
Shapes: H query heads, G key/value heads, R = H / G, C query columns, P parts, N keys of a part, D and Dv head sizes.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress, pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from kvgraph.attention.backends.base import Part
from kvgraph.store.record import PackedSide

TILE = 64  # keys at a time; as float32 they fit in the processor's first cache
SHARED = 1 << 17  # scores from which on threads share the work: waking one takes as long as half of these
KEYS, START, COLUMNS, WIDTH = range(6, 10)  # columns of the kernel's table, after addresses and strides; see `_row`
# Sums may be reordered and fused; infinities keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}
Kernel = Callable[..., None]


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


def in_threads(kernel: Kernel, arguments: tuple[Any, ...], work: np.ndarray, shared: int) -> None:
    """Call the kernel with these arguments and a first and a last unit, for all units; in threads if there is work for them.

    work: of every unit. shared: the work from which on threads share it.
    """
    threads = min(torch.get_num_threads(), len(work))
    if threads == 1 or work.sum() < shared:
        kernel(*arguments, 0, len(work))
        return
    done = np.cumsum(work)
    bounds = [0, *np.searchsorted(done, done[-1] * np.arange(1, threads) / threads).tolist(), len(work)]
    others = [_pool().submit(kernel, *arguments, a, b) for a, b in pairwise(bounds[1:])]
    kernel(*arguments, bounds[0], bounds[1])
    for other in others:
        other.result()


def merge(
    out: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor, order: np.ndarray, ends: np.ndarray, sinks: Tensor | None
) -> None:
    """Merge other parts into out [H, T, D], as one softmax. T: tokens; E: pairs of a token and a part.

    seen [H, E, D], seen_lse [H, E]: the other parts'. order [E]: the pairs of token 0, of token 1, ...; ends [T]: where a token's end.
    sinks [H]: attention sinks, for tokens that have other parts.
    """
    none = np.empty(0, np.float32) if sinks is None else sinks.float().numpy()
    arguments = (out.numpy(), lse.numpy(), seen.numpy(), seen_lse.numpy(), order, ends, none)
    in_threads(_merge, arguments, np.diff(ends, prepend=0) * out.shape[0] * out.shape[2], SHARED)


def _row(part: Part) -> tuple[int, ...]:
    """A part as the kernel reads it: addresses, strides in numbers, sizes."""
    k, v, here = part.keys, part.values, part.columns
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    (kg, kn, _), (vg, vn, _) = k.stride(), v.stride()
    n = k.shape[1]
    return k.data_ptr(), v.data_ptr(), kg, kn, vg, vn, n, here.start, here.stop - here.start, k.dtype.itemsize


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kvgraph-attention")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """The pointer to numbers of the type of `like` at an address."""
    kind = types.CPointer(like.dtype)

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), code


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_: Any, address: Any) -> Any:
    """Bring the 64 bytes at an address into the processor's second cache; any address may be given."""

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, in_second_cache, data = (ir.Constant(number, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(arguments[0], byte), to_read, in_second_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), code


# exp(x) = 2^k exp(y), |y| <= ln(2) / 2. ln(2) is in two parts, so that y is exact; exp(y) is its series, right to 1e-7.
LOG2E, HIGH, LOW = np.float32(math.log2(math.e)), np.float32(0.693359375), np.float32(-2.12194440e-4)
C2, C3, C4, C5, C6, C7, C8 = (np.float32(1 / math.factorial(n)) for n in range(2, 9))
ZERO, HALF, ONE, SMALLEST = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-87)
_inline = numba.njit(nogil=True, fastmath=FAST, inline="always")


@_inline  # type: ignore[untyped-decorator]
def _tile(address, stride, n, size, width, half_like, bits, tile):  # type: ignore[no-untyped-def]
    """n rows of numbers at an address, as float32 [n, size or more]; in `tile` if they were bfloat16. bits: the same memory."""
    for j in range(n):  # a processor fetches ahead within a page of memory, and a page is half a tile
        for b in range(0, width * size, 64):
            _prefetch(address + width * (j + 2 * TILE) * stride + b)
    if width == 4:
        return numba.carray(_pointer(address, tile), (n, stride))
    for j in range(n):
        upper = numba.carray(_pointer(address + 2 * j * stride, half_like), size)
        for d in range(size):
            bits[j, d] = np.uint32(upper[d]) << np.uint32(16)
    return tile


@_inline  # type: ignore[untyped-decorator]
def _exponentials(scores, bits, n, top):  # type: ignore[no-untyped-def]
    """scores [n] become exp(scores - top), and their sum is returned. bits: the same memory as int32."""
    for j in range(n):
        x = max(scores[j] - top, SMALLEST)
        k = np.floor(x * LOG2E + HALF)
        y = x - k * HIGH - k * LOW
        z = ((((((C8 * y + C7) * y + C6) * y + C5) * y + C4) * y + C3) * y + C2) * y * y + y + ONE
        scores[j] = z
        bits[j] += np.int32(k) << np.int32(23)
    total = np.float32(0)
    for j in range(n):
        total += scores[j]
    return total


def _jit(function: Callable[..., None]) -> Kernel:
    """The function, compiled at its first call, and kept in a file if there is a folder that Numba may write to."""
    try:
        made = numba.njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, fastmath=FAST, error_model="numpy")(function)

    @functools.wraps(function)
    def called(*arguments: Any) -> None:
        try:
            made(*arguments)
        except OSError:  # it is compiled, but the file can't be written: the disk is full, say
            made(*arguments)

    return called


@_jit
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


@_jit
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
    score_bits = scores.view(np.int32)
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
                total[r] += _exponentials(scores[r], score_bits[r], here, highest)
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
