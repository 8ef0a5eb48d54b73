"""Registries by name: kvgraph's own entries, then those that installed packages declare.

A package declares an entry by an entry point. Its group says the kind, its name is what people call it. The entry is
imported when it is first looked up. Nothing can be added while a program runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from kvgraph.errors import KVGraphError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A read-only mapping.

    own: kvgraph's own entries.
    group: the group of the entry points. One with the name of an own entry is left out, with a warning.
    wrong: says what is wrong with (name, the loaded entry point), "" if nothing.

    Looking up an entry raises KVGraphError if its package can't be imported or something is wrong with it.
    """

    def __init__(self, own: Mapping[str, T], group: str, wrong: Callable[[str, Any], str]):
        self.group = group
        self._own, self._wrong = dict(own), wrong
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(self._added[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._added

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added

    def __len__(self) -> int:
        return len(self._own) + len(self._added)

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        found = {entry.name: entry for entry in entry_points(group=self.group)}
        for name in sorted(found.keys() & self._own.keys()):
            entry = found.pop(name)
            warnings.warn(f"{_source(entry)} is left out: kvgraph has its own {name!r} in {self.group}", stacklevel=2)
        return dict(sorted(found.items()))

    def _load(self, entry: EntryPoint) -> T:
        try:
            value: T = entry.load()
            wrong = self._wrong(entry.name, value)
        except Exception as error:  # whatever goes wrong in another package, the message names it
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise KVGraphError(
                f"{_source(entry)}, which declares {entry.name!r} in {self.group}, can't be used; "
                f"fix or uninstall it ({wrong})"
            )
        return value


def named(kind: type[Any]) -> Callable[[str, Any], str]:
    """A registry's `wrong` for instances of `kind`, which have a `name`."""

    def wrong(name: str, value: Any) -> str:
        if not isinstance(value, kind):
            return f"it isn't a {kind.__module__}.{kind.__name__}"
        return "" if value.name == name else f"its name is {value.name!r}"

    return wrong


def _source(entry: EntryPoint) -> str:
    """An entry point and its package, for messages."""
    return entry.value if entry.dist is None else f"{entry.value} of the package {entry.dist.name}"
