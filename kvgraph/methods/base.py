"""What methods share: the checks every graph passes first, and the pieces plans are laid out from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.plan import Place, Plan, Span, contiguous

Part = tuple[str, tuple[int, ...]]  # (name, token ids), never empty


class Method(Protocol):
    """A pure function from graphs to plans; its dataclass fields are its whole configuration."""

    name: ClassVar[str]

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph with a query. Raises GraphError when the graph doesn't fit the method."""
        ...


@runtime_checkable
class Probing(Method, Protocol):
    """A method whose plan depends on what the model computes: the engine measures, the method decides."""

    @property
    def needs_probe(self) -> bool:
        """Whether deviations are wanted; without, `plan` is as pure as any method's."""
        ...

    def selecting(self, deviations: Sequence[Sequence[float]]) -> Method:
        """The method that knows them: one number a token, by segment; an empty sequence when nobody looked."""
        ...


def check(graph: ContextGraph, method: str, *, reads_edges: bool = False) -> ContextGraph:
    """The graph as the method sees it. A method without edges sees the chosen segments alone, as if there were no others.

    Raises GraphError unless the graph is tokenized, has a query, and has no edges that the method would ignore.
    """
    if not graph.is_tokenized:
        raise GraphError(f"{method} plans token ids but the graph holds text; call graph.tokenized(encode) first")
    if not graph.query:
        raise GraphError("the query is empty; a plan ends with at least one live token (see ContextGraph.with_query)")
    if reads_edges:
        return graph
    if graph.edges:
        raise GraphError(
            f"{method} ignores edges, but the graph has {len(graph.edges)}; leave them out or use graph-kv"
        )
    return graph.restricted()


def ids(piece: str | tuple[int, ...]) -> tuple[int, ...]:
    """The token ids of a piece of a tokenized graph, where the only text left is empty."""
    return () if isinstance(piece, str) else piece


def prefix_parts(graph: ContextGraph) -> list[Part]:
    """The prefix's pieces."""
    several = len(graph.prefix) > 1
    return [(f"prefix {i}" if several else "prefix", ids(piece)) for i, piece in enumerate(graph.prefix)]


def segment_parts(graph: ContextGraph) -> list[Part]:
    """The segments that hold tokens."""
    return [(name, ids(s)) for name, s in zip(graph.names, graph.segments, strict=True) if s]


def chain(parts: Iterable[Part]) -> list[Span]:
    """Spans at sequential positions from 0, each seeing all before it: together a plain causal prefill."""
    spans: list[Span] = []
    for name, tokens in parts:
        spans.append(contiguous(tokens, end(spans), where_computed(spans), name=name))
    return spans


def where_computed(spans: Sequence[Span]) -> list[Place]:
    """A place for every span of a plan's beginning, at the position where it was computed."""
    return [Place(i, span.start) for i, span in enumerate(spans)]


def recomputed(graph: ContextGraph, selected: Sequence[Collection[int]], method: str) -> Plan:
    """The plan of `block`, but with `selected` tokens of each segment (their indices) live, in one span with the query.

    The live tokens keep their positions, so each sees all before it: the tokens of segments that aren't selected as
    they were stored, the selected ones as they are now. A segment without tokens left makes no span.
    """
    spans = chain(prefix_parts(graph))
    places, at = where_computed(spans), end(spans)
    live: list[tuple[int, int]] = []  # (token, position)
    for name, segment, chosen in zip(graph.names, graph.segments, selected, strict=True):
        tokens, cuts = ids(segment), sorted(set(chosen))
        for before, hi in pairwise([-1, *cuts, len(tokens)]):
            if before + 1 < hi:
                places.append(Place(len(spans), at, before + 1, hi))
        if len(cuts) < len(tokens):
            spans.append(contiguous(tokens, at, name=name))
        live += [(tokens[i], at + i) for i in cuts]
        at += len(tokens)
    label = "recomputed + query" if live else "query"
    live += [(token, at + i) for i, token in enumerate(ids(graph.query))]
    live_tokens, positions = zip(*live, strict=True)
    return Plan((*spans, Span(live_tokens, positions, tuple(places), cached=False, name=label)), method)


def end(spans: Iterable[Span]) -> int:
    """The position after the highest in use, 0 without spans."""
    return max((span.positions[-1] + 1 for span in spans), default=0)


def require_int(method: str, field: str, value: Any, least: int = 0) -> None:
    """Raise GraphError unless a method's field is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise GraphError(f"{method}: {field} must be an integer of at least {least}, not {value!r}")


def require_one_of(method: str, field: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise GraphError unless a method's field is one of `allowed`."""
    if value not in allowed:
        raise GraphError(f"{method}: {field} must be one of {', '.join(allowed)}, not {value!r}")
