"""The databases that keep the library: a SQLite file, or Postgres for servers that may start on any machine.

Statements are SQLite's. What Postgres says otherwise is put into its words here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kvgraph.errors import StoreError
from kvgraph.places import StorePlace

SCHEMA = 1
BUSY_TIMEOUT = 10.0  # seconds a writer waits for another process
LOCK = 0x6B76_6772  # of Postgres' advisory locks, the one that a change holds
_CREATE = """
CREATE TABLE segments (
    row INTEGER PRIMARY KEY, model TEXT NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL,
    text TEXT NOT NULL, tokens BLOB NOT NULL, created REAL NOT NULL, UNIQUE (model, tenant, id)
);
CREATE TABLE graphs (
    row INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL, digest TEXT NOT NULL,
    method TEXT NOT NULL, segments INTEGER NOT NULL, edges INTEGER NOT NULL, spans INTEGER NOT NULL,
    tokens INTEGER NOT NULL, created REAL NOT NULL, state TEXT NOT NULL DEFAULT 'pending',
    done INTEGER NOT NULL DEFAULT 0, error TEXT, UNIQUE (model, tenant, id)
);
CREATE TABLE members (
    graph INTEGER NOT NULL REFERENCES graphs ON DELETE CASCADE, place INTEGER NOT NULL,
    segment INTEGER NOT NULL REFERENCES segments ON DELETE RESTRICT,
    PRIMARY KEY (graph, place), UNIQUE (graph, segment)
) WITHOUT ROWID;
CREATE INDEX member_of ON members (segment);
CREATE TABLE edges (
    graph INTEGER NOT NULL REFERENCES graphs ON DELETE CASCADE, reader INTEGER NOT NULL, source INTEGER NOT NULL,
    PRIMARY KEY (graph, reader, source)
) WITHOUT ROWID;
"""
# SQLite sorts texts by their bytes. Postgres must sort ids in the same way, so that the next page of a list starts at the right one.
_OF_POSTGRES = (
    ("INTEGER PRIMARY KEY AUTOINCREMENT", "BIGSERIAL PRIMARY KEY"),
    ("INTEGER PRIMARY KEY", "BIGSERIAL PRIMARY KEY"),
    ("graph INTEGER", "graph BIGINT"),
    ("segment INTEGER", "segment BIGINT"),
    (" BLOB ", " BYTEA "),
    (" REAL ", " DOUBLE PRECISION "),
    (" id TEXT ", ' id TEXT COLLATE "C" '),
    (") WITHOUT ROWID", ")"),
)


class Database(Protocol):
    """Tables, used by one thread at a time, within `reading` or `changing`."""

    failures: tuple[type[Exception], ...]  # what may be raised, besides UnicodeEncodeError

    def reading(self) -> Any:
        """A block of statements that read."""
        ...

    def changing(self) -> Any:
        """A transaction: all of it or nothing, and nobody else's meanwhile."""
        ...

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """A cursor with `fetchone` and `fetchall`. A statement's values stand for its question marks."""
        ...

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement with each of these values."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class SQLite:
    """A file, None for memory. Raises sqlite3.Error."""

    failures: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, file: Path | None):
        db = sqlite3.connect(file or ":memory:", timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        self._db = db
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, _CREATE.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA:
                raise sqlite3.DatabaseError(f"it has format {version}, this version of kvgraph reads {SCHEMA}")
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Database`."""
        yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """See `Database`."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk, for one, has rolled back already
                self._db.execute("ROLLBACK")
            raise

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """See `Database`."""
        return self._db.execute(sql, values)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Database`."""
        self._db.executemany(sql, rows)

    def close(self) -> None:
        """See `Database`."""
        self._db.close()


class Postgres:
    """A database of its own, by a URL of SQLAlchemy. A lost connection is made again. Raises StoreError."""

    def __init__(self, place: StorePlace):
        try:
            import sqlalchemy
            from sqlalchemy.exc import SQLAlchemyError

            self.failures: tuple[type[Exception], ...] = (SQLAlchemyError,)
            self._engine = sqlalchemy.create_engine(
                place.text, pool_pre_ping=True, pool_size=1, max_overflow=0, hide_parameters=True
            )
        except ModuleNotFoundError as error:
            raise StoreError(f"{place} needs {error.name}; install it with: pip install 'kvgraph[postgres]'") from None
        except self.failures:  # what it says may show a password
            raise StoreError(f"{place} isn't a URL like postgresql+psycopg://USER@HOST/DATABASE") from None
        if self._engine.dialect.name != "postgresql":
            raise StoreError(f"{place} can't keep a library; give a file, or a URL like postgresql+psycopg://...")
        self._connection: Any = None
        try:
            with self.changing():
                self._prepare(place)
        except self.failures as error:
            raise StoreError(f"{place} can't be used: {getattr(error, 'orig', error)}") from None

    def _prepare(self, place: StorePlace) -> None:
        self.execute("CREATE TABLE IF NOT EXISTS kvgraph_library (format INTEGER NOT NULL)")
        found = self.execute("SELECT format FROM kvgraph_library").fetchone()
        if found is None:
            create = _CREATE
            for ours, theirs in _OF_POSTGRES:
                create = create.replace(ours, theirs)
            for statement in filter(str.strip, create.split(";")):
                self.execute(statement)
            self.execute("INSERT INTO kvgraph_library VALUES (?)", (SCHEMA,))
        elif found[0] != SCHEMA:
            raise StoreError(f"{place} has format {found[0]}, this version of kvgraph reads {SCHEMA}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Database`."""
        if self._connection is not None:  # in a transaction
            yield
            return
        with self._engine.begin() as self._connection:
            try:
                yield
            finally:
                self._connection = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """See `Database`."""
        with self.reading():
            self.execute("SELECT pg_advisory_xact_lock(?)", (LOCK,))
            yield

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """See `Database`."""
        return self._connection.exec_driver_sql(sql.replace("?", "%s"), tuple(values))

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Database`."""
        listed = [tuple(row) for row in rows]
        if listed:
            self._connection.exec_driver_sql(sql.replace("?", "%s"), listed)

    def close(self) -> None:
        """See `Database`."""
        self._engine.dispose()
