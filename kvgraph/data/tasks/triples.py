"""Questions over the triples of a knowledge graph: ExplaGraphs, and the evidence triples of 2WikiMultiHopQA."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from kvgraph.data.chat import Document
from kvgraph.data.pages.triples import Triple, sentence
from kvgraph.data.schema import Answers, Text, checked, rows
from kvgraph.data.task import Item, Task
from kvgraph.data.tasks import qa

TRIPLE = re.compile(r"\(([^;()]+);([^;()]+);([^;()]+)\)")
FACTS = 12  # documents of a question over 2WikiMultiHopQA's triples, as long as there are others to add


def reads(triples: Sequence[Triple]) -> tuple[tuple[int, int], ...]:
    """Edges by which a triple reads those that end where it begins, (source, reader) by index."""
    return tuple(
        (source, reader)
        for reader, later in enumerate(triples)
        for source, earlier in enumerate(triples)
        if source != reader and _same(earlier.object, later.subject)
    )


def _same(a: str, b: str) -> bool:
    return a.casefold().strip() == b.casefold().strip()


def _documents(triples: Sequence[Triple]) -> tuple[Document, ...]:
    return tuple(Document(sentence(t), t.subject, f"triple {i}") for i, t in enumerate(triples))


# -- ExplaGraphs ------------------------------------------------------------------------------------------------------


def _triples(text: Any) -> Any:
    return (
        [Triple(*(" ".join(part.split()) for part in found)) for found in TRIPLE.findall(text)]
        if isinstance(text, str)
        else text
    )


class ExplaGraphRecord(BaseModel):
    """A row of the data set: two arguments, whether the second supports the first, and a graph that explains it."""

    arg1: Text
    arg2: Text
    label: Literal["support", "counter"]
    graph: Annotated[list[Triple], BeforeValidator(_triples), Field(min_length=1)]


def explained(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per pair of arguments; its documents are the triples of the graph, in the record's order."""
    name = qa.Ids()
    for record in checked(ExplaGraphRecord, records):
        yield Item(
            id=name(f"{record.arg1}\n{record.arg2}"),
            question=f"Argument 1: {record.arg1}\nArgument 2: {record.arg2}\nDoes argument 2 support or counter argument 1?",
            references=(record.label,),
            documents=_documents(record.graph),
            kind=record.label,
            facts={"triples": len(record.graph)},
            links=reads(record.graph),
        )


EXPLA_GRAPHS = Task(
    name="explagraphs",
    about="ExplaGraphs: does an argument support or counter another, given triples that explain it",
    source="ExplaGraphs (arXiv 2104.07644); rows arg1, arg2, label, graph as in github.com/XiaoxinHe/G-Retriever",
    items=explained,
    instruction="Here are facts that join two arguments.\n\n",
    question="{question}\nAnswer with support or counter and nothing else.\nAnswer:",
    document="{text}\n",
    max_tokens=8,
    metrics=("accuracy",),
    extract="first_line",
    edges="links",
    breakdowns=("kind", "triples"),
)


# -- 2WikiMultiHopQA --------------------------------------------------------------------------------------------------


class EvidenceRecord(BaseModel):
    """A question with the triples that lead to its answer, under 2WikiMultiHopQA's own field names."""

    id: str = Field(validation_alias=AliasChoices("_id", "id"))
    question: str
    answer: Answers
    type: str
    evidences: Annotated[list[Triple], rows("fact", "relation", "entity"), Field(min_length=1)]


def evident(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record: its triples among those of the records after it (cyclically), FACTS in all.

    Their order is that of a hash, so it doesn't tell which are needed. Yes and no are no entities: the triples say what has
    to be compared.
    """
    every = list(checked(EvidenceRecord, records))
    for number, record in enumerate(every):
        own = list(dict.fromkeys(record.evidences))
        others = (t for other in (*every[number + 1 :], *every[:number]) for t in other.evidences)
        known = {triple.subject for triple in own}
        triples = dict.fromkeys(own)
        for triple in others:
            if len(triples) >= FACTS:
                break
            if triple.subject not in known:
                triples[triple] = None
        listed = sorted(triples, key=lambda triple: _digest(record.id, triple))
        gold = [i for i, triple in enumerate(listed) if triple in own]
        yield Item(
            id=record.id,
            question=record.question,
            references=record.answer,
            documents=_documents(listed),
            kind=record.type,
            facts={"hops": len(own), **qa.support(gold, len(listed))},
            links=reads(listed),
        )


def _digest(id: str, triple: Triple) -> bytes:
    return hashlib.sha256("\0".join((id, *triple)).encode()).digest()


WIKI2_TRIPLES = qa.task(
    name="2wiki-triples",
    about="2WikiMultiHopQA over its evidence triples: each a document that reads the triples ending where it begins",
    source="2WikiMultiHopQA (arXiv 2011.01060), evidences: github.com/Alab-NII/2wikimultihop; distractors are other questions' triples",
    items=evident,
    instruction="Here are facts that may help to answer a question. Some of them may have nothing to do with it.\n\n",
    document="{text}\n",
    metrics=("substring_em", "em", "f1"),
    edges="links",
    breakdowns=("kind", "hops"),
)
