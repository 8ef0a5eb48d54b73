"""Parallel Context Windows: documents at shared positions; none reads another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, end, ids, prefix_spans, segments_read, where_computed
from kvgraph.plan import Plan, Span, contiguous


@dataclass(frozen=True)
class PCW(Method):
    """Every document is a window: all stand right after the prefix, at the same positions, and none reads another.

    The query sees the prefix once and every document, and stands right after the longest one. Windows have no BOS of
    their own. Without a shared prefix this is graph-kv without edges.

    shared_prefix: documents see the prefix and are encoded after it. With BOS as the prefix this is the released code,
        which starts every window with BOS and shows the query only one of them.

    Source: Parallel Context Windows (arXiv 2212.10947), section 2, and the released code.
    """

    name: ClassVar[str] = "pcw"

    shared_prefix: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.shared_prefix, bool):
            raise GraphError(f"pcw: shared_prefix must be true or false, not {self.shared_prefix!r}")

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        spans = windows(graph, shared_prefix=self.shared_prefix)
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)


def windows(graph: ContextGraph, *, shared_prefix: bool) -> list[Span]:
    """The prefix's spans, then one per document: all start at the position after the prefix and see it or nothing."""
    prefix = prefix_spans(graph)
    seen = where_computed(prefix) if shared_prefix else ()
    return [*prefix, *(segment.span(end(prefix), seen) for segment in segments_read(graph) if segment.tokens)]
