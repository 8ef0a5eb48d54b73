"""Attention over parts in plain torch. It runs on every device, and faster backends are checked against it.

Scores, log-sum-exp and sums are float32 for every dtype of KV. Scores are tiled, so memory is bounded.
Shapes: H query heads, G key/value heads, R = H / G, C query columns, n columns of a part, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvgraph.attention.backends.base import Part

TILE = 1 << 22  # scores of a tile: 16 MiB in float32


def attend(q: Tensor, parts: Sequence[Part], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """q [H, C, D] float32 -> out [H, C, Dv], lse [H, C], float32."""
    out = q.new_empty(q.shape[0], q.shape[1], parts[0].values.shape[-1])
    lse = q.new_empty(q.shape[:2])
    for part in parts:
        a, b = part.columns.start, part.columns.stop
        keys, values = part.keys.float(), part.values.float()
        rows = max(1, TILE // (q.shape[0] * keys.shape[1]))
        for start in range(a, b, rows):
            here = slice(start, min(b, start + rows))
            within = slice(here.start - a, here.stop - a)
            out[:, here], lse[:, here] = _tile(q[:, here], keys, values, part, within, scale, softcap)
    return out, lse


def _tile(
    q: Tensor, keys: Tensor, values: Tensor, part: Part, rows: slice, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """One tile of query rows over all keys of a part, with exact softmax."""
    (heads, n, dim), groups, total = q.shape, keys.shape[0], keys.shape[1]
    scores = (q.reshape(groups, heads // groups * n, dim) @ keys.transpose(1, 2)).mul_(scale).view(heads, n, total)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = None if part.mask is None else part.mask[rows]
    if part.causal:
        column = torch.arange(total, device=q.device)
        mask = column[None] <= column[rows, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).view(groups, -1, total)
    return (weights @ values).view(heads, n, values.shape[-1]), lse
