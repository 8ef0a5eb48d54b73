"""APE: documents at shared positions after a shared prefix, weighed by a temperature and a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, check, end, ids, where_computed
from kvgraph.methods.pcw import windows
from kvgraph.plan import Group, Plan, contiguous

LEAST, MOST = 0.1, 10.0


@dataclass(frozen=True)
class APE(Method):
    """Every document is encoded after the shared prefix, at the same positions; the query follows the longest.

    For the query and the answer, the documents are one group, without the prefix. The scores of their tokens are
    divided by `temperature`. The log-sum-exp of all these scores is multiplied by temperature * scale; then it competes
    with the prefix and with the query's and the answer's own tokens. Documents are encoded with plain attention. With
    both fields at 1 this is pcw with a shared prefix.

    temperature, scale: numbers from 0.1 to 10. The defaults are those of the released code.

    Source: APE (arXiv 2502.05431), section 4, and the released code. The paper's listing multiplies the log-sum-exp by
    one factor `scale`, the code by scale * temperature; this follows the code.
    """

    name: ClassVar[str] = "ape"

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        for field in ("temperature", "scale"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST <= value <= MOST:
                raise GraphError(f"ape: {field} must be a number from {LEAST:g} to {MOST:g}, not {value!r}")

    @property
    def trains_by_mask(self) -> bool:
        """False: a mask can't weigh a group of keys."""
        return False

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or edges."""
        check(graph, self.name)
        spans = windows(graph, shared_prefix=True)
        pieces = len(graph.prefix)
        places = [place._replace(group=int(place.span >= pieces)) for place in where_computed(spans)]
        context = Group(self.temperature, self.temperature * self.scale)
        query = contiguous(ids(graph.query), end(spans), places, cached=False, name="query", groups=[context])
        return Plan((*spans, query), self.name)
