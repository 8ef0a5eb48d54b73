"""What a graph builder is: a rule by which chunks read other chunks.

To add one: a frozen dataclass in a file of its own here, derived from `GraphBuilder`, with a `name` and `sources`; then a
line in `kvgraph.data.graphs`, or an entry point of another package in the group "kvgraph.graphs" (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvgraph.data.table import ChunkTable
from kvgraph.errors import GraphError
from kvgraph.methods.base import require_int

IndexEdges = tuple[tuple[int, int], ...]
"""Pairs (source, reader) of indices of chunks, sorted by reader; a reader's sources come best first."""


@dataclass(frozen=True)
class GraphBuilder(ABC):
    """A rule. Its fields are its whole configuration: numbers, truth values and texts.

    k: maximum number of sources of a reader. tokens: maximum number of tokens that they have together. What exceeds one
    of them is left out, the best sources stay. The same table always gives the same edges.
    """

    name: ClassVar[str]

    k: int = 4
    tokens: int = 2048

    def __post_init__(self) -> None:
        require_int(self.name, "k", self.k, least=1)
        require_int(self.name, "tokens", self.tokens, least=1)

    @abstractmethod
    def sources(self, table: ChunkTable) -> Iterator[tuple[int, Iterable[int]]]:
        """(a reader, what it reads, best first) for readers in any order; repeated sources and the reader don't matter."""

    def edges(self, table: ChunkTable) -> IndexEdges:
        """The edges among a table's chunks, within the caps. Nothing reads itself."""
        found: dict[int, list[int]] = {}
        for reader, sources in self.sources(table):
            kept, read = found.setdefault(reader, []), 0
            taken = set(kept)
            read = sum(table.chunks[source].tokens for source in kept)
            for source in sources:
                if len(kept) == self.k:
                    break
                size = table.chunks[source].tokens
                if source != reader and source not in taken and read + size <= self.tokens:
                    kept.append(source)
                    taken.add(source)
                    read += size
        return tuple((source, reader) for reader in sorted(found) for source in found[reader])


@dataclass(frozen=True)
class Combined:
    """Several builders: a chunk reads what any of them gives it. Their caps hold for each, so their sum for all."""

    parts: tuple[GraphBuilder, ...]

    @property
    def k(self) -> int:
        """Maximum number of sources of a reader."""
        return sum(part.k for part in self.parts)

    @property
    def tokens(self) -> int:
        """Maximum number of tokens that a reader's sources have together."""
        return sum(part.tokens for part in self.parts)

    def edges(self, table: ChunkTable) -> IndexEdges:
        """The union of the parts' edges; a reader's sources in the order of the parts."""
        found: dict[int, dict[int, None]] = {}
        for part in self.parts:
            for source, reader in part.edges(table):
                found.setdefault(reader, {})[source] = None
        return tuple((source, reader) for reader in sorted(found) for source in found[reader])


def require_bool(builder: str, field: str, value: object) -> None:
    """Raise GraphError unless a builder's field is true or false."""
    if not isinstance(value, bool):
        raise GraphError(f"{builder}: {field} must be true or false, not {value!r}")
