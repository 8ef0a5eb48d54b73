"""Graphs whose query reads chosen segments alone: positions worked out by hand, and keys equal to the whole graph's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import strategies
from kvgraph import models
from kvgraph.edges import all_pairs, chain
from kvgraph.engine.engine import Engine
from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import METHODS, CacheBlend, Full, GraphKV, KVLink, Method, PromptCache
from kvgraph.plan import Plan
from soak import draws

VOCAB = 32
PREFIX, A, B, C, QUERY = [1, 2], [10, 11, 12], [20, 21], [30, 31, 32, 33], [90, 91]


def graph(edges=(), chosen=None, segments=(A, B, C)) -> ContextGraph:
    return ContextGraph(segments, QUERY, PREFIX, edges, chosen=chosen)


def read(plan: Plan) -> list[tuple[str, int]]:
    """What the query sees, as (name, at), and itself."""
    return [(plan.spans[p.span].name, p.at) for p in plan.prompt.sees] + [("query", plan.prompt.start)]


def keys(plan: Plan) -> dict[str, str | None]:
    return {span.name: key for span, key in zip(plan.spans, plan.keys("model"), strict=True) if key}


# graphs


def test_segments_are_chosen_by_index_or_name_in_order():
    g = ContextGraph({"a": "A", "b": "B", "c": "C"}, "?", chosen=["c", 0])
    assert g.chosen == (2, 0) and list(g.read) == [2, 0]
    assert g.tokenized(lambda text: [ord(text)]).chosen == (2, 0)
    assert g.with_query("!").chosen == (2, 0)
    assert ContextGraph(["A", "B"]).chosen is None and list(ContextGraph(["A", "B"]).read) == [0, 1]


def test_a_restricted_graph_has_nothing_but_the_chosen_segments():
    g = ContextGraph(
        {"a": "A", "b": "B", "c": "C"}, "?", ["P"], [("a", "b"), ("a", "c"), ("c", "a")], chosen=["c", "a"]
    )
    assert g.restricted() == ContextGraph({"c": "C", "a": "A"}, "?", ["P"], [("a", "c"), ("c", "a")])
    everything = ContextGraph(["A", "B"])
    assert everything.restricted() is everything


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([0, "b", 0], r"segment 0 \(a\) is chosen twice"),
        (["b", 1], r"segment 1 \(b\) is chosen twice"),
        (["x"], "chosen: there is no segment named 'x'; there are 'a', 'b'"),
        ([2], "chosen: there is no segment 2; there are segments 0 to 1"),
        ([-1], "chosen: there is no segment -1"),
        ([True], "chosen: True is neither the index nor the name"),
        ("ab", "the chosen segments must be a list of their indices or names, not str"),
        (3, "the chosen segments must be a list"),
    ],
)
def test_wrong_choices_are_refused(chosen, message):
    with pytest.raises(GraphError, match=message):
        ContextGraph({"a": "A", "b": "B"}, chosen=chosen)


# methods without edges


def test_full_reads_the_chosen_segments_in_their_order():
    assert read(Full().plan(graph(chosen=[2, 0]))) == [("prefix", 0), ("doc 2", 2), ("doc 0", 6), ("query", 9)]


def test_slots_count_chosen_segments_only():
    plan = KVLink(1, 50, slots=2).plan(graph(chosen=[2, 0]))
    assert plan.prompt.tokens == (50, 51, *QUERY) and list(plan.prompt.positions) == [6, 10, 11, 12]
    assert read(PromptCache(slot=10).plan(graph(chosen=[2, 0]))) == [
        ("prefix", 0), ("doc 2", 2), ("doc 0", 12), ("query", 22),
    ]  # fmt: skip


@settings(max_examples=draws(100))
@given(strategies.graphs(VOCAB, edges=False), st.sampled_from(sorted(set(METHODS) - {"graph-kv"})), st.data())
def test_without_edges_the_other_segments_are_as_good_as_gone(g, name, data):
    method = KVLink(2, 24, 4) if name == "kvlink" else CacheBlend(1) if name == "cacheblend" else METHODS[name]()
    g = data.draw(strategies.choices(g))
    assert method.plan(g) == method.plan(g.restricted())


def test_what_cacheblend_measures_is_the_chosen_segments():
    engine = Engine(models.wrap(families.FAMILIES["llama"]()))
    g = graph(chosen=[2, 0])
    plan = engine.plan(g, CacheBlend(0.5))
    assert plan == engine.plan(g.restricted(), CacheBlend(0.5))
    assert plan.probe_tokens == len(PREFIX) + 2 * len(C + A)


# graph-kv, by hand: P = 2, L = 4


def test_aligned_keeps_the_band_and_hides_versions_of_others():
    plan = GraphKV().plan(graph([(0, 1), (2, 1)], [1]))
    assert {s.name: s.start for s in plan.spans} == {
        "prefix": 0, "doc 0": 2, "doc 2": 2, "doc 1 · round 1": 6, "query": 10,
    }  # fmt: skip
    assert read(plan) == [("prefix", 0), ("doc 1 · round 1", 6), ("query", 10)]


def test_the_query_follows_the_last_band_it_sees():
    edges = [(0, 1), (1, 2)]
    assert read(GraphKV(2).plan(graph(edges, [0]))) == [("prefix", 0), ("doc 0", 2), ("query", 6)]
    assert read(GraphKV(2).plan(graph(edges, [1]))) == [("prefix", 0), ("doc 1 · round 1", 6), ("query", 10)]
    assert read(GraphKV(2).plan(graph(edges, [2]))) == [("prefix", 0), ("doc 2 · round 2", 10), ("query", 14)]
    assert read(GraphKV(2, band=9).plan(graph(edges, [0]))) == [("prefix", 0), ("doc 0", 2), ("query", 11)]
    assert read(GraphKV(2).plan(graph(edges, []))) == [("prefix", 0), ("query", 2)]


def test_versions_that_a_visible_one_read_are_seen_of_chosen_segments_only():
    plan = GraphKV().plan(graph(all_pairs(3), [0, 1]))
    assert read(plan) == [
        ("prefix", 0), ("doc 0", 2), ("doc 1", 2), ("doc 0 · round 1", 6), ("doc 1 · round 1", 6), ("query", 10),
    ]  # fmt: skip
    assert [plan.spans[p.span].name for p in plan.spans[-2].sees] == ["doc 0", "doc 2"], "readers keep their sources"


def test_keep_all_shows_round_0_of_chosen_segments_only():
    assert read(GraphKV(keep="all").plan(graph([(0, 1)], [1]))) == [
        ("prefix", 0), ("doc 1", 2), ("doc 1 · round 1", 6), ("query", 10),
    ]  # fmt: skip


def test_tight_puts_the_query_after_what_it_sees():
    assert read(GraphKV(layout="tight").plan(graph([(2, 0), (0, 1)], [1]))) == [
        ("prefix", 0), ("doc 1 · round 1", 5), ("query", 7),
    ]  # fmt: skip
    assert read(GraphKV(layout="tight").plan(graph([(2, 0)], [1]))) == [("prefix", 0), ("doc 1", 2), ("query", 4)]


def test_sequential_positions_are_those_of_the_whole_graph():
    assert read(GraphKV(layout="sequential").plan(graph([(0, 1)], [1]))) == [
        ("prefix", 0), ("doc 1 · round 1", 14), ("query", 20),
    ]  # fmt: skip
    assert read(GraphKV(layout="sequential").plan(graph([(0, 1)], [2, 0]))) == [
        ("prefix", 0), ("doc 0", 2), ("doc 2", 7), ("query", 11),
    ]  # fmt: skip


def test_packed_lays_the_chosen_ones_end_to_end_in_their_order():
    plan = GraphKV(layout="packed", keep="all").plan(graph(chain(3), [2, 1]))
    assert read(plan) == [
        ("prefix", 0), ("doc 2", 2), ("doc 1", 6), ("doc 2 · round 1", 8), ("doc 1 · round 1", 12), ("query", 14),
    ]  # fmt: skip


ROUNDS = [
    GraphKV(rounds, keep, layout)
    for rounds in (1, 2, 3)
    for keep in ("read", "all")
    for layout in ("aligned", "tight", "sequential")
]


@settings(max_examples=draws(300))
@given(strategies.graphs(VOCAB), st.sampled_from([*ROUNDS, GraphKV(layout="packed", keep="all")]), st.data())
def test_no_choice_changes_a_key(g, method, data):
    plan = method.plan(data.draw(strategies.choices(g)))
    assert keys(plan).items() <= keys(method.plan(g)).items()


@pytest.mark.parametrize("method", [GraphKV(), *(METHODS[name]() for name in ("block", "pcw", "ape", "epic"))])
def test_choosing_all_is_choosing_nothing(method: Method):
    assert method.plan(graph(chosen=[0, 1, 2])) == method.plan(graph())
