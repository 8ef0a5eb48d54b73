"""Attention to bfloat16 KV on a CPU that multiplies bfloat16, compiled by Numba.

PyTorch's fused kernel for CPUs takes as long for products of bfloat16 as of float32. Here queries and weights are rounded to
bfloat16, and a processor's instruction multiplies pairs of such numbers and adds them in float32, as tensor cores of GPUs do.
Scores, log-sum-exp and sums are float32.

Shapes: H query heads, G key/value heads, R = H / G, C query columns, N keys of a part, D and Dv head sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from kvgraph.attention.backends.base import Part
from kvgraph.attention.backends.jit import exponential, in_threads, inline, jit, pointer, prefetch, to_bits
from kvgraph.store.record import PackedSide

LANES = 16  # float32 numbers of a register
WIDTH = 4 * LANES  # columns of a product, and keys of a tile
LINE = 64  # bytes that a processor fetches at once
ROWS = 6  # rows of a product: 24 registers of sums, of 32
UNIT = 384  # rows that share a packed tile of keys; their sums stay in the processor's second cache
SHARED = 1 << 19  # scores from which on threads share the work
binding.initialize_native_asmparser()  # for the instruction below

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
def _transpose(_: Any, source: Any, step: Any, target: Any) -> Any:
    """LANES rows of LANES words, `step` bytes from row to row, become columns at `target`, whose rows are WIDTH words long."""

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        source, step, target = arguments
        number, words = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)

        def at(base: Any, row: int, step: Any) -> Any:
            offset = builder.add(base, builder.mul(step, ir.Constant(number, row)))
            return builder.inttoptr(offset, words.as_pointer())

        rows = [builder.load(at(source, row, step), align=2) for row in range(LANES)]
        size = 1  # blocks of size x size words that are in their places
        while size < LANES:
            for row in range(LANES):
                if not row & size:
                    one, other = rows[row], rows[row + size]
                    masks = [
                        [c + shift if not c & size else c - size + shift + LANES for c in range(LANES)]
                        for shift in (0, size)
                    ]
                    rows[row], rows[row + size] = (
                        builder.shuffle_vector(one, other, ir.Constant(words, mask)) for mask in masks
                    )
            size *= 2
        for row in range(LANES):
            builder.store(rows[row], at(target, row, ir.Constant(number, 4 * WIDTH)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code


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
def _rounded(x):  # type: ignore[no-untyped-def]
    """float32 to the bits of bfloat16, ties to even."""
    bits = np.uint32(to_bits(x))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inline  # type: ignore[untyped-decorator]
def _exponentials(scores, scale, top, weights):  # type: ignore[no-untyped-def]
    """weights [WIDTH] bfloat16 of exp(scale * scores - top), and the sum of these before they are rounded."""
    total = np.float32(0)
    for j in range(WIDTH):
        weight = exponential(scores[j] * scale - top)
        total += weight
        weights[j] = _rounded(weight)
    return total


@inline  # type: ignore[untyped-decorator]
def _aligned(rows, columns):  # type: ignore[no-untyped-def]
    """Memory [rows, columns] uint32 that begins at a line of the processor's cache."""
    memory = np.zeros(rows * columns + LANES, np.uint32)
    skip = (-np.int64(memory.ctypes.data) % LINE) // 4
    return memory[skip : skip + rows * columns].reshape(rows, columns)


@inline  # type: ignore[untyped-decorator]
def _lay_keys(address, step, here, pairs, keys, like):  # type: ignore[no-untyped-def]
    """`here` keys at an address, as the second factor of a product: [pairs, WIDTH], pairs of a key's numbers in its column.

    A processor fetches ahead within a page of memory, which is half a tile. The next tile is fetched here, a little at a time:
    asked for at once, it takes a third longer.
    """
    whole_keys, whole_pairs = here // LANES * LANES, pairs // LANES * LANES
    for j in range(0, whole_keys, LANES):
        for i in range(j + WIDTH, j + WIDTH + LANES):
            for b in range(0, 4 * pairs, LINE):
                prefetch(address + i * step + b)
        for p in range(0, whole_pairs, LANES):
            _transpose(address + j * step + 4 * p, step, keys[p].ctypes.data + 4 * j)
    for j in range(here):
        words = numba.carray(pointer(address + j * step, like), pairs)
        for p in range(whole_pairs if j < whole_keys else 0, pairs):
            keys[p, j] = words[p]


@inline  # type: ignore[untyped-decorator]
def _lay_values(address, step, here, dim, values, like):  # type: ignore[no-untyped-def]
    """`here` values at an address, as second factors: [blocks of WIDTH dimensions, pairs of values, WIDTH]."""
    for i in range((here + 1) // 2):
        first = address + 2 * i * step
        for b in range(0, 2 * dim, LINE):
            prefetch(first + WIDTH * step + b)
            prefetch(first + (WIDTH + 1) * step + b)
        even = numba.carray(pointer(first, like), dim)
        odd = (
            numba.carray(pointer(first + step, like), dim) if 2 * i + 1 < here else even
        )  # of no weight, if there is none
        for b in range((dim + WIDTH - 1) // WIDTH):
            for d in range(min(WIDTH, dim - b * WIDTH)):
                low, high = np.uint32(even[b * WIDTH + d]), np.uint32(odd[b * WIDTH + d])
                values[b * (WIDTH // 2) + i, d] = low | high << np.uint32(16)


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
    keys, values = _aligned(pairs, WIDTH), _aligned(blocks * (WIDTH // 2), WIDTH)
    sums, scores = _aligned(most, blocks * WIDTH).view(np.float32), _aligned(ROWS, WIDTH).view(np.float32)
    top, total = np.empty(most, np.float32), np.empty(most, np.float32)
    query_bytes, sum_bytes = 2 * dim, 4 * blocks * WIDTH
    for u in range(begin, end):
        row, group = table[u // groups], u % groups
        n, start, first, last, causal, mask = row[COUNT], row[START], row[FIRST], row[LAST], row[CAUSAL], row[MASK]
        rows = (last - first) * repeat
        for r in range(rows):
            h, c = group * repeat + r % repeat, start + first + r // repeat
            for d in range(dim):
                query[r, d] = _rounded(q[h, c, d])
            sums[r], top[r], total[r] = 0, -np.inf, 0
        for at in range(0, min(n, last) if causal else n, WIDTH):
            here = min(WIDTH, n - at)
            address = row[KEYS] + group * row[KEY_GROUP] + at * row[KEY_ROW]
            _lay_keys(address, row[KEY_ROW], here, pairs, keys, word_like)
            address = row[VALUES] + group * row[VALUE_GROUP] + at * row[VALUE_ROW]
            _lay_values(address, row[VALUE_ROW], here, value_dim, values, half_like)
            seeing = max(0, at - first) * repeat // ROWS * ROWS if causal else 0  # rows before it see nothing here
            for r0 in range(seeing, rows, ROWS):
                _set_product(
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
                        for j in range(here):
                            if not shown[j * row[MASK_COLUMN]]:
                                scores[r, j] = -np.inf
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
                    _add_product(
                        weights.ctypes.data, 2 * WIDTH, values.ctypes.data + b * 2 * WIDTH * WIDTH,
                        sums.ctypes.data + r0 * sum_bytes + 4 * b * WIDTH, sum_bytes, (here + 1) // 2,
                    )  # fmt: skip
        for r in range(rows):
            h, c = group * repeat + r % repeat, start + first + r // repeat
            for d in range(value_dim):
                out[h, c, d] = sums[r, d] / total[r]
            lse[h, c] = top[r] + np.log(total[r])
