"""CL-SciSumm: a cited paper and the papers that cite it; which paper does a sentence cite?"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.schema import Text, checked
from kvgraph.data.task import Item, TaskError
from kvgraph.data.tasks import ego

FACETS = ("method", "result", "aim", "implication", "hypothesis")


class PaperSection(BaseModel):
    """A section of a paper."""

    title: str
    text: str


class Paper(BaseModel):
    """A row of papers.jsonl; title and abstract may be empty."""

    paper_id: str
    title: str
    abstract: str
    sections: list[PaperSection]

    def document(self) -> Document:
        """The whole paper, under its title, or its id if it has none."""
        parts = [self.abstract, *(f"{section.title.strip()}\n{section.text}" for section in self.sections)]
        return Document("\n\n".join(filter(None, parts)), self.title or self.paper_id, self.paper_id)


class Annotation(BaseModel):
    """A citing sentence, annotated by people, with the field names of CL-SciSumm's .ann.txt files."""

    citing: Text = Field(alias="Citing Article")
    marker: str = Field(alias="Citation Marker")
    sentence: Text = Field(alias="Citation Text")
    facet: str = Field(alias="Discourse Facet")


class SciSummRecord(BaseModel):
    """A row of egos.jsonl as `read` returns it, with the papers in place of their ids."""

    reference_paper: Paper
    citing_papers: Annotated[list[Paper], Field(min_length=1)]
    annotations: Annotated[list[Annotation], Field(min_length=1)]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a folder with papers.jsonl and egos.jsonl, both possibly .gz. Raises TaskError naming the file."""
    papers = {paper.get("paper_id"): paper for _, paper in io.records(_file(path, "papers.jsonl"), TaskError)}
    for where, row in io.records(_file(path, "egos.jsonl"), TaskError):
        try:
            citing = [papers[name] for name in row["citing_papers"]]
            yield {**row, "reference_paper": papers[row["reference_paper"]], "citing_papers": citing}
        except KeyError as error:
            raise TaskError(f"{where}: there is no field or paper {error}") from None


def _file(folder: Path, name: str) -> Path:
    found = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if found is None:
        raise TaskError(f"{folder} has no {name} or {name}.gz; give the folder that holds papers.jsonl and egos.jsonl")
    return found


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """Five items per cited paper (see `ego.arranged`): the cited paper, then the papers that read it.

    The question quotes the first annotated sentence and asks for the title of the paper that it cites. The kind is the
    sentence's topic in the annotation ("method", "result", ...).
    """
    return ego.arranged([_ego(record) for record in checked(SciSummRecord, records)])


def _ego(record: SciSummRecord) -> ego.Ego:
    cited, first = record.reference_paper.document(), record.annotations[0]
    sentence = html.unescape(re.sub(r"<[^>]*>", " ", first.sentence))
    return ego.Ego(
        id=cited.id,
        question=f'The paper {re.sub(r"[.](xml|txt)$", "", first.citing)} says: "{" ".join(sentence.split())}" '
        f'What is the title (the first line) of the paper that it cites there as "{first.marker}"?',
        references=(cited.title,),
        documents=(cited, *(paper.document() for paper in record.citing_papers)),
        links=tuple((0, 1 + i) for i in range(len(record.citing_papers))),
        kind=next((facet for facet in FACETS if facet in first.facet.lower()), ""),
    )


SCISUMM = ego.task(
    name="scisumm",
    about="CL-SciSumm: which paper a sentence cites, among 0 to 2 groups of other papers",
    source="CL-SciSumm 2019 (arXiv 1907.09854), github.com/WING-NUS/scisumm-corpus, its papers as JSON Lines; "
    "arrangements of Graph-KV's Arxiv-QA (arXiv 2506.07334)",
    items=items,
    read=read,
    breakdowns=("kind", *ego.BREAKDOWNS),
)
