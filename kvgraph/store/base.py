"""The interface of every store. A store is a cache: a lost record is only computed again, but a wrong one must never be
served."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from kvgraph.errors import StoreError
from kvgraph.store.record import Record

Found = tuple[Record, str]  # a record, and the name of the tier that had it

# Events that stores count. bad: damaged records, moved aside or replaced. unreadable: records that couldn't be read, or
# that this version doesn't understand. untrusted: records that aren't signed with this process's secret. index_errors: times an index couldn't be used. For remote tiers, errors: calls
# that failed; timeouts: calls without an answer in time; skipped: calls that weren't made, because earlier ones had
# failed. read_bytes, written_bytes: of the records that were found or kept, as the tier keeps them.
EVENTS = (
    "hits",
    "misses",
    "bad",
    "unreadable",
    "untrusted",
    "index_errors",
    "errors",
    "timeouts",
    "skipped",
    "read_bytes",
    "written_bytes",
)

_KEY = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Entry:
    """A record as listings show it. size: bytes, as the tier keeps them. created, used: seconds since the epoch.

    used: object stores only know when a record was written; None if the place doesn't know either. tokens, codec: 0 and ""
    if the record can't be read, or wasn't looked at. tenant: what stands for it, see `tenant_id`.
    """

    key: str
    size: int
    created: float
    used: float | None
    pinned: bool
    tokens: int
    fingerprint: str
    codec: str
    tenant: str


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

    @property
    def available(self) -> bool:
        """False while calls aren't made, because earlier ones failed. Returns at once."""
        ...

    def for_tenant(self, tenant: str) -> Store:
        """The same store for the records of a tenant, by its salt: they are kept, found, listed and deleted as its own.

        It shares counts, limits and connections with this one, and is closed with it.
        """
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

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        """Keep several records, as `put` keeps each, with less waiting where that can be done. Returns why some couldn't be
        kept, by key. See `one_by_one`.
        """
        ...

    def contains(self, key: str) -> bool:
        """Whether `get` would probably find it. A cheap hint: it reads, checks and changes nothing."""
        ...

    def delete(self, key: str) -> bool:
        """Remove a record, pinned or not; True if there was one. Idempotent. Readers that hold it keep their data."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How often each of EVENTS happened in this process, for all tenants. Returns at once."""
        ...

    def size(self) -> int | None:
        """Bytes of all its records; None if that can't be found out now. It may wait for a disk or a network."""
        ...

    def close(self) -> None:
        """Write what is pending and close files. Idempotent; records returned earlier stay valid."""
        ...


def one_by_one(put: Callable[[Record], None], records: Iterable[Record]) -> dict[str, StoreError]:
    """`Store.put_all` of a store that has only a `put`."""
    errors = {}
    for record in records:
        try:
            put(record)
        except StoreError as error:
            errors[record.key] = error
    return errors


def is_key(text: str) -> bool:
    """Whether it is a span's key: 64 lower-case hex digits. Nothing else is in a store or becomes a path."""
    return _KEY.fullmatch(text) is not None


def tenant_id(tenant: str) -> str:
    """What stands for a tenant's salt where others may read it: 16 hex digits; "" for no tenant."""
    return sha256(tenant.encode()).hexdigest()[:16] if tenant else ""


def is_tenant(text: str) -> bool:
    """Whether it stands for a tenant, see `tenant_id`."""
    return _TENANT.fullmatch(text) is not None
