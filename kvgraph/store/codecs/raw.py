"""KV as they are, every bit of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.codecs.base import KV, layered, sides
from kvgraph.store.record import Record


@dataclass(frozen=True)
class Raw:
    """`keys.0`, `values.0`, `keys.1`, ...: tensors [G, N, D] of one float dtype, as the model computed them."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True

    def pack(self, record: Record) -> dict[str, Tensor]:
        """The tensors themselves."""
        return dict(sides(record))

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """The tensors themselves."""
        return layered(tensors)
