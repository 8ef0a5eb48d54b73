"""Cutting pages into chunks along their structure, each within a budget of tokens. Pure Python.

A chunk ends where a section does, if it is full enough, and otherwise between elements. A heading stays with what follows
it, and a term with its description. Rows of a table, items and code blocks are cut only if one alone is over the budget:
then between its lines, between sentences, between words, and inside a word at last.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from kvgraph.data.chat import DOCUMENT, Document
from kvgraph.data.pages.base import PageElement, PageError, SourcePage, unique

Count = Callable[[str], int]
"""Tokens of a text."""

LEAST = 32  # tokens of a budget
FULL = 4  # a section begins a new chunk if the open one has a budget's 1/FULL or more
TITLE = 4  # a title may have 1/TITLE of the budget
STICKY = ("heading", "term")  # kinds that aren't parted from what follows
MOST_COUNTED = 1 << 16  # characters of a text that is counted as one; a longer one is cut in any case
CODE = re.compile(r"\A(```+|~~~+)[^\n]*\n")


@dataclass(frozen=True)
class TextChunk:
    """A part of a page that is encoded as one segment.

    id: unique in a table, made from page and text alone, so that it stays when other parts of the page change.
    page: the page's id. number: its place in the page. title: the page's title and the headings it stands under.
    headings: these headings, outermost first. parents: numbers of the chunks that hold them, innermost first, without
    itself. anchors: names by which links lead here. links: targets as written. sources: ids of pages that its page is
    said to read. tokens: of title and text as a document.
    """

    id: str
    page: str
    number: int
    title: str
    text: str
    headings: tuple[str, ...] = ()
    parents: tuple[int, ...] = ()
    anchors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    url: str = ""
    tokens: int = 0


def filled(title: str, text: str) -> str:
    """A chunk as a model reads it: as the server writes a stored segment."""
    document = Document(text, title).filled(DOCUMENT)
    assert isinstance(document, str)
    return document


class _Heading(NamedTuple):
    """A heading of a page: its level, its text, and the number of the unit that holds it."""

    level: int
    text: str
    unit: int


class _Unit(NamedTuple):
    """Elements that aren't parted: headings and terms, and what follows them. path: the headings it stands under."""

    elements: tuple[PageElement, ...]
    path: tuple[_Heading, ...]
    tokens: int  # about

    @property
    def level(self) -> int:
        """Of the highest heading that it begins with; 0 without one."""
        return min((element.level for element in self.elements if element.level), default=0)


def cut(page: SourcePage, count: Count, budget: int) -> list[TextChunk]:
    """The chunks of a page. budget: maximum tokens of a chunk with its title. Raises PageError for one below LEAST."""
    if budget < LEAST:
        raise PageError(f"a chunk needs a budget of at least {LEAST} tokens, not {budget}")
    cutter = _Cutter(page, count, budget)
    return cutter.chunks(list(cutter.units()))


class _Cutter:
    def __init__(self, page: SourcePage, count: Count, budget: int):
        self.page, self.budget = page, budget
        self.count = lru_cache(maxsize=1 << 12)(count)  # titles are counted again and again, and elements twice

    def title(self, path: Sequence[_Heading]) -> str:
        names = [heading.text for heading in path if heading.text != self.page.title]
        return _shortened(" > ".join([self.page.title, *names]), self.count, self.budget // TITLE)

    def room(self, path: Sequence[_Heading]) -> int:
        """Tokens that a text under these headings may have."""
        return self.budget - self.count(filled(self.title(path), "")) - 2

    def units(self) -> Iterator[_Unit]:
        """The page's elements as units, of which each fits into a chunk."""
        path: list[_Heading] = []
        heads: list[PageElement] = []
        around: tuple[_Heading, ...] = ()  # the headings that the heads stand under
        number = 0
        for element in self.page.elements:
            if not heads:
                around = tuple(path)
            if element.kind == "heading":
                while path and path[-1].level >= element.level:
                    path.pop()
                if not heads:
                    around = tuple(path)
                path.append(_Heading(element.level, element.text, number))
            if element.kind in STICKY and self.size([*heads, element]) <= self.room(around) // 2:
                heads.append(element)
                continue
            room = self.room(around)
            if self.size([*heads, element]) <= room:
                yield self.unit([*heads, element], around)
                number += 1
                heads = []
                continue
            first, *rest = _parts(element, self.count, max(1, room - self.size(heads) - 2), room)
            yield self.unit([*heads, first], around)
            number += 1
            heads = []
            for part in rest:
                yield self.unit([part], tuple(path))
                number += 1
        if heads:
            yield self.unit(heads, around)

    def size(self, elements: Iterable[PageElement]) -> int:
        return sum(self.count(element.text) + 2 for element in elements)

    def unit(self, elements: Sequence[PageElement], path: tuple[_Heading, ...]) -> _Unit:
        return _Unit(tuple(elements), path, self.size(elements))

    def chunks(self, units: Sequence[_Unit]) -> list[TextChunk]:
        """Units packed into chunks."""
        groups: list[list[_Unit]] = []
        size = 0
        for unit in units:
            group = groups[-1] if groups else None
            begins = group is not None and unit.level and (size * FULL >= self.budget or self.leaves(group, unit))
            if group is None or begins or size + unit.tokens > self.room(group[0].path):
                groups.append([unit])
                size = unit.tokens
            else:
                group.append(unit)
                size += unit.tokens
        groups = [part for group in groups for part in self.fitting(group)]
        chunk_of: dict[int, int] = {}  # by the number of a unit
        for number, group in enumerate(groups):
            for _ in group:
                chunk_of[len(chunk_of)] = number
        seen: Counter[str] = Counter()
        return [self.chunk(number, group, chunk_of, seen) for number, group in enumerate(groups)]

    def leaves(self, group: Sequence[_Unit], unit: _Unit) -> bool:
        """Whether a unit's heading ends a section that the group stands under without its heading."""
        return any(heading.level >= unit.level for heading in group[0].path)

    def fitting(self, group: list[_Unit]) -> Iterator[list[_Unit]]:
        """The group, in halves as long as it is over the budget: texts together may have more tokens than one by one."""
        if len(group) > 1 and self.tokens(group) > self.budget:
            half = len(group) // 2
            yield from self.fitting(group[:half])
            yield from self.fitting(group[half:])
        else:
            yield group

    def tokens(self, group: Sequence[_Unit]) -> int:
        return self.count(filled(self.title(group[0].path), _joined([e for unit in group for e in unit.elements])))

    def chunk(self, number: int, group: Sequence[_Unit], chunk_of: Mapping[int, int], seen: Counter[str]) -> TextChunk:
        elements = [element for unit in group for element in unit.elements]
        path = group[0].path
        title, text = self.title(path), _joined(elements)
        digest = hashlib.sha256("\0".join((self.page.id, title, text)).encode()).hexdigest()[:12]
        seen[digest] += 1
        again = "" if seen[digest] == 1 else f"-{seen[digest]}"
        above = (chunk_of[heading.unit] for heading in reversed(path))
        return TextChunk(
            id=f"{slug(self.page.id)}.{digest}{again}",
            page=self.page.id,
            number=number,
            title=title,
            text=text,
            headings=tuple(heading.text for heading in path),
            parents=tuple(dict.fromkeys(chunk for chunk in above if chunk != number)),
            anchors=unique(anchor for element in elements for anchor in element.anchors),
            links=unique(link for element in elements for link in element.links),
            sources=self.page.sources,
            url=self.page.url,
            tokens=self.tokens(group),
        )


def slug(page: str) -> str:
    """A page's id in the letters that the id of a stored segment may have."""
    return re.sub(r"[^A-Za-z0-9_.:-]+", "-", page.replace("/", ":"))[:100].strip("-.:") or "page"


def _joined(elements: Sequence[PageElement]) -> str:
    """Elements as one text: items and rows on lines of their own, others parted by an empty line."""
    text = ""
    before: PageElement | None = None
    for element in elements:
        if before is not None:
            together = (element.kind == before.kind and element.kind in ("item", "row")) or before.kind == "term"
            text += "\n" if together else "\n\n"
        text += element.text
        before = element
    return text


def _shortened(title: str, count: Count, most: int) -> str:
    """A title that has at most so many tokens."""
    while title and count(title) > most:
        title = title[: len(title) * 3 // 4].rstrip()
    return title


def _parts(element: PageElement, count: Count, first: int, room: int) -> list[PageElement]:
    """An element in parts: the first of at most `first` tokens, the others of at most `room`.

    Code stays in fences. Anchors and links are the first part's.
    """
    kind = "paragraph" if element.kind in STICKY else element.kind
    fence = CODE.match(element.text)
    opening, closing = (fence[0], f"\n{fence[1]}") if fence else ("", "")
    around = count(opening) + count(closing) + 2 if fence else 0
    if around * 2 > first:  # a fence that leaves no room for code
        opening = closing = ""
        around = 0
    body = element.text[len(opening) :].removesuffix(closing) if closing else element.text
    texts = [f"{opening}{text}{closing}" for text in _pieces(body, count, first - around, room - around)]
    return [
        replace(element, text=text, kind=kind, level=0) if i == 0 else PageElement(text, kind)
        for i, text in enumerate(texts)
    ]


SEPARATORS = (re.compile(r"(?<=\n)"), re.compile(r"(?<=[.!?;])(?=\s)"), re.compile(r"(?<=\s)(?=\S)"))


def _pieces(text: str, count: Count, first: int, room: int) -> list[str]:
    """A text in pieces: the first of at most `first` tokens, the others of at most `room`; a character at least each.

    It is cut at line ends if the lines fit, else between sentences, else between words, else anywhere.
    """
    pieces: list[str] = []
    held, size = "", 0
    for atom, tokens in _atoms(text, count, min(first, room), 0):
        most = room if pieces else first
        if held and size + tokens > most:
            pieces.append(held)
            held, size = "", 0
        held, size = held + atom, size + tokens
    kept = (piece.strip("\n").rstrip() for piece in [*pieces, held])
    return [piece for piece in kept if piece] or [text]


def _atoms(text: str, count: Count, room: int, level: int) -> Iterator[tuple[str, int]]:
    """(part, its tokens) of a text, each of at most `room` tokens, as large as SEPARATORS allow."""
    if level == len(SEPARATORS):
        start = 0
        while start < len(text):
            size = min(max(1, 4 * room), len(text) - start)
            while size > 1 and count(text[start : start + size]) > room:
                size //= 2
            yield text[start : start + size], count(text[start : start + size])
            start += size
        return
    for part in filter(None, SEPARATORS[level].split(text)):
        tokens = count(part) if len(part) <= MOST_COUNTED else room + 1
        if tokens <= room:
            yield part, tokens
        else:
            yield from _atoms(part, count, room, level + 1)
