"""A corpus as a stored graph: read, cut, joined by edges, and every version encoded into the store.

The graph is one of the library's, so a server that is started on the store serves it. Beside the library, the folder
`indexes` holds for each graph NAME a file NAME.json, which says where chunks come from, and a folder NAME@MODEL for
retrieval.

Every step can be repeated. What is no longer wanted is forgotten first, then the library changes in one transaction, then
what is missing is encoded. A process that was killed leaves at worst records that are computed once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgraph.data import graphs, io, pages
from kvgraph.data.cut import filled
from kvgraph.data.graphs import Combined
from kvgraph.data.library import LIBRARY, Library, NotStoredError, StoredGraph, StoredSegment
from kvgraph.data.pages.base import PageError, Say
from kvgraph.data.retrieval import Embedder, SearchIndex
from kvgraph.data.retrieval.stored import INDEXES, forget_index, index_folder
from kvgraph.data.table import ChunkTable
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.progress import Progress

if TYPE_CHECKING:  # a list of what is there must not wait for torch
    from kvgraph.encoding import Done
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.request import Request

FORMAT = 1  # of NAME.json
QUERY = [0]  # any token: a query changes no document
NOTED = 32  # chunks between two notes of the progress in the library
SAMPLE = 4  # chunks timed for an estimate, with what they read
TENANT = ""  # that of callers of a server without API keys


class IndexingError(KVGraphError):
    """A corpus can't be indexed, or there is no such index."""


@dataclass(frozen=True)
class Layout:
    """How a corpus is indexed. builders: who reads whom. budget: most tokens of a chunk. method: reads the edges."""

    builders: Combined
    budget: int
    method: Method

    def as_json(self) -> dict[str, Any]:
        """It as the index's file keeps it."""
        from kvgraph.methods import spec

        return {"graph": graphs.format(self.builders), "budget": self.budget, "method": spec.format(self.method)}


class PlannedCorpus:
    """A corpus read and planned for a model, before anything is written."""

    def __init__(self, engine: Engine, source: Path, layout: Layout, say: Say):
        self.layout = layout

        def count(text: str) -> int:
            return len(engine.tokenize(text))

        self.table = ChunkTable.of(pages.read(source, say), count, layout.budget)
        if not len(self.table):
            raise IndexingError(f"{source} holds no pages that can be read")
        self.segments = [
            StoredSegment(chunk.id, tuple(engine.tokenize(filled(chunk.title, chunk.text))), chunk.title, chunk.text)
            for chunk in self.table.chunks
        ]
        self.edges = layout.builders.edges(self.table)
        longest = max(len(segment.tokens) for segment in self.segments)
        self.method = layout.method.for_corpus(max(longest, layout.budget))
        self.plan = self.method.plan(
            ContextGraph(
                [segment.tokens for segment in self.segments],
                QUERY,
                edges=self.edges,
                names=[segment.id for segment in self.segments],
            )
        )
        if self.plan.highest_position >= engine.model.limit:
            raise IndexingError(
                f"the graph reaches position {self.plan.highest_position}, but the model's limit is {engine.model.limit}; "
                "use smaller chunks or fewer rounds"
            )
        self.versions = Versions.of(engine, self.plan)

    @cached_property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self.table.pages)


@dataclass
class Versions:
    """The versions of a graph's segments: tokens by key, and keys by the segment's index, the newest last."""

    tokens: dict[str, int] = field(default_factory=dict)
    of_segment: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine, plan: Plan) -> Versions:
        """The versions in a plan."""
        made = cls()
        for key, span in zip(engine.keys(plan), plan.spans, strict=True):
            if key is not None and span.segment is not None:
                made.tokens[key] = len(span)
                made.of_segment.setdefault(span.segment, []).append(key)
        return made


@dataclass(frozen=True)
class Changes:
    """What differs from the index that is there. Chunks: new, gone, same, and readers, whose sources changed.

    pages: ids of pages with new chunks or chunks that are gone. stale: keys of records that nothing needs any more.
    """

    new: int
    gone: int
    readers: int
    same: int
    pages: tuple[str, ...]
    stale: tuple[str, ...]


@dataclass
class EncodedCorpus:
    """What encoding took, in tokens and seconds. chunks: how many had to be encoded."""

    chunks: int = 0
    computed: int = 0
    reused: int = 0
    forgotten: int = 0
    stored: int = 0  # bytes, where other processes wrote them
    seconds: float = 0.0


Elsewhere = Callable[[list[list[Plan]]], "Done"]


class CorpusIndex:
    """The index NAME in a store's folder, for one engine. `compare`, then `write`."""

    def __init__(self, folder: Path, engine: Engine, name: str):
        self.folder, self.engine, self.name = folder, engine, name
        self.library = Library(folder / LIBRARY, engine.model.fingerprint)

    def close(self) -> None:
        """Close the library."""
        self.library.close()

    @property
    def graph(self) -> StoredGraph | None:
        """The stored graph, None if there is none of this name."""
        try:
            return self.library.graph(TENANT, self.name)
        except NotStoredError:
            return None

    def compare(self, corpus: PlannedCorpus) -> Changes:
        """What writing this corpus would change."""
        there = self.graph
        if there is None:
            return Changes(len(corpus.table), 0, 0, 0, tuple(corpus.table.pages), ())
        return _changes(self.engine, self.library, there, corpus, self._pages_of_chunks())

    def _pages_of_chunks(self) -> dict[str, str]:
        try:
            return {chunk["id"]: chunk["page"] for chunk in described(self.folder, self.name)["chunks"]}
        except KVGraphError:  # the file is lost; the library isn't
            return {}

    def write(
        self,
        corpus: PlannedCorpus,
        source: str,
        *,
        embedder: Embedder | None = None,
        progress: bool | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> EncodedCorpus:
        """Make the index what the corpus says, and encode what isn't stored. Can be stopped and repeated at any time.

        embedder: for a search by meaning too; without one, words alone are searched. elsewhere: encodes levels of spans
        in other processes.
        """
        (self.folder / INDEXES).mkdir(parents=True, exist_ok=True)
        with io.locked(self.folder / INDEXES, IndexingError, self.name):
            changes = self.compare(corpus)
            done = EncodedCorpus(forgotten=len(changes.stale))
            self.engine.forget(changes.stale)
            self.engine.flush()
            versions = corpus.versions.tokens
            graph = self.library.replace_graph(
                TENANT,
                self.name,
                corpus.method,
                corpus.segments,
                corpus.edges,
                spans=len(versions),
                tokens=sum(versions.values()),
            )
            io.write_json(describing(self.folder, self.name), self._description(corpus, source), indent=None)
            home = index_folder(self.folder, TENANT, self.name, self.library.model)
            SearchIndex.build(home, corpus.segments, embedder)
            if elsewhere is None:
                self._encode(graph, corpus, done, progress)
            else:
                from kvgraph.encoding import levels

                started, made = time.perf_counter(), elsewhere(levels(corpus.plan))
                done.chunks, done.computed, done.reused = len(corpus.table), made.computed, made.reused
                done.stored, done.seconds = made.stored, time.perf_counter() - started
                self.library.progress(graph, "ready", graph.segments)
            return done

    def _description(self, corpus: PlannedCorpus, source: str) -> dict[str, Any]:
        sources: list[list[int]] = [[] for _ in corpus.table.chunks]
        for source_chunk, reader in corpus.edges:
            sources[reader].append(source_chunk)
        return {
            "format": FORMAT,
            "name": self.name,
            "source": source,
            "model": str(self.engine.model.name),
            "fingerprint": self.engine.model.fingerprint,
            "layout": corpus.layout.as_json(),
            "chunks": [
                {
                    "id": chunk.id,
                    "page": chunk.page,
                    "number": chunk.number,
                    "title": chunk.title,
                    "url": chunk.url,
                    "tokens": chunk.tokens,
                    "sources": read,
                }
                for chunk, read in zip(corpus.table.chunks, sources, strict=True)
            ],
        }

    def _encode(self, graph: StoredGraph, corpus: PlannedCorpus, done: EncodedCorpus, progress: bool | None) -> None:
        engine, started = self.engine, time.perf_counter()
        places: list[int] = []  # of the requests
        ended: set[int] = set()  # places whose versions are encoded
        first = 0  # the first place that isn't among them
        with Progress("encoding", graph.segments, enabled=progress) as bar:

            def missing() -> Iterator[Request]:
                """Requests for the chunks of which a version isn't stored."""
                for place in range(graph.segments):
                    keys = corpus.versions.of_segment.get(place, [])
                    if engine.store is not None and all(map(engine.store.contains, keys)):
                        ended.add(place)
                        done.reused += sum(corpus.versions.tokens[key] for key in keys)
                        bar.advance(1)
                        continue
                    done.chunks += 1
                    places.append(place)
                    yield encoding(engine, self.library, graph, place)

            with closing(engine.run(missing(), in_flight=16)) as outcomes:
                for number, (i, result) in enumerate(outcomes, 1):
                    if isinstance(result, KVGraphError):
                        raise result
                    ended.add(places[i])
                    done.computed += result.usage.computed_tokens
                    bar.advance(1, tokens=done.computed)
                    if engine.store_error is not None:
                        raise engine.store_error
                    if number % NOTED == 0:
                        engine.flush()
                        while first in ended:
                            first += 1
                        # A server that resumes the graph skips every place before this one.
                        self.library.progress(graph, "running", min(first, graph.segments - 1))
            engine.flush()
            if engine.store_error is not None:
                raise engine.store_error
        self.library.progress(graph, "ready", graph.segments)
        done.seconds = time.perf_counter() - started

    def remove(self) -> int:
        """Forget the index, its chunks that no other graph has, and their records. Returns how many records went."""
        (self.folder / INDEXES).mkdir(parents=True, exist_ok=True)
        with io.locked(self.folder / INDEXES, IndexingError, self.name):
            graph = self.graph
            stale: Sequence[str] = ()
            if graph is not None:
                stale = _stale(self.engine, self.library, graph, set())
                self.engine.forget(stale)
                self.engine.flush()
                self.library.remove_graph(graph, unused_segments=True)
            describing(self.folder, self.name).unlink(missing_ok=True)
            forget_index(self.folder, self.library, TENANT, self.name)
            return len(stale)


def encoding(engine: Engine, library: Library, graph: StoredGraph, place: int) -> Request:
    """The encoding of all that a query over one segment of a graph reads, as a server does it."""
    return engine.prepare(graph.method.plan(library.part(graph, [place]).graph(QUERY)), encode_only=True)


def _changes(
    engine: Engine, library: Library, there: StoredGraph, corpus: PlannedCorpus, page_of: Mapping[str, str]
) -> Changes:
    part = library.part(there)
    before = _stored(engine, library, there)
    old = {segment.id: before.of_segment.get(i, [""])[-1] for i, segment in enumerate(part.segments)}
    new = {segment.id: corpus.versions.of_segment[i][-1] for i, segment in enumerate(corpus.segments)}
    fresh, gone = new.keys() - old.keys(), old.keys() - new.keys()
    readers = sum(key != old[id] for id, key in new.items() if id in old)
    touched = {chunk.page for chunk in corpus.table.chunks if chunk.id in fresh}
    touched |= {page_of[id] for id in gone if id in page_of}
    stale = _stale(engine, library, there, set(corpus.versions.tokens))
    return Changes(
        len(fresh), len(gone), readers, len(new) - len(fresh) - readers, tuple(sorted(touched)), tuple(stale)
    )


def _stale(engine: Engine, library: Library, graph: StoredGraph, needed: set[str]) -> list[str]:
    """Keys of a stored graph's records that are neither needed nor another graph's."""
    for other in library.sharing(graph):
        needed = needed.union(_stored(engine, library, other).tokens)
    return [key for key in _stored(engine, library, graph).tokens if key not in needed]


def _stored(engine: Engine, library: Library, graph: StoredGraph) -> Versions:
    """The versions of a stored graph."""
    return Versions.of(engine, graph.method.plan(library.part(graph).graph(QUERY)))


# -- what it would take -----------------------------------------------------------------------------------------------


def rate(engine: Engine, corpus: PlannedCorpus) -> float:
    """Tokens a second when encoding a few chunks of it; 0 if there is nothing to encode."""
    step = max(1, len(corpus.table) // SAMPLE)
    chosen = [[0], *([place] for place in range(1, len(corpus.table), step))]
    first, *others = (_timed(engine, corpus, places) for places in islice(chosen, SAMPLE + 1))
    tokens, seconds = (sum(part) for part in zip(*(others or [first]), strict=True))
    return tokens / seconds if seconds else 0.0


def _timed(engine: Engine, corpus: PlannedCorpus, places: list[int]) -> tuple[int, float]:
    """(tokens computed, seconds) of encoding some chunks with what they read."""
    near = dict.fromkeys(places)
    for _ in range(corpus.method.reach):
        near |= dict.fromkeys(source for source, reader in corpus.edges if reader in near)
    index = {place: i for i, place in enumerate(near)}
    edges = [(index[s], index[r]) for s, r in corpus.edges if s in index and r in index]
    tokens = [corpus.segments[place].tokens for place in near]
    started = time.perf_counter()
    plan = corpus.method.plan(ContextGraph(tokens, QUERY, edges=edges, chosen=range(len(places))))
    result = engine.wait(engine.submit(plan, encode_only=True))
    return result.usage.computed_tokens, time.perf_counter() - started


# -- what is there ----------------------------------------------------------------------------------------------------


def describing(folder: Path, name: str) -> Path:
    """The file that describes an index."""
    return folder / INDEXES / f"{name}.json"


def names(folder: Path) -> list[str]:
    """The indexes in a store's folder."""
    found = (folder / INDEXES).glob("*.json") if (folder / INDEXES).is_dir() else ()
    return sorted(path.stem for path in found if not path.name.startswith("."))


def described(folder: Path, name: str) -> dict[str, Any]:
    """What an index's file says. Raises IndexingError if there is none, or it can't be read."""
    path = describing(folder, name)
    if not path.is_file():
        there = names(folder)
        raise IndexingError(f"{folder} has no index {name!r}; it has {', '.join(there) if there else 'none'}")
    found = io.read_json(path, PageError)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise IndexingError(f"{path} isn't of format {FORMAT}; index its source again")
    return found
