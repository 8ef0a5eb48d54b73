"""Structure: a chunk reads what stands above and before it in its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvgraph.data.graphs.base import GraphBuilder, require_bool
from kvgraph.data.table import ChunkTable
from kvgraph.methods.base import require_int


@dataclass(frozen=True)
class Structure(GraphBuilder):
    """A chunk reads the chunks that hold its headings, its page's first chunk, and the chunks right before it.

    before: how many chunks before it. headings, first: whether it reads the others.

    It assumes that pages were written to be read from the beginning: that sections introduce what they treat, and that
    a paragraph may go on with what the one before it says. In Python's documentation a function is then read with the
    beginning of its module's page. In a list of independent entries (a glossary) these edges carry nothing.
    """

    name: ClassVar[str] = "structure"

    before: int = 1
    headings: bool = True
    first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self.name, "before", self.before)
        require_bool(self.name, "headings", self.headings)
        require_bool(self.name, "first", self.first)

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Chunks before it from the nearest, then headings from the innermost, then the first chunk."""
        for places in table.pages.values():
            for reader in places:
                chunk = table.chunks[reader]
                found = list(range(reader - 1, max(places.start, reader - self.before) - 1, -1))
                if self.headings:
                    found += [places.start + parent for parent in chunk.parents]
                if self.first:
                    found.append(places.start)
                yield reader, found
