"""The kinds of remote tier there are: one line a URL scheme."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from kvgraph.errors import StoreError
from kvgraph.store.base import Store

# scheme -> "module:function"; the function makes the store of (url, fingerprint, tenant). Imported when a URL asks for it.
SCHEMES: dict[str, str] = {
    "redis": "kvgraph.store.remote.redis:open_redis",
    "rediss": "kvgraph.store.remote.redis:open_redis",
    "valkey": "kvgraph.store.remote.redis:open_redis",
    "s3": "kvgraph.store.remote.objects:open_objects",
    "s3a": "kvgraph.store.remote.objects:open_objects",
    "gs": "kvgraph.store.remote.objects:open_objects",
    "az": "kvgraph.store.remote.objects:open_objects",
    "azure": "kvgraph.store.remote.objects:open_objects",
    "abfs": "kvgraph.store.remote.objects:open_objects",
}


def open_remote(url: str, fingerprint: str, tenant: str = "") -> Store:
    """The store that a URL names, for the records of one model and tenant. Raises StoreError for an unknown scheme."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise StoreError(f"there is no kind of store {scheme[:40]!r}; give a folder, or a URL of {', '.join(SCHEMES)}")
    module, _, name = SCHEMES[scheme].partition(":")
    make: Callable[[str, str, str], Store] = getattr(import_module(module), name)
    return make(url, fingerprint, tenant)
