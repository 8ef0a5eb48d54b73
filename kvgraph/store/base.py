"""What every tier of the store can do. It is a cache: losing a record costs a recompute, serving a wrong one is the
unforgivable failure."""

from __future__ import annotations

import re
from typing import Protocol

from kvgraph.store.record import Record

_KEY = re.compile(r"[0-9a-f]{64}")


class Store(Protocol):
    """Content-addressed KV records. Every operation is safe to call from several threads."""

    name: str  # the tier's name in usage records: "memory", "disk", ...

    def get(self, key: str) -> Record | None:
        """The record of `key`, or None. Never raises on a miss or a bad record, never returns doubtful data.

        Changes no record that is good (a bad one may be moved aside), evicts nothing; counts as a use of the record.
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

    def close(self) -> None:
        """Write what is pending and let go of files. Idempotent; records handed out stay valid."""
        ...


def is_key(text: str) -> bool:
    """Whether it is a span's key: 64 lower-case hex digits. Anything else is in no store and never becomes a path."""
    return _KEY.fullmatch(text) is not None
