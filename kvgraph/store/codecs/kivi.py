"""KIVI (Liu et al., arXiv 2402.02750): 2 or 4 bits, keys quantised per channel and values per token, in groups.

Keys have channels that are large for every token, values don't: so a key's group is some tokens of one channel, and a
value's some channels of one token (section 3.1). The paper keeps the last tokens of a growing cache in full, since a
group of keys is complete only every so many tokens. A stored span is complete: its last group is merely shorter, and
`residual` tokens are kept in full only where that is asked for.

The paper's groups have 32 numbers; the default here is 64, which costs half a bit a number instead of one.
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
from kvgraph.store.codecs.uniform import packed_bits, quantised, restore, unpacked_bits
from kvgraph.store.record import BadRecord, Record

PARTS = ("scale", "zero", "codes")


@dataclass(frozen=True)
class KIVI:
    """Parameters:
        bits: of a code, 2 or 4.
        group: numbers that share a scale and a zero.
        residual: last tokens of a span that are kept in full.

    Of every side of every layer, n being the tokens that aren't kept in full: `codes` [G, D, ceil(n * bits / 8)] U8,
    `scale` and `zero` F16, for keys [G, ceil(n / group), D] and for values [G, ceil(D / group), n], and `full`
    [G, N - n, D], the last tokens in the model's dtype. What would be empty is left out.
    """

    bits: int = 4
    group: int = 64
    residual: int = 0

    name: ClassVar[str] = "kivi"
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4) or self.group < 1:
            raise StoreError(f"codec kivi needs bits 2 or 4 and a group of 1 or more, not {self.bits} and {self.group}")

    def pack(self, record: Record) -> dict[str, Tensor]:
        """See the class."""
        packed = {}
        n = max(0, record.held - self.residual)
        for name, x in sides(record):
            if n:
                codes, packed[f"{name}.scale"], packed[f"{name}.zero"] = side_quantised(
                    name, x[:, :n].float(), self.bits, self.group
                )
                packed[f"{name}.codes"] = packed_bits(codes, self.bits)
            if n < record.held:
                packed[f"{name}.full"] = x[:, n:]
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """See the class."""
        n = max(0, tokens - self.residual)
        full = {name.removesuffix(".full"): t for name, t in tensors.items() if name.endswith(".full")}
        rest = {name: t for name, t in tensors.items() if not name.endswith(".full")}
        found: dict[str, Tensor] = {}
        for name, (scale, zero, codes) in grouped(rest, PARTS):
            found[name] = side_restored(name, scale, zero, codes, n, self.bits, self.group).to(known(dtype))
        if n and n < tokens and found.keys() != full.keys():
            raise BadRecord("doesn't hold the last tokens of keys and values")
        for name, last in full.items():
            require(last.dtype == known(dtype) and last.dim() == 3, name, last)
            if name in found:
                require(found[name].shape[::2] == last.shape[::2], name, found[name], last)
                last = torch.cat([found[name], last], 1)
            found[name] = last
        return layered(found)

    def part(
        self, tensors: Mapping[str, Tensor], side: str, tokens: int, lo: int, hi: int, dtype: torch.dtype
    ) -> Tensor:
        """See `kvgraph.store.codecs.base.InPlace`."""
        n = max(0, tokens - self.residual)
        found = []
        if lo < n:
            scale, zero, codes = (tensors[f"{side}.{part}"] for part in PARTS)
            x = side_restored(side, scale, zero, codes, n, self.bits, self.group, lo, min(hi, n))
            found.append(x.to(dtype))
        if hi > n:
            found.append(tensors[f"{side}.full"][:, max(0, lo - n) : hi - n])
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def side_quantised(name: str, x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [G, D, N] uint8, scale and zero of keys or values [G, N, D] float32: of keys per channel, else per token."""
    if name.startswith("keys"):
        codes, scale, zero = quantised(x, bits, group)
        return codes.transpose(1, 2), scale, zero
    return quantised(x.transpose(1, 2), bits, group)


def side_restored(
    name: str,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor,
    n: int,
    bits: int,
    group: int,
    lo: int = 0,
    hi: int | None = None,
) -> Tensor:
    """Tokens lo..hi, or all n, of keys or values [G, n, D] float32 of scale, zero and packed codes.

    Raises BadRecord if they don't fit each other.
    """
    by_channel, hi = name.startswith("keys"), n if hi is None else hi
    good = codes.dim() == 3 and codes.dtype == torch.uint8 and scale.dtype == zero.dtype == torch.float16
    if good:
        heads, channels, width = codes.shape
        along = (math.ceil(n / group), channels) if by_channel else (math.ceil(channels / group), n)
        good = scale.shape == zero.shape == (heads, *along) and width == math.ceil(n * bits / 8)
    require(good, name, scale, zero, codes)
    each = 8 // bits
    skipped = lo % each
    data = codes[:, :, lo // each : math.ceil(hi / each)].transpose(1, 2).contiguous()
    x = unpacked_bits(data, bits)[:, skipped : skipped + hi - lo]
    if by_channel:
        restore(x, scale, zero, group, lo, n)
    else:
        restore(x.transpose(1, 2), scale[:, :, lo:hi], zero[:, :, lo:hi], group, 0, channels)
    return x
