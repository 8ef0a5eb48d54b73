"""The interface of codecs: they turn a record's KV into named tensors to write, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvgraph.store.record import BadRecord, Record

KV = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # keys and values, a tensor [G, N, D] a layer each

# The dtypes that packed tensors may have, by their code in a header (safetensors').
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Codec(Protocol):
    """A frozen dataclass whose fields, whole numbers, are its configuration. It holds no state: any thread may use it.

    name: in the registry. lossless: whether `unpack` returns every bit given to `pack`. A lossy codec is part of the
    model's fingerprint, so its results must never change under one name and configuration.
    """

    name: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """Whether unpacked KV are the packed ones, bit by bit."""
        ...

    def pack(self, record: Record) -> dict[str, Tensor]:
        """The KV of a record as named tensors of DTYPES, none empty, in the order in which they are written."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """The KV in packed tensors, contiguous. Raises BadRecord for tensors that `pack` can't have made.

        tokens: number of the record's tokens. dtype: of the KV that were packed; None if the record doesn't say.
        """
        ...


@runtime_checkable
class InPlace(Protocol):
    """What a codec has beside `Codec` if its records can stay packed in memory: attention unpacks the tokens that it reads."""

    def part(
        self, tensors: Mapping[str, Tensor], side: str, tokens: int, lo: int, hi: int, dtype: torch.dtype
    ) -> Tensor:
        """Tokens lo..hi of one side, such as "keys.0", [G, hi - lo, D]: bit by bit those of `unpack`, which has taken the
        same tensors before.
        """
        ...


def sides(record: Record) -> Iterator[tuple[str, Tensor]]:
    """("keys.0", keys of layer 0), ("values.0", ...), ("keys.1", ...), ..."""
    for layer, (keys, values) in enumerate(zip(record.keys, record.values, strict=True)):
        yield f"keys.{layer}", keys
        yield f"values.{layer}", values


def layered(found: Mapping[str, Tensor]) -> KV:
    """KV from the names that `sides` gives, which must be all, contiguous as attention wants them. Raises BadRecord."""
    layers = range(len(found) // 2)
    if not found or found.keys() != {f"{side}.{layer}" for layer in layers for side in ("keys", "values")}:
        raise BadRecord("doesn't hold keys and values of every layer")
    keys = tuple(found[f"keys.{layer}"].contiguous() for layer in layers)
    return keys, tuple(found[f"values.{layer}"].contiguous() for layer in layers)


def grouped(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """("keys.0", its parts), ...: of tensors named "keys.0.<part>", where every side of every layer has all parts.

    Raises BadRecord.
    """
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    if tensors.keys() != {f"{name}.{part}" for name in names for part in parts}:
        raise BadRecord(f"doesn't hold the parts {', '.join(parts)} of keys and values")
    for name in names:
        yield name, tuple(tensors[f"{name}.{part}"] for part in parts)


def require(good: bool, name: str, *tensors: Tensor) -> None:
    """Raise BadRecord, showing the tensors, unless they can be what their name says."""
    if not good:
        found = ", ".join(f"{CODES[t.dtype]} {list(t.shape)}" for t in tensors)
        raise BadRecord(f"has {found} for {name!r}, which is impossible")


def known(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to decode to. Raises BadRecord if the record doesn't say."""
    if dtype is None:
        raise BadRecord("doesn't say which dtype its KV has")
    return dtype
