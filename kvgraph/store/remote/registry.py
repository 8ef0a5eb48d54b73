"""The kinds of remote tier there are: one line a URL scheme."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from kvgraph.errors import StoreError
from kvgraph.store.base import Store

# scheme -> "module:function"; the function makes the store of (url, fingerprint). Imported only when a URL asks for it.
SCHEMES: dict[str, str] = {}


def open_remote(url: str, fingerprint: str) -> Store:
    """The store that a URL names, for the records of one model. Raises StoreError for a scheme that doesn't exist."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        there = f"; there are {', '.join(SCHEMES)}" if SCHEMES else ""
        raise StoreError(f"there is no kind of store {scheme[:40]!r}; give a folder{there}")
    module, _, name = SCHEMES[scheme].partition(":")
    make: Callable[[str, str], Store] = getattr(import_module(module), name)
    return make(url, fingerprint)
