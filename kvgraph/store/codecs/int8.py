"""8-bit integers, one scale a channel: what outlier channels of keys ask for (KIVI, arXiv 2402.02750, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.codecs.base import KV, grouped, known, layered, require, sides
from kvgraph.store.record import Record

LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """`keys.0.codes` [G, N, D] I8 times `keys.0.scale` [G, 1, D] F32, and so on; symmetric around 0."""

    name: ClassVar[str] = "int8"
    lossless: ClassVar[bool] = False

    def pack(self, record: Record) -> dict[str, Tensor]:
        """Every channel of every head scaled so that its largest number over the tokens is 127."""
        packed = {}
        for name, x in sides(record):
            x = x.float()
            scale = (x.abs().amax(1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
            packed[f"{name}.scale"] = scale
            packed[f"{name}.codes"] = (x / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """Codes times scale."""
        found = {}
        for name, (scale, codes) in grouped(tensors, ("scale", "codes")):
            right = codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.dim() == 3
            require(right and scale.shape == (codes.shape[0], 1, codes.shape[2]), name, scale, codes)
            found[name] = self.part(tensors, name, tokens, 0, codes.shape[1], known(dtype))
        return layered(found)

    def part(
        self, tensors: Mapping[str, Tensor], side: str, tokens: int, lo: int, hi: int, dtype: torch.dtype
    ) -> Tensor:
        """See `kvgraph.store.codecs.base.InPlace`."""
        return tensors[f"{side}.codes"][:, lo:hi].float().mul_(tensors[f"{side}.scale"]).to(dtype)
