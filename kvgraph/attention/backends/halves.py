"""Attention to bfloat16 KV on a CPU that multiplies bfloat16, compiled by Numba.

PyTorch's fused kernel for CPUs takes as long for products of bfloat16 as of float32. Here queries and weights are rounded to
bfloat16, and a processor's instruction multiplies pairs of such numbers and adds them in float32, as tensor cores of GPUs do.
Scores, log-sum-exp and sums are float32.

Shapes: H query heads, G key/value heads, R = H / G, C query columns, N keys of a part, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from kvgraph.attention.backends.base import Part
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
from kvgraph.store.record import PackedSide

UNIT = 384  # rows that share a packed tile of keys; their sums stay in the processor's second cache
SHARED = 1 << 19  # scores from which on threads share the work

# Columns of the kernel's table. Strides are in bytes; a part without a mask has address 0 for it.
COLUMNS = range(14)
KEYS, VALUES, KEY_GROUP, VALUE_GROUP, KEY_ROW, VALUE_ROW, COUNT, *_ = COLUMNS
*_, START, FIRST, LAST, CAUSAL, MASK, MASK_ROW, MASK_COLUMN = COLUMNS


def attend(q: Tensor, parts: Sequence[Part], scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of the parts' columns of q [H, C, D] float32, written to out [H, C, Dv] and lse [H, C], both float32.

    Keys and values are bfloat16, and their last dimension is contiguous and even, as in records and rows.
    """
    together: list[Part] = []
    for part in parts:
        if isinstance(part.keys, PackedSide) or isinstance(part.values, PackedSide):
            _attend_all(q, [_in_16_bits(part)], scale, out, lse)  # unpacked, it shouldn't take memory for long
        else:
            together.append(part if part.keys.dtype == part.values.dtype == torch.bfloat16 else _in_16_bits(part))
    if together:
        _attend_all(q, together, scale, out, lse)


def _attend_all(q: Tensor, parts: Sequence[Part], scale: float, out: Tensor, lse: Tensor) -> None:
    groups = parts[0].keys.shape[0]
    repeat = len(q) // groups
    numbers: list[int] = []
    for part in parts:
        _write(part, max(1, UNIT // repeat), numbers)
    table = np.array(numbers, dtype=np.int64).reshape(-1, len(COLUMNS))
    arguments = (q.contiguous().numpy(), out.numpy(), lse.numpy(), table, np.float32(scale), groups)
    scores = table[:, COUNT] * (table[:, LAST] - table[:, FIRST]) * repeat
    in_threads(_attend, arguments, np.repeat(scores, groups), SHARED)


def _in_16_bits(part: Part) -> Part:
    return part._replace(keys=part.keys.to(torch.bfloat16), values=part.values.to(torch.bfloat16))


def _write(part: Part, step: int, table: list[int]) -> None:
    """Add a part to the kernel's table, up to `step` of its columns at a time."""
    k, v, mask = part.keys, part.values, part.mask
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    where = (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())
    (kg, kn, _), (vg, vn, _) = k.stride(), v.stride()
    columns = part.columns.stop - part.columns.start
    causal = int(part.causal and mask is None)
    for first in range(0, columns, step):
        which = part.columns.start, first, min(columns, first + step), causal
        table += (k.data_ptr(), v.data_ptr(), 2 * kg, 2 * vg, 2 * kn, 2 * vn, k.shape[1], *which, *where)


@intrinsic  # type: ignore[untyped-decorator]
def _highest(_: Any, address: Any) -> Any:
    """The highest of WIDTH float32 numbers at an address."""

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        kind = ir.VectorType(ir.FloatType(), WIDTH)
        found = builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=4)
        size = WIDTH
        while size > 1:
            size //= 2
            halves = [
                builder.shuffle_vector(
                    found, found, ir.Constant(ir.VectorType(ir.IntType(32), size), [*range(at, at + size)])
                )
                for at in (0, size)
            ]
            found = builder.select(builder.fcmp_ordered(">", *halves), *halves)
        return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), code


@inline  # type: ignore[untyped-decorator]
def _exponentials(scores, scale, top, weights):  # type: ignore[no-untyped-def]
    """weights [WIDTH] bfloat16 of exp(scale * scores - top), and the sum of these before they are rounded."""
    total = np.float32(0)
    for j in range(WIDTH):
        weight = exponential(scores[j] * scale - top)
        total += weight
        weights[j] = rounded(weight)
    return total


@jit
def _attend(q, out, lse, table, scale, groups, begin, end):  # type: ignore[no-untyped-def]
    """Units begin..end, each a row of the table and a group, by a softmax over tiles of keys that keeps its maximum.

    The rows of a unit are its columns' R heads.
    """
    repeat, dim, value_dim = q.shape[0] // groups, q.shape[2], out.shape[2]
    pairs, blocks = dim // 2, (value_dim + WIDTH - 1) // WIDTH
    most = 0
    for u in range(begin, end):
        most = max(most, (table[u // groups, LAST] - table[u // groups, FIRST]) * repeat)
    most = (most + ROWS - 1) // ROWS * ROWS
    word_like, half_like, flag_like = np.empty(0, np.uint32), np.empty(0, np.uint16), np.empty(0, np.uint8)
    query, weights = np.zeros((most, dim), np.uint16), np.zeros((ROWS, WIDTH), np.uint16)
    keys, values = aligned(pairs, WIDTH), aligned(blocks * (WIDTH // 2), WIDTH)
    sums, scores = aligned(most, blocks * WIDTH).view(np.float32), aligned(ROWS, WIDTH).view(np.float32)
    top, total = np.empty(most, np.float32), np.empty(most, np.float32)
    query_bytes, sum_bytes = 2 * dim, 4 * blocks * WIDTH
    for u in range(begin, end):
        row, group = table[u // groups], u % groups
        n, start, first, last, causal, mask = row[COUNT], row[START], row[FIRST], row[LAST], row[CAUSAL], row[MASK]
        rows = (last - first) * repeat
        for r in range(rows):
            h, c = group * repeat + r % repeat, start + first + r // repeat
            for d in range(dim):
                query[r, d] = rounded(q[h, c, d])
            sums[r], top[r], total[r] = 0, -np.inf, 0
        for at in range(0, min(n, last) if causal else n, WIDTH):
            here = min(WIDTH, n - at)
            address = row[KEYS] + group * row[KEY_GROUP] + at * row[KEY_ROW]
            lay_keys(address, row[KEY_ROW], here, pairs, keys, word_like)
            address = row[VALUES] + group * row[VALUE_GROUP] + at * row[VALUE_ROW]
            lay_values(address, row[VALUE_ROW], here, value_dim, values, half_like)
            seeing = max(0, at - first) * repeat // ROWS * ROWS if causal else 0  # rows before it see nothing here
            for r0 in range(seeing, rows, ROWS):
                set_product(
                    query.ctypes.data + r0 * query_bytes, query_bytes, keys.ctypes.data, scores.ctypes.data, 4 * WIDTH, pairs
                )  # fmt: skip
                for r in range(min(ROWS, rows - r0)):
                    c = first + (r0 + r) // repeat
                    visible = max(0, min(here, c - at + 1)) if causal else here
                    for j in range(visible, WIDTH):
                        scores[r, j] = -np.inf
                    if mask:
                        address = mask + c * row[MASK_ROW] + at * row[MASK_COLUMN]
                        shown = numba.carray(pointer(address, flag_like), here * row[MASK_COLUMN])
                        if row[MASK_COLUMN] == 1:  # as nearly always, and then wide instructions can do it
                            for j in range(here):
                                scores[r, j] = scores[r, j] if shown[j] else -np.inf
                        else:
                            for j in range(here):
                                scores[r, j] = scores[r, j] if shown[j * row[MASK_COLUMN]] else -np.inf
                    highest = scale * _highest(scores[r].ctypes.data)
                    if highest == -np.inf:  # it sees nothing of the tile
                        weights[r] = 0
                        continue
                    if highest <= top[r0 + r]:
                        highest = top[r0 + r]
                    else:  # also if it isn't a number: the row isn't either then, which must not be hidden
                        less = np.exp(top[r0 + r] - highest)
                        for d in range(blocks * WIDTH):
                            sums[r0 + r, d] *= less
                        total[r0 + r] *= less
                        top[r0 + r] = highest
                    total[r0 + r] += _exponentials(scores[r], scale, highest, weights[r])
                    for j in range(visible, WIDTH):
                        weights[r, j] = 0
                for b in range(blocks):
                    add_product(
                        weights.ctypes.data, 2 * WIDTH, values.ctypes.data + b * 2 * WIDTH * WIDTH,
                        sums.ctypes.data + r0 * sum_bytes + 4 * b * WIDTH, sum_bytes, (here + 1) // 2,
                    )  # fmt: skip
        for r in range(rows):
            h, c = group * repeat + r % repeat, start + first + r // repeat
            for d in range(value_dim):
                out[h, c, d] = sums[r, d] / total[r]
            lse[h, c] = top[r] + np.log(total[r])
