"""Prompt Cache: documents encoded alone, in slots of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import (
    Method,
    SegmentTokens,
    check,
    end,
    ids,
    prefix_spans,
    require_int,
    segments_read,
    where_computed,
)
from kvgraph.plan import Plan, contiguous


@dataclass(frozen=True)
class PromptCache(Method):
    """Every document is encoded alone and starts its slot: slot i is at P + i * slot, with P the prefix's length.

    The query sees everything and stands after the last slot. The rest of a shorter document's slot is a gap in the
    positions, and the whole slot of an empty document is one. In the paper's terms, the schema is the prefix followed
    by one union of all documents per slot, and a union is as long as its longest member.

    slot: length of a slot in positions; the longest document of the graph unless given. Give it, as a schema would, to
        keep positions equal between graphs of one corpus. The keys of documents don't depend on it.

    Raises GraphError, from `plan`, for a document that is longer than its slot.
    Source: Prompt Cache (arXiv 2311.04934), section 3, and the released code.
    """

    name: ClassVar[str] = "prompt-cache"

    slot: int | None = None

    def __post_init__(self) -> None:
        if self.slot is not None:
            require_int(self.name, "slot", self.slot, least=1)

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential, with gaps."""
        return False

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, edges, or too long a document."""
        check(graph, self.name)
        spans, segments = prefix_spans(graph), segments_read(graph)
        at, slot = end(spans), self._slot(segments)
        for i, segment in enumerate(segments):
            if segment.tokens:
                spans.append(segment.span(at + i * slot))
        start = at + len(segments) * slot
        query = contiguous(ids(graph.query), start, where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)

    def _slot(self, segments: Sequence[SegmentTokens]) -> int:
        lengths = [len(segment.tokens) for segment in segments]
        longest = max(lengths, default=0)
        if self.slot is None:
            return longest
        if longest > self.slot:
            i = lengths.index(longest)
            raise GraphError(
                f"segment {i} ({segments[i].name}) has {longest} tokens, more than the slot of {self.slot}; "
                f"shorten it or give a longer slot"
            )
        return self.slot
