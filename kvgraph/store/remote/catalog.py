"""All records in a remote place, for maintenance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch

from kvgraph.errors import StoreError
from kvgraph.store import format, signing
from kvgraph.store.base import Entry, is_key
from kvgraph.store.catalog import VerifyReport
from kvgraph.store.codecs.registry import spec_of
from kvgraph.store.record import BadRecord, UnsupportedRecord, UntrustedRecord
from kvgraph.store.remote.base import Listed, Remote, RemoteError, Space

PIN = "pin-"  # before a key: something of this name means that its record is pinned
AT_ONCE = 8  # records looked at together
BATCH = 256  # records that are listed before they are looked at
HEAD = 64 << 10  # bytes at a record's front that hold its header, but for models of hundreds of layers


class RemoteCatalog:
    """A `kvgraph.store.catalog.Catalog`. A record's namespace says whose it is."""

    def __init__(self, remote: Remote, name: str, shown: str):
        self.name, self.shown = name, shown
        self._remote = remote

    def entries(self, details: bool = True) -> Iterator[Entry]:
        """Every record of every namespace. Pins are listed beside the records."""
        with self._asking("list the records"):
            for space in list(self._remote.spaces()):
                remote = self._remote.within(space)
                found = list(remote.names())
                pinned = {listed.name.removeprefix(PIN) for listed in found if listed.name.startswith(PIN)}
                records = iter([listed for listed in found if is_key(listed.name)])
                with ThreadPoolExecutor(AT_ONCE, "kvgraph-catalog") as pool:
                    while some := list(islice(records, BATCH)):
                        looks: Iterable[tuple[int, str]] = (
                            pool.map(partial(_look, remote), some) if details else [(0, "")] * len(some)
                        )
                        for listed, (tokens, codec) in zip(some, looks, strict=True):
                            yield _entry(space, listed, listed.name in pinned, tokens, codec)

    def read(self, entry: Entry) -> torch.Tensor | None:
        """The whole record."""
        with self._asking("read a record"):
            data = self._within(entry).get(entry.key)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None

    def keep(self, entry: Entry, parts: Sequence[bytes | memoryview]) -> bool:
        """A record in its namespace, unless there is one."""
        remote = self._within(entry)
        with self._asking("keep a record"):
            if remote.contains(entry.key):
                return False
            remote.put(entry.key, parts)
        return True

    def remove(self, entries: Iterable[Entry], seen: Callable[[], object] = int) -> list[Entry]:
        """One by one."""
        removed = []
        with self._asking("remove a record"):
            for entry in entries:
                remote = self._within(entry)
                if not remote.contains(PIN + entry.key) and remote.delete(entry.key):
                    removed.append(entry)
                seen()
        return removed

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """A mark beside the record. It keeps `remove` from it; a place that evicts by itself doesn't know it."""
        with self._asking("pin a record"):
            if pinned:
                self._within(entry).put(PIN + entry.key, [b"1"])
            else:
                self._within(entry).delete(PIN + entry.key)

    def verify(self, repair: bool = True, seen: Callable[[], object] = int) -> VerifyReport:
        """Read and check everything. repair: remove what is bad, pinned or not, and what is of no record."""
        report, secret = VerifyReport(repaired=repair), signing.secret()
        for entry in self.entries(details=False):
            try:
                data = self.read(entry)
                if data is not None:
                    format.decode(data, entry.key, entry.fingerprint, tenant=entry.tenant, secret=secret)
                    report.good += 1
                    report.bytes += entry.size
            except BadRecord as error:
                report.bad.append((entry.key, str(error)))
                if repair:
                    with self._asking("remove a record"):
                        self._within(entry).delete(entry.key)
            except UntrustedRecord as error:
                report.untrusted.append((entry.key, str(error)))
            except UnsupportedRecord as error:
                report.unsupported.append((entry.key, str(error)))
            except StoreError as error:
                report.unreadable.append((entry.key, str(error)))
            seen()
        with self._asking("look for leftovers"):
            for space in list(self._remote.spaces()):
                report.temporary += self._remote.within(space).leftovers(remove=repair)
        return report

    def close(self) -> None:
        """Connections."""
        self._remote.close()

    def _within(self, entry: Entry) -> Remote:
        return self._remote.within(Space(entry.fingerprint or "any", entry.tenant or "all"))

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except RemoteError as error:
            raise StoreError(f"can't {what} in {self.shown}: {error}") from error


def _entry(space: Space, listed: Listed, pinned: bool, tokens: int, codec: str) -> Entry:
    fingerprint = "" if space.fingerprint == "any" else space.fingerprint
    tenant = "" if space.tenant == "all" else space.tenant
    created = listed.used or time.time()
    return Entry(listed.name, listed.size, created, listed.used, pinned, tokens, fingerprint, codec, tenant)


def _look(remote: Remote, listed: Listed) -> tuple[int, str]:
    """(tokens, codec) of a record; (0, "") if its header can't be read."""
    for size in (HEAD, format.START):
        start = remote.start(listed, size)
        if not start:
            break
        try:
            header = format.read_header(torch.frombuffer(bytearray(start), dtype=torch.uint8), listed.size)
            return header.tokens, spec_of(header.codec)
        except (BadRecord, UnsupportedRecord):
            continue
    return 0, ""
