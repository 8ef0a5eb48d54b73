"""The store behind a server. Only this file knows which kinds of store there are, and what they can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvgraph.store.base import Store
from kvgraph.store.disk import DiskStore


@runtime_checkable
class CountingTier(Protocol):
    """A tier that counts what happens to it and knows its size, as metrics show it.

    capacity: the most bytes it keeps; None: no limit. counts: hits, misses, bad, unreadable and index_errors. size: bytes
    of its records, None when they can't be counted now; it may wait for a disk.
    """

    name: str
    capacity: int | None

    def counts(self) -> Mapping[str, int]: ...  # noqa: D102
    def size(self) -> int | None: ...  # noqa: D102


def open_store(folder: Path | None, capacity: int | None, fingerprint: str) -> Store | None:
    """The store in a folder, for one model's records, at most `capacity` bytes; None without a folder."""
    return None if folder is None else DiskStore(folder, capacity_bytes=capacity, fingerprint=fingerprint)


def counting_tiers(store: Store | None) -> list[CountingTier]:
    """Those of a store's tiers that metrics are shown of."""
    tiers = getattr(store, "tiers", (store,))
    return [tier for tier in tiers if isinstance(tier, CountingTier)]
