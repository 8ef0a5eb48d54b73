"""8-bit floats: 4 bits of exponent, 3 of mantissa, one scale a head (FP8 E4M3, arXiv 2209.05433)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.codecs.base import KV, grouped, known, layered, require, sides
from kvgraph.store.record import Record

LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class FP8:
    """`keys.0.codes` [G, N, D] F8_E4M3 times `keys.0.scale` [G, 1, 1] F32, and so on."""

    name: ClassVar[str] = "fp8"
    lossless: ClassVar[bool] = False

    def pack(self, record: Record) -> dict[str, Tensor]:
        """Every head scaled so that its largest number is the format's."""
        packed = {}
        for name, x in sides(record):
            x = x.float()
            scale = (x.abs().amax((1, 2), keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
            packed[f"{name}.scale"] = scale
            packed[f"{name}.codes"] = (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """Codes times scale."""
        found = {}
        for name, (scale, codes) in grouped(tensors, ("scale", "codes")):
            right = codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and codes.dim() == 3
            require(right and scale.shape == (codes.shape[0], 1, 1), name, scale, codes)
            found[name] = (codes.float() * scale).to(known(dtype))
        return layered(found)
