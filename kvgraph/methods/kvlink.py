"""KVLink: documents encoded alone, joined by a few link tokens after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import (
    Method,
    check,
    end,
    ids,
    prefix_spans,
    prompt_span,
    require_int,
    segments_read,
    where_computed,
)
from kvgraph.plan import Plan

MOST_LINKS = 1000  # the paper has at most 5


@dataclass(frozen=True)
class KVLink(Method):
    """Every document is encoded alone; `links` link tokens after each see everything before them, links included.

    The link tokens run in one pass with the query; their positions lie between those of the documents. All positions
    are sequential. An empty document keeps its slot and its link tokens.

    links: link tokens per document (0, 1 or 5 in the published models).
    link_start: token id of the first link token. Link token j of document slot s is link_start + links * s + j.
    slots: documents that the checkpoint has link tokens for.
    mem_start, mem_end: token ids that end the prefix and start the query; None leaves them out.

    Raises GraphError when link_start is missing, and from `plan` when there are more documents than slots.
    Source: KVLink (arXiv 2502.16002), its positional re-encoding and link tokens, and the released evaluation code.
    """

    name: ClassVar[str] = "kvlink"

    links: int = 0
    link_start: int | None = None
    slots: int = 40
    mem_start: int | None = None
    mem_end: int | None = None

    def __post_init__(self) -> None:
        require_int(self.name, "links", self.links)
        require_int(self.name, "slots", self.slots, least=1)
        for field in ("link_start", "mem_start", "mem_end"):
            if getattr(self, field) is not None:
                require_int(self.name, field, getattr(self, field))
        if self.links > MOST_LINKS:
            raise GraphError(f"kvlink: links must be at most {MOST_LINKS}, not {self.links}")
        if self.links and self.link_start is None:
            raise GraphError(
                f"kvlink with links={self.links} needs link_start, the id of the model's first link token; "
                f"the presets kvlink-llama3-1 and kvlink-llama3-5 have the one of the released Llama 3 models"
            )

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential."""
        return False

    @property
    def link_tokens(self) -> tuple[int, ...]:
        """The ids of every link token of every slot."""
        first = self.link_start or 0
        return tuple(range(first, first + self.links * self.slots))

    @property
    def own_tokens(self) -> tuple[int, ...]:
        """Link and memory tokens."""
        markers = (token for token in (self.mem_start, self.mem_end) if token is not None)
        return tuple(sorted((*self.link_tokens, *markers)))

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, edges, or too many documents."""
        check(graph, self.name)
        segments = segments_read(graph)
        if self.links and len(segments) > self.slots:
            raise GraphError(f"kvlink has link tokens for {self.slots} documents but the graph has {len(segments)}")
        spans = prefix_spans(graph, ending=() if self.mem_start is None else (self.mem_start,))
        at = end(spans)
        prompt: list[tuple[int, int]] = []  # (token, position)
        for slot, segment in enumerate(segments):
            if segment.tokens:
                spans.append(segment.span(at))
                at += len(segment.tokens)
            first = (self.link_start or 0) + self.links * slot
            prompt += zip(range(first, first + self.links), range(at, at + self.links), strict=True)
            at += self.links
        opening = () if self.mem_end is None else (self.mem_end,)
        prompt += [(token, at + i) for i, token in enumerate((*opening, *ids(graph.query)))]
        label = "links + query" if self.links and segments else "query"
        return Plan((*spans, prompt_span(prompt, where_computed(spans), label)), self.name)
