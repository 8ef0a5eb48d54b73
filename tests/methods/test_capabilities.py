"""What methods declare is what their plans do; and nobody outside their room looks at a class."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings

import strategies
from kvgraph import methods
from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import METHODS, PRESETS, CacheBlend, GraphKV, KVLink, Method
from soak import draws

ROOT = Path(__file__).parents[2]
VOCAB = 32
NAMES = [*METHODS, *PRESETS]


def ready(name: str) -> Method:
    """The method or preset, ready to plan without a model."""
    method = methods.get(name)
    return method.selecting([[0.0] * 3, [0.0] * 2]) if method.needs_probe else method


@pytest.mark.parametrize("name", NAMES)
def test_reading_edges(name):
    method, alone = ready(name), ContextGraph([[1, 2, 3], [4, 5]], [9])
    linked = ContextGraph([[1, 2, 3], [4, 5]], [9], edges=[(0, 1)])
    if method.reads_edges:
        assert method.plan(linked) != method.plan(alone)
        assert method.outline(linked) != method.outline(alone)
    else:
        assert method.outline(alone) == method
        with pytest.raises(GraphError, match="ignores edges"):
            method.plan(linked)


def test_reading_edges_takes_a_round():
    assert GraphKV().reads_edges and not GraphKV(rounds=0).reads_edges
    assert GraphKV(3).reach == 3 and GraphKV(rounds=0).reach == KVLink().reach == 0


@settings(max_examples=draws(200), deadline=None)
@given(strategies.problems(VOCAB))
def test_plans_do_what_is_declared(problem):
    method, graph = problem
    plan = method.plan(graph)
    given_tokens = {token for piece in (*graph.prefix, *graph.segments, graph.query) for token in piece}
    added = {token for span in plan.spans for token in span.tokens} - given_tokens
    assert added <= set(method.own_tokens) and list(method.own_tokens) == sorted(method.own_tokens)
    assert set(method.link_tokens) <= set(method.own_tokens)
    assert method.trains_by_mask == (not any(span.groups for span in plan.spans))
    assert not method.needs_probe
    tokens = sum(map(len, (*graph.prefix, *(graph.segments[i] for i in graph.read), graph.query)))
    assert method.shares_positions or tokens <= plan.highest_position + 1


@settings(max_examples=draws(200), deadline=None)
@given(strategies.problems(VOCAB))
def test_spans_name_their_segment_and_round(problem):
    method, graph = problem
    plan = method.plan(graph)
    newest: dict[int, int] = {}
    for span in plan.spans:
        assert (span.segment is None) == (span.round is None)
        if span.segment is None:
            assert not span.cached or span.name.startswith("prefix")
        else:
            assert span.cached and span.tokens == graph.segments[span.segment]
            assert span.name == graph.names[span.segment] + (f" · round {span.round}" if span.round else "")
            assert newest.get(span.segment, -1) < span.round
            newest[span.segment] = span.round
    if (
        method.name != "graph-kv"
        and not any(map(len, plan.prompt.groups))
        and method.name not in ("epic", "cacheblend")
    ):
        assert set(newest) == {i for i in graph.read if graph.segments[i]}


def test_own_tokens_of_kvlink():
    assert KVLink(2, 100, 3, 60, 61).own_tokens == (60, 61, *range(100, 106))
    assert KVLink(2, 100, 3).link_tokens == tuple(range(100, 106)) and KVLink().own_tokens == ()


def test_who_needs_tuning_or_a_probe():
    assert [name for name in METHODS if not methods.get(name).needs_tuning] == ["full"]
    assert [name for name in METHODS if methods.get(name).needs_probe] == ["cacheblend"]
    assert not CacheBlend(ratio=1).needs_probe


def test_who_shares_positions():
    assert [name for name in METHODS if methods.get(name).shares_positions] == ["graph-kv", "pcw", "ape"]


@pytest.mark.parametrize("name", NAMES)
def test_fixing_a_method_for_a_corpus(name):
    method = ready(name)
    if not method.reads_edges:
        with pytest.raises(GraphError, match=f"{method.name} reads no edges; name stored segments"):
            method.for_corpus(9)
    elif method.layout == "packed":
        with pytest.raises(GraphError, match="the query's view depends on every segment"):
            method.for_corpus(9)
    else:
        fixed = method.for_corpus(9)
        assert fixed.for_corpus(99) == fixed and (fixed.band == 9) == (method.layout == "aligned")


@pytest.mark.parametrize("name", NAMES)
def test_variations_differ_from_the_method_in_something(name):
    method = methods.get(name)
    for variations in method.variations().values():
        assert variations and all(v.method != method or not v.edges for v in variations)
        assert len({v.name for v in variations}) == len(variations)


# nobody asks for a class

CLASSES = {type(methods.get(name)).__name__ for name in METHODS}


def asks_for_a_class(source: str) -> list[str]:
    """Lines in which code names a method's class, or compares a method's name with a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvgraph.methods"):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if ast.unparse(node.value) == "methods" else []
        elif isinstance(node, ast.Compare):
            text = ast.unparse(node)
            names = [*CLASSES] if re.search(r"\bmethod\.name (==|!=|in|not in) ['\"(\[{]", text) else []
        if CLASSES.intersection(names):
            found.append(ast.unparse(node))
    return found


def test_nobody_outside_asks_for_a_class():
    files = [path for path in (ROOT / "kvgraph").rglob("*.py") if path.parent.name != "methods"]
    assert len(files) > 100
    assert {str(path): found for path in files if (found := asks_for_a_class(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from kvgraph.methods import GraphKV",
        "from kvgraph.methods.kvlink import KVLink",
        "from kvgraph import methods\nisinstance(m, methods.APE)",
        "if method.name == 'full': pass",
        "x = component.method.name in ('full', 'block')",
    ],
)
def test_the_search_finds(source):
    assert asks_for_a_class(source)
