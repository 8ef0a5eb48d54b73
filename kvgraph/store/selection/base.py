"""The interface of token selection: every layer and head keeps the tokens that later readers will most likely look at.

A record then holds fewer keys and values. Readers attend to those and to nothing else of the span.

Shapes: H query heads, G key/value heads, N tokens of the span, K tokens that are kept, W observed queries, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvgraph.store.record import Record
from kvgraph.store.selection.checks import observes, percent


class Selection(Protocol):
    """A frozen dataclass whose fields are its configuration: whole numbers, if they can be given as text. They are part of
    the model's fingerprint, so its results must never change under one name and configuration.

    name: in the registry. keep: percent of a span's tokens that every head keeps, 1 to 100. window: queries, of a span's
    last tokens, that `scores` looks at; 0: none.
    """

    name: ClassVar[str]

    @property
    def keep(self) -> int:
        """Percent of tokens that are kept."""
        ...

    @property
    def window(self) -> int:
        """Queries that are observed."""
        ...

    def scores(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """How much a token should be kept, [G, N] float32, for one layer.

        keys, values: [G, N, D]. queries: [H, W, D] float32 of the span's last W tokens, scaled as their products with
        keys are, W at most `window`; None if `window` is 0.
        """
        ...


@runtime_checkable
class ByLayer(Protocol):
    """What a selection has beside `Selection` if it chooses by other heads in each layer, which depend on the model."""

    def fitted(self, scores: Sequence[Sequence[float]]) -> Selection:
        """The selection for a model with these retrieval scores of every layer's heads."""
        ...

    def of_layer(self, layer: int) -> Selection:
        """What gives the scores of one layer's tokens."""
        ...


def kept_tokens(selection: Selection, tokens: int) -> int:
    """How many tokens of so many are kept: at least one."""
    return max(1, math.ceil(tokens * selection.keep / 100))


def selected(record: Record, selection: Selection, queries: Sequence[Tensor] = ()) -> Record:
    """The record with what a selection keeps, in the order of positions; itself if that is all.

    queries: [H, W, D] of every layer; see `Selection.scores`.
    """
    k = kept_tokens(selection, len(record))
    if k == len(record):
        return record
    keys, values, kept = [], [], []
    for layer, (key, value) in enumerate(zip(record.keys, record.values, strict=True)):
        chooser = selection.of_layer(layer) if isinstance(selection, ByLayer) else selection
        scores = chooser.scores(key, value, queries[layer] if queries else None)
        # Of equal ones the earliest is kept, on every machine.
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
        index = best.unsqueeze(2)
        keys.append(torch.take_along_dim(key, index, 1))
        values.append(torch.take_along_dim(value, index, 1))
        kept.append(record.positions.to(best.device)[best].int().cpu())
    return replace(record, keys=tuple(keys), values=tuple(values), kept=tuple(kept), packed=None)


def latest(selection: Selection, queries: Tensor, tokens: int) -> Tensor:
    """The queries [H, W, D] that a span of so many tokens has room for: they take at most half of what is kept."""
    return queries[:, -max(1, kept_tokens(selection, tokens) // 2) :]


def observed(keys: Tensor, queries: Tensor) -> Tensor:
    """What the last W tokens give every token of their attention: weights [H, W, N] float32, causal."""
    heads, window, size = queries.shape
    groups, tokens, _ = keys.shape
    products = (queries.reshape(groups, -1, size) @ keys.float().transpose(1, 2)).view(heads, window, tokens)
    later = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
    return products.masked_fill(later, -torch.inf).softmax(2)


def smoothed(weights: Tensor, kernel: int) -> Tensor:
    """The mean over `kernel` neighbours along the last dimension of [A, B, N]: what is said stands in several tokens."""
    return torch.nn.functional.avg_pool1d(weights, kernel, 1, kernel // 2)


@dataclass(frozen=True)
class Observing:
    """What selections share that look at the attention of a span's last tokens.

    Parameters:
    keep: percent of tokens that every head keeps.
    window: last tokens whose queries are observed. They are kept themselves; they are fewer where they would be more than
        half of what is kept.
    kernel: neighbours over which attention is smoothed.
    """

    keep: int = 50
    window: int = 32
    kernel: int = 5

    name: ClassVar[str]

    def __post_init__(self) -> None:
        percent(self.name, self.keep)
        observes(self.name, self.window, self.kernel)

    def scores(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """What `needed` says of the tokens before the window; those of the window are always kept."""
        assert queries is not None
        groups, tokens, _ = keys.shape
        queries = latest(self, queries, tokens)
        before = tokens - queries.shape[1]
        weights = observed(keys, queries)[:, :, :before]
        found = self.needed(weights, groups) if before else weights.new_empty(groups, 0)
        return torch.nn.functional.pad(found, (0, tokens - before), value=torch.inf)

    def needed(self, weights: Tensor, groups: int) -> Tensor:
        """How much tokens should be kept, [G, N], by the attention [H, W, N] that the window's queries give them."""
        raise NotImplementedError
