"""Graph-KV: segments encoded alone, then again while they read their sources' caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

from kvgraph.errors import GraphError, PlanError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import (
    Method,
    SegmentTokens,
    Variation,
    check,
    end,
    ids,
    prefix_spans,
    require_int,
    require_one_of,
    where_computed,
)
from kvgraph.plan import Place, Plan, Span, contiguous, pruned

LAYOUTS = ("aligned", "tight", "packed", "sequential")
MOST_ROUNDS = 1000  # on a cycle, every round makes new versions without end
COMPARED_ROUNDS = range(4)  # in ablations

# Bounds of a plan's versions of segments and of what these see, or GROWTH times a larger graph's segments and edges. They
# hold before anything is made: a body of a few kilobytes could otherwise ask for gigabytes of spans.
MOST_SPANS, MOST_PLACES, GROWTH = 1 << 17, 1 << 20, 8

Slice = tuple[int, int]  # of a segment's tokens: the first, and the one after the last


@dataclass(frozen=True)
class GraphKV(Method):
    """Round 0 encodes every segment alone; in round r a segment is encoded again, reading its sources.

    A segment gets a version in round r if one of its sources got one in round r - 1. This version sees the newest
    versions of its sources, as of round r - 1. It sees its own only if it is its own source, and never the prefix. The
    query sees the prefix, the newest version of every segment, and every version that a visible version read.

    A graph with chosen segments is encoded as a whole. Rounds, bands and positions are those of the whole graph, so
    every segment has the same KV as without a choice. Only the query sees less: the prefix and versions of chosen
    segments. What a visible version read of other segments stays hidden. The layout decides where the query stands. In
    "aligned" and "sequential" it follows the last band with something that it sees. In "packed" it sees the chosen
    segments alone, end to end in the order chosen, and follows them.

    rounds: how often caches travel along an edge; 0 without edges.
    keep: "all" shows the query every round-0 version too; "read" only those that a visible version read.
    layout: see below, with P the prefix's length and L the band.
    band: L for "aligned"; the longest segment unless given. A band fixed for a corpus keeps the keys of re-encoded
        segments when a longer document is added.
    drop_token: "packed" only. Tokens with this id are computed in their segment but hidden from its readers, and later
        keys close the gap. The released code pads with eos, and thus drops eos inside documents.

    - "aligned": versions of round r stand at P + r * L, the query right after the last band in use.
    - "tight": a reader starts right after the highest position that it sees, and segments that read nothing start at P.
      The query stands right after the highest position in use. Separate ego groups thus share positions.
    - "packed" (keep "all", one round, every segment a reader): a reader sees its sources' round-0 versions end to end
      from 0, in segment order, and is computed right after them. The query sees all round-0 versions end to end from P,
      then all round-1 versions, and stands after these. Caches are moved between being computed and being read.
    - "sequential": no position is shared. Round 0 stands end to end from P as in `block`, each further round end to end
      after the one before, and the query after the last. This is a control: the attention mask of "aligned" without its
      positions. Without edges it is `block`.

    Raises GraphError for fields that don't go together, and from `plan` when a segment is longer than the band. `plan`
    raises PlanError where many rounds, or many dropped tokens, make a plan far larger than its graph.
    Source: Graph-KV (arXiv 2506.07334), its structure-aware attention and positional encoding allocation. "aligned" is
    the paper's Full with all-pairs edges, its Top-m with top-k edges, and its multi-hop variants with layered edges and
    rounds = depth. "tight" is `gapemp_graph(_batch)` of the released code, "packed" is its `gapemp` and `gapemp_appr`.
    """

    name: ClassVar[str] = "graph-kv"

    rounds: int = 1
    keep: Literal["read", "all"] = "read"
    layout: Literal["aligned", "tight", "packed", "sequential"] = "aligned"
    band: int | None = None
    drop_token: int | None = None

    def __post_init__(self) -> None:
        require_int(self.name, "rounds", self.rounds)
        if self.rounds > MOST_ROUNDS:
            raise GraphError(
                f"graph-kv: rounds must be at most {MOST_ROUNDS}, not {self.rounds}; each encodes every reader again"
            )
        require_one_of(self.name, "keep", self.keep, ("read", "all"))
        require_one_of(self.name, "layout", self.layout, LAYOUTS)
        if self.layout == "packed" and (self.keep, self.rounds) != ("all", 1):
            raise GraphError('graph-kv: layout "packed" is defined for keep="all" and rounds=1 only; set both')
        if self.band is not None:
            require_int(self.name, "band", self.band, least=1)
            if self.layout != "aligned":
                raise GraphError(f'graph-kv: band belongs to layout "aligned", not "{self.layout}"; leave it out')
        if self.drop_token is not None:
            require_int(self.name, "drop_token", self.drop_token)
            if self.layout != "packed":
                raise GraphError(f'graph-kv: drop_token belongs to layout "packed", not "{self.layout}"; leave it out')

    @property
    def reads_edges(self) -> bool:
        """Whether there is at least one round."""
        return self.rounds > 0

    @property
    def reach(self) -> int:
        """One edge per round."""
        return self.rounds

    def for_corpus(self, longest: int) -> GraphKV:
        """The method with its band fixed.

        Raises GraphError for layouts in which a segment's position depends on segments that it doesn't read.
        """
        if self.layout not in ("aligned", "tight"):
            raise GraphError(
                f'in layout "{self.layout}" the query\'s view depends on every segment of the graph; use aligned or tight'
            )
        return replace(self, band=longest) if self.layout == "aligned" and self.band is None else self

    def variations(self) -> Mapping[str, Sequence[Variation]]:
        """The mask without the positions, the positions without the mask, other numbers of rounds, the other `keep`."""
        made: dict[str, Sequence[Variation]] = {}
        if self.layout in ("aligned", "tight"):
            plain = replace(self, layout="sequential", band=None)
            made["mask-positions"] = [
                Variation("mask-only", "the edges, at sequential positions", plain),
                Variation("positions-only", "shared positions, without edges", self, edges=False),
                Variation("neither", "sequential positions, without edges (block)", plain, edges=False),
            ]
        if self.layout != "packed":
            made["rounds"] = [
                Variation(f"rounds-{n}", f"{n} round{'s' * (n != 1)}", replace(self, rounds=n), edges=n > 0)
                for n in COMPARED_ROUNDS
                if n != self.rounds
            ]
            if self.keep == "read":
                about, other = "standalone versions kept for the query", replace(self, keep="all")
            else:
                about, other = "standalone versions dropped unless read", replace(self, keep="read")
            made["keep"] = [Variation(f"keep-{other.keep}", about, other)]
        return made

    def outline(self, graph: ContextGraph) -> Any:
        """The plan with segments of 1, 2, 3, ... distinct tokens."""
        count = len(graph.segments)
        tokens = iter(range(1, (count + 1) ** 2))
        segments = [[next(tokens) for _ in range(i + 1)] for i in range(count)]
        method = self if self.band is None else replace(self, band=max(self.band, count))
        return method.plan(ContextGraph(segments, [0], edges=graph.edges))

    def plan(self, graph: ContextGraph) -> Plan:
        """The plan of a tokenized graph; raises GraphError for text, an empty query, or a segment above the band."""
        check(graph, "graph-kv" if self.rounds else "graph-kv with rounds=0", reads_edges=self.rounds > 0)
        segments = {
            i: SegmentTokens(i, graph.names[i], ids(segment)) for i, segment in enumerate(graph.segments) if segment
        }
        sources: dict[int, list[int]] = {i: [] for i in segments}
        for source, reader in sorted(graph.edges):
            if source in segments and reader in segments:  # edges of empty segments are dropped
                sources[reader].append(source)
        lay_out = self._packed if self.layout == "packed" else self._in_rounds
        spans, places, start = lay_out(graph, segments, sources)
        query = contiguous(ids(graph.query), start, places, cached=False, name="query")
        return pruned([*spans, query], self.name)

    def _in_rounds(
        self, graph: ContextGraph, segments: dict[int, SegmentTokens], sources: dict[int, list[int]]
    ) -> tuple[list[Span], list[Place], int]:
        """Every layout except "packed": (spans, what the query sees, where it starts)."""
        rounds = self._readers(graph, sources)
        spans = prefix_spans(graph)
        prefix, origin, band = where_computed(spans), end(spans), self._band(graph)
        offsets = dict.fromkeys(segments, 0)  # where a segment stands in its round's band
        if self.layout == "sequential":
            lengths = (len(segment.tokens) for segment in segments.values())
            offsets = dict(zip(segments, accumulate(lengths, initial=0), strict=False))
        newest: dict[int, int] = {}  # segment -> its newest version, as an index into spans
        for i, segment in segments.items():
            newest[i] = len(spans)
            spans.append(segment.span(origin + offsets[i]))
        made = {v: (i, 0) for i, v in newest.items()}  # version -> its segment and round
        read = {i for i in graph.read if i in segments}
        visible = {newest[i] for i in read} if self.keep == "all" else set()

        for r, readers in enumerate(rounds, 1):
            before = dict(newest)
            for i in readers:
                seen = [before[s] for s in sources[i]]
                tight = self.layout == "tight"
                start = end(spans[v] for v in seen) if tight else origin + r * band + offsets[i]
                newest[i] = len(spans)
                made[newest[i]] = i, r
                places = [Place(v, spans[v].start) for v in seen]
                spans.append(segments[i].span(start, places, round=r))

        visible.update(newest[i] for i in read)
        for v in reversed(range(len(spans))):  # versions see earlier ones only, so one pass reaches the fixpoint
            if v in visible:
                visible.update(place.span for place in spans[v].sees if made[place.span][0] in read)
        if self.layout == "tight":
            start = max(origin, end(spans[v] for v in visible))
        else:
            start = origin + max((made[v][1] + 1 for v in visible), default=0) * band
        return spans, prefix + [Place(v, spans[v].start) for v in sorted(visible)], start

    def _readers(self, graph: ContextGraph, sources: dict[int, list[int]]) -> list[list[int]]:
        """The segments that are encoded again, by round. Raises PlanError if they are far too many."""
        rounds: list[list[int]] = []
        changed, spans, places = set(sources), len(sources), 0
        for _ in range(self.rounds):
            readers = [i for i in sources if changed.intersection(sources[i])]
            if not readers:
                break
            spans, places = spans + len(readers), places + sum(len(sources[i]) for i in readers)
            _check_size(graph, spans, places, "use fewer rounds or edges")
            rounds.append(readers)
            changed = set(readers)
        return rounds

    def _packed(
        self, graph: ContextGraph, segments: dict[int, SegmentTokens], sources: dict[int, list[int]]
    ) -> tuple[list[Span], list[Place], int]:
        """Layout "packed": (spans, what the query sees, where it starts)."""
        shown = [i for i in graph.read if i in segments]
        runs = {i: sum(1 for _ in self._kept(segment.tokens)) for i, segment in segments.items()}
        seen = [s for found in sources.values() for s in found] + shown + shown
        _check_size(graph, 0, sum(runs[i] for i in seen), "use fewer edges, or a drop_token that is rarer in the text")
        kept = {i: tuple(self._kept(segment.tokens)) for i, segment in segments.items()}

        spans = prefix_spans(graph)
        prefix, origin = where_computed(spans), end(spans)
        first: dict[int, int] = {}
        for i, segment in segments.items():
            first[i] = len(spans)
            spans.append(segment.span(0))
        again: dict[int, int] = {}
        for i, segment in segments.items() if any(sources.values()) else ():
            places, start = _end_to_end([(first[s], kept[s]) for s in sources[i]], 0)
            again[i] = len(spans)
            spans.append(segment.span(start, places, round=1))
        versions = [(made[i], kept[i]) for made in (first, again) for i in shown if i in made]
        places, start = _end_to_end(versions, origin)
        return spans, prefix + places, start

    def _kept(self, tokens: Sequence[int]) -> Iterator[Slice]:
        """The runs of tokens that readers see."""
        dropped = [i for i, token in enumerate(tokens) if token == self.drop_token]
        return ((before + 1, hi) for before, hi in pairwise([-1, *dropped, len(tokens)]) if before + 1 < hi)

    def _band(self, graph: ContextGraph) -> int:
        """Positions that a round takes up, in layouts where this is constant."""
        if self.layout == "sequential":
            return sum(map(len, graph.segments))
        longest = max(map(len, graph.segments), default=0)
        if self.band is None:
            return longest
        if longest > self.band:
            i = next(i for i, segment in enumerate(graph.segments) if len(segment) == longest)
            raise GraphError(
                f"segment {i} ({graph.names[i]}) has {longest} tokens, more than the band of {self.band}; "
                f"shorten it or give a longer band"
            )
        return self.band


def _check_size(graph: ContextGraph, spans: int, places: int, remedy: str) -> None:
    """Raise PlanError, which ends with the remedy, for a plan with far more spans or places than its graph needs."""
    most_spans = max(MOST_SPANS, GROWTH * len(graph.segments))
    most_places = max(MOST_PLACES, GROWTH * (len(graph.segments) + len(graph.edges)))
    if spans > most_spans or places > most_places:
        what = f"{most_spans:,} spans" if spans > most_spans else f"{most_places:,} places"
        raise PlanError(f"graph-kv would plan more than {what} for this graph; {remedy}")


def _end_to_end(versions: Iterable[tuple[int, Iterable[Slice]]], at: int) -> tuple[list[Place], int]:
    """Places of slices of versions, laid from position `at` without gaps, and the position after them."""
    places = []
    for version, slices in versions:
        for lo, hi in slices:
            places.append(Place(version, at - lo, lo, hi))
            at += hi - lo
    return places, at
