"""EPIC: documents encoded alone; the first tokens of each are recomputed with the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, recomputed, require_int, segments_read
from kvgraph.plan import Plan


@dataclass(frozen=True)
class Epic(Method):
    """Every segment is encoded alone; its first `k` tokens are recomputed, seeing everything before them.

    The first tokens of a text that is encoded alone become attention sinks, and would act as sinks in the middle of a
    prompt as well. Recomputed there, they are ordinary tokens. They run in one pass with the query, and readers of a
    segment see them instead of the stored ones. All positions are sequential. The start of the prompt isn't recomputed:
    this is the prefix or, without one, the first segment that isn't empty.

    k: tokens recomputed per segment. 0 gives `block`; the longest segment's length or more gives what `full` computes.

    Source: EPIC (arXiv 2410.15332), its LegoLink algorithm with k from 2 to 32. Its evaluation compares LegoLink-16
    with CacheBlend. LegoLink-0, which encodes chunks after dummy tokens, isn't implemented.
    """

    name: ClassVar[str] = "epic"

    k: int = 16

    def __post_init__(self) -> None:
        require_int(self.name, "k", self.k)

    @property
    def shares_positions(self) -> bool:
        """False: all positions are sequential."""
        return False

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        lengths = [len(segment.tokens) for segment in segments_read(graph)]
        heads = [range(min(self.k, length)) for length in lengths]
        if not graph.prefix:
            opening = next((i for i, length in enumerate(lengths) if length), None)
            heads = [range(0) if i == opening else head for i, head in enumerate(heads)]
        return recomputed(graph, heads, self.name)
