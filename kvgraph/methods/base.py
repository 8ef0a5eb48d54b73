"""What a method is and can do, the checks every graph passes first, and the building blocks of plans.

To add a method: a frozen dataclass in a file of its own, derived from `Method`, with a `name` and `plan`; then a line in
`kvgraph.methods.registry`, or an entry point of another package (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.plan import Place, Plan, Span, contiguous


class Variation(NamedTuple):
    """The same method with one thing changed. about: a few words for a table. edges: False leaves the edges out."""

    name: str
    about: str
    method: Method
    edges: bool = True


class Method(ABC):
    """A pure function from graphs to plans. Subclasses are frozen dataclasses whose fields are their whole configuration.

    The properties below are capabilities: the engine, the server, training and evaluation ask for them before they use
    a method. The defaults are those of a method that ignores edges and computes only the graph's own tokens.
    """

    name: ClassVar[str]

    @abstractmethod
    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph with a query. Raises GraphError when the graph doesn't fit the method."""

    @property
    def reads_edges(self) -> bool:
        """Whether edges change the plan. If not, `plan` refuses a graph with edges."""
        return False

    @property
    def needs_tuning(self) -> bool:
        """Whether a model must be tuned for the method to give its best answers."""
        return True

    @property
    def own_tokens(self) -> tuple[int, ...]:
        """Token ids that the method adds to those of the graph, ascending. No text may contain them."""
        return ()

    @property
    def link_tokens(self) -> tuple[int, ...]:
        """Its own tokens that stand between documents and the query. A model can learn to read them instead."""
        return ()

    @property
    def trains_by_mask(self) -> bool:
        """Whether an attention mask can express its plans. If so, a model can be trained through them."""
        return True

    @property
    def shares_positions(self) -> bool:
        """Whether tokens may share positions. If not, the engine refuses a prompt that is too long before it is planned."""
        return True

    # -- plans that depend on the model -------------------------------------------------------------------------------

    @property
    def needs_probe(self) -> bool:
        """Whether plans depend on deviations measured on the model; then `selecting(deviations)` makes them."""
        return False

    def selecting(self, deviations: Sequence[Sequence[float]]) -> Method:
        """The method, given how far each token's KV is off: one number per token, by segment; empty if not measured."""
        return self

    # -- graphs that are encoded ahead of requests --------------------------------------------------------------------

    def for_corpus(self, longest: int) -> Method:
        """The method with every field fixed that would depend on the whole graph.

        A part of the graph is then encoded as in the whole graph. The part is the segments that a query reads and those
        up to `reach` edges before them. longest: tokens of the graph's longest segment. Raises GraphError if the method
        can't do this.
        """
        why = "can't encode a part of a graph as in the whole" if self.reads_edges else "reads no edges"
        raise GraphError(f"{self.name} {why}; name stored segments in a request's documents instead")

    @property
    def reach(self) -> int:
        """How many edges away a segment may be and still change another's KV."""
        return 0

    # -- ablations ----------------------------------------------------------------------------------------------------

    def variations(self) -> Mapping[str, Sequence[Variation]]:
        """What to compare the method with, by ablation: "mask-positions", "rounds" or "keep"."""
        return {}

    def outline(self, graph: ContextGraph) -> Any:
        """A value that determines the plan of a graph like this one, whatever its segments' lengths.

        Equal outlines mean equal plans. Ablations leave out a variant with the outline of another.
        """
        return (self, frozenset(graph.edges)) if self.reads_edges else self


def check(graph: ContextGraph, method: str, *, reads_edges: bool = False) -> None:
    """Raise GraphError unless the graph is tokenized, has a query, and has no edges that the method would ignore."""
    if not graph.is_tokenized:
        raise GraphError(f"{method} plans token ids but the graph holds text; call graph.tokenized(encode) first")
    if not graph.query:
        raise GraphError(
            "the query is empty; the prompt span of a plan needs at least one token (see ContextGraph.with_query)"
        )
    if graph.edges and not reads_edges:
        raise GraphError(
            f"{method} ignores edges, but the graph has {len(graph.edges)}; leave them out or use graph-kv"
        )


def ids(piece: str | tuple[int, ...]) -> tuple[int, ...]:
    """The token ids of a piece of a tokenized graph, in which any text is empty."""
    return () if isinstance(piece, str) else piece


def prefix_spans(graph: ContextGraph, ending: Sequence[int] = ()) -> list[Span]:
    """The prefix as a causal chain from position 0, one span per piece. ending: tokens added to the last piece."""
    pieces = [ids(piece) for piece in graph.prefix]
    if ending:
        last = pieces.pop() if pieces else ()
        pieces.append((*last, *ending))
    spans: list[Span] = []
    places: tuple[Place, ...] = ()  # grown, so that all readers of a span share one place
    for i, tokens in enumerate(pieces):
        name = f"prefix {i}" if len(pieces) > 1 else "prefix"
        spans.append(contiguous(tokens, end(spans[-1:]), places, name=name))
        places = (*places, Place(i, spans[i].start))
    return spans


class SegmentTokens(NamedTuple):
    """A segment of a graph: its index, its name, and its token ids (possibly none)."""

    number: int
    name: str
    tokens: tuple[int, ...]

    def span(self, start: int, sees: Sequence[Place] = (), *, round: int = 0) -> Span:
        """A version of it at positions start, start + 1, ..."""
        name = f"{self.name} · round {round}" if round else self.name
        return contiguous(self.tokens, start, sees, name=name, segment=self.number, round=round)


def segments_read(graph: ContextGraph) -> list[SegmentTokens]:
    """The segments that the query reads, in order, including empty ones. A method without edges needs no others."""
    return [SegmentTokens(i, graph.names[i], ids(graph.segments[i])) for i in graph.read]


def where_computed(spans: Sequence[Span]) -> list[Place]:
    """A place for each of a plan's first spans, at the position where it was computed."""
    return [Place(i, span.start) for i, span in enumerate(spans)]


def prompt_span(tokens: Sequence[tuple[int, int]], sees: Sequence[Place], name: str) -> Span:
    """The prompt span of (token, position) pairs."""
    token_ids, positions = zip(*tokens, strict=True)
    return Span(token_ids, positions, tuple(sees), cached=False, name=name)


def recomputed(graph: ContextGraph, selected: Sequence[Collection[int]], method: str) -> Plan:
    """The plan of `block`, with selected tokens of the segments moved into the prompt span.

    selected: the indices of these tokens, by segment read.

    The recomputed tokens keep their positions, so each sees all tokens before it: the selected ones as recomputed, the
    others as stored. A segment whose tokens are all selected makes no span.
    """
    spans = prefix_spans(graph)
    places, at = where_computed(spans), end(spans)
    prompt: list[tuple[int, int]] = []  # (token, position)
    for segment, chosen in zip(segments_read(graph), selected, strict=True):
        tokens, cuts = segment.tokens, sorted(set(chosen))
        for before, hi in pairwise([-1, *cuts, len(tokens)]):
            if before + 1 < hi:
                places.append(Place(len(spans), at, before + 1, hi))
        if len(cuts) < len(tokens):
            spans.append(segment.span(at))
        prompt += [(tokens[i], at + i) for i in cuts]
        at += len(tokens)
    label = "recomputed + query" if prompt else "query"
    prompt += [(token, at + i) for i, token in enumerate(ids(graph.query))]
    return Plan((*spans, prompt_span(prompt, places, label)), method)


def end(spans: Iterable[Span]) -> int:
    """The position after the highest in use; 0 without spans."""
    return max((span.positions[-1] + 1 for span in spans), default=0)


def require_int(method: str, field: str, value: Any, least: int = 0) -> None:
    """Raise GraphError unless a method's field is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise GraphError(f"{method}: {field} must be an integer of at least {least}, not {value!r}")


def require_one_of(method: str, field: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise GraphError unless a method's field is one of `allowed`."""
    if value not in allowed:
        raise GraphError(f"{method}: {field} must be one of {', '.join(allowed)}, not {value!r}")
