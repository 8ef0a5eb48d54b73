"""Hyperlinks: a chunk reads the chunks that its links lead to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvgraph.data.graphs.base import GraphBuilder, require_bool
from kvgraph.data.pages.base import ENTITY
from kvgraph.data.table import ChunkTable


@dataclass(frozen=True)
class Links(GraphBuilder):
    """A chunk reads where its links lead, in the order of the links: of HTML, Markdown, wikis, and replies in mail.

    A link with an anchor leads to the chunk that holds the anchor, one without to the page's first chunk. Addresses lead
    to the page that is known by them. Records and pages may also name the pages that they read. within: whether links
    inside a page count.

    It assumes that a linked page helps to understand the text with the link. Navigation links don't, so the HTML reader
    leaves out what is marked as navigation. In Python's documentation most links lead from the use of a name
    to its definition.
    """

    name: ClassVar[str] = "links"

    k: int = 8
    within: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool(self.name, "within", self.within)

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, Iterator[int]]]:
        """Targets in the order of the links, then the pages that the page is said to read."""
        for reader, chunk in enumerate(table.chunks):
            if chunk.links or chunk.sources:
                yield reader, self._targets(table, reader)

    def _targets(self, table: ChunkTable, reader: int) -> Iterator[int]:
        chunk = table.chunks[reader]
        for link in chunk.links:
            target = None if link.startswith(ENTITY) else table.target(reader, link)
            if target is not None and (self.within or table.chunks[target].page != chunk.page):
                yield target
        for page in chunk.sources:
            target = table.first(page)
            if target is not None:
                yield target
