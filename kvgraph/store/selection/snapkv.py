"""SnapKV (Li et al., arXiv 2404.14469): the last tokens' attention says what later ones will look at.

In the paper these tokens end the prompt, so they hold the question. A span is encoded before there is a question: here they are
the span's own last tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.selection.base import latest, observed, smoothed
from kvgraph.store.selection.checks import observes, percent


@dataclass(frozen=True)
class SnapKV:
    """Parameters:
    keep: percent of tokens that every head keeps.
    window: last tokens whose queries are observed. They are kept themselves; they are fewer where they would be more than
        half of what is kept.
    kernel: neighbours over which attention is smoothed.
    """

    keep: int = 50
    window: int = 32
    kernel: int = 5

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        percent(self.name, self.keep)
        observes(self.name, self.window, self.kernel)

    def scores(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """Attention that a token gets from the window: the mean over its queries and the heads that share a key."""
        assert queries is not None
        groups, tokens, _ = keys.shape
        queries = latest(self, queries, tokens)
        before = tokens - queries.shape[1]
        weights = observed(keys, queries)[:, :, :before].mean(1, keepdim=True)
        means = (
            smoothed(weights, self.kernel).view(groups, -1, before).mean(1) if before else weights.new_empty(groups, 0)
        )
        return torch.nn.functional.pad(means, (0, tokens - before), value=torch.inf)
