"""KV as they are, every bit of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvgraph.store.codecs.base import KV, TensorInfo
from kvgraph.store.record import BadRecord, Record

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Raw:
    """`keys.0`, `values.0`, `keys.1`, ...: tensors [G, N, D] of one float dtype, as the model computed them."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True

    def pack(self, record: Record) -> dict[str, Tensor]:
        """Keys and values of every layer; contiguous ones aren't copied."""
        packed = {}
        for layer, (keys, values) in enumerate(zip(record.keys, record.values, strict=True)):
            packed[f"keys.{layer}"], packed[f"values.{layer}"] = keys, values
        return packed

    def check(self, tensors: Mapping[str, TensorInfo], tokens: int) -> None:
        """Layers 0, 1, ...: keys and values [G, N, D] of one float dtype; nothing else."""
        layers = len(tensors) // 2
        names = {f"{side}.{layer}" for layer in range(layers) for side in ("keys", "values")}
        if not layers or tensors.keys() != names:
            raise BadRecord("doesn't hold keys and values of every layer and positions")
        dtype = tensors["keys.0"].dtype
        for name, info in tensors.items():
            if len(info.shape) != 3 or info.shape[1] != tokens or info.dtype != dtype or dtype not in FLOATS:
                raise bad_shape(name, info)

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int) -> KV:
        """The tensors themselves."""
        layers = range(len(tensors) // 2)
        return tuple(tensors[f"keys.{layer}"] for layer in layers), tuple(
            tensors[f"values.{layer}"] for layer in layers
        )


def bad_shape(name: str, info: TensorInfo) -> BadRecord:
    """The complaint about one tensor."""
    return BadRecord(f"has a tensor {name!r} of dtype {info.dtype} and shape {list(info.shape)}, which can't be")
