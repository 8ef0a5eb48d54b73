"""The baseline: one causal chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, end, ids, prefix_spans, segments_read, where_computed
from kvgraph.plan import Plan, contiguous


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

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        spans = prefix_spans(graph)
        for segment in segments_read(graph):
            if segment.tokens:
                spans.append(segment.span(end(spans[-1:]), where_computed(spans)))
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)
