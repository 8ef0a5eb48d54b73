"""Every method on positions worked out by hand, what each refuses, and what holds between methods."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings

import strategies
from kvgraph.edges import all_pairs, chain, ego, layered, top_k
from kvgraph.errors import GraphError, PlanError
from kvgraph.explain import explain
from kvgraph.graph import ContextGraph
from kvgraph.methods import (
    APE,
    METHODS,
    PCW,
    PRESETS,
    Block,
    CacheBlend,
    Epic,
    Full,
    GraphKV,
    KVLink,
    Method,
    PromptCache,
    get,
    graph_kv,
)
from kvgraph.plan import Group, Place, Plan, Span, contiguous
from soak import draws

VOCAB = 32
PREFIX, A, B, C, QUERY = [1, 2], [10, 11, 12], [20, 21], [30, 31, 32, 33], [90, 91]


def graph(segments=(A, B, C), edges=(), prefix=PREFIX, query=QUERY) -> ContextGraph:
    return ContextGraph(segments, query, prefix, edges)


def computed(plan: Plan) -> dict[str, int]:
    """Where each span's first token stands, by name, in plan order."""
    return {span.name: span.start for span in plan.spans}


def sees(plan: Plan, name: str) -> list[tuple]:
    """What a span sees: (name, at) of whole spans, (name, at, lo, hi) of slices."""
    span = next(span for span in plan.spans if span.name == name)
    found = []
    for place in span.sees:
        child = plan.spans[place.span]
        whole = (place.lo, place.hi) == (0, len(child))
        found.append((child.name, place.at) if whole else (child.name, place.at, place.lo, place.hi))
    return found


def keys(plan: Plan) -> dict[str, str | None]:
    return {span.name: key for span, key in zip(plan.spans, plan.keys("model"), strict=True)}


# full and block


def test_full_is_one_causal_chain():
    plan = Full().plan(graph())
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 1": 5, "doc 2": 7, "query": 11}
    assert sees(plan, "doc 1") == [("prefix", 0), ("doc 0", 2)]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 5), ("doc 2", 7)]
    assert plan.highest_position == 12 and plan.method == "full"


@settings(deadline=None, max_examples=draws(50))
@given(strategies.graphs(VOCAB, edges=False))
def test_full_equals_a_plain_causal_prefill(g):
    dense = Full().plan(g).dense()
    joined = [token for piece in (*g.prefix, *g.segments, g.query) for token in piece]
    order = dense.positions.argsort()
    assert dense.tokens[order].tolist() == joined
    assert dense.positions[order].tolist() == list(range(len(joined)))
    assert (dense.visible == (dense.positions[:, None] >= dense.positions[None])).all()


def test_full_shares_the_keys_of_a_common_beginning():
    one, two = keys(Full().plan(graph([A, B, C]))), keys(Full().plan(graph([A, B, [5]], query=[7])))
    assert one["doc 1"] == two["doc 1"] and one["doc 2"] != two["doc 2"]
    swapped = keys(Full().plan(graph([B, A])))
    assert not {swapped["doc 0"], swapped["doc 1"]} & {one["doc 0"], one["doc 1"]}


def test_block_encodes_every_segment_alone():
    plan = Block().plan(graph())
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 1": 5, "doc 2": 7, "query": 11}
    assert [sees(plan, f"doc {i}") for i in range(3)] == [[], [], []]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 5), ("doc 2", 7)]


# kvlink


def test_kvlink_puts_links_between_documents():
    method = KVLink(links=2, link_start=100, mem_start=60, mem_end=61)
    plan = method.plan(graph([A, B]))
    assert computed(plan) == {"prefix": 0, "doc 0": 3, "doc 1": 8, "links + query": 6}
    assert plan.spans[0].tokens == (1, 2, 60)
    assert plan.prompt.tokens == (100, 101, 102, 103, 61, 90, 91)
    assert plan.prompt.positions == (6, 7, 10, 11, 12, 13, 14)
    assert sees(plan, "links + query") == [("prefix", 0), ("doc 0", 3), ("doc 1", 8)]
    assert sees(plan, "doc 0") == sees(plan, "doc 1") == []

    dense = plan.dense()  # the first document's links see prefix and document 0, and earlier links
    rows = dense.visible[-7:]
    seen = [sorted(dense.tokens[row].tolist()) for row in rows]
    assert seen[1] == sorted([1, 2, 60, *A, 100, 101])
    assert seen[2] == sorted([1, 2, 60, *A, 100, 101, *B, 102])
    assert seen[6] == sorted([1, 2, 60, *A, *B, *plan.prompt.tokens])


def test_kvlink_without_links_is_block_with_markers():
    plain, block = KVLink().plan(graph()), Block().plan(graph())
    assert keys(plain) == keys(block) and list(plain.prompt.positions) == list(block.prompt.positions)
    marked = KVLink(mem_start=60, mem_end=61).plan(graph(prefix=[]))
    assert marked.spans[0].tokens == (60,) and marked.prompt.tokens == (61, *QUERY)


def test_kvlink_keeps_the_slot_of_an_empty_document():
    plan = KVLink(links=1, link_start=100).plan(graph([[], B, [], A]))
    assert computed(plan) == {"prefix": 0, "doc 1": 3, "doc 3": 7, "links + query": 2}
    assert plan.prompt.tokens == (100, 101, 102, 103, *QUERY)
    assert plan.prompt.positions == (2, 5, 6, 10, 11, 12)


def test_kvlink_mem_start_ends_the_last_piece_of_the_prefix():
    plan = KVLink(mem_start=60).plan(graph(prefix=[[1], [2, 3]]))
    assert [span.tokens for span in plan.spans[:2]] == [(1,), (2, 3, 60)]


def test_kvlink_slots():
    method = KVLink(links=1, link_start=100, slots=2)
    assert method.plan(graph([A, B])).prompt.tokens[:2] == (100, 101)
    with pytest.raises(GraphError, match="kvlink has link tokens for 2 documents but the graph has 3"):
        method.plan(graph([A, B, []]))
    KVLink(links=0, slots=2).plan(graph([A, B, C]))  # no link tokens, no slots


def test_kvlink_of_the_released_checkpoints():
    plan = get("kvlink-llama3-5").plan(graph([A] * 40))
    assert plan.prompt.tokens[:200] == tuple(range(128011, 128211)) and plan.prompt.tokens[200] == 128255
    assert plan.spans[0].tokens[-1] == 128254
    assert get("kvlink-llama3-1").plan(graph([A, B])).prompt.tokens == (128011, 128012, 128255, *QUERY)
    assert get("kvlink-llama3-0").plan(graph([A, B])).prompt.tokens == (128255, *QUERY)


# graph-kv, aligned


def test_aligned_one_round():
    plan = GraphKV().plan(graph(edges=[(0, 1), (2, 1)]))  # P = 2, L = 4
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 2": 2, "doc 1 · round 1": 6, "query": 10}
    assert sees(plan, "doc 1 · round 1") == [("doc 0", 2), ("doc 2", 2)]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 2", 2), ("doc 1 · round 1", 6)]


def test_aligned_all_pairs_is_the_papers_full():
    plan = GraphKV().plan(graph(edges=all_pairs(3)))
    first, second = [(f"doc {i}", 2) for i in range(3)], [(f"doc {i} · round 1", 6) for i in range(3)]
    assert sees(plan, "doc 1 · round 1") == [first[0], first[2]]
    assert sees(plan, "query") == [("prefix", 0), *first, *second]
    assert plan.prompt.start == 10


def test_aligned_top_1_shows_the_source_once():
    plan = GraphKV().plan(graph(edges=top_k(3, 1)))
    names = ["prefix", "doc 0", "doc 1 · round 1", "doc 2 · round 1", "query"]
    assert list(computed(plan)) == names


def test_a_segment_sees_its_own_old_version_only_as_its_own_source():
    plan = GraphKV().plan(graph([A, B], [(0, 1), (1, 1)]))
    assert sees(plan, "doc 1 · round 1") == [("doc 0", 2), ("doc 1", 2)]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 2), ("doc 1 · round 1", 5)]


def test_keep_all_shows_every_round_0_version():
    plan = GraphKV(keep="all").plan(graph(edges=[(0, 1)]))
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 2), ("doc 2", 2), ("doc 1 · round 1", 6)]


def test_layers_carry_caches_through_and_dead_versions_vanish():
    """top 1 -> top 2-3 -> the rest, two rounds: the first versions of readers are read by nothing alive."""
    segments = [[10], [20], [30, 31], [40], [50]]
    edges = layered([[0], [1, 2], [3, 4]])
    plan = GraphKV(rounds=2).plan(graph(segments, edges))  # P = 2, L = 2
    assert computed(plan) == {
        "prefix": 0,
        "doc 0": 2,
        "doc 1 · round 1": 4,
        "doc 2 · round 1": 4,
        "doc 3 · round 2": 6,
        "doc 4 · round 2": 6,
        "query": 8,
    }
    assert sees(plan, "doc 3 · round 2") == [("doc 1 · round 1", 4), ("doc 2 · round 1", 4)]
    assert sees(plan, "query") == list(computed(plan).items())[:-1]
    once = GraphKV(rounds=1).plan(graph(segments, edges))
    assert sees(once, "doc 3 · round 1") == [("doc 1", 2), ("doc 2", 2)]
    assert once.prompt.start == 6
    assert {"doc 1", "doc 1 · round 1"} < set(computed(once))  # its first version was read, so the query sees both


def test_rounds_stop_when_nothing_changes():
    two, many = (GraphKV(rounds=r).plan(graph(edges=chain(3))) for r in (2, 9))
    assert two == many
    assert computed(many)["query"] == 2 + 3 * 4


def test_a_segment_is_encoded_again_only_after_its_sources():
    """doc 0 -> doc 1 -> doc 2 and doc 0 -> doc 2: in round 2 doc 2 sees doc 1's new version and doc 0's only one."""
    plan = GraphKV(rounds=2).plan(graph(edges=[(0, 1), (1, 2), (0, 2)]))
    assert sees(plan, "doc 2 · round 2") == [("doc 0", 2), ("doc 1 · round 1", 6)]
    assert "doc 2 · round 1" not in computed(plan) and "doc 1" not in computed(plan)


def test_a_cycle_runs_all_rounds_and_shows_what_it_read():
    plan = GraphKV(rounds=3).plan(graph([A, B], [(0, 1), (1, 0)]))  # L = 3
    assert sees(plan, "doc 0 · round 3") == [("doc 1 · round 2", 8)]
    assert sees(plan, "doc 1 · round 2") == [("doc 0 · round 1", 5)]
    rounds = [[f"doc {i}" + (f" · round {r}" if r else "") for i in (0, 1)] for r in range(4)]
    assert list(computed(plan)) == ["prefix", *(name for names in rounds for name in names), "query"]
    assert plan.prompt.start == 2 + 4 * 3


def test_a_band_keeps_keys_when_a_longer_document_joins():
    edges = [(0, 1)]
    fixed, free = GraphKV(band=8), GraphKV()
    assert computed(fixed.plan(graph([A, B], edges)))["query"] == 2 + 2 * 8
    name = "doc 1 · round 1"
    assert keys(fixed.plan(graph([A, B], edges)))[name] == keys(fixed.plan(graph([A, B, [7] * 8], edges)))[name]
    assert keys(free.plan(graph([A, B], edges)))[name] != keys(free.plan(graph([A, B, [7] * 8], edges)))[name]
    with pytest.raises(GraphError, match=r"segment 2 \(doc 2\) has 9 tokens, more than the band of 8"):
        fixed.plan(graph([A, B, [7] * 9], edges))


def test_without_edges_or_segments():
    assert computed(GraphKV().plan(graph())) == {"prefix": 0, "doc 0": 2, "doc 1": 2, "doc 2": 2, "query": 6}
    for method in (GraphKV(), GraphKV(band=7), get("graph-kv-ego"), get("graph-kv-rag")):
        assert computed(method.plan(graph([]))) == {"prefix": 0, "query": 2}
        assert computed(method.plan(graph([[]], prefix=[]))) == {"query": 0}


# graph-kv, tight


def test_tight_ego_groups_share_positions():
    segments = [A, C, [50], B, [70, 71]]  # doc 2 reads 0 and 1; doc 4 reads 3
    plan = get("graph-kv-ego").plan(graph(segments, ego([(2, [0, 1]), (4, [3])])))
    assert computed(plan) == {
        "prefix": 0,
        "doc 0": 2,
        "doc 1": 2,
        "doc 3": 2,
        "doc 2 · round 1": 6,  # after the longest neighbour
        "doc 4 · round 1": 4,
        "query": 7,  # after the longest group
    }
    assert sees(plan, "doc 4 · round 1") == [("doc 3", 2)]
    assert [name for name, _ in sees(plan, "query")] == [name for name in computed(plan) if name != "query"]


def test_tight_rounds_stack_on_what_they_see():
    plan = GraphKV(layout="tight", rounds=2).plan(graph(edges=chain(3)))
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 1 · round 1": 5, "doc 2 · round 2": 7, "query": 11}


# graph-kv, packed


def test_packed_moves_keys_between_computing_and_reading():
    plan = get("graph-kv-rag").plan(graph(edges=all_pairs(3, self_edges=True)))  # P = 2, F = 9
    again = [f"doc {i} · round 1" for i in range(3)]
    assert computed(plan) == {"prefix": 0, "doc 0": 0, "doc 1": 0, "doc 2": 0, **dict.fromkeys(again, 9), "query": 20}
    for name in again:
        assert sees(plan, name) == [("doc 0", 0), ("doc 1", 3), ("doc 2", 5)]
    assert sees(plan, "query") == [
        ("prefix", 0),
        ("doc 0", 2),
        ("doc 1", 5),
        ("doc 2", 7),
        (again[0], 11),
        (again[1], 14),
        (again[2], 16),
    ]


def test_packed_top_k_reads_the_last_and_encodes_everybody_again():
    plan = get("graph-kv-rag-top-k").plan(graph(edges=top_k(3, 1, self_edges=True, last=True)))
    for i in range(3):
        assert sees(plan, f"doc {i} · round 1") == [("doc 2", 0)]
        assert computed(plan)[f"doc {i} · round 1"] == 4
    others = get("graph-kv-rag-top-k").plan(graph(edges=top_k(3, 1, last=True)))  # doc 2 reads nothing
    assert sees(others, "doc 2 · round 1") == [] and computed(others)["doc 2 · round 1"] == 0
    assert computed(others)["query"] == computed(plan)["query"] == 20


def test_packed_lays_sources_in_segment_order_whatever_the_order_of_edges():
    g = graph(edges=[(2, 1), (0, 1)])
    assert sees(get("graph-kv-rag").plan(g), "doc 1 · round 1") == [("doc 0", 0), ("doc 2", 3)]


def test_packed_drops_a_token_and_later_keys_close_the_gap():
    eos = 9
    segments = [[9, 10, 9, 9, 11, 9], [20, 21]]  # kept: 10 and 11; F = 4
    plan = get("graph-kv-rag", drop_token=eos).plan(graph(segments, all_pairs(2, self_edges=True)))
    assert sees(plan, "doc 0 · round 1") == [("doc 0", -1, 1, 2), ("doc 0", -3, 4, 5), ("doc 1", 2)]
    assert computed(plan)["doc 0 · round 1"] == computed(plan)["doc 1 · round 1"] == 4
    assert sees(plan, "query") == [
        ("prefix", 0),
        ("doc 0", 1, 1, 2),
        ("doc 0", -1, 4, 5),
        ("doc 1", 4),
        ("doc 0 · round 1", 5, 1, 2),
        ("doc 0 · round 1", 3, 4, 5),
        ("doc 1 · round 1", 8),
    ]
    assert plan.prompt.start == 2 + 2 * 4
    assert plan.spans[1].tokens == tuple(segments[0])  # computed with its document all the same
    dense = plan.dense()
    seen = dense.visible[-1]
    pairs = sorted(zip(dense.positions[seen].tolist(), dense.tokens[seen].tolist(), strict=True))
    assert pairs == list(enumerate([1, 2, 10, 11, 20, 21, 10, 11, 20, 21, *QUERY]))


def test_packed_drops_a_segment_of_nothing_else():
    plan = get("graph-kv-rag", drop_token=9).plan(graph([[9, 9], B], all_pairs(2, self_edges=True)))
    assert computed(plan) == {"prefix": 0, "doc 1": 0, "doc 1 · round 1": 2, "query": 6}


def test_packed_keeps_dropped_tokens_in_prefix_and_query():
    plan = get("graph-kv-rag", drop_token=9).plan(graph([A], prefix=[9, 1], query=[9]))
    assert plan.spans[0].tokens == (9, 1) and plan.prompt.tokens == (9,) and plan.prompt.start == 5
    assert sees(plan, "query")[0] == ("prefix", 0)


# pcw


def test_pcw_reuses_positions():
    plan = PCW().plan(graph())  # P = 2, the longest document has 4
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 1": 2, "doc 2": 2, "query": 6}
    assert [sees(plan, f"doc {i}") for i in range(3)] == [[], [], []]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 2), ("doc 2", 2)]


def test_pcw_with_a_shared_prefix_encodes_documents_after_it():
    plan = PCW(shared_prefix=True).plan(graph(prefix=[[1], [2]]))
    assert computed(plan) == {"prefix 0": 0, "prefix 1": 1, "doc 0": 2, "doc 1": 2, "doc 2": 2, "query": 6}
    assert sees(plan, "doc 2") == [("prefix 0", 0), ("prefix 1", 1)]
    assert plan.prompt.sees == PCW().plan(graph(prefix=[[1], [2]])).prompt.sees
    assert PCW(shared_prefix=True).plan(graph(prefix=[])) == PCW().plan(graph(prefix=[]))


# ape


def test_ape_weighs_the_documents_together():
    plan = APE(temperature=0.8, scale=0.5).plan(graph(prefix=[[1], [2]]))
    windows = PCW(shared_prefix=True).plan(graph(prefix=[[1], [2]]))
    assert plan.spans[:-1] == windows.spans[:-1]
    assert plan.prompt.positions == windows.prompt.positions == range(6, 8)
    assert sees(plan, "query") == [("prefix 0", 0), ("prefix 1", 1), ("doc 0", 2), ("doc 1", 2), ("doc 2", 2)]
    assert [place.group for place in plan.prompt.sees] == [0, 0, 1, 1, 1]
    assert plan.prompt.groups == (Group(0.8, 0.8 * 0.5),)
    assert get("ape").plan(graph()).prompt.groups == (Group(0.9, 0.81),)


def test_ape_documents_have_one_key_in_every_graph_with_the_prefix():
    """What `encode` stores, each document in a graph of its own, is what a question over several finds."""
    several = keys(APE().plan(graph()))
    alone = keys(APE(0.5, 0.5).plan(graph([C], query=[7])))
    assert alone["doc 0"] == several["doc 2"] == keys(PCW(shared_prefix=True).plan(graph()))["doc 2"]
    assert keys(APE().plan(graph(prefix=[3])))["doc 2"] != several["doc 2"]


# prompt-cache


def test_prompt_cache_has_a_slot_a_document():
    plan = PromptCache(slot=6).plan(graph())
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 1": 8, "doc 2": 14, "query": 20}
    assert [sees(plan, f"doc {i}") for i in range(3)] == [[], [], []]
    assert sees(plan, "query") == [("prefix", 0), ("doc 0", 2), ("doc 1", 8), ("doc 2", 14)]
    assert computed(PromptCache().plan(graph())) == {"prefix": 0, "doc 0": 2, "doc 1": 6, "doc 2": 10, "query": 14}
    assert computed(PromptCache().plan(graph([A, [], B]))) == {"prefix": 0, "doc 0": 2, "doc 2": 8, "query": 11}


def test_prompt_cache_refuses_a_document_longer_than_its_slot():
    with pytest.raises(GraphError, match=r"segment 2 \(doc 2\) has 4 tokens, more than the slot of 3"):
        PromptCache(slot=3).plan(graph())


# every method


def without_a_model(name: str) -> Method:
    """The method or preset, ready to plan: one that asks a model which tokens to recompute is told none."""
    method = get(name)
    return method.selecting([]) if method.needs_probe else method


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_edges_of_the_world(name):
    method = without_a_model(name)
    with pytest.raises(GraphError, match="the query is empty"):
        method.plan(graph(query=[]))
    with pytest.raises(GraphError, match=r"holds text; call graph\.tokenized"):
        method.plan(ContextGraph(["text"], [1]))
    with pytest.raises(GraphError, match="holds text"):
        method.plan(ContextGraph([[1]], "why?"))
    plan = method.plan(graph([[], A, []], prefix=[]))
    assert all(span.tokens for span in plan.spans)
    assert ("prefix" in computed(plan)) == (getattr(method, "mem_start", None) is not None)
    named = method.plan(ContextGraph({"intro": A}, QUERY))
    assert "intro" in computed(named)


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_a_prefix_of_several_pieces_is_a_causal_chain(name):
    plan = without_a_model(name).plan(graph(prefix=[[1, 2], [], [3], [4]]))
    assert sees(plan, "prefix 2") == [("prefix 0", 0), ("prefix 1", 2)]
    assert sees(plan, plan.prompt.name)[:3] == [("prefix 0", 0), ("prefix 1", 2), ("prefix 2", 3)]


@pytest.mark.parametrize(
    "method",
    [Full(), Block(), KVLink(), GraphKV(rounds=0), PCW(), APE(), PromptCache(), Epic(), CacheBlend()],
    ids=lambda m: m.name,
)
def test_edges_a_method_ignores_are_refused(method):
    with pytest.raises(GraphError, match=f"{method.name}.* ignores edges, but the graph has 1"):
        method.plan(graph(edges=[(0, 0)]))


def test_edges_of_empty_segments_vanish():
    plan = GraphKV().plan(graph([A, [], C], [(1, 0), (0, 1), (0, 2)]))
    assert computed(plan) == {"prefix": 0, "doc 0": 2, "doc 2 · round 1": 6, "query": 10}


@settings(deadline=None, max_examples=draws(200))
@given(strategies.problems(VOCAB))
def test_plans_of_all_methods(problem):
    method, g = problem
    plan = method.plan(g)
    assert plan == method.plan(g) and plan.method == method.name
    assert [span.cached for span in plan.spans] == [True] * (len(plan.spans) - 1) + [False]
    assert plan.prompt.tokens[-len(g.query) :] == g.query
    read = {place.span for span in plan.spans for place in span.sees}
    assert read == set(range(len(plan.spans) - 1)), "every cached span is read"
    for place in plan.prompt.sees:  # the query stands after all it sees
        assert place.at + place.hi - 1 < plan.prompt.positions[-1] + 1 - len(g.query)
    assert explain(plan).count("\n") >= len(plan.spans)


@settings(deadline=None, max_examples=draws(100))
@given(strategies.graphs(VOCAB, edges=False))
def test_a_document_encoded_alone_has_one_key_in_every_method(g):
    methods = [Block(), KVLink(), KVLink(2, 24, 4), GraphKV(), GraphKV(layout="tight"), get("graph-kv-rag"), Epic(0)]
    methods += [PCW(), PromptCache()]
    first, *others = (keys(method.plan(g)) for method in methods)
    for other in others:
        assert {k: v for k, v in other.items() if v} == {k: v for k, v in first.items() if v}


@settings(deadline=None, max_examples=draws(100))
@given(strategies.problems(VOCAB))
def test_keys_depend_on_the_prefix_only_where_documents_see_it(problem):
    method, g = problem
    assume(method.name not in ("full", "ape") and method != PCW(shared_prefix=True))
    assume(method.name != "epic" or g.prefix)  # without one it leaves what opens the prompt as it is
    other = ContextGraph(g.segments, [3], [1, 2, 3], g.edges, chosen=g.chosen)
    one, two = keys(method.plan(g)), keys(method.plan(other))
    assert {k: v for k, v in one.items() if k.startswith("doc")} == {
        k: v for k, v in two.items() if k.startswith("doc")
    }


# fields and the registry


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVLink(links=5), r"kvlink with links=5 needs link_start.*kvlink-llama3-5"),
        (lambda: KVLink(links=-1), "kvlink: links must be an integer of at least 0, not -1"),
        (lambda: KVLink(slots=0), "kvlink: slots must be an integer of at least 1"),
        (lambda: KVLink(mem_start="x"), "kvlink: mem_start must be an integer"),
        (lambda: GraphKV(rounds=1.5), "graph-kv: rounds must be an integer"),
        (lambda: GraphKV(rounds=True), "graph-kv: rounds must be an integer"),
        (lambda: GraphKV(keep="some"), "graph-kv: keep must be one of read, all, not 'some'"),
        (lambda: GraphKV(layout="loose"), "graph-kv: layout must be one of aligned, tight, packed"),
        (lambda: GraphKV(layout="packed"), 'layout "packed" is defined for keep="all" and rounds=1 only'),
        (lambda: GraphKV(layout="packed", keep="all", rounds=2), 'layout "packed" is defined'),
        (lambda: GraphKV(band=0), "graph-kv: band must be an integer of at least 1"),
        (lambda: GraphKV(layout="tight", band=4), 'band belongs to layout "aligned", not "tight"'),
        (lambda: GraphKV(drop_token=1), 'drop_token belongs to layout "packed", not "aligned"'),
        (lambda: Epic(k=-1), "epic: k must be an integer of at least 0, not -1"),
        (lambda: CacheBlend(ratio=1.5), "cacheblend: ratio must be a number from 0 to 1, not 1.5"),
        (lambda: CacheBlend(ratio=True), "cacheblend: ratio must be a number"),
        (lambda: get("cacheblend", selected=3), "cacheblend: selected must be token indices, one list per segment"),
        (lambda: PCW(shared_prefix=1), "pcw: shared_prefix must be true or false, not 1"),
        (lambda: APE(temperature=0), "ape: temperature must be a number from 0.1 to 10, not 0"),
        (lambda: APE(scale=float("nan")), "ape: scale must be a number from 0.1 to 10, not nan"),
        (lambda: APE(scale=True), "ape: scale must be a number"),
        (lambda: APE(temperature="0.9"), "ape: temperature must be a number"),
        (lambda: PromptCache(slot=0), "prompt-cache: slot must be an integer of at least 1, not 0"),
        (lambda: get("grph"), "there is no method 'grph'; there are full, block, kvlink, graph-kv, .*graph-kv-rag"),
        (
            lambda: get("graph-kv", hops=2),
            "graph-kv has no field 'hops'; it has rounds, keep, layout, band, drop_token",
        ),
        (lambda: get("full", x=1), "full has no field 'x'; it has no fields"),
    ],
)
def test_wrong_fields(make, message):
    with pytest.raises(GraphError, match=message):
        make()


def test_get():
    assert get("graph-kv", rounds=2) == GraphKV(rounds=2)
    assert get("kvlink", links=2, link_start=7) == KVLink(2, 7)
    assert get("graph-kv-rag", drop_token=1) == GraphKV(layout="packed", keep="all", drop_token=1)
    assert get("kvlink-llama3-5", slots=8) == KVLink(5, 128011, 8, 128254, 128255)
    assert {name: get(name).name for name in METHODS} == {name: name for name in METHODS}
    with pytest.raises(TypeError):
        METHODS["mine"] = Full  # type: ignore[index]


# explain


def test_explain_lists_who_sees_whom():
    text = explain(get("graph-kv-rag", drop_token=11).plan(graph([A, B], [(0, 1)])))
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert rows[0] == ["#", "span", "tokens", "positions", "state", "sees"]
    assert rows[2] == ["0", "prefix", "2", "0–1", "cached"]
    assert rows[6] == ["4", "doc 1 · round 1", "2", "2–3", "cached", "doc 0[0:1] @ 0, doc 0[2:3] @ -1"]
    assert rows[-1] == [
        "graph-kv: 6 spans; 12 tokens cached in 5 spans (4 distinct: 9 tokens), 2 in the prompt span; highest position 11"
    ]


def test_explain_shows_groups():
    lines = explain(APE(0.5, 0.8).plan(graph())).splitlines()
    assert lines[6].endswith("prefix @ 0, doc 0 … doc 2 @ 2 in group 1")
    assert lines[-2] == "query: group 1 has temperature 0.5 and scale 0.4"
    spans = [contiguous([1], 0, name=name) for name in "abc"]
    apart = contiguous([2], 1, [Place(i, 0, group=i) for i in range(3)], cached=False, groups=[Group(), Group()])
    assert "a @ 0, b @ 0 in group 1, c @ 0 in group 2" in explain(Plan((*spans, apart)))


def test_explain_abbreviates():
    shared = explain(GraphKV().plan(graph([A] * 30, top_k(30, 0))))
    assert "doc 0 … doc 4 @ 2, doc 6 … doc 29 @ 2" in shared
    assert "doc 0 … doc 29 @ 2, doc 0 · round 1 … doc 29 · round 1 @ 5" in shared
    links = explain(KVLink(1, 0).plan(graph([A] * 30)))
    assert "5, 9, … 27 more …, 121–123" in links
    assert "prefix @ 0, doc 0 @ 2, doc 1 @ 6, doc 2 @ 10, … 26 more …, doc 29 @ 118" in links
    assert "92 tokens cached in 31 spans (2 distinct: 5 tokens)" in links


def test_explain_without_names():
    text = explain(Plan((Span((1,), range(1)), Span((2,), range(1, 2), (), cached=False))))
    assert text.splitlines()[-1] == "2 spans; 1 token cached in 1 span, 1 in the prompt span; highest position 1"


def test_fields_without_bounds_have_one():
    with pytest.raises(GraphError, match="links must be at most 1000, not 99999999999"):
        get("kvlink", links=99999999999, link_start=1)
    with pytest.raises(GraphError, match="rounds must be at most 1000, not 1000000000"):
        get("graph-kv", rounds=10**9)


def test_rounds_are_counted_before_anything_is_made(monkeypatch):
    """A request of a few kilobytes can ask for millions of places, or for half a million spans of one place each."""
    cycle = [(i, (i + 1) % 500) for i in range(500)]
    dense, long = graph([[7]] * 64, all_pairs(64, self_edges=True)), graph([[7]] * 500, cycle)
    monkeypatch.setattr(graph_kv, "prefix_spans", None)  # which a plan begins with
    for layout in ("aligned", "tight", "sequential"):
        with pytest.raises(PlanError, match="more than 1,048,576 places for this graph; use fewer rounds or edges"):
            GraphKV(rounds=1000, layout=layout).plan(dense)
        with pytest.raises(PlanError, match="more than 131,072 spans for this graph; use fewer rounds or edges"):
            GraphKV(rounds=1000, layout=layout).plan(long)


def test_dropped_tokens_are_counted_before_anything_is_made(monkeypatch):
    method = GraphKV(layout="packed", keep="all", drop_token=9)
    cut = [[9, 10] * 5000]
    readers, alone = graph(cut * 20, all_pairs(20, self_edges=True)), graph([[9, 10] * 600_000])
    padded = graph([[10] + [9] * 9999] * 20, all_pairs(20, self_edges=True))
    assert len(method.plan(padded).prompt.sees) == 1 + 2 * 20  # dropped tokens that cut nothing don't count
    monkeypatch.setattr(graph_kv, "prefix_spans", None)
    for wide in (readers, alone):
        with pytest.raises(
            PlanError, match="more than 1,048,576 places for this graph; use fewer edges, or a drop_token"
        ):
            method.plan(wide)


def test_a_large_graph_may_have_a_large_plan(monkeypatch):
    """A corpus has more segments and edges than the bounds of small graphs allow, and several rounds of them."""
    monkeypatch.setattr(graph_kv, "MOST_SPANS", 1)
    monkeypatch.setattr(graph_kv, "MOST_PLACES", 1)
    for edges in (all_pairs(3), all_pairs(3, self_edges=True), chain(3)):
        assert GraphKV(rounds=3).plan(graph(edges=edges)).prompt
        assert get("graph-kv-rag").plan(graph(edges=edges)).prompt
    assert get("graph-kv-rag").plan(graph()).prompt
    with pytest.raises(PlanError, match="more than 24 spans"):
        GraphKV(rounds=8).plan(graph(edges=all_pairs(3)))
