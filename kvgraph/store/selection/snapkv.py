"""SnapKV (Li et al., arXiv 2404.14469): the last tokens' attention says what later ones will look at.

In the paper these tokens end the prompt, so they hold the question. A span is encoded before there is a question: here they are
the span's own last tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvgraph.store.selection.base import Observing, smoothed


@dataclass(frozen=True)
class SnapKV(Observing):
    """Keeps what the window needs on average. For its parameters see `Observing`."""

    name: ClassVar[str] = "snapkv"

    def needed(self, weights: Tensor, groups: int) -> Tensor:
        """Attention that a token gets from the window: the mean over its queries and the heads that share a key."""
        return smoothed(weights.mean(1, keepdim=True), self.kernel).view(groups, -1, weights.shape[2]).mean(1)
