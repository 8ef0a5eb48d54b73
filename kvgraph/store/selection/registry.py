"""The registry of selections, and selections as text: "knorm:keep=25", "snapkv:keep=50,window=16"."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

from kvgraph.errors import StoreError
from kvgraph.registry import Registry
from kvgraph.store.selection.base import Selection
from kvgraph.store.selection.compresskv import CompressKV
from kvgraph.store.selection.defensive import Defensive
from kvgraph.store.selection.knorm import KeyNorm
from kvgraph.store.selection.snapkv import SnapKV


def _wrong(name: str, selection: Any) -> str:
    """What is wrong with a selection of another package, or nothing."""
    if not (isinstance(selection, type) and is_dataclass(selection) and hasattr(selection, "scores")):
        return "it isn't a dataclass with scores"
    named = selection.name  # type: ignore[attr-defined]  # or it raises
    return "" if named == name else f"the selection's name is {named!r}"


SELECTIONS: Registry[type[Selection]] = Registry(
    {selection.name: selection for selection in (KeyNorm, SnapKV, Defensive, CompressKV)}, "kvgraph.selections", _wrong
)
"""Selections by name. Other packages add some in the group "kvgraph.selections"; see `kvgraph.registry`."""


def parse_selection(text: str) -> Selection:
    """The selection of a text: a name, and its fields after a colon. Raises StoreError, listing the known ones."""
    name, _, given = text.strip().partition(":")
    if name not in SELECTIONS:
        raise StoreError(f"there is no selection {name[:40]!r}; there are {', '.join(SELECTIONS)}")
    known = [f.name for f in fields(SELECTIONS[name]) if isinstance(f.default, int)]  # type: ignore[arg-type]  # dataclasses
    values: dict[str, int] = {}
    for item in filter(None, given.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise StoreError(f"selection {name} has no field {key[:40]!r}; it has {', '.join(known)}")
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise StoreError(f"field {key} of selection {name} is a whole number, not {value[:40]!r}")
        values[key] = int(value)
    return SELECTIONS[name](**values)


def fingerprint_selected(fingerprint: str, selection: Selection | None) -> str:
    """The fingerprint of a model whose spans keep a selection: the model's own, if that is all of them."""
    if selection is None or selection.keep == 100:
        return fingerprint
    values = [f"{f.name}={getattr(selection, f.name)}" for f in fields(selection)]  # type: ignore[arg-type]  # dataclasses
    return hashlib.sha256(f"{fingerprint} select {selection.name}:{','.join(values)}".encode()).hexdigest()
