"""Records: the KV of one span, as engines compute and stores keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch


class BadRecord(Exception):
    """The bytes aren't the expected record: damaged, mislabelled or not a record. The message says why."""


class UnsupportedRecord(Exception):
    """The bytes may be fine, but this reader doesn't understand them: another version, codec or kind of positions."""


class UntrustedRecord(Exception):
    """The bytes are a record, but it isn't signed with this reader's secret."""


@dataclass(frozen=True)
class PackedSide:
    """Keys or values of one layer that stay packed: a stand-in for a tensor, whose tokens are unpacked when it is cast.

    shape: (G, N, D). dtype: of what is unpacked. unpack(lo, hi): tokens lo..hi [G, hi - lo, D], in that dtype.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    unpack: Callable[[int, int], torch.Tensor]
    first: int = 0  # its token 0, as `unpack` counts

    def __getitem__(self, index: tuple[slice, slice]) -> PackedSide:
        """Some of the tokens, [:, lo:hi], still packed."""
        lo, hi, _ = index[1].indices(self.shape[1])
        return replace(self, shape=(self.shape[0], hi - lo, self.shape[2]), first=self.first + lo)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """Unpacked: exactly the numbers that the decoded record has."""
        return self.unpack(self.first, self.first + self.shape[1]).to(dtype)

    def float(self) -> torch.Tensor:
        """Unpacked, in float32."""
        return self.to(torch.float32)


Side = torch.Tensor | PackedSide


@dataclass(frozen=True)
class PackedKV:
    """A record's KV as a codec keeps them. codec: its text (see `kvgraph.store.codecs.registry`). tensors: by name, in
    the order in which they are written. layers: keys and values of every layer for reading them in place, if they are.
    """

    codec: str
    tensors: Mapping[str, torch.Tensor]
    layers: tuple[tuple[PackedSide, PackedSide], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Arriving(Protocol):
    """KV that are being copied to a device, layer by layer."""

    @property
    def done(self) -> bool:
        """Whether all of them are there. The host doesn't wait; once True, it stays so."""
        ...

    def wait(self, layer: int | None = None) -> None:
        """What the device is given from now on runs once a layer is there, None: all of them. The host doesn't wait."""
        ...


@dataclass(frozen=True)
class Record:
    """KV of one span, with keys rotated as if the span's first token stood at position 0.

    Shapes: G key/value heads, N tokens, D head size (may differ by layer and between keys and values).
    key: the span's Merkle key, 64 hex digits. keys[l], values[l]: [G, N, D], last dimension contiguous.
    positions: [N] int64, relative to the first token's. All tensors are read-only by agreement: many rows share them.

    kept: positions [G, K] int32 of the tokens whose keys and values every layer and head holds, if a selection has
    left some out. Keys and values are then [G, K, D]; `positions` still has all N. None: all are there.

    packed: the packed form that the KV was decoded from, if a codec was used. Stores write it unchanged, because
    packing decoded KV again could change it. In the engine's memory a record may have this alone: no keys and values,
    but `packed.layers`, from which attention unpacks what it reads (see `kvgraph.store.codecs.registry.in_place`).

    arrival: who reads keys and values on a device must have it wait first, as long as it isn't done. None: they are there.
    """

    key: str
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    packed: PackedKV | None = field(default=None, compare=False, repr=False)
    kept: tuple[torch.Tensor, ...] | None = None
    arrival: Arriving | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return self.positions.shape[0]

    @property
    def held(self) -> int:
        """K: tokens whose keys and values are there; N unless a selection has left some out."""
        return self.layer(0)[0].shape[1]

    def layer(self, index: int) -> tuple[Side, Side]:
        """Keys and values [G, K, D] of a layer, packed if that is all there is."""
        if self.keys or self.packed is None:
            return self.keys[index], self.values[index]
        return self.packed.layers[index]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are in memory."""
        if not self.keys and self.packed is not None:
            return self.packed.nbytes
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def stored_bytes(self) -> int:
        """Bytes of keys and values as stores keep them."""
        return self.nbytes if self.packed is None else self.packed.nbytes
