"""The registries of methods and presets.

Other packages add methods by entry points in the group "kvgraph.methods", each with the name of its method, and presets
by entry points in "kvgraph.presets"; see kvgraph.registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from typing import Any

from kvgraph.errors import GraphError
from kvgraph.methods.ape import APE
from kvgraph.methods.base import Method
from kvgraph.methods.block import Block
from kvgraph.methods.cacheblend import CacheBlend
from kvgraph.methods.epic import Epic
from kvgraph.methods.full import Full
from kvgraph.methods.graph_kv import GraphKV
from kvgraph.methods.kvlink import KVLink
from kvgraph.methods.pcw import PCW
from kvgraph.methods.presets import (
    graph_kv_ego,
    graph_kv_rag,
    graph_kv_rag_top_k,
    kvlink_llama3_0,
    kvlink_llama3_1,
    kvlink_llama3_5,
)
from kvgraph.methods.prompt_cache import PromptCache
from kvgraph.registry import Registry

BASELINE = Full.name
"""The method that others are compared with, and the default."""


def _wrong(name: str, make: Any) -> str:
    """What is wrong with a method class or preset of another package, or nothing."""
    made = make()
    if not isinstance(made, Method):
        return "it doesn't make a kvgraph.methods.Method"
    if isinstance(make, type) and made.name != name:
        return f"the method's name is {made.name!r}"
    return ""


METHODS: Registry[Callable[[], Method]] = Registry(
    {cls.name: cls for cls in (Full, Block, KVLink, GraphKV, PCW, APE, PromptCache, Epic, CacheBlend)},
    "kvgraph.methods",
    _wrong,
)
"""Method classes by name."""

PRESETS: Registry[Callable[[], Method]] = Registry(
    {
        "graph-kv-rag": graph_kv_rag,
        "graph-kv-rag-top-k": graph_kv_rag_top_k,
        "graph-kv-ego": graph_kv_ego,
        "kvlink-llama3-0": kvlink_llama3_0,
        "kvlink-llama3-1": kvlink_llama3_1,
        "kvlink-llama3-5": kvlink_llama3_5,
    },
    "kvgraph.presets",
    _wrong,
)
"""Configured methods by name. The functions' docstrings say what they reproduce."""


def known(name: str) -> bool:
    """Whether there is a method or preset of this name."""
    return name in METHODS or name in PRESETS


def get(name: str, /, **changes: Any) -> Method:
    """The method or preset called `name`, with some of its fields changed.

    Raises GraphError, listing the known names or fields, for an unknown one.
    """
    make = METHODS.get(name) or PRESETS.get(name)
    if make is None:
        raise GraphError(f"there is no method {name!r}; there are {', '.join([*METHODS, *PRESETS])}")
    return with_fields(make(), changes, name)


def with_fields(method: Method, changes: Mapping[str, Any], called: str = "") -> Method:
    """The method with some of its fields changed. called: its name in errors, if not its own.

    Raises GraphError for an unknown field or a wrong value.
    """
    names = configuration(method)
    for field in changes:
        if field not in names:
            raise GraphError(
                f"{called or method.name} has no field {field!r}; it has {', '.join(names) or 'no fields'}"
            )
    changed: Any = method
    return replace(changed, **changes) if changes else method


def configuration(method: Method) -> dict[str, Any]:
    """The values of a method's fields, by name."""
    return {field.name: getattr(method, field.name) for field in fields_of(method)}


def fields_of(method: Method) -> tuple[Field[Any], ...]:
    """A method's fields."""
    dataclass: Any = method
    return fields(dataclass)
