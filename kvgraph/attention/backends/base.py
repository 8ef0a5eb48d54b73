"""The type of attention backends: a function over parts that gives out and log-sum-exp of every query column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from kvgraph.store.record import Side


class Part(NamedTuple):
    """Query columns `columns` attend to keys [G, N, D] and values [G, N, Dv], which may be packed on a CPU.

    mask: bool [n, N], True where visible, at least one True per row; None if everything is visible.
    causal: without a mask, column i of n sees the first i + 1 of N = n keys.
    """

    columns: slice
    keys: Side
    values: Side
    mask: Tensor | None = None
    causal: bool = False


# (q [H, C, D] float32, parts that cover every column exactly once, scale, softcap) -> out [H, C, Dv], lse [H, C] float32
Backend = Callable[[Tensor, Sequence[Part], float, float | None], tuple[Tensor, Tensor]]
