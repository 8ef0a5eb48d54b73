"""MuSiQue-Ans: two to four gold paragraphs among twenty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, checked, references
from kvgraph.data.task import Hub, Item
from kvgraph.data.tasks import qa


class Paragraph(BaseModel):
    """One of a record's `paragraphs`."""

    title: str
    paragraph_text: str
    is_supporting: bool


class MuSiQueRecord(BaseModel):
    """A line of musique_ans_v1.0_dev.jsonl; the unanswerable questions of musique_full_v1.0 are refused."""

    id: str = Field(pattern=r"^\dhop")
    question: str
    answer: Answers
    answer_aliases: list[str] = []
    answerable: Literal[True] = True
    paragraphs: Annotated[list[Paragraph], Field(min_length=1)]
    question_decomposition: list[Any]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its paragraphs in the record's order, which doesn't depend on which are gold.

    The kind is the shape of the reasoning, with which the id begins: "2hop", "3hop1", "3hop2", "4hop1", ...
    """
    for record in checked(MuSiQueRecord, records):
        gold = [i for i, paragraph in enumerate(record.paragraphs) if paragraph.is_supporting]
        yield Item(
            id=record.id,
            question=record.question,
            references=references([record.answer, record.answer_aliases]),
            documents=tuple(Document(p.paragraph_text, p.title) for p in record.paragraphs),
            kind=record.id.partition("_")[0],
            facts={"hops": len(record.question_decomposition), **qa.support(gold, len(record.paragraphs))},
        )


MUSIQUE = qa.task(
    name="musique",
    about="MuSiQue-Ans: questions of two to four hops over twenty paragraphs",
    source="MuSiQue (arXiv 2108.00573): github.com/StonyBrookNLP/musique, musique_ans_v1.0_dev.jsonl",
    items=items,
    metrics=("substring_em", "em", "f1"),
    hub=Hub("dgslibisey/MuSiQue"),
    breakdowns=("hops", "kind"),
)
