"""CompressKV's choice of tokens (Lin et al., arXiv 2508.02401): the heads of a layer that retrieve decide for all of it.

Most heads look at the first and the last tokens, and their votes push out what stands between. Here, as in the authors' code,
a few *semantic retrieval heads* of each layer vote, and every key/value head of the layer keeps the same tokens. Which heads these are
is found once per model, see `kvgraph.engine.retrieval_heads`, and is part of the fingerprint.

The paper also gives layers different budgets, by the error that eviction makes in each. Here every layer keeps equally many
tokens, because a record has one number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kvgraph.errors import StoreError
from kvgraph.store.selection.base import Observing, smoothed


@dataclass(frozen=True)
class CompressKV(Observing):
    """Keeps what the retrieval heads of a layer look at. For keep, window and kernel see `Observing`.

    Parameters:
        heads: of each layer that vote; the authors' code has 4.
        voters: their numbers, by layer; found by `fitted`. Empty: all heads vote.
    """

    window: int = 8
    heads: int = 4
    voters: tuple[tuple[int, ...], ...] = ()

    name: ClassVar[str] = "compresskv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise StoreError(f"selection {self.name} needs 1 or more heads, not {self.heads}")

    def fitted(self, scores: Sequence[Sequence[float]]) -> CompressKV:
        """With the heads of the highest retrieval scores, of every layer [H]; of equal ones the first."""
        best = (sorted(range(len(layer)), key=[-score for score in layer].__getitem__) for layer in scores)
        return replace(self, voters=tuple(tuple(sorted(heads[: self.heads])) for heads in best))

    def of_layer(self, layer: int) -> CompressKV:
        """What chooses in one layer."""
        return replace(self, voters=self.voters[layer : layer + 1])

    def needed(self, weights: Tensor, groups: int) -> Tensor:
        """Attention that a token gets from the window: the mean over its queries and the voters, for all groups alike."""
        votes = weights[list(self.voters[0])] if self.voters else weights
        return smoothed(votes.mean(1, keepdim=True), self.kernel).mean(0).expand(groups, -1)
