"""The baseline: one causal chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import chain, check, end, ids, prefix_parts, segment_parts, where_computed
from kvgraph.plan import Plan, contiguous


@dataclass(frozen=True)
class Full:
    """Prefix, segments and query as one causal chain at sequential positions; equals a plain causal prefill.

    Requests that begin with the same pieces share them in the store: this is ordinary prefix caching.
    Source: the baseline of the papers ("sequential encoding" in Graph-KV, arXiv 2506.07334); `vanilla` in
    Graph-KV's code.
    """

    name: ClassVar[str] = "full"

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        graph = check(graph, self.name)
        spans = chain([*prefix_parts(graph), *segment_parts(graph)])
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)
