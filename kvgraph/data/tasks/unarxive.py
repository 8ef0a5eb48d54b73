"""unarXive: a paper in full text and the works it cites; in which of its sections is a work cited?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from kvgraph.data.chat import Document
from kvgraph.data.schema import checked
from kvgraph.data.task import Item
from kvgraph.data.tasks import ego

MARKER = re.compile(r"\{\{(\w+):([^}]*)\}\}")  # {{cite:ID}}, {{formula:ID}}, {{figure:ID}}, {{table:ID}}


class Metadata(BaseModel):
    """What arXiv knows of a paper."""

    title: str


class Paragraph(BaseModel):
    """A paragraph and the heading it stands under; citations and formulas are markers."""

    section: str | None = ""
    text: str


class Work(BaseModel):
    """A cited work: a line of the paper's references."""

    bib_entry_raw: str


class Referred(BaseModel):
    """What a marker stands for: a formula, or the caption of a figure or table."""

    latex: str = ""
    caption: str = ""


class UnarxiveRecord(BaseModel):
    """A line of unarXive's JSON Lines."""

    paper_id: str
    metadata: Metadata
    abstract: Paragraph | None = None
    body_text: list[Paragraph]
    bib_entries: dict[str, Work]
    ref_entries: dict[str, Referred]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """Five items per paper (see `ego.arranged`): the works that its text cites, then the paper, which reads them.

    A work's document is its line in the references, with the number that the paper's text cites it by, so an answer
    needs both. The question is about a work that the text cites under one heading only. A hash of the paper's id picks
    the heading, so that "Introduction" isn't the most common answer, and then the work. Papers without such a work, or
    with only one heading, make no items.
    """
    egos = (_ego(record) for record in checked(UnarxiveRecord, records))
    return ego.arranged([found for found in egos if found])


def _ego(record: UnarxiveRecord) -> ego.Ego | None:
    headings = _cited_under(record)
    numbers = {work: number for number, work in enumerate(headings, 1)}
    asked: dict[str, list[str]] = {}  # works by the one heading that they are cited under
    for work, (heading, *others) in headings.items():
        if not others and _plain(heading):
            asked.setdefault(heading, []).append(work)
    if not asked or len({paragraph.section for paragraph in record.body_text}) < 2:
        return None
    digest = int(hashlib.sha256(record.paper_id.encode()).hexdigest(), 16)
    heading, under = [*asked.items()][digest % len(asked)]
    work = under[digest // len(asked) % len(under)]
    title = " ".join(record.metadata.title.split())
    works = {key: _shown(record, record.bib_entries[key].bib_entry_raw, numbers).strip() for key in numbers}
    cited = tuple(
        Document(works[key], f'Reference [{number}] of "{title}"', f"{record.paper_id}[{number}]")
        for key, number in numbers.items()
    )
    return ego.Ego(
        id=record.paper_id,
        question=f'Under which heading does the paper "{title}" cite this work: {works[work]}',
        references=(heading.strip(),),
        documents=(*cited, Document(_text(record, numbers), title, record.paper_id)),
        links=tuple((i, len(cited)) for i in range(len(cited))),
    )


def _cited_under(record: UnarxiveRecord) -> dict[str, list[str]]:
    """The headings that each work is cited under, in the order of first citation."""
    headings: dict[str, list[str]] = {}
    for paragraph in record.body_text:
        for kind, key in MARKER.findall(paragraph.text):
            if kind == "cite" and key in record.bib_entries:
                under = headings.setdefault(key, [])
                if (paragraph.section or "") not in under:
                    under.append(paragraph.section or "")
    return headings


def _plain(heading: str) -> bool:
    """Whether a heading can be asked for: it must be text without a formula."""
    return bool(heading.strip()) and not MARKER.search(heading)


def _text(record: UnarxiveRecord, numbers: Mapping[str, int]) -> str:
    """The paper: abstract, then paragraphs, each heading once before its paragraphs."""
    parts, heading = [record.abstract.text if record.abstract else ""], None
    for paragraph in record.body_text:
        if paragraph.section != heading:
            heading = paragraph.section
            parts.append(heading or "")
        parts.append(paragraph.text)
    shown = (_shown(record, part, numbers).strip() for part in parts)
    return "\n\n".join(filter(None, shown))


def _shown(record: UnarxiveRecord, text: str, numbers: Mapping[str, int]) -> str:
    """The text with citations as numbers, formulas as LaTeX, and figures and tables as their captions."""

    def shown(marker: re.Match[str]) -> str:
        kind, key = marker.groups()
        if kind == "cite":
            return f"[{numbers[key]}]" if key in numbers else "[?]"
        referred = record.ref_entries.get(key, Referred())
        return referred.latex or referred.caption

    return MARKER.sub(shown, text)


UNARXIVE = ego.task(
    name="unarxive",
    about="unarXive: the section in which a paper cites a work, among 0 to 2 other papers with their references",
    source="unarXive 2022 (arXiv 2303.14957), github.com/IllDepence/unarXive: its JSON Lines; arrangements of Graph-KV's "
    "Arxiv-QA (arXiv 2506.07334)",
    items=items,
)
