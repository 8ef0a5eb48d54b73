"""Chunks of a source in one table, with what leads from one to another: pages, anchors, links. Pure Python."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from kvgraph.data.cut import Count, TextChunk, cut
from kvgraph.data.pages.base import ENTITY, MESSAGE, SourcePage

WIKI = "wiki:"  # begins a link to a page by its title
INDEXES = ("index.html", "index.htm", "index.md", "README.md", "readme.md")  # pages that stand for their folder


class ChunkTable:
    """The chunks of pages, page by page in the order of the pages' ids, whatever order they come in.

    chunks: all of them; a builder of graphs names them by their index here.
    """

    def __init__(self, chunks: Iterable[TextChunk]):
        self.chunks = tuple(sorted(chunks, key=lambda chunk: (chunk.page, chunk.number)))

    @classmethod
    def of(cls, pages: Iterable[SourcePage], count: Count, budget: int) -> ChunkTable:
        """The chunks of pages; see `kvgraph.data.cut.cut`."""
        return cls(chunk for page in pages for chunk in cut(page, count, budget))

    def __len__(self) -> int:
        return len(self.chunks)

    @cached_property
    def pages(self) -> dict[str, range]:
        """The indices of each page's chunks, by the page's id."""
        found: dict[str, range] = {}
        for i, chunk in enumerate(self.chunks):
            start = found[chunk.page].start if chunk.page in found else i
            found[chunk.page] = range(start, i + 1)
        return found

    @cached_property
    def anchors(self) -> dict[tuple[str, str], int]:
        """The first chunk that holds an anchor, by page and anchor."""
        found: dict[tuple[str, str], int] = {}
        for i, chunk in enumerate(self.chunks):
            for anchor in chunk.anchors:
                found.setdefault((chunk.page, anchor), i)
        return found

    @cached_property
    def names(self) -> dict[str, str]:
        """Pages by what wikis call them: title, id, and file name without its ending; in small letters. The first wins."""
        found: dict[str, str] = {}
        for page, places in self.pages.items():
            for name in (page, PurePosixPath(page).stem, self.chunks[places.start].title.split(" > ")[0]):
                found.setdefault(name.casefold().replace("_", " "), page)
        return found

    @cached_property
    def urls(self) -> dict[str, str]:
        """Pages by their address, without scheme and fragment."""
        return {_address(self.chunks[places.start].url): page for page, places in reversed(self.pages.items())}

    def first(self, page: str) -> int | None:
        """The first chunk of a page, None if there is no such page."""
        return self.pages[page].start if page in self.pages else None

    def target(self, reader: int, link: str) -> int | None:
        """The chunk that a link in a chunk leads to: the one with its anchor, else the page's first. None: it isn't here."""
        chunk = self.chunks[reader]
        if link.startswith((ENTITY, MESSAGE)):
            return self.first(link)
        if link.startswith(WIKI):
            name, _, anchor = link[len(WIKI) :].partition("#")
            page = self.names.get(name.strip().casefold().replace("_", " ")) if name else chunk.page
            return None if page is None else self._within(page, anchor.strip().lower().replace(" ", "-"))
        try:
            path, anchor = urldefrag(link)
            page = self._page(chunk, path)
        except ValueError:  # such as half an IPv6 address
            return None
        return None if page is None else self._within(page, unquote(anchor))

    def _within(self, page: str, anchor: str) -> int | None:
        return self.anchors.get((page, anchor), self.first(page))

    def _page(self, chunk: TextChunk, path: str) -> str | None:
        if not path:
            return chunk.page
        if urlsplit(path).scheme or path.startswith("//"):
            return self.urls.get(_address(path))
        plain = unquote(path.partition("?")[0])
        name = posixpath.normpath(posixpath.join(posixpath.dirname(chunk.page), plain)).lstrip("/")
        if plain.startswith("/"):
            name = posixpath.normpath(plain).lstrip("/")
        guesses = [name, *(f"{name}/{index}" if name != "." else index for index in INDEXES)]
        guesses += [f"{name}{ending}" for ending in (".md", ".html")]
        found = next((guess for guess in guesses if guess in self.pages), None)
        if found is None and chunk.url:
            found = self.urls.get(_address(urljoin(chunk.url, path)))
        return found


def _address(url: str) -> str:
    """An address without what may differ between two of the same page."""
    parts = urlsplit(url.strip())
    return f"{parts.netloc.lower().removeprefix('www.')}{parts.path.removesuffix('/')}?{parts.query}" if url else ""
