"""The defensive aggregation of DefensiveKV (Feng et al., arXiv 2510.13334): a token matters if any query asks for it.

Means, as in SnapKV, drop what only one query needs. Here a token counts as much as it does to the query and head that need
it most, and at least the mean of its head. The paper also splits one budget among a layer's heads, and weights tokens by the norm
of their projected values; here every head keeps equally many, and values aren't looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvgraph.store.selection.base import Observing, smoothed


@dataclass(frozen=True)
class Defensive(Observing):
    """Keeps what any query of the window needs. For its parameters see `Observing`."""

    name: ClassVar[str] = "defensive"

    def needed(self, weights: Tensor, groups: int) -> Tensor:
        """The largest attention that a token gets from any query of the window and any head that shares its key."""
        worst = smoothed(weights, self.kernel).reshape(groups, -1, weights.shape[2]).amax(1)
        return worst.clamp(min=worst.mean(1, keepdim=True))
