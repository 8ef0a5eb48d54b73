"""The memory tier. Least recently used records are evicted first, pinned ones never. It is also the engine's pool."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvgraph.errors import StoreError
from kvgraph.store.base import EVENTS, Found, Store, one_by_one
from kvgraph.store.record import Record


@dataclass
class _Entry:
    record: Record
    nbytes: int
    pins: int = 0


class MemoryStore:
    """Records in this process's memory, at most `capacity_bytes` of keys and values. Thread-safe."""

    name = "memory"

    def __init__(self, capacity_bytes: int):
        self.capacity: int | None = capacity_bytes
        self._most = capacity_bytes
        self._counts = dict.fromkeys(EVENTS, 0)
        self.bytes = 0
        self.pinned_bytes = 0
        self._idle: OrderedDict[str, _Entry] = OrderedDict()  # not pinned, least recently used first
        self._pinned: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self.on_evict: Callable[[str], None] | None = None  # called with the key of each record that makes room

    def __len__(self) -> int:
        return len(self._idle) + len(self._pinned)

    def __contains__(self, key: str) -> bool:
        return key in self._pinned or key in self._idle

    def contains(self, key: str) -> bool:
        """Changes nothing and doesn't count as a use."""
        return key in self

    @property
    def tiers(self) -> tuple[Store, ...]:
        """Itself."""
        return (self,)

    @property
    def available(self) -> bool:
        """Always."""
        return True

    def for_tenant(self, tenant: str) -> Store:
        """Itself: keys cover the tenant, and nothing in memory is listed."""
        return self

    def get(self, key: str) -> Found | None:
        """The record and "memory", or None. Evicts nothing; makes it the most recently used."""
        with self._lock:
            entry = self._pinned.get(key)
            if entry is None and (entry := self._idle.get(key)) is not None:
                self._idle.move_to_end(key)
            self._counts["misses" if entry is None else "hits"] += 1
            self._counts["read_bytes"] += 0 if entry is None else entry.nbytes
            return None if entry is None else (entry.record, self.name)

    def put(self, record: Record) -> None:
        """Keep a record, evicting others down to the capacity. Idempotent: an existing record stays.

        A record that doesn't fit beside the pinned ones isn't kept, and nothing is evicted for it.
        """
        nbytes = self._taken(record)
        with self._lock:
            if record.key in self._pinned:
                return
            if record.key in self._idle:
                self._idle.move_to_end(record.key)
                return
            if self.pinned_bytes + nbytes > self._most:
                return
            self._evict_to(self._most - nbytes)
            self._idle[record.key] = _Entry(record, nbytes)
            self.bytes += nbytes
            self._counts["written_bytes"] += nbytes

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        """One by one."""
        return one_by_one(self.put, records)

    def touch(self, key: str) -> None:
        """Make a record the most recently used, if it is there. Counts nothing."""
        with self._lock:
            if key in self._idle:
                self._idle.move_to_end(key)

    def evict_to(self, size: int) -> None:
        """Evict least recently used records until at most `size` bytes are held, or only pinned ones. Idempotent."""
        with self._lock:
            self._evict_to(size)

    def pin(self, key: str) -> None:
        """Protect a record from eviction. Counted: as many unpins release it. Raises KeyError if it isn't there."""
        with self._lock:
            entry = self._pinned.get(key)
            if entry is None:
                entry = self._pinned[key] = self._idle.pop(key)
                self.pinned_bytes += entry.nbytes
            entry.pins += 1

    def unpin(self, key: str) -> None:
        """Take one pin back; after the last the record is the most recently used. KeyError if it isn't pinned."""
        with self._lock:
            entry = self._pinned[key]
            entry.pins -= 1
            if entry.pins == 0:
                self._idle[key] = self._pinned.pop(key)
                self.pinned_bytes -= entry.nbytes

    def delete(self, key: str) -> bool:
        """Remove a record, pinned or not. Idempotent."""
        with self._lock:
            entry = self._pinned.pop(key, None)
            if entry is not None:
                self.pinned_bytes -= entry.nbytes
            else:
                entry = self._idle.pop(key, None)
            if entry is None:
                return False
            self.bytes -= entry.nbytes
            return True

    def counts(self) -> dict[str, int]:
        """Hits, misses and bytes."""
        with self._lock:
            return dict(self._counts)

    def size(self) -> int:
        """Bytes of keys and values."""
        return self.bytes

    def close(self) -> None:
        """Remove all records; those returned earlier stay valid."""
        with self._lock:
            self._idle.clear()
            self._pinned.clear()
            self.bytes = self.pinned_bytes = 0

    def _taken(self, record: Record) -> int:
        """Bytes that a record takes."""
        return record.nbytes

    def _evict_to(self, size: int) -> None:
        while self.bytes > size and self._idle:
            key, entry = self._idle.popitem(last=False)
            self.bytes -= entry.nbytes
            if self.on_evict is not None:
                self.on_evict(key)


class HostStore(MemoryStore):
    """Records in pinned memory, each in one buffer, from which a GPU copies them: see `kvgraph.engine.transfers`.

    It also holds what is on the GPU, as long as it is among the most recently used. Its bytes are those that torch's
    allocator takes, which gives pinned memory in powers of two.
    """

    name = "host"

    def _taken(self, record: Record) -> int:
        return 1 << (record.keys[0].untyped_storage().nbytes() - 1).bit_length()
