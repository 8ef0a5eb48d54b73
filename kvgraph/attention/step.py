"""The row primitive: new tokens of many requests in one packed forward, each attending to stored spans in place.

Because RoPE is relative, a stored span seen at position `at` needs no re-rotation. The *query* is rotated by -at and
attends to the keys as stored. A token sees a few parts: its row's own KV, and one part per place. Each part gives an
output and a log-sum-exp, and these are merged into one softmax. Nothing stored is ever copied or moved.

Shapes: H query heads, G key/value heads, T packed new tokens of the step, N keys, D head size,
E extra (token, part) pairs of the step besides every token's primary part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.backends import backend_for, cpu
from kvgraph.attention.backends.base import Backend, Part
from kvgraph.attention.blocks import Fresh, KeyBlock, blocks_of
from kvgraph.attention.rope import Rotary
from kvgraph.attention.rows import Row, RowKV
from kvgraph.store.record import Record

_NONE = torch.empty(0, dtype=torch.int64)


@dataclass
class _Bucket:
    """Tokens whose extra parts are merged at once. They have similar numbers of these, at most P."""

    tokens: Tensor | slice  # packed tokens, [n]
    count: int  # n
    gather: Tensor | None = None  # [P, n] columns into the extra pairs; None: the pairs are in the order [P, n]
    padding: Tensor | None = None  # [P, n] bool, True where a token has fewer than P
    joints: Sequence[tuple[Tensor, Tensor]] = ()  # a group: its pairs [P, n] bool, and scale - 1 [n] float32


class _Seen(NamedTuple):
    """A Part of every layer: its columns attend to keys `here` of a source."""

    columns: slice
    source: Record | RowKV | Fresh
    here: slice
    mask: Tensor | None
    causal: bool

    def of(self, layer: int, fresh: tuple[Tensor, Tensor]) -> Part:
        """The part of one layer. fresh: the step's new keys [G, T, D], in the frames of their chains, and values."""
        keys, values = fresh if isinstance(self.source, Fresh) else self.source.layer(layer)
        if self.here.stop - self.here.start < keys.shape[1]:  # a slice for nothing is most of this, in a decoding step
            keys, values = keys[:, self.here], values[:, self.here]
        return Part(self.columns, keys, values, self.mask, self.causal)


@dataclass
class _Parts:
    """The parts of a step for layers of one window. Pair columns: T primary ones in token order, then E extra ones."""

    primary: list[_Seen]
    extra: list[_Seen] = field(default_factory=list)
    token: Tensor = _NONE  # [E] the packed token of every extra pair
    shifts: np.ndarray = field(
        default_factory=_NONE.numpy
    )  # [S] distinct rotations, position of the seen span's token 0
    shift: Tensor = _NONE  # [E] index into shifts
    buckets: list[_Bucket] = field(default_factory=list)  # of the packed tokens that have extra pairs
    sharpness: Tensor | None = None  # [E, 1] float32, 1 / temperature; None: no view is in a group
    order: np.ndarray = field(default_factory=_NONE.numpy)  # [E] the extra pairs of token 0, of token 1, ...
    ends: np.ndarray = field(default_factory=_NONE.numpy)  # [T] where a token's end in that order


class Step:
    """Bookkeeping of one packed forward, made once and used by every layer. Call it as the model's `attend`."""

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
        self.leads = np.repeat([row.lead for row in rows], [len(row.tokens) for row in rows])
        self.linked = bool(self.leads.any())  # some row continues the one before it
        self._leads: dict[int, tuple[Tensor, ...]] = {}
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
            if row.kv.window:
                row.kv.observe(layer, q[:, here], scale)
        parts = self._parts[self.layers[layer].window]
        inside, keys = self._in_chains(layer, q, k)
        out, lse = self.backend(inside, [seen.of(layer, (keys, v)) for seen in parts.primary], scale, softcap)
        if parts.extra:
            moved = self._moved(layer, q, parts)
            others = [seen.of(layer, (keys, v)) for seen in parts.extra]
            _merge(out, lse, *self.backend(moved, others, scale, softcap), parts, sinks)
        if sinks is not None:
            _sink_single_parts(out, lse, parts, sinks)
        return out.to(q.dtype)

    def _in_chains(self, layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, in float32, and keys of the step, each rotated from its row's frame into that of its chain's first."""
        index = self.layers[layer].rotary
        if index is None or not self.linked:
            return q.float(), k
        if index not in self._leads:
            self._leads[index] = tuple(
                t.to(self.device) for t in self.rotaries[index].table(torch.from_numpy(self.leads))
            )
        return self.rotaries[index].rotate(q, *self._leads[index]), self.rotaries[index].rotate(k, *self._leads[index])

    def _moved(self, layer: int, q: Tensor, parts: _Parts) -> Tensor:
        """The queries of the extra pairs [H, E, D] float32, each rotated by minus its span's position.

        Dividing the query by its group's temperature divides the scores in every backend.
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
        own, others = blocks_of(self.rows, [here.start for here in self.spans], window)
        parts = _Parts([self._part(b, slice(int(b.tokens[0]), int(b.tokens[-1]) + 1)) for b in own])
        if not others:
            return parts
        columns = 0
        for block in others:
            here = slice(columns, columns + len(block.tokens))
            parts.extra.append(self._part(block, here))
            columns = here.stop
        tokens = np.concatenate([block.tokens for block in others])
        at, lengths, weights = zip(*(run for block in others for run in block.runs), strict=True)
        parts.shifts, segment = np.unique(np.array(at, dtype=np.int64), return_inverse=True)
        parts.shift = self._tensor(np.repeat(segment, lengths))
        groups = None
        if any(weights):
            groups = np.repeat([w or (0.0, 1.0, 1.0) for w in weights], lengths, axis=0)
            parts.sharpness = self._tensor((1 / groups[:, 1:2]).astype(np.float32))
        parts.token = self._tensor(tokens)
        parts.order = np.argsort(tokens, kind="stable")
        counts = np.bincount(tokens, minlength=self.size)
        parts.ends = np.cumsum(counts)
        parts.buckets = list(self._buckets(parts.order, counts, groups))
        return parts

    def _part(self, block: KeyBlock, columns: slice) -> _Seen:
        mask = None if block.mask is None else self._tensor(block.mask)
        return _Seen(columns, block.source, slice(block.lo, block.hi), mask, block.causal)

    def _buckets(self, order: np.ndarray, counts: np.ndarray, groups: np.ndarray | None) -> Iterator[_Bucket]:
        """Buckets of tokens, given the extra pairs in the order of their tokens, how many each token has, and the group,
        temperature and scale of every pair if there are any.

        A token that sees 1,000 places must not make its neighbours 1,000 wide. The counts of a bucket are within a
        factor of two, so padding at most doubles the pairs.
        """
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
            if gather.size == len(order) and np.array_equal(gather.reshape(-1), np.arange(len(order))):
                yield _Bucket(where, len(members), joints=joints)
            else:
                yield _Bucket(where, len(members), self._tensor(gather), self._tensor(padding), joints)

    def _joints(self, groups: np.ndarray, padding: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """The groups of a bucket, given group, temperature and scale of its pairs [P, n, 3]: see _Bucket.joints."""
        number = np.where(padding, 0, groups[..., 0])
        for group in np.unique(number[number > 0]):
            pairs = number == group
            scale = np.where(pairs, groups[..., 2], 0).max(0)  # a token's pairs of one group share one scale
            yield self._tensor(pairs), self._tensor((scale - 1).astype(np.float32))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _merge(out: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor, parts: _Parts, sinks: Tensor | None) -> None:
    """Merge the extra parts into out [H, T, Dv], in place: every part weighs exp(its lse - the joint lse).

    Multiplying the joint lse of a group by its scale adds (scale - 1) of it to the lse of each of its parts.
    """
    heads = out.shape[0]
    if out.device.type == "cpu" and parts.sharpness is None and (module := cpu.compiled()):
        module.merge(out, lse, seen, seen_lse, parts.order, parts.ends, sinks)
        return
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
    """Apply the attention sink [H] to tokens that have only a primary part (the merge applied it to the others)."""
    share = torch.sigmoid(lse - sinks.float()[:, None])  # exp(lse) / (exp(lse) + exp(sink))
    for bucket in parts.buckets:
        share[:, bucket.tokens] = 1.0
    out.mul_(share[..., None])
