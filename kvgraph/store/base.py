"""What every store can do. It is a cache: losing a record costs a recompute, serving a wrong one is the unforgivable
failure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from kvgraph.store.record import Record

Found = tuple[Record, str]  # a record, and the name of the tier that had it

# What stores count. bad: records that weren't what they should be, moved aside or replaced. unreadable: records that
# couldn't be read, or that this version doesn't understand. index_errors: times an index couldn't be used. Of remote
# tiers, errors: calls that failed; timeouts: calls without an answer in time; skipped: calls that weren't made, because
# those before them had failed.
EVENTS = ("hits", "misses", "bad", "unreadable", "index_errors", "errors", "timeouts", "skipped")

_KEY = re.compile(r"[0-9a-f]{64}")


class Store(Protocol):
    """Content-addressed KV records. Every operation is safe to call from several threads.

    name: as usage and metrics call it: "memory", "disk", ... capacity: bytes it keeps at most; None: no limit.
    """

    name: str
    capacity: int | None

    @property
    def tiers(self) -> tuple[Store, ...]:
        """The stores it consists of, fastest first; a plain store is its own only tier."""
        ...

    def get(self, key: str) -> Found | None:
        """The record of `key` and the name of the tier that had it, or None.

        Never raises on a miss or a bad record, never returns doubtful data. Changes no record that is good (a bad one may
        be moved aside), evicts nothing; counts as a use of the record.
        """
        ...

    def put(self, record: Record) -> None:
        """Keep a record. Idempotent and atomic: others see all of it or nothing. May evict others.

        Raises StoreError when it can't be kept and somebody should know (folder not writable, disk full).
        """
        ...

    def contains(self, key: str) -> bool:
        """Whether `get` would probably find it. A cheap hint: it reads, checks and changes nothing."""
        ...

    def delete(self, key: str) -> bool:
        """Remove a record, pinned or not; True if there was one. Idempotent. Readers that hold it keep their data."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How often each of EVENTS happened in this process. Waits for nothing."""
        ...

    def size(self) -> int | None:
        """Bytes of all its records; None if that can't be told now. It may wait for a disk or a network."""
        ...

    def close(self) -> None:
        """Write what is pending and let go of files. Idempotent; records handed out stay valid."""
        ...


def is_key(text: str) -> bool:
    """Whether it is a span's key: 64 lower-case hex digits. Anything else is in no store and never becomes a path."""
    return _KEY.fullmatch(text) is not None
