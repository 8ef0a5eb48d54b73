"""The disk tier's index: keys, sizes and last uses. It can be rebuilt from the files.

It never decides anything about a record's content, so it may be lost, stale or wrong without harm.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Self

from kvgraph.store.base import Entry

SCHEMA = 3
BUSY_TIMEOUT = 5.0  # seconds a writer waits for another process

_COLUMNS = ", ".join(f.name for f in fields(Entry))
_CREATE = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY, size INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, pinned INTEGER NOT NULL,
    tokens INTEGER NOT NULL, fingerprint TEXT NOT NULL, codec TEXT NOT NULL, tenant TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON records (used);
CREATE TABLE IF NOT EXISTS totals (bytes INTEGER NOT NULL, pinned INTEGER NOT NULL);
DELETE FROM totals;
INSERT INTO totals SELECT coalesce(sum(size), 0), coalesce(sum(size * pinned), 0) FROM records;
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON records BEGIN
    UPDATE totals SET bytes = bytes + new.size, pinned = pinned + new.size * new.pinned;
END;
CREATE TRIGGER IF NOT EXISTS changed AFTER UPDATE OF size, pinned ON records BEGIN
    UPDATE totals SET bytes = bytes + new.size - old.size,
        pinned = pinned + new.size * new.pinned - old.size * old.pinned;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON records BEGIN
    UPDATE totals SET bytes = bytes - old.size, pinned = pinned - old.size * old.pinned;
END;
"""


class Index:
    """A SQLite database in WAL mode. Every method may raise sqlite3.Error.

    is_new: it isn't filled from the files yet, or an older version's; `filled` says that it is. create: make the tables
    of a new one.
    """

    def __init__(self, path: Path, create: bool = True):
        self.db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            self.is_new = version < SCHEMA
            if self.is_new and create:  # an older version's rows are made again from the files
                self.db.executescript("DROP TABLE IF EXISTS records;" + _CREATE if version else _CREATE)
            elif version > SCHEMA:
                raise sqlite3.DatabaseError(f"index schema {version}")
        except BaseException:
            self.db.close()
            raise

    def filled(self) -> None:
        self.db.execute(f"PRAGMA user_version = {SCHEMA}")
        self.is_new = False

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Self:
        """Begin a write transaction: other writers wait until it ends."""
        self.db.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.db.execute("COMMIT")
        elif self.db.in_transaction:  # a full disk, for one, has rolled back already
            self.db.execute("ROLLBACK")

    def add(self, entry: Entry) -> None:
        """Insert a row. A row that is there keeps its pin and the later use."""
        marks = ", ".join("?" * len(fields(Entry)))
        self.db.execute(
            f"INSERT INTO records ({_COLUMNS}) VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET "
            "size = excluded.size, created = excluded.created, used = max(used, excluded.used), "
            "tokens = excluded.tokens, fingerprint = excluded.fingerprint, codec = excluded.codec, tenant = excluded.tenant",
            astuple(entry),
        )

    def touch(self, used: dict[str, float], *, wait: bool = True) -> None:
        """Note last uses (key → seconds since the epoch) of rows that exist. wait=False: fail at once if locked."""
        if not wait:
            self.db.execute("PRAGMA busy_timeout = 0")
        try:
            with self:
                self.db.executemany(
                    "UPDATE records SET used = max(used, ?) WHERE key = ?", [(time, key) for key, time in used.items()]
                )
        finally:
            self.db.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")

    def remove(self, keys: Iterable[str]) -> None:
        self.db.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def set_pinned(self, key: str, pinned: bool) -> None:
        self.db.execute("UPDATE records SET pinned = ? WHERE key = ?", (pinned, key))

    def sizes(self) -> dict[str, int]:
        """Size of every record that has a row."""
        return dict(self.db.execute("SELECT key, size FROM records"))

    def total(self) -> tuple[int, int]:
        """(bytes of all records, bytes of the pinned ones): kept by triggers, because a sum over a million rows takes long."""
        found = self.db.execute("SELECT bytes, pinned FROM totals").fetchone()
        if found is None:
            raise sqlite3.DatabaseError("index without totals")
        total, pinned = found
        return total, pinned

    def pinned(self) -> set[str]:
        """Keys of the pinned records."""
        return {key for (key,) in self.db.execute("SELECT key FROM records WHERE pinned")}

    def entries(self) -> Iterator[Entry]:
        """All rows, most recently used first."""
        return map(_entry, self.db.execute(f"SELECT {_COLUMNS} FROM records ORDER BY used DESC"))

    def idle(self) -> Iterator[Entry]:
        """Rows that aren't pinned, least recently used first."""
        return map(_entry, self.db.execute(f"SELECT {_COLUMNS} FROM records WHERE NOT pinned ORDER BY used"))


def _entry(row: tuple[Any, ...]) -> Entry:
    key, size, created, used, pinned, *rest = row
    return Entry(key, size, created, used, bool(pinned), *rest)
