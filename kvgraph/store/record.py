"""Records: the KV of one span, as engines compute and stores keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


class BadRecord(Exception):
    """The bytes aren't the expected record: damaged, mislabelled or not a record. The message says why."""


class UnsupportedRecord(Exception):
    """The bytes may be fine, but this reader doesn't understand them: another version, codec or kind of positions."""


class UntrustedRecord(Exception):
    """The bytes are a record, but it isn't signed with this reader's secret."""


@dataclass(frozen=True)
class PackedKV:
    """A record's KV as a codec keeps them. codec: its text (see `kvgraph.store.codecs.registry`). tensors: by name, in
    the order in which they are written.
    """

    codec: str
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Record:
    """KV of one span, with keys rotated as if the span's first token stood at position 0.

    Shapes: G key/value heads, N tokens, D head size (may differ by layer and between keys and values).
    key: the span's Merkle key, 64 hex digits. keys[l], values[l]: [G, N, D], last dimension contiguous.
    positions: [N] int64, relative to the first token's. All tensors are read-only by agreement: many rows share them.

    kept: positions [G, K] int32 of the tokens whose keys and values every layer and head holds, if a selection has
    left some out. Keys and values are then [G, K, D]; `positions` still has all N. None: all are there.

    packed: the packed form that the KV was decoded from, if a codec was used. Stores write it unchanged, because
    packing decoded KV again could change it.
    """

    key: str
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    packed: PackedKV | None = field(default=None, compare=False, repr=False)
    kept: tuple[torch.Tensor, ...] | None = None

    def __len__(self) -> int:
        return self.positions.shape[0]

    @property
    def held(self) -> int:
        """K: tokens whose keys and values are there; N unless a selection has left some out."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def stored_bytes(self) -> int:
        """Bytes of keys and values as stores keep them."""
        if self.packed is None:
            return self.nbytes
        return sum(t.numel() * t.element_size() for t in self.packed.tensors.values())
