"""The methods and presets that there are, by name: kvgraph's own, then those that installed packages add.

A package adds a method by an entry point in the group "kvgraph.methods", whose name is the method's, and a preset by one
in "kvgraph.presets". It is imported when somebody asks for it, and nothing can be added while a program runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
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

BASELINE = Full.name
"""The method that other methods are measured against, and that every model answers by."""


class Registry(Mapping[str, Callable[[], Method]]):
    """What makes a method with its default fields, by name. Read-only.

    own: kvgraph's. group: the entry points of other packages. One that is called as an own one is left out, with a
    warning. Looking one up raises GraphError if its package can't be imported or gives something else.
    """

    def __init__(self, own: Mapping[str, Callable[[], Method]], group: str):
        self._own, self._group = dict(own), group
        self._loaded: dict[str, Callable[[], Method]] = {}

    def __getitem__(self, name: str) -> Callable[[], Method]:
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = _loaded(self._added[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added

    def __len__(self) -> int:
        return len(self._own) + len(self._added)

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        found = {entry.name: entry for entry in entry_points(group=self._group)}
        for name in sorted(found.keys() & self._own.keys()):
            warnings.warn(f"{_source(found.pop(name))} calls a method {name!r}, which is kvgraph's own", stacklevel=2)
        return dict(sorted(found.items()))


def _source(entry: EntryPoint) -> str:
    """The package that an entry point is of, for messages."""
    return f"the package {entry.dist.name}" if entry.dist is not None else entry.value


def _loaded(entry: EntryPoint) -> Callable[[], Method]:
    try:
        make: Any = entry.load()
        made = make()
    except Exception as error:
        raise GraphError(
            f"{_source(entry)} adds the method {entry.name!r}, which can't be made "
            f"({type(error).__name__}: {error}); mend or uninstall it"
        ) from error
    if not isinstance(made, Method):
        raise GraphError(
            f"{_source(entry)} adds the method {entry.name!r}, but {entry.value} makes no kvgraph.methods.Method"
        )
    if entry.group == "kvgraph.methods" and made.name != entry.name:
        raise GraphError(
            f"{_source(entry)} adds the method {entry.name!r}, but {entry.value} has the name {made.name!r}"
        )
    checked: Callable[[], Method] = make
    return checked


METHODS = Registry(
    {cls.name: cls for cls in (Full, Block, KVLink, GraphKV, PCW, APE, PromptCache, Epic, CacheBlend)},
    "kvgraph.methods",
)
"""Method classes by name."""

PRESETS = Registry(
    {
        "graph-kv-rag": graph_kv_rag,
        "graph-kv-rag-top-k": graph_kv_rag_top_k,
        "graph-kv-ego": graph_kv_ego,
        "kvlink-llama3-0": kvlink_llama3_0,
        "kvlink-llama3-1": kvlink_llama3_1,
        "kvlink-llama3-5": kvlink_llama3_5,
    },
    "kvgraph.presets",
)
"""Configured methods by name: functions whose docstrings say what they reproduce."""


def known(name: str) -> bool:
    """Whether there is a method or preset of this name."""
    return name in METHODS or name in PRESETS


def get(name: str, /, **changes: Any) -> Method:
    """The method or preset called `name`, with some of its fields changed.

    Raises GraphError listing the known names, or the method's fields, when one is wrong.
    """
    make = METHODS.get(name) or PRESETS.get(name)
    if make is None:
        raise GraphError(f"there is no method {name!r}; there are {', '.join([*METHODS, *PRESETS])}")
    return with_fields(make(), changes, name)


def with_fields(method: Method, changes: Mapping[str, Any], called: str = "") -> Method:
    """The method with some of its fields changed. called: what errors call it, its name unless given.

    Raises GraphError for a field that it doesn't have, or a value that it doesn't take.
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
