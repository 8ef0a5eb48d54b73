"""What the kernels that Numba compiles share: how they are compiled, threads, memory by address, exponentials."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Sums may be reordered and fused; infinities keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}
Kernel = Callable[..., None]
inline = numba.njit(nogil=True, fastmath=FAST, inline="always")
FILES = ("jit.py", "products.py")  # their code becomes part of kernels in other files
SHARED_CODE = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in FILES)).hexdigest()[:8]


def jit(function: Callable[..., None]) -> Kernel:
    """The function, compiled at its first call, and kept in a file if there is a folder that Numba may write to.

    Numba compiles it again when its own file changes. Its name has a hash of the shared ones, so that it does when they change too.
    """
    function.__qualname__ += f"_{SHARED_CODE}"
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
    try:
        kernel(*arguments, bounds[0], bounds[1])
    finally:
        wait(others)  # they read memory by its address: whatever ends this call, it must be there until they are done
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kvgraph-attention")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_: Any, address: Any, like: Any) -> Any:
    """The pointer to numbers of the type of `like` at an address."""
    kind = types.CPointer(like.dtype)

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), code


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, address: Any) -> Any:
    """Bring the 64 bytes at an address into the processor's second cache; any address may be given."""

    def code(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, in_second_cache, data = (ir.Constant(number, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(arguments[0], byte), to_read, in_second_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), code


def _same_bits(source: Any, target: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def cast(_: Any, number: Any) -> Any:
        return target(source), lambda context, builder, _, arguments: builder.bitcast(
            arguments[0], context.get_value_type(target)
        )

    return cast


to_bits, from_bits = _same_bits(types.float32, types.int32), _same_bits(types.int32, types.float32)


# exp(x) = 2^k exp(y), |y| <= ln(2) / 2. ln(2) is in two parts, so that y is exact; exp(y) is its series, right to 1e-7.
LOG2E, HIGH, LOW = np.float32(math.log2(math.e)), np.float32(0.693359375), np.float32(-2.12194440e-4)
C2, C3, C4, C5, C6, C7, C8 = (np.float32(1 / math.factorial(n)) for n in range(2, 9))
ZERO, HALF, ONE, SMALLEST = (np.float32(x) for x in (0, 0.5, 1, -87))


@inline  # type: ignore[untyped-decorator]
def exponential(x):  # type: ignore[no-untyped-def]
    """exp of a float32 number that isn't positive; of less than -87 as of -87. A loop of it becomes one of wide instructions."""
    x = max(x, SMALLEST)
    k = np.floor(x * LOG2E + HALF)
    y = x - k * HIGH - k * LOW
    z = ((((((C8 * y + C7) * y + C6) * y + C5) * y + C4) * y + C3) * y + C2) * y * y + y + ONE
    return z * from_bits((np.int32(k) + np.int32(127)) << np.int32(23))
