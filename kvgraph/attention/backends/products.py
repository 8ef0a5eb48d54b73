"""Products of bfloat16 numbers for kernels that Numba compiles, by the instruction of x86 processors that multiplies pairs of
such numbers and adds them in float32; and how their operands are laid out.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from kvgraph.attention.backends.jit import inline, pointer, prefetch, to_bits

LANES = 16  # float32 numbers of a register
WIDTH = 4 * LANES  # columns of a product, and keys of a tile
LINE = 64  # bytes that a processor fetches at once
ROWS = 6  # rows of a product: 24 registers of sums, of 32
binding.initialize_native_asmparser()  # for the instruction


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


set_product, add_product = _product(True), _product(False)


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


@inline  # type: ignore[untyped-decorator]
def rounded(x):  # type: ignore[no-untyped-def]
    """float32 to the bits of bfloat16, ties to even."""
    bits = np.uint32(to_bits(x))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inline  # type: ignore[untyped-decorator]
def aligned(rows, columns):  # type: ignore[no-untyped-def]
    """Memory [rows, columns] uint32 that begins at a line of the processor's cache."""
    memory = np.zeros(rows * columns + LANES, np.uint32)
    skip = (-np.int64(memory.ctypes.data) % LINE) // 4
    return memory[skip : skip + rows * columns].reshape(rows, columns)


@inline  # type: ignore[untyped-decorator]
def lay_keys(address, step, here, pairs, keys, like):  # type: ignore[no-untyped-def]
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
def lay_values(address, step, here, dim, values, like):  # type: ignore[no-untyped-def]
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
