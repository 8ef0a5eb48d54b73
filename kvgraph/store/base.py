"""The interface of every store. A store is a cache: a lost record is only computed again, but a wrong one must never be
served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from kvgraph.store.record import Record

Found = tuple[Record, str]  # a record, and the name of the tier that had it

# Events that stores count. bad: damaged records, moved aside or replaced. unreadable: records that couldn't be read, or
# that this version doesn't understand. untrusted: records that aren't signed with this process's secret. index_errors: times an index couldn't be used. For remote tiers, errors: calls
# that failed; timeouts: calls without an answer in time; skipped: calls that weren't made, because earlier ones had
# failed.
EVENTS = ("hits", "misses", "bad", "unreadable", "untrusted", "index_errors", "errors", "timeouts", "skipped")

_KEY = re.compile(r"[0-9a-f]{64}")


class Store(Protocol):
    """Content-addressed KV records. Every operation is safe to call from several threads.

    name: in usage and metrics: "memory", "disk", ... capacity: maximum bytes that it keeps; None means no limit.
    """

    name: str
    capacity: int | None

    @property
    def tiers(self) -> tuple[Store, ...]:
        """The stores it consists of, fastest first; a plain store is its own only tier."""
        ...

    def get(self, key: str) -> Found | None:
        """The record of `key` and the name of the tier that had it, or None.

        Never raises for a miss or a bad record, and never returns doubtful data. Good records don't change, bad ones
        may be moved aside, nothing is evicted. It counts as a use of the record.
        """
        ...

    def put(self, record: Record) -> None:
        """Keep a record. Idempotent and atomic: others see all of it or nothing. May evict others.

        Raises StoreError if it can't be kept for a reason that users should know (folder not writable, disk full).
        """
        ...

    def contains(self, key: str) -> bool:
        """Whether `get` would probably find it. A cheap hint: it reads, checks and changes nothing."""
        ...

    def delete(self, key: str) -> bool:
        """Remove a record, pinned or not; True if there was one. Idempotent. Readers that hold it keep their data."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How often each of EVENTS happened in this process. Returns at once."""
        ...

    def size(self) -> int | None:
        """Bytes of all its records; None if that can't be found out now. It may wait for a disk or a network."""
        ...

    def close(self) -> None:
        """Write what is pending and close files. Idempotent; records returned earlier stay valid."""
        ...


def is_key(text: str) -> bool:
    """Whether it is a span's key: 64 lower-case hex digits. Nothing else is in a store or becomes a path."""
    return _KEY.fullmatch(text) is not None
