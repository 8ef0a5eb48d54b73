"""What the tokens of a step see, as blocks: some tokens, and one slice of one span's keys that they all attend to.

This is the interface between rows and the executors of attention. It is bookkeeping only, without tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvgraph.attention.rows import Row, RowKV
from kvgraph.store.record import Record


class KeyRun(NamedTuple):
    """Some tokens of a block that see it in the same way: its token 0 at position `at` of their frame.

    weights: (group, temperature, scale) of the group it belongs to, see `View`; None without a group.
    """

    at: int
    n: int
    weights: tuple[int, float, float] | None = None


class Fresh:
    """As the source of a block: the step's own new keys and values, by packed token, in the frame of their chain's first
    row. A chain of rows is one causal block over them."""


FRESH = Fresh()


@dataclass
class KeyBlock:
    """Packed tokens `tokens` [n] attend to keys lo..hi of `source`.

    runs: how they see it, n tokens in total.
    mask: bool [n, hi - lo], True where visible, at least one True per row; None if everything is visible.
    causal: without a mask, token i sees keys lo..lo + i.
    """

    tokens: np.ndarray
    source: Record | RowKV | Fresh
    lo: int
    hi: int
    runs: list[KeyRun]
    mask: np.ndarray | None = None
    causal: bool = False


def blocks_of(rows: Sequence[Row], starts: Sequence[int], window: int | None) -> tuple[list[KeyBlock], list[KeyBlock]]:
    """The blocks of a step whose row i has its packed tokens from starts[i] on. window: of the layers, see `Layer`.

    The first list has a block for the new tokens of each chain (a row that isn't joined, and those that continue it), in
    order; together they cover each token once. The second has what is seen besides. Rows that see the same tokens of the
    same source share one block, wherever each places it.
    """
    own: list[KeyBlock] = []
    masked: list[KeyBlock] = []
    shared: dict[tuple[int, int, int], KeyBlock] = {}
    parts: dict[tuple[int, int, int], list[np.ndarray]] = {}
    firsts = [i for i, row in enumerate(rows) if not row.joined]
    for i, j in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        row, chain = rows[i], rows[i:j]
        p = row.positions if len(chain) == 1 else np.concatenate([r.positions + r.lead for r in chain])
        index, first, last = np.arange(starts[i], starts[i] + len(p)), int(p[0]), int(p[-1])
        past = row.kv.length
        if len(p) == 1 and (window is None or p[0] - row.kv.positions[0] < window):
            past = 0  # one token that sees all of its row needs one block instead of two
        for a, b, lo, hi, mask in _slices(p, row.kv.positions[:past], window):
            masked.append(KeyBlock(index[a:b], row.kv, lo, hi, _runs(chain, 0, a, b), mask))
        fits = window is None or p[-1] - p[0] < window
        mask = None if fits else np.tri(len(p), dtype=bool) & (p[:, None] - p[None] < window)
        source, lo = (row.kv, past) if len(chain) == 1 else (FRESH, starts[i])
        hi = lo + len(p) if len(chain) > 1 else row.kv.length + len(row.tokens)
        own.append(KeyBlock(index, source, lo, hi, _runs(chain, 0, 0, len(p)), mask, fits and len(p) > 1))
        for view in row.views:
            if window is not None and first - view.last >= window:
                continue  # all of it has left the window
            if first > view.last and (window is None or last - view.first < window):
                slices: list[_Slice] = [(0, len(p), 0, view.hi - view.lo, None)]  # the common case, without numpy
            else:
                slices = _slices(p, view.positions + view.at, window)
            if view.shown is not None:
                slices = list(_shown(slices, view.shown))
            for a, b, lo, hi, mask in slices:
                key = (id(view.source), view.lo + lo, view.lo + hi)
                runs = _runs(chain, view.at, a, b, view.weights)
                if mask is not None:
                    masked.append(KeyBlock(index[a:b], view.source, *key[1:], runs, mask))
                elif key in shared:
                    shared[key].runs.extend(runs)
                    parts[key].append(index[a:b])
                else:
                    shared[key] = KeyBlock(index[a:b], view.source, *key[1:], runs)
                    parts[key] = [index[a:b]]
    for key, block in shared.items():
        if len(parts[key]) > 1:
            block.tokens = np.concatenate(parts[key])
    return own, [*masked, *shared.values()]


def _runs(
    chain: Sequence[Row], at: int, a: int, b: int, weights: tuple[int, float, float] | None = None
) -> list[KeyRun]:
    """How tokens a..b of a chain see what stands at position `at` of its first row's frame."""
    if len(chain) == 1:
        return [KeyRun(at, b - a, weights)]
    runs, start = [], 0
    for row in chain:
        n = min(b, start + len(row.tokens)) - max(a, start)
        if n > 0:
            runs.append(KeyRun(at - row.lead, n, weights))
        start += len(row.tokens)
    return runs


_Slice = tuple[int, int, int, int, np.ndarray | None]  # tokens a..b see keys lo..hi, all or by a mask [b - a, hi - lo]


def _slices(p: np.ndarray, keys: np.ndarray, window: int | None) -> list[_Slice]:
    """What tokens at ascending positions p see of keys at ascending positions.

    A key is visible iff its position is lower than the token's and, with a window, p - key < window. Therefore the
    visible keys of one token are a slice. Neighbouring tokens with the same slice share it, others get a mask
    [b - a, hi - lo].
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
    for a, b in pairwise(edges):
        if kind[a] == 0:
            continue
        lo, hi = int(low[a:b].min()), int(high[a:b].max())
        same = (low[a:b] == lo).all() and (high[a:b] == hi).all()
        column = np.arange(lo, hi)[None]
        mask = None if same else (column >= low[a:b, None]) & (column < high[a:b, None])
        blocks.append((a, b, lo, hi, mask))
    return blocks


def _shown(blocks: Sequence[_Slice], shown: np.ndarray) -> Iterator[_Slice]:
    """The blocks without hidden keys, and without tokens that then see nothing."""
    for a, b, lo, hi, mask in blocks:
        visible = shown[lo:hi] if mask is None else np.logical_and(mask, shown[lo:hi])
        mask = np.broadcast_to(visible, (b - a, hi - lo))
        some: np.ndarray = np.any(mask, axis=1)
        for i, j in pairwise([0, *(np.flatnonzero(np.diff(some)) + 1).tolist(), b - a]):
            if some[i]:
                yield a + i, a + j, lo, hi, np.array(mask[i:j])  # a copy: torch wants to write to it
