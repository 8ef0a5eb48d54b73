"""Knowledge graphs: an entity's chunk reads the entities that it is related to; and paths between a question's entities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from typing import ClassVar

from kvgraph.data.graphs.base import GraphBuilder
from kvgraph.data.pages.base import ENTITY
from kvgraph.data.pages.triples import Triple
from kvgraph.data.table import ChunkTable
from kvgraph.errors import GraphError, KVGraphError


@dataclass(frozen=True)
class Triples(GraphBuilder):
    """The chunk of an entity reads the chunks of the objects of its triples.

    It assumes a source of triples, whose entities are pages (`kvgraph.data.pages.triples`). An object that is no subject
    has no page, and an entity in hundreds of triples has several chunks, of which the first is read. Shown on
    ExplaGraphs and on 2WikiMultiHopQA's evidence triples.
    """

    name: ClassVar[str] = "triples"

    k: int = 8

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Objects in the order of the triples."""
        for reader, chunk in enumerate(table.chunks):
            targets = [table.target(reader, link) for link in chunk.links if link.startswith(ENTITY)]
            found = [target for target in targets if target is not None]
            if found:
                yield reader, found


def paths(
    triples: Sequence[Triple], entities: Iterable[str], *, longest: int = 4, most: int = 8
) -> list[tuple[int, ...]]:
    """Shortest paths between a question's entities: each the indices of its triples, in the order they are walked.

    Triples are walked in both directions. longest: triples of a path. most: paths in all, the shortest first. With one
    entity, or none that are joined, the paths are the triples around each. Source: the retrieval of GNN-RAG (arXiv
    2405.20139, shortest paths from question entities) and Paths-over-Graph (arXiv 2410.14211, paths between all of them).
    """
    try:
        import networkx
    except ImportError:
        raise KVGraphError("paths need networkx: pip install 'kvgraph[index]'") from None
    if longest < 1 or most < 1:
        raise GraphError("paths need at least one triple, and at least one path")
    graph = networkx.Graph()
    for i, triple in enumerate(triples):
        if not graph.has_edge(triple.subject, triple.object):
            graph.add_edge(triple.subject, triple.object, triple=i)
    asked = [entity for entity in dict.fromkeys(entities) if entity in graph]
    found: dict[tuple[int, ...], None] = {}
    for start, goal in combinations(asked, 2):
        if networkx.has_path(graph, start, goal) and networkx.shortest_path_length(graph, start, goal) <= longest:
            for nodes in islice(networkx.all_shortest_paths(graph, start, goal), most):
                found[tuple(graph.edges[pair]["triple"] for pair in pairwise(nodes))] = None
    if not found:
        for entity in asked:
            for neighbour in graph.neighbors(entity):
                found[(graph.edges[entity, neighbour]["triple"],)] = None
    return sorted(found, key=lambda path: (len(path), path))[:most]


def along(walks: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Edges by which each triple of a path reads the one before it, (source, reader) by index, each once."""
    return tuple(dict.fromkeys(pair for walk in walks for pair in pairwise(walk)))
