"""The kinds of remote tier there are: one line a URL scheme."""

from __future__ import annotations

from collections.abc import Callable

from kvgraph.errors import StoreError
from kvgraph.registry import Registry
from kvgraph.store.base import Store

Opener = Callable[[str, str, str], Store]
"""What makes the store of (URL, model's fingerprint, tenant). It imports the client of its service when it is called."""


def _redis(url: str, fingerprint: str, tenant: str) -> Store:
    from kvgraph.store.remote.redis import open_redis

    return open_redis(url, fingerprint, tenant)


def _objects(url: str, fingerprint: str, tenant: str) -> Store:
    from kvgraph.store.remote.objects import open_objects

    return open_objects(url, fingerprint, tenant)


SCHEMES: Registry[Opener] = Registry(
    {
        **dict.fromkeys(("redis", "rediss", "valkey"), _redis),
        **dict.fromkeys(("s3", "s3a", "gs", "az", "azure", "abfs"), _objects),
    },
    "kvgraph.stores",
    lambda scheme, opener: "" if callable(opener) else "it isn't a function",
)
"""Openers by URL scheme. Other packages add some in the group "kvgraph.stores"; see `kvgraph.registry`."""


def open_remote(url: str, fingerprint: str, tenant: str = "") -> Store:
    """The store that a URL names, for the records of one model and tenant. Raises StoreError for an unknown scheme."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise StoreError(f"there is no kind of store {scheme[:40]!r}; give a folder, or a URL of {', '.join(SCHEMES)}")
    return SCHEMES[scheme](url, fingerprint, tenant)
