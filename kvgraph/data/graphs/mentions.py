"""Mentions: a chunk reads where the names that it uses are introduced."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import ClassVar

from kvgraph.data.graphs.base import GraphBuilder
from kvgraph.data.table import ChunkTable
from kvgraph.methods.base import require_int

TOKEN = re.compile(r"\w+(?:[._]\w+)*")
LONGEST = 6  # words of a name
BOLD = re.compile(r"\*\*([^*\n]{3,60})\*\*|^([A-Z][^:\n]{2,58}?):\s", re.MULTILINE)
COMMON = frozenset("introduction overview example examples usage notes note see also summary contents index".split())


@dataclass(frozen=True)
class Mentions(GraphBuilder):
    """A chunk reads the chunks that introduce names it uses: titles of pages, headings, anchors such as os.path.join, and
    terms in bold. The rarest names come first.

    least: letters of a name. share: names that more than one in `share` chunks use are too common to need reading.

    It assumes that a name means the same everywhere and is introduced in one place: a name that several places introduce
    is left out. This suits references, specifications and encyclopaedias; in stories a name isn't defined anywhere.
    """

    name: ClassVar[str] = "mentions"

    least: int = 4
    share: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self.name, "least", self.least, least=1)
        require_int(self.name, "share", self.share, least=1)

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """Where the names in it are introduced, the rarest name first, equal ones in the order of the table."""
        home = self._introduced(table)
        used = [set(_names(chunk.text, home)) for chunk in table.chunks]
        count: dict[str, int] = {}
        for names in used:
            for name in names:
                count[name] = count.get(name, 0) + 1
        most = max(2, len(table) // self.share)
        for reader, names in enumerate(used):
            scores: dict[int, float] = {}
            for name in names:
                if count[name] <= most and home[name] != reader:
                    scores[home[name]] = scores.get(home[name], 0.0) + log(1 + len(table) / count[name])
            yield reader, sorted(scores, key=lambda source: (-scores[source], source))

    def _introduced(self, table: ChunkTable) -> dict[str, int]:
        """The only chunk that introduces each name, by the name in small letters."""
        found: dict[str, set[int]] = {}

        def note(name: str, chunk: int) -> None:
            key = " ".join(TOKEN.findall(name.casefold()))
            if len(key) >= self.least and key not in COMMON and len(key.split()) <= LONGEST and not key.isdigit():
                found.setdefault(key, set()).add(chunk)

        for places in table.pages.values():
            note(table.chunks[places.start].title.split(" > ")[0], places.start)
        for i, chunk in enumerate(table.chunks):
            head = chunk.text.split("\n", 1)[0]
            if head and len(head) <= 80 and chunk.anchors:
                note(head, i)
            for anchor in chunk.anchors:
                if "." in anchor or "_" in anchor:
                    note(anchor, i)
            for bold, before in BOLD.findall(chunk.text):
                note(bold or before, i)
        return {name: min(chunks) for name, chunks in found.items() if len(chunks) == 1}


def _names(text: str, known: dict[str, int]) -> Iterator[str]:
    """The known names in a text, each longest one at its place."""
    tokens: Sequence[str] = TOKEN.findall(text.casefold())
    at = 0
    while at < len(tokens):
        for size in range(min(LONGEST, len(tokens) - at), 0, -1):
            name = " ".join(tokens[at : at + size])
            if name in known:
                yield name
                at += size - 1
                break
        at += 1
