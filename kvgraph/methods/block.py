"""Block-Attention: every segment alone, at sequential positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import chain, check, end, ids, prefix_parts, segment_parts, where_computed
from kvgraph.plan import Plan, contiguous


@dataclass(frozen=True)
class Block:
    """Every segment, prefix included, is encoded alone; the query sees all of them at sequential positions.

    A prefix of several pieces is one causal chain.
    Source: Block-Attention (arXiv 2409.15355), its block-wise prefill; `block`, `block_batch` and the
    Block-Attention server in Graph-KV's code.
    """

    name: ClassVar[str] = "block"

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        graph = check(graph, self.name)
        spans = chain(prefix_parts(graph))
        for name, tokens in segment_parts(graph):
            spans.append(contiguous(tokens, end(spans[-1:]), name=name))
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)
