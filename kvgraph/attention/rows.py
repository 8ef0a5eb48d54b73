"""Rows: each request's share of a step, with new tokens, their positions, the spans they see, and the row's own KV.

Shapes: G key/value heads, N tokens, T new tokens of a row, D key head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvgraph.store.record import Record


class View:
    """Tokens lo..hi of a source as one row sees them: the source's token 0 stands at position `at` of the row's frame.

    source: a record, or the KV of a row computed in this step or an earlier one.
    group: views of a row with the same group (counted from 1; 0 means none) share temperature and scale. Their scores
        are divided by temperature, and their joint log-sum-exp is multiplied by scale before all parts are merged.
    gaps: (lo, hi) slices between lo and hi that are hidden.
    """

    __slots__ = ("source", "at", "lo", "hi", "weights", "shown", "positions", "first", "last")

    def __init__(
        self,
        source: Record | RowKV,
        at: int,
        lo: int,
        hi: int,
        group: int = 0,
        temperature: float = 1.0,
        scale: float = 1.0,
        gaps: Sequence[tuple[int, int]] = (),
    ):
        self.source, self.at, self.lo, self.hi = source, at, lo, hi
        self.weights = (group, temperature, scale) if group else None
        self.shown: np.ndarray | None = None  # [hi - lo] bool; None means all
        if gaps:
            self.shown = np.ones(hi - lo, dtype=bool)
            for a, b in gaps:
                self.shown[a - lo : b - lo] = False
        positions = source.positions if isinstance(source, RowKV) else source.positions.numpy()
        self.positions = positions[lo:hi]  # relative to the source's first token
        self.first = at + int(self.positions[0])
        self.last = at + int(self.positions[-1])


class RowKV:
    """A row's own KV, preallocated for `capacity` tokens: keys[l], values[l] are [G, capacity, D]; `length` are valid.

    It is one buffer: the keys of layer 0, its values, the keys of layer 1, ...
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], capacity: int, dtype: torch.dtype, device: torch.device):
        """shapes: (kv heads, key dim, value dim) of every layer."""
        sizes = [(g * capacity * kd, g * capacity * vd) for g, kd, vd in shapes]
        buffer = torch.empty(sum(k + v for k, v in sizes), dtype=dtype, device=device)
        keys, values, at = [], [], 0
        for (g, kd, vd), (nk, nv) in zip(shapes, sizes, strict=True):
            keys.append(buffer[at : at + nk].view(g, capacity, kd))
            values.append(buffer[at + nk : at + nk + nv].view(g, capacity, vd))
            at += nk + nv
        self.buffer = buffer
        self.keys, self.values = tuple(keys), tuple(values)
        self.positions = np.empty(capacity, dtype=np.int64)
        self.capacity, self.length, self.nbytes = capacity, 0, buffer.numel() * buffer.element_size()

    def record(self, key: str) -> Record:
        """The finished KV as a record, without a copy. The row's first position must be 0 (its own frame)."""
        if self.length != self.capacity or self.positions[0] != 0:
            raise ValueError(f"row KV holds {self.length} of {self.capacity} tokens from position {self.positions[0]}")
        return Record(key, self.keys, self.values, torch.from_numpy(self.positions))


@dataclass
class Row:
    """One request's share of a step: new tokens at `positions` ([T] int64, the row's frame), what it sees, its own KV."""

    tokens: Sequence[int]
    positions: np.ndarray
    views: Sequence[View]
    kv: RowKV

    def commit(self) -> None:
        """Count the new tokens as part of the row's KV. Call it once, after the forward."""
        self.kv.length += len(self.tokens)
