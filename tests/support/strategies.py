"""Hypothesis strategies: random graphs of token ids, (method, graph) pairs over every method, plans of any shape."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from hypothesis import strategies as st

from kvgraph.graph import ContextGraph
from kvgraph.methods import APE, METHODS, PCW, Block, CacheBlend, Epic, Full, GraphKV, KVLink, Method, PromptCache
from kvgraph.plan import Group, Place, Plan, Span, pruned

MAX_SEGMENTS = 4
MAX_LINKS = 2
LINK_TOKENS = MAX_SEGMENTS * MAX_LINKS  # the highest ids of the vocabulary, for KVLink

factors = st.sampled_from([0.5, 0.9, 1.0, 1.6])  # temperatures and scales


@st.composite
def graphs(draw: st.DrawFn, vocab: int, edges: bool = True, max_length: int = 6) -> ContextGraph:
    """Graphs of token ids below `vocab`: empty segments and prefixes, prefixes of several pieces, any edges."""
    token = st.integers(0, vocab - 1)
    piece = st.lists(token, max_size=max_length)
    segments = draw(st.lists(piece, max_size=MAX_SEGMENTS))
    if segments and draw(st.booleans()):
        segments[-1] = segments[0]  # the same document twice
    prefix = draw(piece | st.lists(piece, min_size=2, max_size=3))
    query = draw(st.lists(token, min_size=1, max_size=max_length))
    pairs = [(s, r) for s in range(len(segments)) for r in range(len(segments))]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if edges and pairs else []
    return ContextGraph(segments, query, prefix, chosen)


@st.composite
def choices(draw: st.DrawFn, graph: ContextGraph) -> ContextGraph:
    """The graph with any of its segments, in any order, as all that the query reads."""
    chosen = draw(st.lists(st.sampled_from(range(len(graph.segments))), unique=True)) if graph.segments else []
    return ContextGraph(graph.segments, graph.query, list(graph.prefix), graph.edges, graph.names, chosen)


@st.composite
def problems(draw: st.DrawFn, vocab: int, max_length: int = 6) -> tuple[Method, ContextGraph]:
    """(method, graph) pairs that give a plan: every method, layout, number of rounds, any choice. Needs vocab >= 16."""
    kind = draw(st.sampled_from([*METHODS]))
    graph = draw(graphs(vocab, edges=kind == "graph-kv", max_length=max_length))
    if draw(st.booleans()):
        graph = draw(choices(graph))
    if kind == "full":
        return Full(), graph
    if kind == "block":
        return Block(), graph
    if kind == "pcw":
        return PCW(draw(st.booleans())), graph
    if kind == "ape":
        return APE(draw(factors), draw(factors)), graph
    if kind == "prompt-cache":
        longest = max([1, *map(len, graph.segments)])
        return PromptCache(draw(st.none() | st.integers(longest, longest + 3))), graph
    if kind == "epic":
        return Epic(draw(st.integers(0, max_length))), graph
    if kind == "cacheblend":
        return CacheBlend(
            selected=[draw(st.sets(st.sampled_from(range(len(s))))) if s else () for s in graph.restricted().segments]
        ), graph
    optional = st.none() | st.integers(0, vocab - 1)
    if kind == "kvlink":
        links, mem_start, mem_end = draw(st.integers(0, MAX_LINKS)), draw(optional), draw(optional)
        return KVLink(links, vocab - LINK_TOKENS, MAX_SEGMENTS, mem_start, mem_end), graph
    layout = draw(st.sampled_from(["aligned", "tight", "packed", "sequential"]))
    if layout == "packed":
        drop = draw(st.none() | st.sampled_from([token for s in graph.segments for token in s] or [0]))
        return GraphKV(layout="packed", keep="all", drop_token=drop), graph
    rounds = draw(st.integers(1 if graph.edges else 0, 3))
    method = GraphKV(rounds, draw(st.sampled_from(["read", "all"])), layout)
    if layout == "aligned" and draw(st.booleans()):
        longest = max(map(len, graph.segments), default=0)
        method = replace(method, band=max(1, longest + draw(st.integers(0, 3))))
    return method, graph


@st.composite
def plans(draw: st.DrawFn, vocab: int, max_spans: int = 5, max_length: int = 4) -> Plan:
    """Plans of any shape: slices, duplicate and overlapping views, groups, keys above readers, gaps in the prompt span."""
    spans: list[Span] = []
    n = draw(st.integers(1, max_spans))
    for i in range(n):
        tokens = tuple(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=max_length)))
        start = draw(st.integers(0, 20))
        live = i == n - 1
        steps = draw(st.lists(st.integers(1, 3 if live else 1), min_size=len(tokens) - 1, max_size=len(tokens) - 1))
        groups = draw(st.just([]) | st.lists(st.builds(Group, factors, factors), max_size=2))
        sees = []
        for child in draw(st.lists(st.integers(0, i - 1), max_size=4)) if spans else []:
            lo = draw(st.integers(0, len(spans[child]) - 1))
            hi = draw(st.integers(lo + 1, len(spans[child])))
            sees.append(Place(child, draw(st.integers(0, 24)), lo, hi, draw(st.integers(0, len(groups)))))
        positions = tuple(accumulate(steps, initial=start))
        spans.append(Span(tokens, positions, tuple(sees), cached=not live, groups=tuple(groups)))
    return pruned(spans)
