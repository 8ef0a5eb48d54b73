"""Stored segments and corpus graphs by tenant: what was given, as token ids, in one SQLite file beside the KV store, or in
a Postgres.

The library holds no KV. It says which tokens an id stands for and who reads whom; keys follow from that, so a record
that is gone costs a recompute and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvgraph import methods
from kvgraph.data.chat import Document
from kvgraph.data.databases import Database, Postgres, SQLite
from kvgraph.errors import KVGraphError, StoreError
from kvgraph.graph import ContextGraph, Text
from kvgraph.methods import Method
from kvgraph.places import StorePlace

log = logging.getLogger("kvgraph.data")

State = Literal["pending", "running", "ready", "failed"]

DEFAULT_METHOD = "graph-kv"  # of the graphs that don't name theirs: it was the only one when this schema was made
LIBRARY = "library.sqlite"  # in the folder of the store


class LibraryError(KVGraphError):
    """The library can't do what was asked. param: the field of a server's request that asked for it, if it was one."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class NotStoredError(LibraryError):
    """There is no such segment or graph."""


class TakenError(LibraryError):
    """An id belongs to something else, or what should go is in use."""


@dataclass(frozen=True)
class StoredSegment:
    """A stored segment: token ids, and the title and text they were made from. created: seconds since the epoch."""

    id: str
    tokens: tuple[int, ...]
    title: str = ""
    text: str = ""
    created: float = 0.0


@dataclass(frozen=True)
class StoredGraph:
    """What is known of a stored graph without its content.

    row: its number in the library. segments, edges: how many. spans, tokens: what encoding it leaves in the store.
    done: segments that are encoded, of `segments`.
    """

    row: int
    tenant: str
    id: str
    method: Method
    segments: int
    edges: int
    spans: int
    tokens: int
    created: float
    state: State
    done: int
    error: str | None


@dataclass(frozen=True)
class GraphPart:
    """Segments of a graph, edges (source, reader) among them, and which were chosen, both as indices into `segments`."""

    segments: tuple[StoredSegment, ...]
    edges: tuple[tuple[int, int], ...]
    chosen: tuple[int, ...]

    def graph(self, query: Text = "") -> ContextGraph:
        """It as a context graph without a prefix, segments named by their ids."""
        tokens, names = [s.tokens for s in self.segments], [s.id for s in self.segments]
        return ContextGraph(tokens, query, "", self.edges, names, self.chosen)


class Library:
    """Segments and graphs of one model (by fingerprint), by tenant and id. Safe to use from several threads.

    place: the SQLite file, or the URL of a Postgres, shared with other processes; None keeps everything in memory. Raises
    StoreError when it can't be used, is damaged, or another version's. A file that can't be written is left alone, with a
    warning: then memory serves.
    """

    def __init__(self, place: Path | StorePlace | None, model: str):
        self.model = model
        self._lock = threading.RLock()
        self._db: Database
        if isinstance(place, StorePlace):
            self._db = Postgres(place)
            return
        try:
            self._db = SQLite(place)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
                log.warning(
                    "can't keep segments and graphs in %s, they are lost when the server stops: %s", place, error
                )
                self._db = SQLite(None)
            else:
                raise StoreError(
                    f"{place} can't be used ({error}); move it away and store its segments again"
                ) from None

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._db.close()

    # -- segments -----------------------------------------------------------------------------------------------------

    def add(self, tenant: str, segments: Iterable[StoredSegment], most: int) -> list[StoredSegment]:
        """Keep segments, all or none, at most `most` of a tenant; returns them as kept. Idempotent.

        Raises TakenError when an id belongs to other tokens, and LibraryError beyond `most`.
        """
        with self._changing():
            kept = [self._add(tenant, segment) for segment in segments]
            (count,) = self._one("SELECT count(*) FROM segments WHERE model = ? AND tenant = ?", self.model, tenant)
            if count > most:
                raise LibraryError(f"there would be {count} segments, but at most {most} are kept; delete some first")
            return kept

    def _add(self, tenant: str, segment: StoredSegment) -> StoredSegment:
        there = self._find(tenant, segment.id)
        if there is not None:
            if there.tokens != segment.tokens:
                raise TakenError(f"segment {segment.id!r} exists with another text; DELETE it first")
            return there
        created = time.time()
        self._db.execute(
            "INSERT INTO segments (model, tenant, id, title, text, tokens, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.model, tenant, segment.id, segment.title, segment.text, _packed(segment.tokens), created),
        )
        return StoredSegment(segment.id, segment.tokens, segment.title, segment.text, created)

    def segment(self, tenant: str, id: str, param: str | None = None) -> StoredSegment:
        """A stored segment. Raises NotStoredError; `param` names the request's field."""
        with self._reading():
            found = self._find(tenant, id)
        if found is None:
            raise NotStoredError(f"there is no segment {id!r}; store it with PUT /v1/segments", param=param)
        return found

    def _find(self, tenant: str, id: str) -> StoredSegment | None:
        row = self._one(
            "SELECT id, tokens, title, text, created FROM segments WHERE model = ? AND tenant = ? AND id = ?",
            *(self.model, tenant, id),
        )
        return None if row is None else StoredSegment(row[0], _unpacked(row[1]), *row[2:])

    def document(self, tenant: str, segment: str) -> Document:
        """A stored segment as a document. Raises NotStoredError."""
        found = self.segment(tenant, segment, "documents")
        return Document(found.text, found.title, found.id, found.tokens)

    def segments(self, tenant: str, after: str, limit: int) -> list[StoredSegment]:
        """Up to `limit` segments with ids above `after`, in the order of their ids."""
        with self._reading():
            rows = self._db.execute(
                "SELECT id, tokens, title, text, created FROM segments WHERE model = ? AND tenant = ? AND id > ? "
                "ORDER BY id LIMIT ?",
                (self.model, tenant, after, limit),
            ).fetchall()
        return [StoredSegment(row[0], _unpacked(row[1]), *row[2:]) for row in rows]

    def remove(self, tenant: str, id: str) -> StoredSegment:
        """Take a segment out; returns it. Raises NotStoredError, or TakenError while a graph uses it."""
        with self._changing():
            segment = self.segment(tenant, id)
            used = self._one(
                "SELECT graphs.id FROM members JOIN graphs ON graphs.row = graph JOIN segments ON segments.row = segment "
                "WHERE segments.model = ? AND segments.tenant = ? AND segments.id = ? LIMIT 1",
                *(self.model, tenant, id),
            )
            if used is not None:
                raise TakenError(f"graph {used[0]!r} uses segment {id!r}; DELETE the graph first")
            self._db.execute("DELETE FROM segments WHERE model = ? AND tenant = ? AND id = ?", (self.model, tenant, id))
            return segment

    # -- graphs -------------------------------------------------------------------------------------------------------

    def add_graph(
        self,
        tenant: str,
        id: str | None,
        method: Method,
        segments: Sequence[str],
        edges: Sequence[tuple[int, int]],
        *,
        spans: int,
        tokens: int,
        most: int | None = None,
        most_edges: int | None = None,
    ) -> StoredGraph:
        """Keep a graph of stored segments, in state "pending". One that is there with the same content stays as it is,
        but one that failed is pending again. Without an id it is named after its content.

        most, most_edges: how many graphs a tenant may have, and edges in all of them; a segment's place in a graph counts
        as an edge. Raises TakenError when the id belongs to another graph, NotStoredError for unknown segments, and
        LibraryError beyond `most` or `most_edges`.
        """
        with self._changing():
            rows = [self._row_of(tenant, segment) for segment in segments]
            digest = _digest(method, rows, edges)
            id = id or f"graph-{digest[:24]}"
            there = self._there(tenant, id)
            if there is None:
                self._check_room(tenant, len(rows) + len(edges), most, most_edges)
                self._insert(tenant, id, digest, method, rows, edges, spans, tokens)
            elif there[1] != digest:
                raise TakenError(f"graph {id!r} exists with other content; DELETE it first")
            self._db.execute(
                "UPDATE graphs SET state = 'pending', error = NULL WHERE model = ? AND tenant = ? AND id = ? "
                "AND state = 'failed'",
                (self.model, tenant, id),
            )
            return self.graph(tenant, id)

    def replace_graph(
        self,
        tenant: str,
        id: str,
        method: Method,
        segments: Iterable[StoredSegment],
        edges: Sequence[tuple[int, int]],
        *,
        spans: int,
        tokens: int,
    ) -> StoredGraph:
        """Keep a graph with its segments, in place of the graph of this id if there is one, all or nothing.

        Segments of the earlier graph that no graph has any more are taken out. The same content changes nothing.
        Raises TakenError when a segment's id belongs to other tokens.
        """
        with self._changing():
            rows = []
            for segment in segments:
                self._add(tenant, segment)
                rows.append(self._row_of(tenant, segment.id))
            digest = _digest(method, rows, edges)
            there = self._there(tenant, id)
            if there is None or there[1] != digest:
                before = () if there is None else self._rows_of(there[0])
                if there is not None:
                    self._db.execute("DELETE FROM graphs WHERE row = ?", there[:1])
                self._insert(tenant, id, digest, method, rows, edges, spans, tokens)
                self._drop_unused(before)
            return self.graph(tenant, id)

    def _check_room(self, tenant: str, size: int, most: int | None, most_edges: int | None) -> None:
        """Raise LibraryError if one more graph, with `size` edges and places of segments, is too much for a tenant."""
        graphs, edges = self._one(
            "SELECT 1 + count(*), ? + coalesce(sum(segments + edges), 0) FROM graphs WHERE model = ? AND tenant = ?",
            *(size, self.model, tenant),
        )
        if most is not None and graphs > most:
            raise LibraryError(f"there would be {graphs} graphs, but at most {most} are kept; delete some first")
        if most_edges is not None and edges > most_edges:
            raise LibraryError(
                f"all graphs would have {edges} edges and segments, but at most {most_edges} are kept; delete some first"
            )

    def _there(self, tenant: str, id: str) -> tuple[int, str] | None:
        """(row, digest) of a graph."""
        return self._one(
            "SELECT row, digest FROM graphs WHERE model = ? AND tenant = ? AND id = ?", self.model, tenant, id
        )

    def _insert(
        self,
        tenant: str,
        id: str,
        digest: str,
        method: Method,
        rows: Sequence[int],
        edges: Sequence[tuple[int, int]],
        spans: int,
        tokens: int,
    ) -> None:
        fields = _written(method)
        columns = (self.model, tenant, id, digest, fields, len(rows), len(edges), spans, tokens, time.time())
        graph = self._db.execute(
            "INSERT INTO graphs (model, tenant, id, digest, method, segments, edges, spans, tokens, created) "
            f"VALUES ({', '.join('?' * len(columns))}) RETURNING row",
            columns,
        ).fetchone()[0]
        members = [(graph, place, row) for place, row in enumerate(rows)]
        self._db.executemany("INSERT INTO members (graph, place, segment) VALUES (?, ?, ?)", members)
        pairs = [(graph, reader, source) for source, reader in edges]
        self._db.executemany("INSERT INTO edges (graph, reader, source) VALUES (?, ?, ?)", pairs)

    def _rows_of(self, graph: int) -> list[int]:
        """The rows of a graph's segments."""
        return [row for (row,) in self._db.execute("SELECT segment FROM members WHERE graph = ?", (graph,))]

    def _drop_unused(self, rows: Iterable[int]) -> None:
        """Take those of these segments out that no graph has."""
        self._db.executemany(
            "DELETE FROM segments WHERE row = ? AND NOT EXISTS (SELECT 1 FROM members WHERE segment = segments.row)",
            ((row,) for row in rows),
        )

    def _row_of(self, tenant: str, segment: str) -> int:
        row = self._one(
            "SELECT row FROM segments WHERE model = ? AND tenant = ? AND id = ?", self.model, tenant, segment
        )
        if row is None:
            raise NotStoredError(f"there is no segment {segment!r}; store it with PUT /v1/segments", param="segments")
        return row[0]

    def graph(self, tenant: str, id: str, param: str | None = None) -> StoredGraph:
        """A stored graph's state. Raises NotStoredError; `param` names the request's field."""
        found = self._graphs("tenant = ? AND id = ?", tenant, id)
        if not found:
            raise NotStoredError(f"there is no graph {id!r}; store it with POST /v1/graphs", param=param)
        return found[0]

    def graphs(self, tenant: str, after: str, limit: int) -> list[StoredGraph]:
        """Up to `limit` graphs with ids above `after`, in the order of their ids."""
        return self._graphs("tenant = ? AND id > ? ORDER BY id LIMIT ?", tenant, after, limit)

    def has_elsewhere(self, tenant: str, id: str) -> bool:
        """Whether another model has a graph of this id."""
        with self._reading():
            found = self._one(
                "SELECT 1 FROM graphs WHERE tenant = ? AND id = ? AND model <> ? LIMIT 1", tenant, id, self.model
            )
        return found is not None

    def unfinished(self) -> list[StoredGraph]:
        """All tenants' graphs that are neither ready nor failed, oldest first."""
        return self._graphs("state IN ('pending', 'running') ORDER BY created")

    def _graphs(self, where: str, *values: Any) -> list[StoredGraph]:
        names = "row, tenant, id, method, segments, edges, spans, tokens, created, state, done, error"
        with self._reading():
            rows = self._db.execute(f"SELECT {names} FROM graphs WHERE model = ? AND {where}", (self.model, *values))
            return [
                StoredGraph(row, tenant, id, _read(method), *rest)  # type: ignore[arg-type]
                for row, tenant, id, method, *rest in rows
            ]

    def progress(self, graph: StoredGraph, state: State, done: int, error: str | None = None) -> None:
        """Note how far the encoding has come. No effect on a graph that is gone."""
        with self._changing():
            self._db.execute(
                "UPDATE graphs SET state = ?, done = ?, error = ? WHERE row = ?", (state, done, error, graph.row)
            )

    def remove_graph(self, graph: StoredGraph, unused_segments: bool = False) -> None:
        """Take a graph out. Its segments stay, or with `unused_segments` those that another graph has."""
        with self._changing():
            rows = self._rows_of(graph.row) if unused_segments else ()
            self._db.execute("DELETE FROM graphs WHERE row = ?", (graph.row,))
            self._drop_unused(rows)

    def sharing(self, graph: StoredGraph) -> list[StoredGraph]:
        """Other graphs of the tenant that have some of the graph's segments."""
        return self._graphs(
            "tenant = ? AND row <> ? AND row IN (SELECT others.graph FROM members AS others JOIN members AS own "
            "ON others.segment = own.segment WHERE own.graph = ?) ORDER BY row",
            *(graph.tenant, graph.row, graph.row),
        )

    def part(self, graph: StoredGraph, chosen: Sequence[str | int] | None = None) -> GraphPart:
        """What a query over the chosen segments (by id, or by number in the graph; None: all) needs of the graph.

        That is the chosen segments in this order, then what their versions were computed from: sources up to the
        method's `reach` edges away. Their keys are those of the whole graph. Raises NotStoredError for a segment that isn't
        in the graph, or if the graph has been replaced or removed.
        """
        with self._reading():
            places = range(graph.segments) if chosen is None else [self._place(graph, ref) for ref in chosen]
            needed, pairs = self._ancestors(graph, places)
            index = {place: i for i, place in enumerate(needed)}
            return GraphPart(
                tuple(self._members(graph, needed)),
                tuple((index[source], index[reader]) for source, reader in pairs),
                tuple(index[place] for place in places),
            )

    def members(self, graph: StoredGraph) -> list[str]:
        """The ids of a graph's segments, in its order."""
        with self._reading():
            rows = self._db.execute(
                "SELECT id FROM members JOIN segments ON segments.row = segment WHERE graph = ? ORDER BY place",
                (graph.row,),
            )
            return [id for (id,) in rows]

    def texts(self, graph: StoredGraph) -> list[StoredSegment]:
        """A graph's segments, in its order, with their titles and texts."""
        with self._reading():
            rows = self._db.execute(
                "SELECT id, tokens, title, text, created FROM members JOIN segments ON segments.row = segment "
                "WHERE graph = ? ORDER BY place",
                (graph.row,),
            )
            return [StoredSegment(row[0], _unpacked(row[1]), *row[2:]) for row in rows]

    def sources(self, graph: StoredGraph, id: str) -> list[str]:
        """The ids of the segments that one of a graph reads, in the graph's order; empty for one that it hasn't."""
        with self._reading():
            rows = self._db.execute(
                "SELECT source.id FROM segments AS reader JOIN members AS at ON at.segment = reader.row AND at.graph = ? "
                "JOIN edges ON edges.graph = at.graph AND edges.reader = at.place JOIN members AS from_ ON "
                "from_.graph = at.graph AND from_.place = edges.source JOIN segments AS source ON source.row = from_.segment "
                "WHERE reader.model = ? AND reader.tenant = ? AND reader.id = ? ORDER BY edges.source",
                (graph.row, self.model, graph.tenant, id),
            )
            return [source for (source,) in rows]

    def _ancestors(self, graph: StoredGraph, places: Iterable[int]) -> tuple[dict[int, None], list[tuple[int, int]]]:
        """The places and all that is within the method's reach before them, and the edges on the way."""
        needed, pairs = dict.fromkeys(places), []
        frontier = list(needed)
        for _ in range(graph.method.reach):
            found: dict[int, None] = {}
            for reader in frontier:
                rows = self._db.execute("SELECT source FROM edges WHERE graph = ? AND reader = ?", (graph.row, reader))
                for (source,) in rows:
                    pairs.append((source, reader))
                    if source not in needed:
                        needed[source] = found[source] = None
            frontier = list(found)
        return needed, pairs

    def _place(self, graph: StoredGraph, ref: str | int) -> int:
        if isinstance(ref, int):
            return ref
        row = self._one(
            "SELECT place FROM members JOIN segments ON segments.row = segment WHERE graph = ? AND model = ? "
            "AND tenant = ? AND id = ?",
            *(graph.row, self.model, graph.tenant, ref),
        )
        if row is None:
            raise NotStoredError(f"graph {graph.id!r} has no segment {ref!r}", param="kvgraph.segments")
        return row[0]

    def _members(self, graph: StoredGraph, places: Iterable[int]) -> Iterator[StoredSegment]:
        for place in places:
            row = self._one(
                "SELECT id, tokens FROM members JOIN segments ON segments.row = segment WHERE graph = ? AND place = ?",
                *(graph.row, place),
            )
            if row is None:
                raise NotStoredError(f"graph {graph.id!r} was replaced or removed meanwhile; try again")
            yield StoredSegment(row[0], _unpacked(row[1]))

    # -- the database -------------------------------------------------------------------------------------------------------

    def _one(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values).fetchone()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One thread at a time; the database's errors as StoreError."""
        with self._lock:
            try:
                with self._db.reading():
                    yield
            except UnicodeEncodeError:
                raise LibraryError("an id isn't valid Unicode: it contains half of a surrogate pair") from None
            except self._db.failures as error:
                raise StoreError(
                    f"the library of segments can't be used now: {getattr(error, 'orig', error)}"
                ) from None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction: all of it or nothing."""
        with self._reading(), self._db.changing():
            yield


def _digest(method: Method, rows: Sequence[int], edges: Sequence[tuple[int, int]]) -> str:
    """A graph's content in short; rows: of its segments."""
    return hashlib.sha256(json.dumps([_written(method), rows, sorted(edges)]).encode()).hexdigest()


def _written(method: Method) -> str:
    """A method as the library keeps it: its fields as JSON and, unless it is DEFAULT_METHOD, its name."""
    name = {} if method.name == DEFAULT_METHOD else {"method": method.name}
    return json.dumps(methods.configuration(method) | name, sort_keys=True)


def _read(text: str) -> Method:
    fields = json.loads(text)
    return methods.get(fields.pop("method", DEFAULT_METHOD), **fields)


def _packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _unpacked(blob: bytes) -> tuple[int, ...]:
    return tuple(array("i", blob))
