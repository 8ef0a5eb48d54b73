"""The search indexes of stored graphs, beside the library that holds the graphs.

`kvgraph index` makes a graph's index in `indexes/GRAPH@MODEL` of the library's folder, because two models may have graphs
of one name. A graph that has none, because it was stored by requests, gets one of its words when it is first searched.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvgraph.data.library import Library, StoredGraph
from kvgraph.data.retrieval.base import Embedder, Hit, RetrievalError
from kvgraph.data.retrieval.index import INDEX, SearchIndex

log = logging.getLogger("kvgraph.data")

INDEXES = "indexes"  # in the library's folder
OPEN = 16  # indexes kept open

_Stamp = tuple[int, int] | None  # of a file; None: there is none


def index_folder(library_folder: Path, tenant: str, graph: str, model: str = "") -> Path:
    """Where the index of a model's graph is; without a model, where it was when models shared it. No id contains "@"."""
    inside = library_folder / INDEXES / (f"@{tenant}" if tenant else "")
    return inside / (f"{graph}@{model[:16]}" if model else graph)


def forget_index(library_folder: Path, library: Library, tenant: str, graph: str) -> None:
    """Remove the index of a graph that is gone, and a shared one of its name unless another model may need it."""
    shutil.rmtree(index_folder(library_folder, tenant, graph, library.model), ignore_errors=True)
    if not library.has_elsewhere(tenant, graph):
        shutil.rmtree(index_folder(library_folder, tenant, graph), ignore_errors=True)


class GraphIndexes:
    """The indexes of a library's graphs. Safe to use from several threads.

    folder: the library's; None keeps what is built in a temporary folder until `close`. load: gives the embedder of a
    name; one that can't be loaded is left out with a warning, and words alone are searched.
    """

    def __init__(self, library: Library, folder: Path | None, load: Callable[[str], Embedder]):
        self._library, self._folder, self._load = library, folder, load
        self._temporary: Path | None = None
        self._lock = threading.Lock()
        self._building: dict[int, threading.Lock] = {}
        self._open: OrderedDict[int, tuple[Path, _Stamp, SearchIndex]] = OrderedDict()  # by the graph's row
        self._embedders: dict[str, Embedder | None] = {}

    def search(self, graph: StoredGraph, query: str, top: int, tokens: int | None = None) -> list[Hit]:
        """The best segments of a graph for a query, also those that the best ones read. See `SearchIndex.search`."""
        return self.of(graph).search(query, top, partial(self._library.sources, graph), tokens)

    def of(self, graph: StoredGraph) -> SearchIndex:
        """The index of a graph, built if there is none. Raises RetrievalError."""
        with self._lock:
            turn = self._building.setdefault(graph.row, threading.Lock())
        with turn:
            with self._lock:
                folder, stamp, index = self._open.get(graph.row, (None, None, None))
                if index is not None:
                    self._open.move_to_end(graph.row)
            if index is None or folder is None or stamp != _stamp(folder):
                folder, index = self._found(graph)
                with self._lock:
                    self._open[graph.row] = folder, _stamp(folder), index
                    while len(self._open) > OPEN:
                        self._open.popitem(last=False)
            return index

    def forget(self, graph: StoredGraph) -> None:
        """Take the index of a graph away, which is gone."""
        with self._lock:
            self._open.pop(graph.row, None)
            self._building.pop(graph.row, None)
        if self._folder is not None:
            forget_index(self._folder, self._library, graph.tenant, graph.id)
        if self._temporary is not None:
            shutil.rmtree(self._temporary / str(graph.row), ignore_errors=True)

    def close(self) -> None:
        """Remove what is temporary. Idempotent."""
        with self._lock:
            self._open.clear()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _found(self, graph: StoredGraph) -> tuple[Path, SearchIndex]:
        """The index in the graph's own folder, or the shared one, if it is of these segments; else a new one of their words."""
        if self._folder is not None:
            home = index_folder(self._folder, graph.tenant, graph.id, self._library.model)
            for place in (home, index_folder(self._folder, graph.tenant, graph.id)):
                if (place / INDEX).is_file() and (index := self._opened(place, graph)) is not None:
                    return place, index
            try:
                if not (home / INDEX).is_file():  # one of other segments may be what `kvgraph index` is making
                    return home, SearchIndex.build(home, self._library.texts(graph))
            except RetrievalError as error:
                log.warning("can't keep an index: %s", error)
        with self._lock:
            if self._temporary is None:
                self._temporary = Path(tempfile.mkdtemp(prefix="kvgraph-indexes-"))
            folder = self._temporary / str(graph.row)
        return folder, SearchIndex.build(folder, self._library.texts(graph))

    def _opened(self, place: Path, graph: StoredGraph) -> SearchIndex | None:
        """The index in a folder, None if it is damaged or of other segments than the graph."""
        try:
            index = SearchIndex.open(place, self._embedder)
        except RetrievalError as error:
            log.warning("%s; words alone are searched", error)
            return None
        if list(index.ids) == self._library.members(graph):
            return index
        log.warning("the index %s is of other segments than graph %r; words alone are searched", place, graph.id)
        return None

    def _embedder(self, name: str) -> Embedder | None:
        with self._lock:
            if name not in self._embedders:
                try:
                    self._embedders[name] = self._load(name)
                except RetrievalError as error:
                    log.warning("%s; words alone are searched", error)
                    self._embedders[name] = None
            return self._embedders[name]


def _stamp(folder: Path) -> _Stamp:
    try:
        facts = (folder / INDEX).stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino
