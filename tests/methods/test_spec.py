"""Methods as text: one parser, one formatter, and the default that stands for none."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvgraph import methods
from kvgraph.errors import GraphError
from kvgraph.methods import APE, METHODS, PRESETS, CacheBlend, Epic, Full, GraphKV, PromptCache
from soak import draws


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field, by its type."""
    if isinstance(hint, UnionType):
        return st.one_of([values(kind) for kind in get_args(hint)])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(0, 1000) | st.integers(0, 10**17),
        float: st.floats(0, 10, allow_subnormal=False) | st.integers(0, 10),
    }[hint]


@settings(max_examples=draws(30), suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
@given(data=st.data())
def test_text_and_method_say_the_same(name, data):
    method = methods.get(name)
    hints, names = get_type_hints(type(method)), [*methods.configuration(method)]
    fields = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    try:
        method = methods.with_fields(method, {field: data.draw(values(hints[field]), field) for field in fields})
    except GraphError:
        assume(False)
    text = methods.format(method)
    assert methods.parse(text) == methods.resolve(text) == method and type(methods.parse(text)) is type(method)
    assert methods.format(methods.parse(text)) == text


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("full", Full()),
        ("full:", Full()),
        ("epic:k=8", Epic(8)),
        ("graph-kv: rounds = 2 ,layout=tight,", GraphKV(2, layout="tight")),
        ("graph-kv:band=NONE", GraphKV()),
        ("pcw:shared_prefix=True", methods.PCW(shared_prefix=True)),
        ("cacheblend:selected=[[0,2],[]],ratio=0.5", CacheBlend(0.5, ((0, 2), ()))),
        ("cacheblend:ratio=0.5, selected = [ [1] ] ", CacheBlend(0.5, ((1,),))),
        ("ape:temperature=0.30000000000000004", APE(0.1 + 0.2)),
        ("graph-kv-ego:rounds=2", GraphKV(2, layout="tight")),
    ],
)
def test_what_is_read(spec, method):
    assert methods.parse(spec) == method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "there is no method ''"),
        ("nonsense", "there is no method 'nonsense'; there are full, block,"),
        ("Full", "there is no method 'Full'"),
        ("full:k=1", "full has no field 'k'; it has no fields"),
        ("epic:k", "'k' isn't FIELD=VALUE"),
        ("epic:=1", "epic has no field ''"),
        ("epic:k=many", "epic: k must be an integer of at least 0, not 'many'"),
        ('epic:k="1"', "epic: k must be an integer of at least 0, not '1'"),
        ("epic:k=" + "9" * 5000, "epic: k must be an integer"),
        ("cacheblend:selected=[[0]", "isn't JSON"),
        ("cacheblend:selected=" + "[" * 100_000, "isn't JSON"),
        ("cacheblend:selected=[[0]]x,ratio=1", "a comma is missing before 'x,ratio=1'"),
        ("prompt-cache:slot=0", "slot must be an integer of at least 1"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(GraphError) as refused:
        methods.parse(spec)
    assert message in str(refused.value) and len(str(refused.value)) < 6000


def test_what_stands_for_a_method():
    assert methods.resolve("epic:k=8") == Epic(8) == methods.resolve(Epic(8), ["block"])
    for wrong, message in ((Epic, r"such as Epic\(\), not the class"), (3, "not int"), (b"full", "not bytes")):
        with pytest.raises(GraphError, match=message):
            methods.resolve(wrong)  # type: ignore[arg-type]


def test_the_default_is_the_first_declared_method_that_there_is():
    assert methods.resolve(None) == methods.resolve(None, ["unheard-of"]) == Full()
    assert methods.resolve(None, ["unheard-of", "prompt-cache", "block"]) == PromptCache()
    assert methods.resolve(None, ["graph-kv-ego"]) == methods.get("graph-kv-ego")
