"""Block-Attention: every segment alone, at sequential positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, end, ids, prefix_spans, segments_read, where_computed
from kvgraph.plan import Plan, contiguous


@dataclass(frozen=True)
class Block(Method):
    """Every segment, prefix included, is encoded alone; the query sees all of them at sequential positions.

    A prefix of several pieces is one causal chain.
    Source: Block-Attention (arXiv 2409.15355), its block-wise prefill; `block`, `block_batch` and the
    Block-Attention server in Graph-KV's code.
    """

    name: ClassVar[str] = "block"

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential."""
        return False

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        spans = prefix_spans(graph)
        for segment in segments_read(graph):
            if segment.tokens:
                spans.append(segment.span(end(spans[-1:])))
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)
