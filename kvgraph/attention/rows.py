"""Rows: each request's share of a step, with new tokens, their positions, the spans they see, and the row's own KV.

Shapes: G key/value heads, N tokens, T new tokens of a row, D key head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from kvgraph.attention.rope import Rotary
from kvgraph.store.record import Arriving, Record, Side


class View:
    """Tokens lo..hi of a source as one row sees them: the source's token 0 stands at position `at` of the row's frame.

    source: a record, or the KV of a row computed in this step or an earlier one.
    group: views of a row with the same group (counted from 1; 0 means none) share temperature and scale. Their scores
        are divided by temperature, and their joint log-sum-exp is multiplied by scale before all parts are merged.
    gaps: (lo, hi) slices between lo and hi that are hidden.
    """

    __slots__ = ("at", "first", "hi", "last", "lo", "positions", "shown", "source", "weights")

    @property
    def whole(self) -> bool:
        """Whether every token between lo and hi has its keys and values there."""
        return isinstance(self.source, RowKV) or self.source.kept is None

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
        self.positions = positions[lo:hi]  # as the source counts them: from its first token, or where it was gathered
        self.first = at + int(self.positions[0])
        self.last = at + int(self.positions[-1])
        if isinstance(source, Record) and source.kept is not None:  # seen whole, from behind: see `Scheduler.check`
            assert lo == 0 and hi == len(source) and not gaps, "a slice of a span of which some tokens were left out"
            self.hi = source.held


class RowKV:
    """A row's own KV, preallocated for `capacity` tokens: keys[l], values[l] are [G, capacity, D]; `length` are valid.

    It is one buffer: the keys of layer 0, its values, the keys of layer 1, ...
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        pinned: bool = False,
    ):
        """shapes: (kv heads, key dim, value dim) of every layer. pinned: memory that a GPU can copy from by itself."""
        sizes = [(g * capacity * kd, g * capacity * vd) for g, kd, vd in shapes]
        buffer = torch.empty(sum(k + v for k, v in sizes), dtype=dtype, device=device, pin_memory=pinned)
        keys, values, at = [], [], 0
        for (g, kd, vd), (nk, nv) in zip(shapes, sizes, strict=True):
            keys.append(buffer[at : at + nk].view(g, capacity, kd))
            values.append(buffer[at + nk : at + nk + nv].view(g, capacity, vd))
            at += nk + nv
        self.buffer = buffer
        self.keys, self.values = tuple(keys), tuple(values)
        self.positions = np.empty(capacity, dtype=np.int64)
        self.capacity, self.length, self.nbytes = capacity, 0, buffer.numel() * buffer.element_size()
        self.window = 0  # of its last tokens, the queries are kept
        self.queries: list[torch.Tensor] = []  # of every layer, [H, W, D] float32, scaled

    def layer(self, index: int) -> tuple[Side, Side]:
        """Keys and values of a layer, as a record gives them."""
        return self.keys[index], self.values[index]

    def observe(self, layer: int, queries: torch.Tensor, scale: float) -> None:
        """Keep the last queries of a step's new tokens [H, T, D], with those before them."""
        latest = queries[:, -self.window :].float() * scale
        if layer == len(self.queries):
            self.queries.append(latest)
        else:
            self.queries[layer] = torch.cat([self.queries[layer], latest], 1)[:, -self.window :]

    def record(self, key: str) -> Record:
        """The finished KV as a record, without a copy. The row's first position must be 0 (its own frame)."""
        if self.length != self.capacity or self.positions[0] != 0:
            raise ValueError(f"row KV holds {self.length} of {self.capacity} tokens from position {self.positions[0]}")
        return Record(key, self.keys, self.values, torch.from_numpy(self.positions))


@dataclass
class Row:
    """One request's share of a step: new tokens at `positions` ([T] int64, the row's frame), what it sees, its own KV.

    joined: it continues the row before it in the step as the next link of a chain. It sees all that the chain's first row
    sees, and all earlier rows of the chain, which are new and whole, except that the first may have a past. Its own views
    are not used. lead: the position of its frame's origin in the frame of the chain's first row, higher than all positions
    there.

    arrivals: of its views' records, those that may still be on their way to the device.
    """

    tokens: Sequence[int]
    positions: np.ndarray
    views: Sequence[View]
    kv: RowKV
    joined: bool = False
    lead: int = 0
    arrivals: Sequence[Arriving] = ()

    def commit(self) -> None:
        """Count the new tokens as part of the row's KV. Call it once, after the forward."""
        self.kv.length += len(self.tokens)


def arrivals_of(rows: Sequence[Row]) -> list[Arriving]:
    """What a step of these rows must have wait, each once."""
    found = {id(arrival): arrival for row in rows for arrival in row.arrivals}
    return [arrival for arrival in found.values() if not arrival.done]


def shapes_of(record: Record) -> list[tuple[int, int, int]]:
    """(kv heads, key dim, value dim) of every layer of a record whose keys and values are there."""
    return [(k.shape[0], k.shape[2], v.shape[2]) for k, v in zip(record.keys, record.values, strict=True)]


def flat(record: Record) -> torch.Tensor | None:
    """A record's keys and values as one tensor [numbers], if they lie in memory as those of a `RowKV`."""
    sides = [side for layer in zip(record.keys, record.values, strict=True) for side in layer]
    first = sides[0]
    storage, at = first.untyped_storage().data_ptr(), first.data_ptr()
    for side in sides:
        if side.data_ptr() != at or side.untyped_storage().data_ptr() != storage or not side.is_contiguous():
            return None
        at += side.numel() * side.element_size()
    return torch.as_strided(first, (sum(side.numel() for side in sides),), (1,), first.storage_offset())


def on_device(record: Record, device: torch.device) -> Record:
    """A copy of the record on a device, once the copy is done. Its KV are one buffer there, laid out as a row's own.

    A record that already lies there like this is returned as it is. Stored records reach a GPU in another way, beside the
    steps: see `kvgraph.engine.transfers`.
    """
    source = record.keys[0].device
    if source.type == device.type and (source.type == "cpu" or flat(record) is not None):
        return record
    arrived = RowKV(shapes_of(record), record.held, record.keys[0].dtype, device)
    whole = None if source.type == "cpu" else flat(record)
    if whole is None:
        return copied(record, arrived)
    arrived.buffer.copy_(whole)  # computed there: one copy
    return replace(record, keys=arrived.keys, values=arrived.values)


def copied(record: Record, to: RowKV) -> Record:
    """The record with its keys and values copied to this memory, one layer's after another's."""
    for mine, theirs in zip((*to.keys, *to.values), (*record.keys, *record.values), strict=True):
        mine.copy_(theirs)
    return replace(record, keys=to.keys, values=to.values)


MANY, SHORT = 16, 64  # at least so many views, of at most so many tokens on average, are gathered
LINKED = 512  # instead of SHORT, for the new tokens of a chain: they are many, so parts cost more than a copy


def gathered(
    views: Sequence[View],
    shapes: Sequence[tuple[int, int, int]],
    rotaries: Sequence[Rotary | None],
    longest: int = SHORT,
) -> Sequence[View]:
    """The views of a row, many short ones copied side by side into one, with keys moved to where the row sees them.

    A chat of a thousand messages is then one span to attend to, not a thousand. Views in groups, with gaps, or whose
    positions aren't one after another stay. rotaries: of every layer. longest: tokens of a view on average, at most. The
    copy costs one more rounding of 16-bit keys.
    """
    plain = sorted((v for v in views if v.weights is None and v.shown is None and v.whole), key=lambda v: v.first)
    total = sum(v.hi - v.lo for v in plain)
    if len(plain) < MANY or total > longest * len(plain) or any(a.last >= b.first for a, b in pairwise(plain)):
        return views
    sample = plain[0].source.layer(0)[0]
    copy = RowKV(shapes, total, sample.dtype, sample.device)
    copy.length = total
    copy.positions[:] = np.concatenate([v.positions + v.at for v in plain])
    at = torch.from_numpy(np.repeat([v.at for v in plain], [v.hi - v.lo for v in plain]))
    tables = {id(r): tuple(t.to(sample.device) for t in r.table(at)) for r in rotaries if r is not None}
    for layer, rotary in enumerate(rotaries):
        sides = [v.source.layer(layer) for v in plain]
        keys = torch.cat([k[:, v.lo : v.hi].to(sample.dtype) for v, (k, _) in zip(plain, sides, strict=True)], 1)
        copy.keys[layer][:] = keys if rotary is None else rotary.rotate(keys, *tables[id(rotary)])
        values = [x[:, v.lo : v.hi].to(sample.dtype) for v, (_, x) in zip(plain, sides, strict=True)]
        torch.cat(values, 1, out=copy.values[layer])
    ids = set(map(id, plain))
    return [View(copy, 0, 0, total), *(v for v in views if id(v) not in ids)]
