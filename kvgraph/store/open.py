"""Opening stores by name: a folder, a URL, or several of these from fastest to slowest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvgraph.errors import StoreError
from kvgraph.store.base import Store
from kvgraph.store.catalog import Catalog
from kvgraph.store.disk import DiskStore
from kvgraph.store.remote.registry import open_remote
from kvgraph.store.remote.store import RemoteStore
from kvgraph.store.tiered import TieredStore

Where = str | Path


def open_catalog(where: Where, make: bool = False) -> Catalog:
    """All records in a folder, which must be a store unless it is to be made, or at a URL. Raises StoreError."""
    if "://" in str(where):
        opened = open_remote(str(where), "")
        if not isinstance(opened, RemoteStore):
            raise StoreError(f"a {opened.name} store can't be listed")
        return opened.catalog()
    folder = Path(where)
    if not make and not (folder / "VERSION").exists():  # looking at a store must not create one
        raise StoreError(f"{folder} isn't a store" if folder.exists() else f"there is no store {folder}")
    return DiskStore(folder)


def open_store(
    where: Where | Sequence[Where],
    fingerprint: str,
    *,
    capacity_bytes: int | None = None,
    tenant: str = "",
) -> Store:
    """The store in a folder, at a URL, or the tiers of several, for the records of one model.

    capacity_bytes: of a folder; None for no limit. tenant: a salt; each tenant's records are kept apart. Raises StoreError.
    """
    places = [where] if isinstance(where, str | Path) else list(where)
    if not places:
        raise StoreError("give at least one folder or URL of a store")
    stores: list[Store] = []
    for place in places:
        if "://" in str(place):
            stores.append(open_remote(str(place), fingerprint, tenant))
        else:
            stores.append(DiskStore(place, capacity_bytes, fingerprint=fingerprint).for_tenant(tenant))
    return stores[0] if len(stores) == 1 else TieredStore(stores)
