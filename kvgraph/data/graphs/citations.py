"""Citations: a chunk reads the works that it cites, or their entries in a bibliography."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvgraph.data.cut import TextChunk
from kvgraph.data.graphs.base import GraphBuilder
from kvgraph.data.table import ChunkTable

ENTRY = re.compile(r"@(\w{2,20})\s*\{\s*([^\s,{}]{1,100})\s*,")  # of BibTeX
CITED = re.compile(
    r"\\(?:no)?[cC]ite\w*\*?(?:\[[^\]\n]{0,100}\])*\{([^{}\n]{1,500})\}|\[([^\[\]\n]{0,300}@[^\[\]\n]{1,300})\]"
)
KEY = re.compile(r"@([\w][\w:.#$%&+?<>~/-]{0,99})")
NUMBERED = re.compile(r"^\s*(?:[-*]\s+)?\[(\d{1,4})\]\s+\S", re.MULTILINE)  # an entry of a list of references
NUMBERS = re.compile(r"\[(\d{1,4}(?:\s*[,;–-]\s*\d{1,4}){0,20})\]")
ARXIV = re.compile(
    r"(?:arxiv(?:\.org)?[:/\s]*(?:abs/|pdf/)?)(\d{4}\.\d{4,5}|[a-z-]{2,20}(?:\.[A-Z]{2})?/\d{7})", re.IGNORECASE
)
ARXIV_NAME = re.compile(r"(?<!\d)(\d{4}\.\d{4,5})(?!\d)")  # in an id, which is often nothing but the number
DOI = re.compile(r"\b(10\.\d{4,9}/[^\s\"'<>{}|\\^`\[\]]{1,200})", re.IGNORECASE)
RANGE = 50  # works of "[3-8]" at most


@dataclass(frozen=True)
class Citations(GraphBuilder):
    r"""A chunk reads what it cites: by the key of a BibTeX entry (\cite{key}, [@key]), by a number in brackets ([12], of
    the entry with this number in the same page), or by an arXiv identifier or DOI.

    An identifier stands for the page that has it in its id, its address or its title; otherwise for the only chunk that
    has it in an entry.

    It assumes that a claim is clearer next to the work it is taken from. It takes numbers in brackets for citations only
    where the page has a line that begins with that number in brackets, so subscripts of code aren't taken for any. Shown
    on unarXive's papers, whose references are lines "[12] ...".
    """

    name: ClassVar[str] = "citations"

    k: int = 8

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Works in the order in which they are cited; keys, then numbers, then identifiers."""
        works, entries = _works(table), _entries(table)
        for reader, chunk in enumerate(table.chunks):
            found = [works.get(name) for name in _cited(chunk.text)]
            found += [entries.get((chunk.page, number)) for number in _numbers(chunk.text)]
            found += [works.get(name) for name in _identifiers(" ".join((chunk.text, *chunk.links)))]
            yield reader, [source for source in found if source is not None]


def _works(table: ChunkTable) -> dict[str, int]:
    """Chunks by the keys and identifiers that stand for them."""
    found: dict[str, int] = {}
    for places in table.pages.values():
        first = table.chunks[places.start]
        for name in (*_identifiers(" ".join((first.page, first.url, first.title))), *_bare(first)):
            found.setdefault(name, places.start)
    for i, chunk in enumerate(table.chunks):
        for _, key in ENTRY.findall(chunk.text):
            found.setdefault(f"key:{key}", i)
    held: dict[str, list[int]] = {}
    for i, chunk in enumerate(table.chunks):
        if ENTRY.search(chunk.text) or NUMBERED.search(chunk.text):
            for name in _identifiers(chunk.text):
                held.setdefault(name, []).append(i)
    for name, chunks in held.items():
        if len(chunks) == 1:
            found.setdefault(name, chunks[0])
    return found


def _bare(chunk: TextChunk) -> list[str]:
    return [f"arxiv:{number}" for number in ARXIV_NAME.findall(chunk.page)]


def _entries(table: ChunkTable) -> dict[tuple[str, int], int]:
    """Chunks by page and the number of an entry that they hold; the last of the page, as references stand at its end."""
    return {
        (chunk.page, int(number)): i for i, chunk in enumerate(table.chunks) for number in NUMBERED.findall(chunk.text)
    }


def _cited(text: str) -> Iterator[str]:
    for keys, bracketed in CITED.findall(text):
        for key in keys.split(",") if keys else KEY.findall(bracketed):
            yield f"key:{key.strip().rstrip('.')}"


def _numbers(text: str) -> Iterator[int]:
    for group in NUMBERS.findall(text):
        for part in re.split(r"\s*[,;]\s*", group):
            low, *high = (int(number) for number in re.split(r"\s*[–-]\s*", part)[:2])
            yield from range(low, min(high[0] if high else low, low + RANGE) + 1)


def _identifiers(text: str) -> Iterator[str]:
    for number in ARXIV.findall(text):
        yield f"arxiv:{number.lower()}"
    for doi in DOI.findall(text):
        yield f"doi:{doi.rstrip('.,;:)').lower()}"
