"""Several tiers as one store: read from the fastest that has it, write to all."""

from __future__ import annotations

from collections.abc import Sequence

from kvgraph.errors import StoreError
from kvgraph.store.base import Store
from kvgraph.store.record import Record


class TieredStore:
    """Tiers from fastest to slowest, e.g. `TieredStore([MemoryStore(10**9), DiskStore("kv")])`."""

    name = "tiered"

    def __init__(self, tiers: Sequence[Store]):
        if not tiers:
            raise StoreError("a tiered store needs at least one tier")
        self.tiers = tuple(tiers)

    def get(self, key: str) -> Record | None:
        """See `get_with_tier`."""
        return self.get_with_tier(key)[0]

    def get_with_tier(self, key: str) -> tuple[Record | None, str]:
        """The record and the name of the first tier that has it, or (None, "").

        Puts the record into the faster tiers, where it may evict others; that failing doesn't fail the get.
        """
        for index, tier in enumerate(self.tiers):
            record = tier.get(key)
            if record is not None:
                for faster in self.tiers[:index]:
                    try:
                        faster.put(record)
                    except StoreError:  # promotion only saves time later
                        pass
                return record, tier.name
        return None, ""

    def put(self, record: Record) -> None:
        """Write through to every tier. Idempotent. Raises the first tier's StoreError after all tiers were tried."""
        failed: StoreError | None = None
        for tier in self.tiers:
            try:
                tier.put(record)
            except StoreError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def contains(self, key: str) -> bool:
        """Whether any tier has it. Changes nothing."""
        return any(tier.contains(key) for tier in self.tiers)

    def delete(self, key: str) -> bool:
        """Remove it from every tier; True if one had it. Idempotent."""
        found = [tier.delete(key) for tier in self.tiers]
        return any(found)

    def close(self) -> None:
        """Close every tier."""
        for tier in self.tiers:
            tier.close()
