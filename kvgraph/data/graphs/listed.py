"""Explicit lists, and the named shapes of `kvgraph.edges` within each page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvgraph.data import io
from kvgraph.data.graphs.base import GraphBuilder
from kvgraph.data.table import ChunkTable
from kvgraph.edges import named_edges
from kvgraph.errors import GraphError

MOST = 200  # chunks of a page whose edges a name may make: most shapes make the square of them


@dataclass(frozen=True)
class EdgeList(GraphBuilder):
    """Edges from a file: lines "source<TAB>reader", each the id of a page or of a chunk. A page stands for its first
    chunk as a source, and for all its chunks as a reader.

    It assumes nothing. Ids that aren't here are left out: lists are often made for a larger corpus.
    """

    name: ClassVar[str] = "listed"

    k: int = 16
    file: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.file, str) or not self.file:
            raise GraphError('listed needs a file: listed:file="edges.tsv"')

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Sources in the order of the file."""
        chunks = {chunk.id: i for i, chunk in enumerate(table.chunks)}
        found: dict[int, list[int]] = {}
        for number, line in enumerate(io.read_text(Path(self.file)).split("\n"), 1):
            if not line.strip():
                continue
            pair = [part.strip() for part in line.split("\t")]
            if len(pair) != 2:
                raise GraphError(f"{self.file}:{number} isn't a source and a reader with a tab between them")
            source = chunks.get(pair[0], table.first(pair[0]))
            readers = [chunks[pair[1]]] if pair[1] in chunks else table.pages.get(pair[1], ())
            for reader in readers if source is not None else ():
                found.setdefault(reader, []).append(source)  # type: ignore[arg-type]
        yield from found.items()


@dataclass(frozen=True)
class Shape(GraphBuilder):
    """A shape of `kvgraph.edges` among the chunks of each page: shape:of=chain, shape:of=top-k:3.

    It assumes only that a page's chunks have an order. Pages of more than MOST chunks take only "chain".
    """

    name: ClassVar[str] = "shape"

    of: str = "chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.of, str) or ">" in self.of:
            raise GraphError(f"shape: of must be the name of a shape, such as chain or top-k:3, not {self.of!r}")
        named_edges(self.of, ["", ""])

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Sources in the order that the shape gives."""
        for places in table.pages.values():
            names = [""] * len(places)
            made = named_edges(self.of if len(places) <= MOST else "chain", names)
            found: dict[int, list[int]] = {}
            for source, reader in made:
                assert isinstance(source, int) and isinstance(reader, int)
                found.setdefault(places.start + reader, []).append(places.start + source)
            yield from found.items()
