"""Attention of many query columns to bfloat16 KV on a CPU that multiplies bfloat16, compiled by Numba: prefill and encoding.

PyTorch's fused kernel for CPUs takes as long for products of bfloat16 as of float32. Here queries and weights are rounded to
bfloat16, and a processor's instruction multiplies pairs of such numbers and adds them in float32, as tensor cores of GPUs do.
Scores, log-sum-exp and sums are float32.

Shapes: H query heads, G key/value heads, R = H / G, C query columns, N keys of a part, D and Dv head sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from kvgraph.attention.backends.base import Part
from kvgraph.attention.backends.compiled import (
    C2,
    C3,
    C4,
    C5,
    C6,
    C7,
    HALF,
    HIGH,
    LOG2E,
    LOW,
    ONE,
    SMALLEST,
    TILE,
    _inline,
    _jit,
    _pointer,
    in_threads,
)

LANES = 16  # float32 numbers of a register
WIDTH = 4 * LANES  # columns of a product, and keys of a tile
ROWS = 6  # rows of a product: 24 registers of sums, of 32
UNIT = 384  # rows that share a packed tile of keys; their sums stay in the processor's second cache
SHARED = 1 << 19  # scores from which on threads share the work
assert WIDTH == TILE
binding.initialize_native_asmparser()  # for the instruction below

KEYS, VALUES, KEY_STRIDE, VALUE_STRIDE, COUNT, START, FIRST, LAST, GROUP, CAUSAL, MASK, MASK_STRIDE = range(12)


def attend(q: Tensor, parts: Sequence[Part], scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of the parts' columns of q [H, C, D] float32, written to out [H, C, Dv] and lse [H, C], both float32.

    Keys and values are bfloat16, and their last dimension is contiguous and even, as in records and rows.
    """
    unpacked = [
        part._replace(keys=part.keys.to(torch.bfloat16), values=part.values.to(torch.bfloat16)) for part in parts
    ]
    repeat = len(q) // parts[0].keys.shape[0]
    table = np.array([unit for part in unpacked for unit in _units(part, repeat)], dtype=np.int64)
    arguments = (q.contiguous().numpy(), out.numpy(), lse.numpy(), table, np.float32(scale), repeat)
    work = table[:, COUNT] * (table[:, LAST] - table[:, FIRST]) * repeat
    in_threads(_attend, arguments, work, SHARED)


def _units(part: Part, repeat: int) -> Iterator[tuple[int, ...]]:
    """What is computed at once, as the kernel reads it: columns FIRST..LAST of the part, of the heads of one group.

    Strides are in bytes. A part without a mask has address 0 for it.
    """
    k, v, mask = part.keys, part.values, part.mask
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    columns, step = part.columns.stop - part.columns.start, max(1, UNIT // repeat)
    where = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
    (groups, n, _), (kg, kn, _), (vg, vn, _) = k.shape, k.stride(), v.stride()
    for group, first in product(range(groups), range(0, columns, step)):
        addresses = k.data_ptr() + 2 * group * kg, v.data_ptr() + 2 * group * vg, 2 * kn, 2 * vn, n
        which = part.columns.start, first, min(columns, first + step), group
        yield *addresses, *which, int(part.causal and mask is None), *where


def _product(fresh: bool) -> Any:
    """The product of ROWS x 2n and 2n x WIDTH numbers of bfloat16: sums [ROWS, WIDTH] float32, set if `fresh`, else added to.

    Arguments: the address of the first factor, and the bytes from row to row; the address of the second, whose rows are one
    after another and hold pairs: numbers 2i and 2i + 1 of every column; the address of the sums, and the bytes from row to
    row; n.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def made(_: Any, a: Any, a_step: Any, b: Any, c: Any, c_step: Any, n: Any) -> Any:
        return types.void(*[types.int64] * 6), functools.partial(_product_code, fresh)

    return made


def _product_code(fresh: bool, context: Any, builder: Any, _: Any, arguments: Any) -> Any:
    a, a_step, b, c, c_step, n = arguments
    number, word = ir.IntType(64), ir.IntType(32)
    floats, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(word, LANES)
    kind = ir.FunctionType(floats, [floats, words, words])
    multiply = ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", side_effect=False)
    columns = range(WIDTH // LANES)

    def const(value: int) -> Any:
        return ir.Constant(number, value)

    def at(base: Any, offset: Any, type_: Any) -> Any:
        return builder.inttoptr(builder.add(base, offset), type_.as_pointer())

    def place(row: int, column: int) -> Any:
        return at(c, builder.add(builder.mul(c_step, const(row)), const(4 * LANES * column)), floats)

    places = [(row, column) for row in range(ROWS) for column in columns]
    first = [ir.Constant(floats, [0.0] * LANES) if fresh else builder.load(place(*p), align=4) for p in places]
    before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(number)
    i.add_incoming(const(0), before)
    sums = [builder.phi(floats) for _ in places]
    for phi, value in zip(sums, first, strict=True):
        phi.add_incoming(value, before)
    row_of_b = builder.mul(i, const(4 * WIDTH))
    pairs = [
        builder.load(at(b, builder.add(row_of_b, const(4 * LANES * column)), words), align=4) for column in columns
    ]
    updated = []
    for row in range(ROWS):
        offset = builder.add(builder.mul(a_step, const(row)), builder.mul(i, const(4)))
        one = builder.insert_element(
            ir.Constant(words, ir.Undefined), builder.load(at(a, offset, word), align=2), ir.Constant(word, 0)
        )
        spread = builder.shuffle_vector(one, one, ir.Constant(words, [0] * LANES))
        updated += [builder.call(multiply, [sums[len(columns) * row + c], spread, pairs[c]]) for c in columns]
    following = builder.add(i, const(1))
    i.add_incoming(following, loop)
    for phi, value in zip(sums, updated, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, n), loop, after)
    builder.position_at_end(after)
    for p, value in zip(places, updated, strict=True):
        builder.store(value, place(*p), align=4)
    return context.get_dummy_value()


_set_product, _add_product = _product(True), _product(False)


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


def _same_bits(source: Any, target: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def cast(_: Any, number: Any) -> Any:
        return target(source), lambda context, builder, _, arguments: builder.bitcast(
            arguments[0], context.get_value_type(target)
        )

    return cast


_to_bits, _from_bits = _same_bits(types.float32, types.int32), _same_bits(types.int32, types.float32)


@_inline  # type: ignore[untyped-decorator]
def _rounded(x):  # type: ignore[no-untyped-def]
    """float32 to the bits of bfloat16, ties to even."""
    bits = np.uint32(_to_bits(x))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_inline  # type: ignore[untyped-decorator]
def _exponentials(scores, scale, top, weights):  # type: ignore[no-untyped-def]
    """weights [WIDTH] bfloat16 of exp(scale * scores - top), and the sum of these before they are rounded."""
    total = np.float32(0)
    for j in range(WIDTH):
        x = max(scores[j] * scale - top, SMALLEST)
        k = np.floor(x * LOG2E + HALF)
        y = x - k * HIGH - k * LOW
        z = (((((C7 * y + C6) * y + C5) * y + C4) * y + C3) * y + C2) * y * y + y + ONE
        z *= _from_bits((np.int32(k) + np.int32(127)) << np.int32(23))
        total += z
        weights[j] = _rounded(z)
    return total


@_inline  # type: ignore[untyped-decorator]
def _aligned(rows, columns):  # type: ignore[no-untyped-def]
    """Memory [rows, columns] uint32 that begins at a line of the processor's cache."""
    memory = np.zeros(rows * columns + LANES, np.uint32)
    skip = (-np.int64(memory.ctypes.data) % 64) // 4
    return memory[skip : skip + rows * columns].reshape(rows, columns)


@_jit
def _attend(q, out, lse, table, scale, repeat, begin, end):  # type: ignore[no-untyped-def]
    """Units begin..end, by a softmax over tiles of keys that keeps its maximum. A unit's rows are its columns' R heads."""
    dim, value_dim = q.shape[2], out.shape[2]
    pairs, blocks = dim // 2, (value_dim + WIDTH - 1) // WIDTH
    most = 0
    for u in range(begin, end):
        most = max(most, (table[u, LAST] - table[u, FIRST]) * repeat)
    most = (most + ROWS - 1) // ROWS * ROWS
    word_like, half_like, flag_like = np.empty(0, np.uint32), np.empty(0, np.uint16), np.empty(0, np.uint8)
    query = np.zeros((most, dim), np.uint16)
    keys, values = _aligned(pairs, WIDTH), _aligned(blocks * (WIDTH // 2), WIDTH)
    sums = _aligned(most, blocks * WIDTH).view(np.float32)
    bits = _aligned(ROWS, WIDTH)
    scores = bits.view(np.float32)
    weights = np.zeros((ROWS, WIDTH), np.uint16)
    top, total = np.empty(most, np.float32), np.empty(most, np.float32)
    query_bytes, sum_bytes = 2 * dim, 4 * blocks * WIDTH
    for u in range(begin, end):
        n, start, first, last = table[u, COUNT], table[u, START], table[u, FIRST], table[u, LAST]
        causal, mask = table[u, CAUSAL], table[u, MASK]
        rows = (last - first) * repeat
        padded = (rows + ROWS - 1) // ROWS * ROWS
        for r in range(padded):
            if r < rows:
                h, c = table[u, GROUP] * repeat + r % repeat, start + first + r // repeat
                for d in range(dim):
                    query[r, d] = _rounded(q[h, c, d])
            sums[r], top[r], total[r] = 0, -np.inf, 0
        for at in range(0, min(n, last) if causal else n, WIDTH):
            here = min(WIDTH, n - at)
            for j in range(here):
                address = table[u, KEYS] + (at + j) * table[u, KEY_STRIDE]
                words = numba.carray(_pointer(address, word_like), pairs)
                for p in range(pairs):
                    keys[p, j] = words[p]
            for i in range((here + 1) // 2):
                address = table[u, VALUES] + (at + 2 * i) * table[u, VALUE_STRIDE]
                even = numba.carray(_pointer(address, half_like), value_dim)
                odd = even  # of no weight, if there is none
                if at + 2 * i + 1 < n:
                    odd = numba.carray(_pointer(address + table[u, VALUE_STRIDE], half_like), value_dim)
                for b in range(blocks):
                    for d in range(min(WIDTH, value_dim - b * WIDTH)):
                        low, high = np.uint32(even[b * WIDTH + d]), np.uint32(odd[b * WIDTH + d])
                        values[b * (WIDTH // 2) + i, d] = low | high << np.uint32(16)
            seeing = (
                max(0, at - first) * repeat // ROWS * ROWS if causal else 0
            )  # the rows before it see none of the tile
            for r0 in range(seeing, padded, ROWS):
                _set_product(
                    query.ctypes.data + r0 * query_bytes,
                    query_bytes,
                    keys.ctypes.data,
                    bits.ctypes.data,
                    4 * WIDTH,
                    pairs,
                )
                for r in range(ROWS):
                    c = min(last - 1, first + (r0 + r) // repeat)
                    visible = min(here, c - at + 1) if causal else here
                    for j in range(max(0, visible), WIDTH):
                        scores[r, j] = -np.inf
                    if mask:
                        shown = numba.carray(_pointer(mask + c * table[u, MASK_STRIDE] + at, flag_like), here)
                        for j in range(here):
                            if not shown[j]:
                                scores[r, j] = -np.inf
                    highest = max(top[r0 + r], scale * _highest(bits[r].ctypes.data))
                    if highest == -np.inf:
                        weights[r] = 0
                        continue
                    if highest > top[r0 + r]:
                        less = np.exp(top[r0 + r] - highest)
                        top[r0 + r] = highest
                        total[r0 + r] *= less
                        for d in range(blocks * WIDTH):
                            sums[r0 + r, d] *= less
                    total[r0 + r] += _exponentials(scores[r], scale, highest, weights[r])
                    for j in range(max(0, visible), WIDTH):
                        weights[r, j] = 0
                for b in range(blocks):
                    _add_product(
                        weights.ctypes.data, 2 * WIDTH, values.ctypes.data + b * 2 * WIDTH * WIDTH,
                        sums.ctypes.data + r0 * sum_bytes + 4 * b * WIDTH, sum_bytes, (here + 1) // 2,
                    )  # fmt: skip
        for r in range(rows):
            h, c = table[u, GROUP] * repeat + r % repeat, start + first + r // repeat
            for d in range(value_dim):
                out[h, c, d] = sums[r, d] / total[r]
            lse[h, c] = top[r] + np.log(total[r])
