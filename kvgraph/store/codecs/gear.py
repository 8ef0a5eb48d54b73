"""GEAR (Kang et al., arXiv 2403.05527): quantised numbers, plus sparse outliers, plus a low-rank correction.

X ≈ D + L + S (section 3). S holds the outliers, the few largest and smallest numbers of every vector: a channel of keys,
a token of values. D is what is left, quantised in groups as KIVI does. L is the best approximation of low rank to what
quantisation got wrong, head by head. Here an outlier is clamped to the next number that is none, and S is what that
takes away, so D needs no special value for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.errors import StoreError
from kvgraph.store.codecs.base import KV, grouped, known, layered, require, sides
from kvgraph.store.codecs.kivi import side_quantised, side_restored
from kvgraph.store.codecs.uniform import LARGEST, packed_bits
from kvgraph.store.record import Record

PARTS = ("scale", "zero", "where", "outliers", "left", "right", "codes")
MOST = 1 << 15  # numbers in a vector whose outliers int16 can point at
SWEEPS = 2  # of subspace iteration (section 3.2)


@dataclass(frozen=True)
class GEAR:
    """Parameters:
        bits: of a code, 2 or 4.
        group: numbers that share a scale and a zero.
        outliers: numbers in a thousand that are kept apart, half of them the largest, half the smallest.
        rank: of the correction.

    Beside KIVI's `codes`, `scale` and `zero`: `where` I16 and `outliers` F16, for keys [G, k, D] and for values [G, N, k];
    `left` [G, N, r] and `right` [G, D, r] F16.
    """

    bits: int = 4
    group: int = 64
    outliers: int = 20
    rank: int = 4

    name: ClassVar[str] = "gear"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4) or self.group < 1 or not 1 <= self.outliers < 500 or self.rank < 1:
            raise StoreError(
                "codec gear needs bits 2 or 4, a group of 1 or more, 1 to 499 outliers in a thousand and a rank of 1 or more"
            )

    def pack(self, record: Record) -> dict[str, Tensor]:
        """See the class."""
        if record.held > MOST:
            raise StoreError(f"codec gear keeps spans of up to {MOST:,} tokens, not {record.held:,}; use kivi")
        packed = {}
        for name, x in sides(record):
            x = x.float()
            axis = _axis(name)
            clamped, where, outliers = _without_outliers(x, axis, self._outliers(x.shape[axis]))
            codes, scale, zero = side_quantised(name, clamped, self.bits, self.group)
            data = packed_bits(codes, self.bits)
            wrong = clamped - side_restored(name, scale, zero, data, record.held, self.bits, self.group)
            left, right = _low_rank(wrong, min(self.rank, *x.shape[1:]))
            for part, tensor in zip(PARTS, (scale, zero, where, outliers, left, right, data), strict=True):
                packed[f"{name}.{part}"] = tensor
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """See the class."""
        found = {}
        for name, (scale, zero, where, outliers, left, right, codes) in grouped(tensors, PARTS):
            x = side_restored(name, scale, zero, codes, tokens, self.bits, self.group)
            heads, n, channels = x.shape
            rank, axis = min(self.rank, n, channels), _axis(name)
            good = left.shape == (heads, n, rank) and right.shape == (heads, channels, rank)
            shape = list(x.shape)
            shape[axis] = self._outliers(x.shape[axis])
            good = good and list(where.shape) == list(outliers.shape) == shape and where.dtype == torch.int16
            good = good and outliers.dtype == left.dtype == right.dtype == torch.float16
            require(good, name, where, outliers, left, right)
            index = where.long()
            require(bool(((index >= 0) & (index < x.shape[axis])).all()), name, where)
            x = x + left.float() @ right.float().transpose(1, 2)
            found[name] = x.scatter_add(axis, index, outliers.float()).to(known(dtype))
        return layered(found)

    def _outliers(self, length: int) -> int:
        """Outliers of a vector: an even number, at least the largest and the smallest, if it has two numbers."""
        return min(2 * math.ceil(length * self.outliers / 2000), length // 2 * 2) or 1


def _axis(name: str) -> int:
    """Along which a vector runs: a channel of keys over the tokens, a token's values over the channels."""
    return 1 if name.startswith("keys") else 2


def _without_outliers(x: Tensor, axis: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x with outliers clamped to the range of the rest, where they are along the axis, and what clamping took away."""
    order = x.argsort(axis)
    length = x.shape[axis]
    low, high = count // 2, count - count // 2
    where = torch.cat([order.narrow(axis, 0, low), order.narrow(axis, length - high, high)], axis)
    if length > count:
        least = x.gather(axis, order.narrow(axis, low, 1))
        most = x.gather(axis, order.narrow(axis, length - high - 1, 1))
    else:
        least = most = x.mean(axis, keepdim=True)
    kept = torch.minimum(torch.maximum(x, least), most)
    outliers = (x - kept).gather(axis, where).clamp(-LARGEST, LARGEST).half()
    return kept, where.to(torch.int16), outliers


def _low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [G, N, r] and [G, D, r] float16 whose product is close to x [G, N, D]: subspace iteration, always alike."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(x.shape[2], rank, generator=generator).to(x.device).expand(x.shape[0], -1, -1)
    for sweep in range(SWEEPS):
        left = torch.linalg.qr(x @ right).Q
        right = x.transpose(1, 2) @ left
        if sweep < SWEEPS - 1:
            right = torch.linalg.qr(right).Q
    return left.clamp(-LARGEST, LARGEST).half(), right.clamp(-LARGEST, LARGEST).half()
