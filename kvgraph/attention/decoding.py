"""Decode steps one after another on a GPU, without making their tables again.

While the same rows decode, a step differs from the one before it in a few numbers: each row's token and position, and how far
its own KV reach. The tables of a captured graph stay on the device, so only these numbers change, and only the beginning of
the tables, where they lie, is uploaded.

Shapes: n rows, each with one new token.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from kvgraph.attention.cuda import CudaStep, Extent, Tables, Window
from kvgraph.attention.rows import Row, RowKV, View


class Decoding:
    """A step of decoding rows in tables of fixed sizes, which later steps of the same rows continue.

    It keeps no row's KV alive. It is valid as long as nothing else fills its tables.
    """

    def __init__(self, step: CudaStep, tables: Tables, staging: Tensor):
        """step: one that `continuable` accepts. staging: what has been uploaded for it."""
        lengths = np.array([row.kv.length for row in step.rows])
        windows = list(zip(step.tables, tables.layout.windows, strict=True))
        found = [_ends(window, sections, lengths + 1) for window, sections in windows]
        self._ends, self._owners = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._most = min(_most_keys(window, step, int(lengths.sum())) for window in step.tables)
        limits = [-(-(lengths + 1) // window.run) * window.run for window in step.tables]
        self._limits: list[int] = np.min(limits, axis=0).tolist()  # at which a row's own KV are split into more runs
        self._reach = _reach(step)
        self._seen: WeakKeyDictionary[RowKV, tuple[int, Sequence[View]]] = WeakKeyDictionary()
        for i, row in enumerate(step.rows):
            self._seen[row.kv] = i, row.views
        self._rows, self._tables = len(step.rows), tables
        self.length = max(int(self._ends.max()) + 1, tables.layout.rows.at + 3 * self._rows)
        self._head = staging.numpy()[: self.length].copy()

    def continues(self, rows: Sequence[Row], want: Sequence[int]) -> bool:
        """Whether a step has this step's rows, one token each, and tables of the same structure."""
        if len(rows) != self._rows or len(want) != self._rows or not all(map(self._same, range(len(rows)), rows)):
            return False
        if self._reach is not None and any(row.positions[0] >= end for row, end in zip(rows, self._reach, strict=True)):
            return False
        lengths = [row.kv.length for row in rows]
        fits = all(length < limit for length, limit in zip(lengths, self._limits, strict=True))
        return fits and sum(lengths) <= self._most

    def _same(self, i: int, row: Row) -> bool:
        found = self._seen.get(row.kv)
        return found is not None and found[0] == i and found[1] is row.views and len(row.tokens) == 1

    def advance(self, rows: Sequence[Row], staging: Tensor) -> None:
        """Write a step that `continues` this one into the staging buffer (pinned, >= `length` int64) and start its upload."""
        head, layout, n = self._head, self._tables.layout, len(rows)
        for row in rows:
            row.kv.positions[row.kv.length] = row.positions[0]
        lengths = np.array([row.kv.length for row in rows])
        head[layout.tokens.at : layout.tokens.at + n] = [row.tokens[0] for row in rows]
        head[layout.positions.at : layout.positions.at + n] = [row.positions[0] for row in rows]
        head[layout.rows.at + 2 : layout.rows.at + 3 * n : 3] = lengths
        head[self._ends] = (lengths + 1)[self._owners]
        staging.numpy()[: self.length] = head
        self._tables.upload(staging, self.length)


def continuable(step: CudaStep) -> bool:
    """Whether every row has one new token, of which the logits are wanted, and sees all of its row and of its views.

    What a row sees then grows by its own token each step and doesn't change otherwise, up to the end of a sliding window.
    """
    if any(len(row.tokens) != 1 or row.joined for row in step.rows) or list(step.want) != list(range(step.size)):
        return False
    reach = _reach(step)
    if reach is not None and any(row.positions[0] >= end for row, end in zip(step.rows, reach, strict=True)):
        return False
    return all(view.last < row.positions[0] and view.shown is None for row in step.rows for view in row.views)


def _reach(step: CudaStep) -> list[int] | None:
    """For each row, the position at which the first thing it sees leaves the narrowest sliding window; None: there is none."""
    narrowest = min((window for window in step.windows if window is not None), default=None)
    if narrowest is None:
        return None
    return [min([int(row.kv.positions[0]), *(v.first for v in row.views)]) + narrowest for row in step.rows]


def _ends(window: Window, sections: dict[str, Extent], ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the tables say how far each row's own KV reach, and of which row: the last tile of each row's own block.

    Block i is row i's own, see `blocks_of`. ends [n]: where the rows' own KV end.
    """
    places, owners = [], []
    for name, tiles in (("small", window.small), ("large", window.large)):
        own = np.flatnonzero(tiles[:, 0] < len(ends))
        last = own[tiles[own, 5] == ends[tiles[own, 0]]]
        places.append(sections[name].at + 8 * last + 5)
        owners.append(tiles[last, 0])
    return np.concatenate(places), np.concatenate(owners)


def _most_keys(window: Window, step: CudaStep, keys: int) -> int:
    """Up to how many own keys of all rows together the runs keep their length. keys: how many there are now."""
    groups, tune = step.layers[0].kv_heads, step.tune
    each = groups * -(-step.repeat // tune.rows)
    return keys + (window.run * tune.programs[0] - window.work) // each
