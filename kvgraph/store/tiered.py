"""Several stores as one: read from the fastest that has the record, write to all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvgraph.errors import StoreError
from kvgraph.store.base import Found, Store
from kvgraph.store.record import Record


class TieredStore:
    """Tiers from fastest to slowest, e.g. `TieredStore([MemoryStore(10**9), DiskStore("kv")])`."""

    name = "tiered"
    capacity: int | None = None  # each tier has its own

    def __init__(self, tiers: Sequence[Store]):
        if not tiers:
            raise StoreError("a tiered store needs at least one tier")
        self._tiers = tuple(tiers)

    @property
    def tiers(self) -> tuple[Store, ...]:
        """The tiers, fastest first."""
        return tuple(part for tier in self._tiers for part in tier.tiers)

    @property
    def available(self) -> bool:
        """Whether all tiers are."""
        return all(tier.available for tier in self._tiers)

    def for_tenant(self, tenant: str) -> Store:
        """The same tiers for a tenant's records."""
        return TieredStore([tier.for_tenant(tenant) for tier in self._tiers])

    def get(self, key: str) -> Found | None:
        """The record and the name of the first tier that has it, or None.

        Copies the record to the faster tiers, where it may evict others. If this fails, the get still succeeds.
        """
        for index, tier in enumerate(self._tiers):
            found = tier.get(key)
            if found is not None:
                for faster in self._tiers[:index]:
                    try:
                        faster.put(found[0])
                    except StoreError:  # copying only saves time later
                        pass
                return found
        return None

    def put(self, record: Record) -> None:
        """Write through to every tier. Idempotent. Raises the first tier's StoreError after all tiers were tried."""
        failed: StoreError | None = None
        for tier in self._tiers:
            try:
                tier.put(record)
            except StoreError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        """Write through to every tier, one after the other."""
        errors: dict[str, StoreError] = {}
        for tier in self._tiers:
            errors = tier.put_all(records) | errors
        return errors

    def contains(self, key: str) -> bool:
        """Whether any tier has it. Changes nothing."""
        return any(tier.contains(key) for tier in self._tiers)

    def delete(self, key: str) -> bool:
        """Remove it from every tier; True if one had it. Idempotent."""
        found = [tier.delete(key) for tier in self._tiers]
        return any(found)

    def counts(self) -> dict[str, int]:
        """The sums of all tiers: a record found in the second tier is a miss of the first."""
        total: Counter[str] = Counter()
        for tier in self._tiers:
            total.update(tier.counts())
        return dict(total)

    def size(self) -> int | None:
        """Bytes in all tiers; None if one of them can't tell."""
        sizes = [tier.size() for tier in self._tiers]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def close(self) -> None:
        """Close every tier."""
        for tier in self._tiers:
            tier.close()
