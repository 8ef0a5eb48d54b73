"""CacheBlend: documents encoded alone; the tokens that this changes most are recomputed with the query."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, recomputed, segments_read
from kvgraph.plan import Plan


@dataclass(frozen=True)
class CacheBlend(Method):
    """Every segment is encoded alone; the tokens whose KV this changes most are recomputed, seeing all before them.

    The recomputed tokens run in one pass with the query, and readers of a segment see them instead of the stored ones.
    All positions are sequential, and the prefix is never recomputed.

    The choice of tokens needs the model. `Engine.plan` measures how far every token's KV is off (kvgraph.engine.probe)
    and plans with `selecting(deviations)`. Once `selected` is given, the plan is a pure function of the graph.

    ratio: share of all segments' tokens to recompute. 0 gives `block`, 1 gives what `full` computes; neither needs a
        probe.
    selected: indices of the tokens to recompute, one tuple per segment that the query reads, in its order. Segments
        beyond the end of the list have none. None means not measured yet.

    Raises GraphError for a ratio outside 0..1, and from `plan` when the selection is missing or doesn't fit the graph.
    Source: CacheBlend (arXiv 2405.16444), sections 4.2 and 4.3; 15 % is its default. Simplified: one selection, made on
    the second layer as in the released code, serves all layers. The paper also describes gradual filtering, a larger
    selection that shrinks from layer to layer.
    """

    name: ClassVar[str] = "cacheblend"

    ratio: float = 0.15
    selected: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= 1:
            raise GraphError(f"cacheblend: ratio must be a number from 0 to 1, not {self.ratio!r}")
        if self.selected is None:
            return
        try:
            selected = tuple(tuple(sorted({operator.index(i) for i in indices})) for indices in self.selected)
        except TypeError:
            raise GraphError("cacheblend: selected must be token indices, one list per segment") from None
        object.__setattr__(self, "selected", selected)

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential."""
        return False

    @property
    def needs_probe(self) -> bool:
        """Whether the plan depends on deviations that haven't been measured yet."""
        return self.selected is None and 0 < self.ratio < 1

    def selecting(self, deviations: Sequence[Sequence[float]]) -> CacheBlend:
        """The same method with the most deviating tokens selected, `ratio` of all; of equal ones the earlier.

        deviations: one number per token, by segment. If empty, nothing is selected.
        """
        tokens = [(-d, segment, i) for segment, row in enumerate(deviations) for i, d in enumerate(row)]
        selected: list[list[int]] = [[] for _ in deviations]
        for _, segment, i in sorted(tokens)[: round(self.ratio * len(tokens))]:
            selected[segment].append(i)
        return replace(self, selected=tuple(map(tuple, selected)))

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, edges, or without a selection."""
        check(graph, self.name)
        return recomputed(graph, self._selection(graph), self.name)

    def _selection(self, graph: ContextGraph) -> list[Sequence[int]]:
        """The indices to recompute of every segment that the query reads."""
        if self.needs_probe:
            raise GraphError(
                f"cacheblend with ratio={self.ratio} needs a model to select tokens; plan with an engine "
                "(Engine.plan, kvgraph ask), or set ratio=0, ratio=1 or selected"
            )
        segments = segments_read(graph)
        lengths = [len(segment.tokens) for segment in segments]
        if self.selected is None:
            return [range(n) if self.ratio else () for n in lengths]
        if len(self.selected) > len(lengths):
            raise GraphError(
                f"cacheblend selects from {len(self.selected)} segments but the graph has {len(lengths)}; measure again"
            )
        chosen: list[Sequence[int]] = [*self.selected, *[()] * (len(lengths) - len(self.selected))]
        for segment, indices, n in zip(segments, chosen, lengths, strict=True):
            if indices and not 0 <= min(indices) <= max(indices) < n:
                raise GraphError(
                    f"cacheblend selects tokens {min(indices)}..{max(indices)} of {segment.name}, which has {n}"
                )
        return chosen
