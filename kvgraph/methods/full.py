"""The baseline: one causal chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, end, ids, prefix_spans, segments_read
from kvgraph.plan import Place, Plan, contiguous


@dataclass(frozen=True)
class Full(Method):
    """Prefix, segments and query as one causal chain at sequential positions; equals a plain causal prefill.

    Requests that begin with the same pieces share them in the store. This is ordinary prefix caching.
    Source: the baseline of the papers ("sequential encoding" in Graph-KV, arXiv 2506.07334); `vanilla` in
    Graph-KV's code.
    """

    name: ClassVar[str] = "full"

    @property
    def needs_tuning(self) -> bool:
        """False: every causal model was trained on this."""
        return False

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential."""
        return False

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        spans = prefix_spans(graph)
        last = spans[-1] if spans else None
        places = () if last is None else (*last.sees, Place(len(spans) - 1, last.start))
        for segment in segments_read(graph):
            if segment.tokens:
                spans.append(segment.span(end(spans[-1:]), places))
                places = (*places, Place(len(spans) - 1, spans[-1].start))
        query = contiguous(ids(graph.query), end(spans[-1:]), places, cached=False, name="query")
        return Plan((*spans, query), self.name)
