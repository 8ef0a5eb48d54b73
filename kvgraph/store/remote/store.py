"""A remote place as a store: records checked like those of a file, with a deadline for every call.

A slow or dead service costs at most a few deadlines, then nothing until it answers again; meanwhile spans are computed.
Its data isn't trusted.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from kvgraph.errors import StoreError
from kvgraph.store import format, signing
from kvgraph.store.base import EVENTS, Found, Store, is_key, one_by_one, tenant_id
from kvgraph.store.catalog import Catalog
from kvgraph.store.record import BadRecord, Record, UnsupportedRecord, UntrustedRecord
from kvgraph.store.remote.base import TIMEOUT, Remote, RemoteError, RemoteFull, Space
from kvgraph.store.remote.breaker import Absent, Breaker
from kvgraph.store.remote.catalog import RemoteCatalog

P = ParamSpec("P")
T = TypeVar("T")

# Threads: writes take no turn of a read's. A client copies what comes while it holds Python's lock, so eight of them on two
# processors doubled the time of a step of the model beside them (`benchmarks.reading`).
READERS, WRITERS = min(8, max(2, format.processors() - 1)), 2
WRITE_TIMEOUT = 60.0  # seconds that a write may take; nobody waits for it but the next write
MEASURED_EVERY = 60.0  # seconds for which a size is good


class RemoteStore:
    """Records in a remote place. Safe to use from several threads.

    name: the tier's. shown: the place, as errors call it. fingerprint: the model's; a record that states another one is
    never served. timeout: seconds of a read. tenant: the salt of the tenant whose records they are. remote: the place, in
    the namespace of both.
    """

    capacity: int | None = None  # the place has a limit of its own, or none

    def __init__(
        self,
        remote: Remote,
        name: str,
        shown: str,
        fingerprint: str = "",
        timeout: float = TIMEOUT,
        tenant: str = "",
    ):
        self.name, self.shown, self.fingerprint, self.timeout = name, shown, fingerprint, timeout
        self.tenant = tenant_id(tenant)
        self.breaker = Breaker()
        self._remote = remote
        self._secret = signing.secret()
        self._absent = Absent()
        self._bad: set[str] = set()  # keys whose record there is bad or untrusted: a put replaces it
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = _Threads(name)
        self._measured: tuple[float, int | None] = (float("-inf"), None)
        self._tenants: dict[str, RemoteStore] = {tenant: self}  # of this process; shared by all of them

    @property
    def tiers(self) -> tuple[Store, ...]:
        """Itself."""
        return (self,)

    @property
    def available(self) -> bool:
        """Whether the circuit breaker is closed."""
        return not self.breaker.is_open

    def for_tenant(self, tenant: str) -> RemoteStore:
        """The same place for a tenant's records, in a namespace of its own."""
        with self._lock:
            if tenant not in self._tenants:
                other = copy.copy(self)
                other.tenant, other._absent, other._bad = tenant_id(tenant), Absent(), set()
                other._remote = self._remote.within(Space.of(self.fingerprint, tenant))
                self._tenants[tenant] = other
            return self._tenants[tenant]

    def get(self, key: str) -> Found | None:
        """The record, or None if there is none, if it is bad, or if the place doesn't answer in time."""
        record = self._load(key) if is_key(key) else None
        self._count("misses" if record is None else "hits")
        return None if record is None else (record, self.name)

    def put(self, record: Record) -> None:
        """Keep a record. Idempotent: one that is there stays, unless it was found to be bad.

        Raises StoreError if the place doesn't answer or is full.
        """
        parts = format.encode(record, self.fingerprint, self.tenant, self._secret)
        key = record.key
        try:
            if key not in self._bad and self._write(self._remote.contains, key):
                return
            self._write(self._remote.put, key, parts)
        except RemoteError as error:
            raise StoreError(f"can't keep a record in {self.shown}: {error}") from error
        with self._lock:
            self._bad.discard(key)
            self._counts["written_bytes"] += sum(map(len, parts))
        self._absent.discard(key)

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        """As many at once as there are threads for writing."""
        with ThreadPoolExecutor(WRITERS, f"kvgraph-{self.name}-put") as pool:
            parts = pool.map(lambda record: one_by_one(self.put, [record]), records)
            return {key: error for errors in parts for key, error in errors.items()}

    def contains(self, key: str) -> bool:
        """Whether there is a record; False too if the place doesn't answer in time."""
        if not is_key(key) or key in self._absent or key in self._bad:
            return False
        try:
            return self._read(self._remote.contains, key)
        except RemoteError:
            return False

    def delete(self, key: str) -> bool:
        """Remove a record. Idempotent. Raises StoreError if the place doesn't answer."""
        if not is_key(key):
            return False
        try:
            return self._write(self._remote.delete, key)
        except RemoteError as error:
            raise StoreError(f"can't remove a record from {self.shown}: {error}") from error

    def records(self) -> Iterator[tuple[str, int]]:
        """(key, bytes) of every record. Raises StoreError if the place doesn't answer."""
        try:
            for listed in self._remote.names():
                if is_key(listed.name):
                    yield listed.name, listed.size
        except RemoteError as error:
            raise StoreError(f"can't list the records in {self.shown}: {error}") from error

    def counts(self) -> dict[str, int]:
        """What this process saw, by event. Waits for nothing."""
        with self._lock:
            return {event: self._counts[event] for event in EVENTS}

    def size(self) -> int | None:
        """Bytes of this model's records, of the tenants that this process knows, as they were at most a minute ago.

        None if the place doesn't answer.
        """
        when, size = self._measured
        if time.monotonic() - when > MEASURED_EVERY and self.breaker.allows():
            try:
                with self._lock:
                    tenants = list(self._tenants.values())
                size = sum(size for store in tenants for _, size in store.records())
            except StoreError:
                size = None
            self._measured = time.monotonic(), size
        return size

    def catalog(self) -> Catalog:
        """All records in the place, of every model and tenant."""
        return RemoteCatalog(self._remote, self.name, self.shown)

    def close(self) -> None:
        """Let go of threads and connections. Idempotent; the store can still be used and takes new ones."""
        self._threads.close()
        self._remote.close()

    def _load(self, key: str) -> Record | None:
        if key in self._absent or key in self._bad:
            return None
        try:
            data = self._read(self._remote.get, key)
        except RemoteError:
            return None
        if data is None:
            self._absent.add(key)
            return None
        try:
            if not data:
                raise BadRecord("is empty")
            found = torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=torch.uint8)
            record = format.decode(found, key, self.fingerprint, tenant=self.tenant, secret=self._secret)
            self._count("read_bytes", len(data))
            return record
        except (BadRecord, UntrustedRecord) as error:
            self._count("bad" if isinstance(error, BadRecord) else "untrusted")
            with self._lock:
                self._bad.add(key)
        except UnsupportedRecord:
            self._count("unreadable")
            self._absent.add(key)
        return None

    def _read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._call(self._threads.pool("read"), self.timeout, call, *args, **kwargs)

    def _write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._call(self._threads.pool("write"), WRITE_TIMEOUT, call, *args, **kwargs)

    def _call(
        self, pool: ThreadPoolExecutor, timeout: float, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What a call returns, if it does in time. Raises RemoteError."""
        if not self.breaker.allows():
            self._count("skipped")
            raise RemoteError("it doesn't answer; it will be tried again later")
        try:
            future = pool.submit(call, *args, **kwargs)
        except RuntimeError:  # closed by another thread
            raise RemoteError("it was closed") from None
        try:
            result = future.result(timeout)
        except TimeoutError:
            future.cancel()
            self._count("timeouts")
            self.breaker.failed()
            raise RemoteError(f"no answer within {timeout:g} seconds") from None
        except RemoteFull:
            self._count("errors")
            self.breaker.succeeded()
            raise
        except RemoteError:
            self._count("errors")
            self.breaker.failed()
            raise
        self.breaker.succeeded()
        return result

    def _count(self, event: str, n: int = 1) -> None:
        with self._lock:
            self._counts[event] += n


class _Threads:
    """Threads for reads and others for writes, made when they are needed, for all tenants of a place."""

    def __init__(self, name: str):
        self._name = name
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def pool(self, kind: str) -> ThreadPoolExecutor:
        with self._lock:
            if kind not in self._pools:
                threads = WRITERS if kind == "write" else READERS
                self._pools[kind] = ThreadPoolExecutor(threads, f"kvgraph-{self._name}-{kind}")
            return self._pools[kind]

    def close(self) -> None:
        """Idempotent; the next call takes new threads."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
