"""The disk tier: one immutable file per record, shared by any number of processes on a POSIX system.

    folder/VERSION               the store's format
    folder/records/ab/<key>.safetensors
    folder/quarantine/           bad records, moved aside for people to look at
    folder/index.sqlite          sizes, last uses, pins; rebuilt from the files whenever needed
    folder/index.lock            held while the index is opened or replaced

Other files in the folder are left alone.

Only the files count. A record appears by one rename of a finished, synced file and never changes afterwards, so readers
need no lock. If the index is locked, lost, damaged or read-only, records are still served and kept; only eviction
becomes less exact.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from kvgraph.errors import StoreError
from kvgraph.store import format, signing
from kvgraph.store.base import EVENTS, Entry, Found, Store, is_key, tenant_id
from kvgraph.store.catalog import VerifyReport
from kvgraph.store.codecs.registry import spec_of
from kvgraph.store.disk.files import TEMPORARY, StagedFile, remove_if_abandoned, stage, write_atomically
from kvgraph.store.disk.index import Index
from kvgraph.store.disk.mounts import is_remote
from kvgraph.store.record import BadRecord, Record, UnsupportedRecord, UntrustedRecord

T = TypeVar("T")

STORE_FORMAT = "kvgraph-store 1"
SUFFIX = ".safetensors"
TOUCH_EVERY = 30.0  # seconds between writes of last uses to the index
SYNCS = 16  # files of a batch that are synced at once
TOUCH_AT_MOST = 1024  # last uses waiting to be written

# Connections opened before a fork: SQLite allows the child neither to use nor to close them.
_inherited: list[Index] = []


@dataclass(frozen=True)
class Stat:
    """A store at one moment. bytes: of record files. quarantined: files in quarantine/.

    counts: what this process saw since it opened the store, by event (see `kvgraph.store.base.EVENTS`).
    """

    records: int
    bytes: int
    tokens: int
    pinned: int
    pinned_bytes: int
    capacity: int | None
    quarantined: int
    counts: Mapping[str, int]


class DiskStore:
    """Records in a folder. Safe to use from several threads and processes at once.

    folder: made if missing.
    capacity_bytes: of the record files of all processes together; None means no limit. The least recently used records
        are evicted first.
    verify: compare a record's checksum the first time this process loads it.
    fingerprint: the model's. It is written into records, and a record with another one is never served.

    On a network mount, files are read into memory: one that another machine truncates while it is mapped would end the
    process. Raises StoreError if the folder can't be used or holds another store format.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | Path,
        capacity_bytes: int | None = None,
        verify: bool = True,
        fingerprint: str | None = None,
    ):
        if not str(folder):
            raise StoreError("the store's folder has no name; give a path")
        if capacity_bytes is not None and capacity_bytes < 1:
            raise StoreError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self.folder, self.shown = Path(folder), str(folder)
        self.capacity, self.checks, self.fingerprint = capacity_bytes, verify, fingerprint or ""
        self._secret = signing.secret()
        self._untrusted: set[str] = set()  # keys whose file isn't signed with this secret: a put replaces it
        # Who may write to the folder could change a mapped file after its signature was checked.
        self.mapped = not self._secret and not is_remote(self.folder)
        # Gives memory to read whole records into, such as what a GPU copies from by itself; None: files are mapped or read.
        self.memory: Callable[[int], torch.Tensor] | None = None
        self._records = self.folder / "records"
        self._counts: Counter[str] = Counter()
        self._checked: dict[str, tuple[int, int, int]] = {}  # key → the file whose checksum was right
        self._used: dict[str, float] = {}  # last uses not yet in the index
        self._touched = time.time()
        self._local = threading.Lock()  # guards the four above
        self._index: Index | None = None
        self._index_id: tuple[int, int, int] | None = None
        self._index_lock = threading.RLock()
        self._reconciled = False  # whether rows and files are known to agree, but for what others lose meanwhile
        self._open_folder()

    # -- the Store interface ------------------------------------------------------------------------------------------

    def get(self, key: str) -> Found | None:
        """The record, its KV mapped from the file, or None. Never raises and never returns doubtful data.

        A bad record is moved to quarantine/ and counted; it is a miss.
        """
        return self.get_of("", key)

    def get_of(self, tenant: str, key: str) -> Found | None:
        """As `get`, for a tenant (`kvgraph.store.base.tenant_id`): another's record is a miss, and is left alone."""
        record = self._load(key, tenant) if is_key(key) else None
        self._count("misses" if record is None else "hits")
        if record is None:
            return None
        self._touch(key)
        return record, self.name

    def put(self, record: Record) -> None:
        """Keep a record; on return it survives a crash. Idempotent: a file that is there stays. May evict others.

        Raises StoreError if the folder isn't writable, the disk is full, or the record can't fit the capacity beside the
        pinned ones; nothing else is lost then.
        """
        self.put_of("", record)

    def put_of(self, tenant: str, record: Record) -> None:
        """As `put`, for a tenant."""
        self._path(record.key)  # which refuses what is no key
        if self.contains(record.key):
            self._remember(record.key)
            return
        self._write(self._new_entry(tenant, record), format.encode(record, self.fingerprint, tenant, self._secret))

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        """Keep several: on return those that could be kept survive a crash. The waits for the disk overlap."""
        return self.put_all_of("", records)

    def put_all_of(self, tenant: str, records: Sequence[Record]) -> dict[str, StoreError]:
        """As `put_all`, for a tenant."""
        errors: dict[str, StoreError] = {}
        staged: list[_Staged] = []
        for record in records:
            try:
                entry = self._new_entry(tenant, record)
                if self.contains(record.key):
                    self._remember(record.key)
                elif all(record.key != other.entry.key for other in staged):
                    self._stage(entry, format.encode(record, self.fingerprint, tenant, self._secret), staged, errors)
            except StoreError as error:
                errors[record.key] = error
            except BaseException:
                for one in staged:
                    one.file.discard()
                raise
        self._commit(staged, errors)
        return errors

    def _new_entry(self, tenant: str, record: Record) -> Entry:
        self._path(record.key)  # which refuses what is no key
        codec, now = record.packed.codec if record.packed else "raw", time.time()
        return Entry(record.key, 0, now, now, False, len(record), self.fingerprint, codec, tenant)

    def _write(self, entry: Entry, buffers: Sequence[bytes | memoryview]) -> None:
        """A new record's file and row. Its size and the time of its creation are the file's."""
        staged: list[_Staged] = []
        errors: dict[str, StoreError] = {}
        self._stage(entry, buffers, staged, errors)
        self._commit(staged, errors)
        if errors:
            raise errors[entry.key]

    def _stage(
        self,
        entry: Entry,
        buffers: Sequence[bytes | memoryview],
        staged: list[_Staged],
        errors: dict[str, StoreError],
    ) -> None:
        """Write a record's file under a temporary name. Where room is short, those that are staged are committed first."""
        size = sum(len(b) for b in buffers)
        pending = sum(other.entry.size for other in staged)
        if self.capacity is not None and staged and pending + size > self.capacity // 2:
            self._commit(staged, errors)
            pending = 0
        self._make_room(pending + size)
        try:
            staged.append(_Staged(replace(entry, size=size), stage(self._path(entry.key), buffers)))
        except OSError as error:
            raise self._cant("keep a record", error) from error

    def _commit(self, staged: list[_Staged], errors: dict[str, StoreError]) -> None:
        """Make staged files survive a crash and show them under their names, then add their rows. Empties the list.

        The waits for the disk overlap, and a file system's journal commits together what waits together.
        """
        works, staged[:] = list(staged), []

        def finish(one: _Staged) -> Entry | OSError:
            try:
                return replace(one.entry, created=one.file.commit().st_mtime)
            except OSError as error:
                return error

        if len(works) < 2:
            found = [finish(one) for one in works]
        else:
            with ThreadPoolExecutor(min(SYNCS, len(works)), "kvgraph-disk") as pool:
                found = list(pool.map(finish, works))
        for one, result in zip(works, found, strict=True):
            if isinstance(result, OSError):
                errors[one.entry.key] = self._cant("keep a record", result)
        written = [entry for entry in found if isinstance(entry, Entry)]
        self._count("written_bytes", sum(entry.size for entry in written))
        self._untrusted.difference_update(entry.key for entry in written)

        def work(index: Index) -> None:
            if len(written) == 1:
                return index.add(written[0])
            with index:
                for entry in written:
                    index.add(entry)

        if written:
            self._with_index(work)

    def contains(self, key: str) -> bool:
        """Whether there is a file for it that was not found untrusted. Changes nothing."""
        return is_key(key) and key not in self._untrusted and os.path.exists(self._path(key))

    def delete(self, key: str) -> bool:
        """Remove a record, pinned or not. Idempotent. Raises StoreError if the folder isn't writable."""
        return self.delete_of("", key)

    def delete_of(self, tenant: str, key: str) -> bool:
        """As `delete`, for a tenant: another's record stays."""
        if not is_key(key) or ((entry := self._entry(key)) is not None and entry.tenant not in ("", tenant)):
            return False
        try:
            self._path(key).unlink()
            found = True
        except FileNotFoundError:
            found = False
        except OSError as error:
            raise self._cant("remove a record", error) from error
        self._with_index(lambda index: index.remove([key]))
        return found

    def close(self) -> None:
        """Write pending last uses and close the index. Idempotent; the store can still be used and opens it again."""
        with self._index_lock:
            if self._used:
                self._with_index(self._flush)
            self._forget_index()

    # -- inspection and maintenance -----------------------------------------------------------------------------------

    def ls(self) -> list[Entry]:
        """All records, most recently used first. Changes no record. Reads the files if the index can't be used."""

        def entries(index: Index) -> list[Entry]:
            self._flush(index)
            return list(index.entries())

        found = self._with_index(entries)
        if found is None:
            found = [entry for entry in map(self._entry, self._keys()) if entry is not None]
            found.sort(key=lambda e: e.used or 0.0, reverse=True)
        return found

    def stat(self) -> Stat:
        """Sums and counts. Changes nothing."""
        entries = self.ls()
        pinned = [e for e in entries if e.pinned]
        return Stat(
            len(entries),
            sum(e.size for e in entries),
            sum(e.tokens for e in entries),
            len(pinned),
            sum(e.size for e in pinned),
            self.capacity,
            self.quarantined,
            self.counts(),
        )

    @property
    def tiers(self) -> tuple[Store, ...]:
        """Itself."""
        return (self,)

    @property
    def available(self) -> bool:
        """Always."""
        return True

    def for_tenant(self, tenant: str) -> Store:
        """The same folder; the tenant is written into its records."""
        return _OfTenant(self, tenant_id(tenant)) if tenant else self

    def counts(self) -> dict[str, int]:
        """Counts of this process, by event. Reads no file."""
        with self._local:
            return {event: self._counts[event] for event in EVENTS}

    def size(self) -> int | None:
        """Bytes of all record files by the index; None if it can't be used now. May wait for other users of the index."""
        return self._with_index(lambda index: index.total()[0])

    def find(self, prefix: str) -> str:
        """The key that starts with `prefix` (at least 4 hex digits). Raises StoreError if none or several do."""
        if len(prefix) < 4 or not is_key(prefix.ljust(64, "0")):
            raise StoreError(f"{prefix!r} isn't the beginning of a key; give at least 4 of its hex digits")
        keys = [name.removesuffix(SUFFIX) for name in _names(self._records / prefix[:2]) if name.startswith(prefix)]
        if len(keys) != 1:
            raise StoreError(f"{len(keys) or 'no'} records start with {prefix!r} in store {self.folder}")
        return keys[0]

    def rm(self, key: str) -> str:
        """Delete the record with this key or unambiguous beginning of one; returns its key. Raises StoreError."""
        found = self.find(key)
        self.delete(found)
        return found

    def pin(self, key: str) -> None:
        """Protect a record from eviction and `prune`, in every process, until `unpin`. Not counted; idempotent.

        Pins live in the index: they are lost with it. Raises StoreError if there is no such record or no usable index.
        """
        self._set_pinned(key, True)

    def unpin(self, key: str) -> None:
        """Undo `pin`. Idempotent. Raises StoreError as `pin` does."""
        self._set_pinned(key, False)

    def prune(self, max_bytes: int | None = None, older_than: float | None = None) -> tuple[int, int]:
        """Remove records not used for `older_than` seconds, then the least recently used until at most `max_bytes` are
        left. Pinned ones stay. Returns (records, bytes) removed. Raises StoreError, also if some files can't be removed;
        the others are by then.
        """
        now = time.time()
        failed: list[OSError] = []

        def work(index: Index) -> tuple[int, int]:
            self._flush(index)
            self._reconcile(index)
            with index:
                victims: dict[str, int] = {}
                left = index.total()[0]
                for entry in index.idle():
                    old = older_than is not None and now - (entry.used or 0.0) > older_than
                    over = max_bytes is not None and left > max_bytes
                    if not (old or over):
                        break
                    if (error := self._removed(entry.key)) is not None:
                        failed.append(error)
                        continue
                    victims[entry.key] = entry.size
                    left -= entry.size
                index.remove(victims)
            return len(victims), sum(victims.values())

        removed = self._need_index(work)
        if failed:
            raise self._cant(f"remove {len(failed):,} records (others were removed: {removed[0]:,})", failed[0])
        return removed

    def verify(self, repair: bool = True, seen: Callable[[], object] = int) -> VerifyReport:
        """Check every record in full; with `repair`, move bad ones aside, remove leftovers of dead writers, and repair the
        index.

        Reads everything; other processes may keep using the store. Doesn't raise: unreadable files are reported. seen: called
        for each file.
        """
        report = VerifyReport(repaired=repair)
        for name in _names(self.folder):
            if name.startswith(TEMPORARY) and repair:
                remove_if_abandoned(self.folder / name)
        report.foreign += sorted(map(str, self._foreign()))
        for folder in sorted(_names(self._records)):
            for name in sorted(_names(self._records / folder)):
                self._verify_file(self._records / folder / name, report)
                seen()
        rows = self._with_index(self._reconcile) if repair else None
        if rows is not None:
            report.rows_added, report.rows_removed = rows
        return report

    # -- kvgraph.store.catalog.Catalog --------------------------------------------------------------------------------

    @property
    def quarantined(self) -> int:
        """Files in quarantine/."""
        return len(_names(self.folder / "quarantine"))

    def entries(self, details: bool = True) -> Iterator[Entry]:
        """All records, from the index."""
        yield from self.ls()

    def read(self, entry: Entry) -> torch.Tensor | None:
        """A record's file as it is. This is no use of it."""
        try:
            return self._data(self._path(entry.key))[0]
        except FileNotFoundError:
            return None
        except (OSError, BadRecord) as error:
            raise StoreError(f"record {entry.key} can't be read from {self.folder}: {error}") from error

    def keep(self, entry: Entry, parts: Sequence[bytes | memoryview]) -> bool:
        """A file with these bytes, unless there is one."""
        if self.contains(entry.key):
            return False
        self._write(replace(entry, used=entry.used or time.time(), pinned=False), parts)
        return True

    def remove(self, entries: Iterable[Entry], seen: Callable[[], object] = int) -> list[Entry]:
        """Remove records that aren't pinned, in one transaction of the index. Returns those that were there. Raises
        StoreError if a file can't be removed; the others are gone by then."""
        wanted = list(entries)

        def work(index: Index) -> list[Entry]:
            with index:
                pinned = index.pinned()
                removed = []
                for entry in wanted:
                    if entry.key in pinned:
                        continue
                    if (error := self._removed(entry.key)) is not None:
                        failed.append(error)
                    else:
                        removed.append(entry)
                index.remove([entry.key for entry in removed])
            return removed

        failed: list[OSError] = []
        removed = self._need_index(work)
        for _ in wanted:
            seen()
        if failed:
            raise self._cant(f"remove {len(failed):,} records (others were removed: {len(removed):,})", failed[0])
        return removed

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """As `pin` and `unpin`."""
        self._set_pinned(entry.key, pinned)

    # -- files --------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        if not is_key(key):
            raise StoreError(f"{key!r} isn't a record's key, which has 64 lower-case hex digits")
        return self._records / key[:2] / (key + SUFFIX)

    def _open_folder(self) -> None:
        version = self.folder / "VERSION"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not version.exists():
                write_atomically(version, [STORE_FORMAT.encode() + b"\n"])
            found = version.read_bytes()[:100].decode("ascii", "replace").strip()
            if found != STORE_FORMAT:
                raise StoreError(
                    f"{self.folder} holds a store of format {found!r}, but this version reads {STORE_FORMAT!r}; "
                    "use another folder, or the version that wrote it"
                )
            self._records.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cant("open the store", error) from error

    def _load(self, key: str, tenant: str) -> Record | None:
        path = self._path(key)
        inode = None
        try:
            data, info = self._data(path)
            inode, identity = info.st_ino, format.identity(info)
            first = self._checked.get(key) != identity
            # What is read once more may have changed on its way: a mapped file doesn't.
            verify = self.checks and (first or not self.mapped)
            record = format.decode(data, key, self.fingerprint, verify, tenant, self._secret)
        except BadRecord:
            self._move_aside(path, inode)
            return None
        except UntrustedRecord:
            self._count("untrusted")
            self._untrusted.add(key)
            return None
        except UnsupportedRecord:
            self._count("unreadable")
            return None
        except OSError as error:  # missing or not readable now, which doesn't mean that it is bad
            if not isinstance(error, FileNotFoundError):
                self._count("unreadable")
            return None
        self._untrusted.discard(key)
        with self._local:
            self._counts["read_bytes"] += info.st_size
            if first:
                self._checked[key] = identity
        return record

    def _move_aside(self, path: Path, inode: int | None) -> None:
        """Rename a bad record into quarantine/, unless somebody has replaced it meanwhile."""
        self._count("bad")
        try:
            if inode is not None and path.stat().st_ino != inode:
                return
            aside = self.folder / "quarantine"
            aside.mkdir(exist_ok=True)
            path.rename(aside / f"{path.name}.{time.time_ns()}-{os.getpid()}")
        except OSError:  # read-only, or gone: it is a miss anyway
            pass

    def _keys(self) -> Iterator[str]:
        """Keys of all record files."""
        for folder in _names(self._records):
            for name in _names(self._records / folder):
                if _is_record(folder, name):
                    yield name.removesuffix(SUFFIX)

    def _entry(self, key: str) -> Entry | None:
        """A record's row, made from its file; None without a file. An unreadable header counts as 0 tokens."""
        path = self._path(key)
        try:
            data, info = format.map_file(path) if self.mapped else format.read_file(path, format.START)
            header = format.read_header(data, info.st_size)
            rest = header.tokens, header.fingerprint, spec_of(header.codec), header.tenant
        except FileNotFoundError:
            return None
        except (OSError, BadRecord, UnsupportedRecord):
            rest = 0, "", "", ""
            try:
                info = path.stat()
            except OSError:
                return None
        return Entry(key, info.st_size, info.st_mtime, info.st_mtime, False, *rest)

    def _data(self, path: Path) -> tuple[torch.Tensor, os.stat_result]:
        if self.memory is not None:
            return format.read_file(path, memory=self.memory)
        return format.map_file(path, ahead=True) if self.mapped else format.read_file(path)

    def _verify_file(self, path: Path, report: VerifyReport) -> None:
        if path.name.startswith(TEMPORARY):
            report.temporary += remove_if_abandoned(path, only_look=not report.repaired)
            return
        if not _is_record(path.parent.name, path.name):
            report.foreign.append(str(path))
            return
        key = path.name.removesuffix(SUFFIX)
        inode = None
        try:
            data, info = self._data(path)
            inode = info.st_ino
            format.decode(data, key, secret=self._secret)
        except BadRecord as error:
            if report.repaired:
                self._move_aside(path, inode)
            report.bad.append((key, str(error)))
        except UntrustedRecord as error:
            report.untrusted.append((key, str(error)))
        except UnsupportedRecord as error:
            report.unsupported.append((key, str(error)))
        except FileNotFoundError:  # evicted meanwhile
            pass
        except OSError as error:
            report.unreadable.append((str(path), error.strerror or str(error)))
        else:
            report.good += 1
            report.bytes += info.st_size

    def _foreign(self) -> Iterator[Path]:
        """Paths directly in records/ that aren't the store's."""
        for name in _names(self._records):
            path = self._records / name
            if not path.is_dir() or len(name) != 2 or not is_key(name.ljust(64, "0")):
                yield path

    def _cant(self, what: str, error: OSError) -> StoreError:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            why = "the folder isn't writable; records in it are still read"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full; free some space, or remove records with `kvgraph store gc`"
        else:
            why = error.strerror or str(error)
        return StoreError(f"can't {what} in {self.folder}: {why}")

    # -- eviction -----------------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Evict the least recently used until `size` more bytes fit the capacity. Without an index nothing is evicted.

        Raises StoreError if they can't fit beside the pinned records.
        """
        if self.capacity is None:
            return
        capacity = self.capacity

        def work(index: Index) -> int:
            if index.total()[0] + size <= capacity:
                return 0
            self._flush(index)
            if not self._reconciled:  # a writer killed between its rename and its row leaves a file without a row
                self._reconcile(index)
            with index:
                total, pinned = index.total()
                if pinned + size > capacity:
                    return pinned
                victims: list[str] = []
                for entry in index.idle():
                    if total + size <= capacity:
                        break
                    if self._removed(entry.key) is None:
                        victims.append(entry.key)
                        total -= entry.size
                index.remove(victims)
                return 0 if total + size <= capacity else total

        pinned = self._with_index(work) or 0
        if pinned or size > capacity:
            beside = f" beside {pinned:,} bytes that are pinned or can't be removed" if pinned else ""
            raise StoreError(
                f"a record of {size:,} bytes can't fit the capacity of {capacity:,} bytes of {self.folder}{beside}"
            )

    def _removed(self, key: str) -> OSError | None:
        """Remove a record's file, inside a transaction of the index, so that two processes don't do it twice.

        What prevented it, or None: one file that can't be removed keeps no other from going.
        """
        try:
            if is_key(key):
                self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._count("unreadable")
            return error
        return None

    # -- index --------------------------------------------------------------------------------------------------------

    def _with_index(self, work: Callable[[Index], T]) -> T | None:
        """work's result, or None if the index can't be used now. A damaged index is replaced, and work runs again."""
        with self._index_lock:
            for attempt in range(2):
                try:
                    return work(self._open_index())
                except (sqlite3.Error, OSError) as error:
                    self._count("index_errors")
                    self._reconciled = False
                    damaged = _is_damage(error)
                    self._forget_index()
                    if attempt or not (damaged and self._discard_index()):
                        return None
        return None

    def _need_index(self, work: Callable[[Index], T]) -> T:
        result = self._with_index(work)
        if result is None:
            raise StoreError(
                f"the index of store {self.folder} can't be written now: read-only, or locked by a process"
            )
        return result

    def _open_index(self) -> Index:
        """The open index; opened again after a fork and when its file was replaced, filled from the files when new."""
        if self._index is not None and self._index_id == self._identify_index():
            return self._index
        self._forget_index()
        with self._exclusive():
            index = Index(self.folder / "index.sqlite")
            self._index, self._index_id = index, self._identify_index()
            if index.is_new:
                self._reconcile(index)
                index.filled()
        return index

    def _identify_index(self) -> tuple[int, int, int] | None:
        try:
            info = (self.folder / "index.sqlite").stat()
        except OSError:
            return None
        return os.getpid(), info.st_dev, info.st_ino

    def _forget_index(self) -> None:
        if self._index is not None:
            if self._index_id is not None and self._index_id[0] == os.getpid():
                self._index.close()
            else:
                _inherited.append(self._index)
        self._index = None

    def _discard_index(self) -> bool:
        """Delete a damaged index; whether that worked."""
        try:
            with self._exclusive():
                for suffix in ("", "-wal", "-shm"):
                    (self.folder / f"index.sqlite{suffix}").unlink(missing_ok=True)
        except OSError:
            return False
        return True

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Only one process at a time opens or replaces the index. Raises OSError."""
        descriptor = os.open(self.folder / "index.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _reconcile(self, index: Index) -> tuple[int, int]:
        """Add rows of files without one, remove rows without a file; returns how many of each."""
        rows = index.sizes()
        files = set(self._keys())
        entries = [entry for key in files - rows.keys() if (entry := self._entry(key)) is not None]
        with index:
            for entry in entries:
                index.add(entry)
            # A record that was written and got its row since the files were listed isn't in `rows`, so it stays.
            lost = [key for key in rows.keys() - files if not self.contains(key)]
            index.remove(lost)
        self._reconciled = True
        return len(entries), len(lost)

    def _remember(self, key: str) -> None:
        """Put a record that is already there to use, and give it a row if it has none."""
        entry = self._entry(key)
        if entry is not None:
            self._with_index(lambda index: index.add(entry))
            self._touch(key)

    def _set_pinned(self, key: str, pinned: bool) -> None:
        entry = self._entry(key)
        if entry is None:
            raise StoreError(f"there is no record {key} in store {self.folder}")

        def work(index: Index) -> bool:
            index.add(entry)
            index.set_pinned(key, pinned)
            return True

        self._need_index(work)

    def _touch(self, key: str) -> None:
        """Note a use. Now and then the notes go to the index, unless that would have to wait: a get is never slow."""
        now = time.time()
        with self._local:
            self._used[key] = now
            due = len(self._used) >= TOUCH_AT_MOST or now - self._touched > TOUCH_EVERY
            if due:
                self._touched = now
        if due and self._index_lock.acquire(blocking=False):
            try:
                # Never repairs, because a get doesn't scan the store. The next writer repairs a damaged index.
                if self._index is not None and self._index_id == self._identify_index():
                    self._flush(self._index, wait=False)
                elif (self.folder / "index.sqlite").exists():
                    index = Index(self.folder / "index.sqlite", create=False)
                    try:
                        if not index.is_new:
                            self._flush(index, wait=False)
                    finally:
                        index.close()
            except (sqlite3.Error, OSError):
                self._count("index_errors")
            finally:
                self._index_lock.release()

    def _flush(self, index: Index, *, wait: bool = True) -> None:
        with self._local:
            used, self._used = self._used, {}
            self._touched = time.time()
        if used:
            index.touch(used, wait=wait)

    def _count(self, what: str, n: int = 1) -> None:
        with self._local:
            self._counts[what] += n


class _OfTenant:
    """A folder's records of one tenant, by its `kvgraph.store.base.tenant_id`. See `Store` for what its methods do."""

    def __init__(self, store: DiskStore, tenant: str):
        self._store, self._tenant = store, tenant
        self.name, self.capacity = store.name, store.capacity

    @property
    def tiers(self) -> tuple[Store, ...]:
        return (self,)

    @property
    def available(self) -> bool:
        return self._store.available

    def for_tenant(self, tenant: str) -> Store:
        return self._store.for_tenant(tenant)

    def get(self, key: str) -> Found | None:
        return self._store.get_of(self._tenant, key)

    def put(self, record: Record) -> None:
        self._store.put_of(self._tenant, record)

    def put_all(self, records: Sequence[Record]) -> dict[str, StoreError]:
        return self._store.put_all_of(self._tenant, records)

    def contains(self, key: str) -> bool:
        return self._store.contains(key)

    def delete(self, key: str) -> bool:
        return self._store.delete_of(self._tenant, key)

    def counts(self) -> dict[str, int]:
        return self._store.counts()

    def size(self) -> int | None:
        return self._store.size()

    def close(self) -> None:
        self._store.close()


class _Staged(NamedTuple):
    """A record's row, and its file that isn't there yet."""

    entry: Entry
    file: StagedFile


def _is_record(folder: str, name: str) -> bool:
    return name.endswith(SUFFIX) and is_key(name.removesuffix(SUFFIX)) and name[:2] == folder


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # gone, or not a folder
        return []


def _is_damage(error: Exception) -> bool:
    """Whether an error says that the index itself is broken, not only busy, full or read-only."""
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    # No code: our own complaint about the schema. 1 is SQLITE_ERROR: no such table or column.
    return code is None or code & 0xFF in (1, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
