"""The defensive aggregation of DefensiveKV (Feng et al., arXiv 2510.13334): a token matters if any query asks for it.

Means, as in SnapKV, drop what only one query needs. Here a token counts as much as it does to the query and head that need
it most, and at least the mean of its head. The paper also splits one budget among a layer's heads, and weights tokens by the norm
of their projected values; here every head keeps equally many, and values aren't looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.selection.base import latest, observed, smoothed
from kvgraph.store.selection.checks import observes, percent


@dataclass(frozen=True)
class Defensive:
    """Parameters:
    keep: percent of tokens that every head keeps.
    window: last tokens whose queries are observed. They are kept themselves; they are fewer where they would be more than
        half of what is kept.
    kernel: neighbours over which attention is smoothed.
    """

    keep: int = 50
    window: int = 32
    kernel: int = 5

    name: ClassVar[str] = "defensive"

    def __post_init__(self) -> None:
        percent(self.name, self.keep)
        observes(self.name, self.window, self.kernel)

    def scores(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """The largest attention that a token gets from any query of the window and any head that shares its key."""
        assert queries is not None
        groups, tokens, _ = keys.shape
        queries = latest(self, queries, tokens)
        window = queries.shape[1]
        before = tokens - window
        weights = observed(keys, queries)[:, :, :before]
        if before:
            worst = smoothed(weights, self.kernel).reshape(groups, -1, before).amax(1)
            worst = worst.clamp(min=worst.mean(1, keepdim=True))
        else:
            worst = weights.new_empty(groups, 0)
        return torch.nn.functional.pad(worst, (0, window), value=torch.inf)
