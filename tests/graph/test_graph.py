"""ContextGraph: what it accepts, what it refuses and how it says so; edge builders."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from kvgraph.edges import all_pairs, chain, ego, layered, named_edges, star, top_k
from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_tokenized_piece_by_piece():
    graph = ContextGraph(["ab", [7, 8], ""], "q", ["c", [9]], [(0, 1)])
    assert not graph.is_tokenized
    ids = graph.tokenized(bytes_of)
    assert ids.is_tokenized
    assert ids.segments == ((97, 98), (7, 8), ()) and ids.query == (113,) and ids.prefix == ((99,), (9,))
    assert ids.edges == graph.edges and ids.names == graph.names
    assert ids.tokenized(bytes_of) == ids


def test_a_piece_is_encoded_alone_and_empty_text_not_at_all():
    calls = []
    ContextGraph(["ab", ""], "", ["x", "y"]).tokenized(lambda text: calls.append(text) or [1])
    assert sorted(calls) == ["ab", "x", "y"]


def test_integers_of_other_libraries_become_ints():
    graph = ContextGraph([np.array([1, 2]), (np.int32(3),)], np.arange(2), np.array([5]))
    assert graph.segments == ((1, 2), (3,)) and graph.query == (0, 1) and graph.prefix == ((5,),)
    assert {type(token) for piece in (*graph.segments, graph.query) for token in piece} == {int}


@pytest.mark.parametrize(
    ("prefix", "pieces"),
    [
        ("", ()),
        ([], ()),
        ("ab", ("ab",)),
        ([1, 2], ((1, 2),)),
        (["a", ""], ("a",)),
        (["a", [1]], ("a", (1,))),
        ([[1, 2], [], [3]], ((1, 2), (3,))),
        ([[1, 2]], ((1, 2),)),
    ],
)
def test_prefix(prefix, pieces):
    graph = ContextGraph([], "q", prefix)
    assert graph.prefix == pieces
    assert ContextGraph([], "q", graph.prefix).prefix == pieces


def test_names():
    graph = ContextGraph({"intro": [1], "proof": [2]}, edges=[("intro", "proof"), (1, "intro")])
    assert graph.names == ("intro", "proof") and graph.edges == ((0, 1), (1, 0))
    assert ContextGraph([[1], [2]]).names == ("doc 0", "doc 1")
    assert ContextGraph([[1], [2]], names=["a", "b"], edges=star("a", ["b"])).edges == ((1, 0),)


def test_frozen_hashable_replaceable():
    graph = ContextGraph([[1], [2]], [3])
    with pytest.raises(FrozenInstanceError):
        graph.query = (4,)  # type: ignore[misc]
    assert hash(graph) == hash(ContextGraph(([1], [2]), (3,)))
    assert replace(graph, edges=[(0, 1)]) == ContextGraph([[1], [2]], [3], edges=[(0, 1)])


def test_with_query_changes_the_query_alone():
    graph = ContextGraph([[1], [2]], prefix=[9], edges=[(0, 1)], names=["a", "b"])
    asked = graph.with_query([3])
    assert not graph.has_query and asked.has_query
    assert asked == ContextGraph([[1], [2]], [3], [9], [(0, 1)], ["a", "b"])
    assert asked.segments is graph.segments and graph.query == ""
    with pytest.raises(GraphError, match="the query: token 0 is -1"):
        graph.with_query([-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segments": "text"}, "segments must be a list of segments or a mapping of names to segments, not str"),
        ({"segments": 3}, "segments must be .* not int"),
        ({"segments": [1, 2]}, "segment 0 must be text or a sequence of token ids, not int"),
        ({"segments": [[1], None]}, "segment 1 must be .* not NoneType"),
        ({"segments": {"a": b"x"}}, r"segment 0 \(a\) must be .* not bytes"),
        ({"segments": [[1, 2.0]]}, "segment 0: token 1 is 2.0, a float; token ids are integers"),
        ({"segments": [[1, "b"]]}, "segment 0: token 1 is 'b', a str"),
        ({"segments": [[True]]}, "segment 0: token 0 is True, a bool"),
        ({"segments": [[1], [2, -5]]}, "segment 1: token 1 is -5; token ids can't be negative"),
        ({"query": [[1]]}, r"the query: token 0 is \[1\]"),
        ({"prefix": 5}, "the prefix must be text, .* not int"),
        ({"prefix": [1, "a"]}, "the prefix mixes token ids and pieces"),
        ({"prefix": [[1], [-1]]}, "piece 1 of the prefix: token 0 is -1"),
        ({"names": ["a"]}, "there are 2 segments but 1 names"),
        ({"names": ["a", ""]}, "the name of segment 1 is ''"),
        ({"names": ["a", "a"]}, "segments 0 and 1 are both named 'a'"),
        ({"segments": {"a": [1]}, "names": ["a"]}, "a mapping bring their names"),
        ({"edges": [(0, 2)]}, r"edge \(0, 2\): there is no segment 2; there are segments 0 to 1"),
        ({"edges": [(-1, 0)]}, "there is no segment -1"),
        ({"segments": [], "edges": [(0, 0)]}, "there is no segment 0; the graph has no segments"),
        ({"edges": [("x", 0)]}, "there is no segment named 'x'; there are 'doc 0', 'doc 1'"),
        ({"edges": [(0.0, 1)]}, "0.0 is neither the index nor the name of a segment"),
        ({"edges": [(True, 1)]}, "True is neither"),
        ({"edges": [(0, 1, 2)]}, r"edge \(0, 1, 2\) must be a pair"),
        ({"edges": ["01"]}, r"edge '01' must be a pair \(source, reader\), not str"),
        ({"edges": [(0, 1), (1, 0), (0, 1)]}, r"edge \(0, 1\) is given twice \(segment 1 reads segment 0\)"),
        ({"edges": [(0, 1), ("doc 0", "doc 1")]}, r"edge \('doc 0', 'doc 1'\) is given twice"),
    ],
)
def test_errors_name_the_thing(arguments, message):
    with pytest.raises(GraphError, match=message):
        ContextGraph(**{"segments": [[1], [2]], **arguments})


def test_many_names_are_not_all_listed():
    with pytest.raises(GraphError, match=r"'doc 7', \.\.\. \(300 in all\)$"):
        ContextGraph([[1]] * 300, edges=[("x", 0)])


def test_all_pairs():
    assert set(all_pairs(3)) == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    assert set(all_pairs(2, self_edges=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all_pairs(0) == () and all_pairs(1) == ()


def test_top_k():
    assert set(top_k(3, 1)) == {(0, 1), (0, 2)}
    assert set(top_k(3, 1, self_edges=True)) == {(0, 0), (0, 1), (0, 2)}
    assert set(top_k(3, 2, last=True)) == {(1, 0), (2, 0), (2, 1), (1, 2)}
    assert top_k(3, 0) == top_k(3, 3) == top_k(3, 9) == all_pairs(3)
    with pytest.raises(GraphError, match="k must be an integer of at least 0, not -1"):
        top_k(3, -1)
    with pytest.raises(GraphError, match="n must be"):
        all_pairs(2.0)


def test_star_ego_chain_layered():
    assert star(2, [0, 1]) == ((0, 2), (1, 2))
    assert ego([(1, [0]), (4, [2, 3])]) == ((0, 1), (2, 4), (3, 4))
    assert chain(3) == ((0, 1), (1, 2)) and chain(1) == chain(0) == ()
    assert set(layered([[0], [1, 2], [3]])) == {(0, 1), (0, 2), (1, 3), (2, 3)}
    assert layered([]) == layered([[0, 1]]) == ()
    with pytest.raises(GraphError, match="segment 1 is the center of a star"):
        ego([(1, [0, 1])])
    with pytest.raises(GraphError, match="layer 1 is empty"):
        layered([[0], [], [1]])
    with pytest.raises(GraphError, match="segment 0 is in layers 0 and 1"):
        layered([[0], [0, 1]])


def test_self_edges_are_legal():
    assert ContextGraph([[1]], edges=[(0, 0)]).edges == ((0, 0),)


@pytest.mark.parametrize(
    ("spec", "edges"),
    [
        ("", ()),
        ("none", ()),
        ("all", all_pairs(5)),
        ("all+self", all_pairs(5, self_edges=True)),
        ("chain", chain(5)),
        ("top-k:2", top_k(5, 2)),
        ("last-k:2+self", top_k(5, 2, self_edges=True, last=True)),
        ("star:3", star(3, [0, 1, 2, 4])),
        ("layers:1-3", layered([[0], [1, 2, 3], [4]])),
        ("layers:1-2-2", layered([[0], [1, 2], [3, 4]])),
        ("layers:4-4-4", layered([[0, 1, 2, 3], [4]])),
        ("0>2, b>0", ((0, 2), ("b", 0))),
    ],
)
def test_edges_by_name(spec, edges):
    assert named_edges(spec, ["a", "b", "c", "d", "e"]) == edges


@pytest.mark.parametrize(
    "spec",
    ["al", "top-k", "top-k:x", "chain+self", "layers:", "layers:1-0", "star:", "0>1>2", "all:3", "+self", "none:1"],
)
def test_edges_with_an_unknown_name_are_refused(spec):
    with pytest.raises(GraphError, match="edges|layer"):
        named_edges(spec, ["a", "b", "c"])
