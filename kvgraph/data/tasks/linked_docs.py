"""Hyperlinked documentation: what does a name mean that a section links to?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kvgraph.data import graphs, pages
from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.table import ChunkTable
from kvgraph.data.task import Item, TaskError
from kvgraph.data.tasks import qa

WORDS = 150  # of a chunk, at most
DOCUMENTS = 8  # of a question: the section, what it links to, and others
SENTENCE = re.compile(r"\s*(\S.{20,300}?[.!?])(?:\s|$)", re.DOTALL)
ANCHOR = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")  # a name such as os.path.join


class DocumentationSection(BaseModel):
    """A document of a question."""

    id: str
    title: str
    text: Text


class LinkedRecord(BaseModel):
    """A question about a link, as `read` makes it. links: (source, reader) by index."""

    id: str
    question: str
    answer: Answers
    documents: Annotated[list[DocumentationSection], Field(min_length=2)]
    links: list[tuple[int, int]]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The questions of a folder of HTML or Markdown, such as that of Debian's package python3-doc.

    One for each section that links to a name's definition elsewhere: it asks for the definition's first sentence. The
    documents are that section, what it links to, and sections that come after these in the corpus, DOCUMENTS in all, in the
    order of a hash. Pages that can't be read are left out.
    """
    table = ChunkTable.of(pages.read(path, lambda line: None), lambda text: len(text.split()), WORDS)
    read_by: dict[int, list[int]] = {}
    for source, reader in graphs.parse(f"links:within=false,k={DOCUMENTS - 2},tokens=100000").edges(table):
        read_by.setdefault(reader, []).append(source)
    if not read_by:
        raise TaskError(f"{path} has no page that links to another")
    for reader, sources in sorted(read_by.items()):
        chunk = table.chunks[reader]
        for link in chunk.links:
            name = link.rpartition("#")[2]
            target = table.target(reader, link)
            if target is None or target not in sources or not ANCHOR.fullmatch(name):
                continue
            if answer := _defined(table.chunks[target].text, name):
                yield _record(table, reader, sources, name, answer)
                break


def _defined(text: str, name: str) -> str:
    """The first sentence after the line that introduces a name; "" if there is none."""
    for line, after in re.findall(r"^(.*)\n((?:.|\n)*?)(?=\n\n|\Z)", text, re.MULTILINE):
        if line.startswith((f"{name}(", f"class {name}(", f"exception {name}", f"{name}\n")) or line.strip() == name:
            found = SENTENCE.match(after)
            return " ".join(found[1].split()) if found else ""
    return ""


def _record(table: ChunkTable, reader: int, sources: list[int], name: str, answer: str) -> dict[str, Any]:
    kept = dict.fromkeys((reader, *sources))
    page = table.chunks[reader].page
    at = table.pages[page].stop
    while len(kept) < min(DOCUMENTS, len(table)):
        kept[at % len(table)] = None
        at += 1
    key = table.chunks[reader].id
    order = sorted(kept, key=lambda i: hashlib.sha256(f"{key} {table.chunks[i].id}".encode()).digest())
    place = {chunk: i for i, chunk in enumerate(order)}
    return {
        "id": key,
        "question": f'The section "{table.chunks[reader].title}" refers to {name}. What does the documentation say of {name}?',
        "answer": answer,
        "documents": [{"id": c.id, "title": c.title, "text": c.text} for c in (table.chunks[i] for i in order)],
        "links": [(place[source], place[reader]) for source in sources],
    }


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record."""
    for record in checked(LinkedRecord, records):
        yield Item(
            id=record.id,
            question=record.question,
            references=record.answer,
            documents=tuple(Document(d.text, d.title, d.id) for d in record.documents),
            facts={"links": len(record.links)},
            links=tuple(record.links),
        )


LINKED_DOCS = qa.task(
    name="linked-docs",
    about="Hyperlinked documentation: what does it say of a name that a section links to, over the section and its links",
    source="made from a folder of HTML, such as that of Debian's package python3-doc",
    items=items,
    read=read,
    instruction="Here are sections of a documentation.\n\n",
    metrics=("rougeL", "f1"),
    edges="links",
    breakdowns=("links",),
)
