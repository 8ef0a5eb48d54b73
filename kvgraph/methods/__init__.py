"""Methods: pure functions from graphs to plans, one file each. To add one, add a file and a line in METHODS."""

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
from kvgraph.methods.prompt_cache import PromptCache

__all__ = [
    "APE",
    "METHODS",
    "PCW",
    "PRESETS",
    "Block",
    "CacheBlend",
    "Epic",
    "Full",
    "GraphKV",
    "KVLink",
    "Method",
    "PromptCache",
    "get",
    "parse",
    "reads_edges",
]


def graph_kv_rag(drop_token: int | None = None) -> GraphKV:
    """Graph-KV's `gapemp`: give the graph all_pairs(n, self_edges=True); drop_token is the tokenizer's pad (= eos)."""
    return GraphKV(keep="all", layout="packed", drop_token=drop_token)


def graph_kv_rag_top_k(drop_token: int | None = None) -> GraphKV:
    """Graph-KV's `gapemp_appr`: as `gapemp`, with a graph of top_k(n, k, self_edges=True, last=True)."""
    return graph_kv_rag(drop_token)


def graph_kv_ego() -> GraphKV:
    """Graph-KV's `gapemp_graph` and `gapemp_graph_batch`: give the graph ego([(center, neighbours), ...])."""
    return GraphKV(layout="tight")


def kvlink_llama3_0() -> KVLink:
    """KVLink0 for Llama 3: the released checkpoint without link tokens."""
    return KVLink(links=0, mem_start=128254, mem_end=128255)


def kvlink_llama3_1() -> KVLink:
    """KVLink1 for Llama 3: one link token a document; reserved token ids from 128011."""
    return KVLink(links=1, link_start=128011, slots=40, mem_start=128254, mem_end=128255)


def kvlink_llama3_5() -> KVLink:
    """KVLink5 for Llama 3: five link tokens a document; reserved token ids from 128011."""
    return KVLink(links=5, link_start=128011, slots=40, mem_start=128254, mem_end=128255)


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


def parse(spec: str) -> Method:
    """The method of "name" or "name:field=value,field=value", as commands and requests write it.

    Raises GraphError listing what there is.
    """
    name, _, rest = spec.partition(":")
    fields: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        field, equals, value = item.partition("=")
        if not equals:
            raise GraphError(f"method {spec[:80]!r}: {item!r} isn't FIELD=VALUE")
        fields[field.strip()] = _value(value.strip())
    return get(name, **fields)


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text) if len(text) <= 18 else text
        except ValueError:
            continue
    return text
