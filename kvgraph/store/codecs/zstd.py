"""Zstandard (RFC 8878) over the tensors of any other codec. Lossless if that one is.

Numbers are cut into planes of bytes first: the bytes with sign and exponent compress, those with the mantissa hardly do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvgraph.errors import StoreError
from kvgraph.store.codecs.base import CODES, DTYPES, KV, Codec
from kvgraph.store.codecs.raw import Raw
from kvgraph.store.record import BadRecord, Record

MOST = 1024  # times its size that a frame may hold; real KV stay below 10
TABLE = "table"


@dataclass(frozen=True)
class Zstd:
    """Parameters:
        level: 1 (fast) to 22 (small).
        over: the codec whose tensors are compressed.

    `table` is JSON, {name: [dtype, shape, compressed or not]}; every other tensor holds the bytes of the one it names.
    """

    level: int = 3
    over: Codec = field(default_factory=Raw)

    name: ClassVar[str] = "zstd"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise StoreError(f"codec zstd needs a level from 1 to 22, not {self.level}")

    @property
    def lossless(self) -> bool:
        """As the codec below."""
        return self.over.lossless

    def pack(self, record: Record) -> dict[str, Tensor]:
        """See the class."""
        return self.wrapped(self.over.pack(record))

    def wrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that the codec below has packed, compressed."""
        compressor = _zstandard().ZstdCompressor(level=self.level)
        packed, table = {}, {}
        for name, tensor in tensors.items():
            planes = _planes(tensor)
            frame = compressor.compress(planes.numpy().data)
            smaller = len(frame) < planes.numel() <= MOST * len(frame)
            packed[name] = torch.frombuffer(bytearray(frame), dtype=torch.uint8) if smaller else planes
            table[name] = [CODES[tensor.dtype], list(tensor.shape), smaller]
        text = bytearray(json.dumps(table, separators=(",", ":")), "ascii")
        return {TABLE: torch.frombuffer(text, dtype=torch.uint8), **packed}

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype | None) -> KV:
        """See the class."""
        return self.over.unpack(self.unwrapped(tensors), tokens, dtype)

    def unwrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the codec below. Raises BadRecord."""
        rest = dict(tensors)
        table = _table(rest.pop(TABLE, None))
        if table.keys() != rest.keys():
            raise BadRecord("has another table of tensors than tensors")
        return {name: _tensor(name, data, *table[name]) for name, data in rest.items()}


def _table(data: Tensor | None) -> dict[str, tuple[str, list[int], bool]]:
    try:
        if data is None:
            raise ValueError
        table = json.loads(data.numpy().tobytes().decode("ascii"))
        for dtype, shape, compressed in table.values():
            if dtype not in DTYPES or not isinstance(compressed, bool) or not shape:
                raise ValueError
            if not all(type(extent) is int and extent > 0 for extent in shape):
                raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadRecord("has a table of compressed tensors that can't be read") from error
    return {name: (dtype, shape, compressed) for name, (dtype, shape, compressed) in table.items()}


def _tensor(name: str, data: Tensor, code: str, shape: list[int], compressed: bool) -> Tensor:
    size = math.prod(shape) * DTYPES[code].itemsize
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise BadRecord(f"has a tensor {name!r} that isn't bytes")
    if compressed:
        zstandard = _zstandard()
        frame = data.numpy().tobytes()
        try:  # the size is checked before there is memory for it
            if not size <= MOST * len(frame) or zstandard.frame_content_size(frame) != size:
                raise BadRecord(f"has a compressed tensor {name!r} of another size than its table says")
            data = torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(frame)), dtype=torch.uint8)
        except zstandard.ZstdError as error:
            raise BadRecord(f"has a compressed tensor {name!r} that is damaged: {error}") from error
    if data.numel() != size:
        raise BadRecord(f"has a tensor {name!r} of another size than its table says")
    planes = data.view(DTYPES[code].itemsize, -1)
    return planes.T.clone(memory_format=torch.contiguous_format).view(DTYPES[code]).view(shape)


def _planes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, all first bytes of its numbers first, then all second ones, ..."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8)
    return data.reshape(-1, tensor.dtype.itemsize).T.contiguous().reshape(-1)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise StoreError("codec zstd needs the package zstandard: pip install 'kvgraph[store]'") from None
    return zstandard
