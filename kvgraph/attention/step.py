"""The row primitive: new tokens of many requests in one packed forward, each attending to stored spans as they lie.

Because RoPE is relative, a stored span seen at position `at` needs no re-rotation: the *query* is rotated by -at and
attends to the canonical keys. What a token sees is so a handful of parts (its row's own KV, and one part a place),
each giving an output and a log-sum-exp, merged into one softmax. Nothing stored is ever copied or moved.

Shapes: H query heads, G key/value heads, T packed new tokens of the step, N keys, D head size,
E extra (token, part) pairs of the step besides every token's primary part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.backends import backend_for
from kvgraph.attention.backends.base import Backend, Part
from kvgraph.attention.rope import Rotary
from kvgraph.store.record import Record


class View:
    """Tokens lo..hi of a record as one row sees them: its token 0 stands at position `at` of the row's frame.

    group: views of a row with the same group (counted from 1; 0: none) share temperature and scale. Their scores are
    divided by temperature, and their joint log-sum-exp is multiplied by scale before all parts are merged.
    gaps: (lo, hi) slices between lo and hi that are hidden.
    """

    __slots__ = ("record", "at", "lo", "hi", "weights", "shown", "positions", "first", "last")

    def __init__(
        self,
        record: Record,
        at: int,
        lo: int,
        hi: int,
        group: int = 0,
        temperature: float = 1.0,
        scale: float = 1.0,
        gaps: Sequence[tuple[int, int]] = (),
    ):
        self.record, self.at, self.lo, self.hi = record, at, lo, hi
        self.weights = (group, temperature, scale) if group else None
        self.shown: np.ndarray | None = None  # [hi - lo] bool; None: all
        if gaps:
            self.shown = np.ones(hi - lo, dtype=bool)
            for a, b in gaps:
                self.shown[a - lo : b - lo] = False
        self.positions = record.positions.numpy()[lo:hi]  # relative to the record's first token
        self.first = at + int(self.positions[0])
        self.last = at + int(self.positions[-1])


class RowKV:
    """A row's own KV, preallocated for `capacity` tokens: keys[l], values[l] are [G, capacity, D]; `length` are valid."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], capacity: int, dtype: torch.dtype, device: torch.device):
        """shapes: (kv heads, key dim, value dim) of every layer."""
        sizes = [(g * capacity * kd, g * capacity * vd) for g, kd, vd in shapes]
        buffer = torch.empty(sum(k + v for k, v in sizes), dtype=dtype, device=device)
        keys, values, at = [], [], 0
        for (g, kd, vd), (nk, nv) in zip(shapes, sizes, strict=True):
            keys.append(buffer[at : at + nk].view(g, capacity, kd))
            values.append(buffer[at + nk : at + nk + nv].view(g, capacity, vd))
            at += nk + nv
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
        """Count the new tokens as part of the row's KV; to be called once, after the forward."""
        self.kv.length += len(self.tokens)


@dataclass
class _Bucket:
    """Tokens whose extra parts are merged at once: they have about equally many, P at most."""

    tokens: Tensor | slice  # packed tokens, [n]
    count: int  # n
    gather: Tensor | None = None  # [P, n] columns into the extra pairs; None: the pairs lie as [P, n] already
    padding: Tensor | None = None  # [P, n] bool, True where a token has fewer than P
    joints: Sequence[tuple[Tensor, Tensor]] = ()  # a group: its pairs [P, n] bool, and scale - 1 [n] float32


@dataclass
class _Parts:
    """The parts of a step for layers of one window. Pair columns: T primary ones in token order, then E extra ones."""

    primary: list[tuple[slice, RowKV, int, int, Tensor | None, bool]]  # columns, own KV, lo, hi, mask, causal
    extra: list[tuple[slice, Record | RowKV, int, int, Tensor | None]]
    token: Tensor  # [E] the packed token of every extra pair
    shifts: np.ndarray  # [S] distinct rotations, position of the seen span's token 0
    shift: Tensor  # [E] index into shifts
    buckets: list[_Bucket]  # of the packed tokens that have extra pairs
    sharpness: Tensor | None = None  # [E, 1] float32, 1 / temperature; None: no view is in a group


class Step:
    """Bookkeeping of one packed forward, made once and used by every layer; call it as the model's `attend`."""

    def __init__(self, rows: Sequence[Row], layers: Sequence, rotaries: Sequence[Rotary], device: torch.device):
        self.rows, self.layers, self.rotaries, self.device = rows, layers, rotaries, device
        self.backend: Backend = backend_for(device)
        self.spans: list[slice] = []
        at = 0
        for row in rows:
            n = row.kv.length
            row.kv.positions[n : n + len(row.tokens)] = row.positions
            self.spans.append(slice(at, at + len(row.tokens)))
            at += len(row.tokens)
        self.size = at
        self._parts: dict[int | None, _Parts] = {}
        self._tables: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
        for window in {layer.window for layer in layers}:
            self._parts[window] = self._build(window)

    @cached_property
    def tokens(self) -> Tensor:
        return torch.tensor([t for row in self.rows for t in row.tokens], dtype=torch.int64, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        return torch.from_numpy(np.concatenate([row.positions for row in self.rows])).to(self.device)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of one layer. q [H, T, D], k [G, T, D], v [G, T, Dv], all rotated to row frames -> [H, T, Dv]."""
        for row, here in zip(self.rows, self.spans, strict=True):
            n = row.kv.length
            row.kv.keys[layer][:, n : n + here.stop - here.start] = k[:, here]
            row.kv.values[layer][:, n : n + here.stop - here.start] = v[:, here]
        parts = self._parts[self.layers[layer].window]
        own = [
            Part(c, kv.keys[layer][:, lo:hi], kv.values[layer][:, lo:hi], m, x) for c, kv, lo, hi, m, x in parts.primary
        ]
        out, lse = self.backend(q.float(), own, scale, softcap)
        if parts.extra:
            moved = self._moved(layer, q, parts)
            seen = [Part(c, r.keys[layer][:, lo:hi], r.values[layer][:, lo:hi], m) for c, r, lo, hi, m in parts.extra]
            _merge(out, lse, *self.backend(moved, seen, scale, softcap), parts, sinks)
        if sinks is not None:
            _sink_single_parts(out, lse, parts, sinks)
        return out.to(q.dtype)

    def _moved(self, layer: int, q: Tensor, parts: _Parts) -> Tensor:
        """The queries of the extra pairs [H, E, D] float32, each rotated by minus the position its span stands at.

        Dividing the query by its group's temperature divides the scores, whatever the backend does with them next.
        """
        chosen = q.index_select(1, parts.token).float()
        if parts.sharpness is not None:
            chosen *= parts.sharpness
        index = self.layers[layer].rotary
        if index is None:
            return chosen
        key = (self.layers[layer].window, index)
        if key not in self._tables:
            cos, sin = self.rotaries[index].table(torch.from_numpy(-parts.shifts))
            self._tables[key] = (cos.to(self.device)[parts.shift], sin.to(self.device)[parts.shift])
        return self.rotaries[index].rotate(chosen, *self._tables[key])

    def _build(self, window: int | None) -> _Parts:
        primary: list[tuple[slice, RowKV, int, int, Tensor | None, bool]] = []
        extra: list[tuple[slice, Record | RowKV, int, int, Tensor | None]] = []
        token: list[np.ndarray] = []  # packed tokens of the extra pairs
        runs: list[Run] = []  # in the same order
        shared: dict[tuple[int, int, int], tuple[Record, list[np.ndarray], list[Run]]] = {}
        columns = 0

        def add(record, lo: int, hi: int, tokens: np.ndarray, of: Sequence[Run], mask=None) -> None:
            nonlocal columns
            extra.append((slice(columns, columns + len(tokens)), record, lo, hi, self._mask(mask)))
            columns += len(tokens)
            token.append(tokens)
            runs.extend(of)

        for row, here in zip(self.rows, self.spans, strict=True):
            past, total, p = row.kv.length, row.kv.length + len(row.tokens), row.positions
            index = np.arange(here.start, here.stop)
            if len(p) == 1 and (window is None or p[0] - row.kv.positions[0] < window):
                past = 0  # one token that sees all of its row: one part instead of two
            for a, b, lo, hi, mask in _blocks(p, row.kv.positions[:past], window):
                add(row.kv, lo, hi, index[a:b], [(0, b - a, None)], mask)
            fits = window is None or p[-1] - p[0] < window
            mask = None if fits else np.tri(len(p), dtype=bool) & (p[:, None] - p[None] < window)
            primary.append((here, row.kv, past, total, self._mask(mask), fits and len(p) > 1))
            for view in row.views:
                if p[0] > view.last and (window is None or p[-1] - view.first < window):
                    blocks: list[Block] = [(0, len(p), 0, view.hi - view.lo, None)]  # the common case, without numpy
                else:
                    blocks = _blocks(p, view.positions + view.at, window)
                if view.shown is not None:
                    blocks = list(_shown(blocks, view.shown))
                for a, b, lo, hi, mask in blocks:
                    lo, hi = view.lo + lo, view.lo + hi
                    if mask is not None:
                        add(view.record, lo, hi, index[a:b], [(view.at, b - a, view.weights)], mask)
                        continue
                    # Rows that see the same tokens of the same record share one matmul, wherever each places it.
                    _, tokens, of = shared.setdefault((id(view.record), lo, hi), (view.record, [], []))
                    tokens.append(index[a:b])
                    of.append((view.at, b - a, view.weights))
        for (_, lo, hi), (record, tokens, of) in shared.items():
            add(record, lo, hi, np.concatenate(tokens), of)
        return self._parts_of(primary, extra, token, runs)

    def _parts_of(self, primary, extra, token, runs: Sequence[Run]) -> _Parts:
        if not extra:
            none = torch.empty(0, dtype=torch.int64)
            return _Parts(primary, [], none, np.empty(0, np.int64), none, [])
        tokens = np.concatenate(token)
        at, counts, weights = zip(*runs, strict=True)
        shifts, segment = np.unique(np.array(at, dtype=np.int64), return_inverse=True)
        shift = self._tensor(np.repeat(segment, counts))
        groups = sharpness = None
        if any(weights):
            groups = np.repeat([w or (0.0, 1.0, 1.0) for w in weights], counts, axis=0)
            sharpness = self._tensor((1 / groups[:, 1:2]).astype(np.float32))
        buckets = list(self._buckets(tokens, groups))
        return _Parts(primary, extra, self._tensor(tokens), shifts, shift, buckets, sharpness)

    def _buckets(self, tokens: np.ndarray, groups: np.ndarray | None) -> Iterator[_Bucket]:
        """Buckets of tokens, given the token of every extra pair, and its group, temperature and scale if there are any.

        A token that sees 1,000 places must not make its neighbours 1,000 wide: a bucket's counts are within a factor of
        two, so padding at most doubles the pairs.
        """
        counts = np.bincount(tokens, minlength=self.size)
        order = np.argsort(tokens, kind="stable")  # the pairs of token 0, of token 1, ...
        first = np.cumsum(counts) - counts
        size = np.where(counts > 0, np.ceil(np.log2(np.maximum(counts, 1))), -1)
        for s in np.unique(size[counts > 0]):
            members = np.flatnonzero(size == s)
            part = np.arange(counts[members].max())[:, None]
            padding = part >= counts[members]
            gather = order[np.where(padding, 0, first[members] + part)]
            where: Tensor | slice = self._tensor(members)
            if members[-1] - members[0] + 1 == len(members):
                where = slice(int(members[0]), int(members[-1]) + 1)
            joints = () if groups is None else list(self._joints(groups[gather], padding))
            if gather.size == len(tokens) and np.array_equal(gather.reshape(-1), np.arange(len(tokens))):
                yield _Bucket(where, len(members), joints=joints)
            else:
                yield _Bucket(where, len(members), self._tensor(gather), self._tensor(padding), joints)

    def _joints(self, groups: np.ndarray, padding: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """The groups of a bucket, given group, temperature and scale of its pairs [P, n, 3]: see _Bucket.joints."""
        number = np.where(padding, 0, groups[..., 0])
        for group in np.unique(number[number > 0]):
            pairs = number == group
            scale = np.where(pairs, groups[..., 2], 0).max(0)  # a token's pairs of one group have one scale
            yield self._tensor(pairs), self._tensor((scale - 1).astype(np.float32))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _mask(self, array: np.ndarray | None) -> Tensor | None:
        return None if array is None else self._tensor(array)


Run = tuple[int, int, tuple[int, float, float] | None]  # extra pairs of one view: rotation, how many, its weights
Block = tuple[int, int, int, int, np.ndarray | None]  # tokens a..b see keys lo..hi, all or by a mask [b - a, hi - lo]


def _blocks(p: np.ndarray, keys: np.ndarray, window: int | None) -> list[Block]:
    """What tokens at ascending positions p see of keys at ascending positions.

    A key is visible iff its position is lower than the token's and, with a window, p - key < window. The visible keys of
    one token are so a slice; neighbouring tokens with the same slice share a block, others get a mask [b - a, hi - lo].
    """
    if not len(keys):
        return []
    if keys[-1] < p[0] and (window is None or p[-1] - keys[0] < window):  # the common case: all see all
        return [(0, len(p), 0, len(keys), None)]
    high = np.searchsorted(keys, p, side="left")
    low = np.zeros_like(high) if window is None else np.searchsorted(keys, p - window, side="right")
    blocks = []
    whole = (low == 0) & (high == len(keys))
    some = low < high
    kind = np.where(whole, 2, np.where(some, 1, 0))
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(p)]
    for a, b in zip(edges, edges[1:], strict=False):
        if kind[a] == 0:
            continue
        lo, hi = int(low[a:b].min()), int(high[a:b].max())
        same = (low[a:b] == lo).all() and (high[a:b] == hi).all()
        column = np.arange(lo, hi)[None]
        mask = None if same else (column >= low[a:b, None]) & (column < high[a:b, None])
        blocks.append((a, b, lo, hi, mask))
    return blocks


def _shown(blocks: Sequence[Block], shown: np.ndarray) -> Iterator[Block]:
    """The blocks without hidden keys, and without tokens that see nothing then."""
    for a, b, lo, hi, mask in blocks:
        visible = shown[lo:hi] if mask is None else np.logical_and(mask, shown[lo:hi])
        mask = np.broadcast_to(visible, (b - a, hi - lo))
        some: np.ndarray = np.any(mask, axis=1)
        for i, j in pairwise([0, *(np.flatnonzero(np.diff(some)) + 1).tolist(), b - a]):
            if some[i]:
                yield a + i, a + j, lo, hi, np.array(mask[i:j])  # a copy: torch wants to write to it


def _merge(out: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor, parts: _Parts, sinks: Tensor | None) -> None:
    """Merge the extra parts into out [H, T, Dv], in place: every part weighs exp(its lse - the joint lse).

    Multiplying the joint lse of a group by its scale adds (scale - 1) of it to the lse of each of its parts.
    """
    heads = out.shape[0]
    for bucket in parts.buckets:
        if bucket.gather is None or bucket.padding is None:
            others = seen.view(heads, -1, bucket.count, seen.shape[-1])
            lses = seen_lse.view(heads, -1, bucket.count)
        else:
            others = seen[:, bucket.gather]
            lses = seen_lse[:, bucket.gather].masked_fill(bucket.padding, -torch.inf)
        for pairs, more in bucket.joints:
            joint = torch.logsumexp(lses.masked_fill(~pairs, -torch.inf), 1, keepdim=True)
            lses = torch.where(pairs, lses + more * joint, lses)
        mine = lse[:, bucket.tokens]
        total = torch.logaddexp(mine, torch.logsumexp(lses, 1))
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float()[:, None])
        weights = torch.exp(lses - total[:, None])
        merged = torch.einsum("hpt,hptd->htd", weights, others)
        merged.addcmul_(out[:, bucket.tokens], torch.exp(mine - total)[..., None])
        out[:, bucket.tokens] = merged


def _sink_single_parts(out: Tensor, lse: Tensor, parts: _Parts, sinks: Tensor) -> None:
    """Let the attention sink [H] take its share of tokens that have only a primary part (others got it in the merge)."""
    share = torch.sigmoid(lse - sinks.float()[:, None])  # exp(lse) / (exp(lse) + exp(sink))
    for bucket in parts.buckets:
        share[:, bucket.tokens] = 1.0
    out.mul_(share[..., None])
