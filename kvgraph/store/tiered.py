"""Several stores as one: read from the fastest that has the record, write to all.

What a slower tier had is copied to the faster ones by a thread of its own. Who reads doesn't wait for a disk to take it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvgraph.errors import StoreError
from kvgraph.store.base import Found, Store
from kvgraph.store.record import Record

MOST = 64  # records that may wait to be copied; what is read beyond that is copied another time
WAITING = 1 << 30  # bytes of them, which no tier's capacity counts; a larger record is copied if no other waits


class _Copier:
    """Copies records to faster tiers, one after the other, in a thread that begins with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._thread: ThreadPoolExecutor | None = None
        self._copies: dict[str, tuple[Future[None], int]] = {}  # by key: of a record that isn't copied yet; its bytes

    def start(self, record: Record, tiers: Sequence[Store]) -> None:
        """Copy a record later, unless too many wait, or too many bytes."""
        with self._lock:
            waiting = sum(size for _, size in self._copies.values())
            full = len(self._copies) >= MOST or (waiting and waiting + record.nbytes > WAITING)
            if full or record.key in self._copies:
                return
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "kvgraph-copier")
            self._copies[record.key] = self._thread.submit(self._copy, record, tiers), record.nbytes

    def wait(self, key: str | None = None) -> None:
        """Until a record, or every one, has been copied."""
        with self._lock:
            copies = [copy for name, (copy, _) in self._copies.items() if key in (None, name)]
        wait(copies)

    def close(self) -> None:
        """Finish what was started, and end the thread. The next copy begins a new one."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def _copy(self, record: Record, tiers: Sequence[Store]) -> None:
        try:
            for tier in tiers:
                try:
                    tier.put(record)
                except StoreError:  # copying only saves time later
                    pass
        finally:
            with self._lock:
                del self._copies[record.key]


class TieredStore:
    """Tiers from fastest to slowest, e.g. `TieredStore([MemoryStore(10**9), DiskStore("kv")])`."""

    name = "tiered"
    capacity: int | None = None  # each tier has its own

    def __init__(self, tiers: Sequence[Store]):
        if not tiers:
            raise StoreError("a tiered store needs at least one tier")
        self._tiers = tuple(tiers)
        self._copier = _Copier()

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
        made = TieredStore([tier.for_tenant(tenant) for tier in self._tiers])
        made._copier = self._copier
        return made

    def get(self, key: str) -> Found | None:
        """The record and the name of the first tier that has it, or None.

        The record is then copied to the faster tiers, where it may evict others; `flush` waits for that.
        """
        for index, tier in enumerate(self._tiers):
            found = tier.get(key)
            if found is not None:
                if index:
                    self._copier.start(found[0], self._tiers[:index])
                return found
        return None

    def flush(self) -> None:
        """Wait until what was read so far is copied to the faster tiers."""
        self._copier.wait()

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
        """Remove it from every tier; True if one had it. Idempotent. Raises as `put` does."""
        self._copier.wait(key)  # or it would come back
        found, failed = False, None
        for tier in self._tiers:
            try:
                found |= tier.delete(key)
            except StoreError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return found

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
        """Finish copies and close every tier."""
        self._copier.close()
        for tier in self._tiers:
            tier.close()
