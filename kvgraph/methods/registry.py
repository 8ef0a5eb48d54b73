"""The methods and presets that there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from types import MappingProxyType
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

METHODS: Mapping[str, type[Full | Block | KVLink | GraphKV | PCW | APE | PromptCache | Epic | CacheBlend]] = (
    MappingProxyType({cls.name: cls for cls in (Full, Block, KVLink, GraphKV, PCW, APE, PromptCache, Epic, CacheBlend)})
)
"""Method classes by name."""

PRESETS: Mapping[str, Callable[[], Method]] = MappingProxyType(
    {
        "graph-kv-rag": graph_kv_rag,
        "graph-kv-rag-top-k": graph_kv_rag_top_k,
        "graph-kv-ego": graph_kv_ego,
        "kvlink-llama3-0": kvlink_llama3_0,
        "kvlink-llama3-1": kvlink_llama3_1,
        "kvlink-llama3-5": kvlink_llama3_5,
    }
)
"""Configured methods by name: functions whose docstrings say what they reproduce."""


def get(spec: str, **fields: Any) -> Method:
    """The method or preset called `spec`, with some of its fields changed.

    Raises GraphError listing the known names, or the method's fields, when one is wrong.
    """
    make: Callable[[], Any] | None = METHODS.get(spec) or PRESETS.get(spec)
    if make is None:
        raise GraphError(f"there is no method {spec!r}; there are {', '.join([*METHODS, *PRESETS])}")
    method = make()
    known = [f.name for f in fields_of(method)]
    for field in fields:
        if field not in known:
            raise GraphError(f"{spec} has no field {field!r}; it has {', '.join(known) or 'no fields'}")
    return replace(method, **fields)


def reads_edges(method: Method) -> bool:
    """Whether the method makes anything of edges; all others refuse a graph that has some."""
    return isinstance(method, GraphKV) and method.rounds > 0
