"""Arxiv-QA, Graph-KV's own data: questions about a paper and works it cites, all in full text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.task import Item, TaskError
from kvgraph.data.tasks import ego


class Neighbourhood(BaseModel):
    """A paper ("0") and the works it cites ("1"), by name; null if the text of one wasn't available."""

    paper: Text = Field(alias="0")
    cited: dict[str, str | None] = Field(alias="1")


class ArxivQARecord(BaseModel):
    """A question as `read` returns it. text: the content of text_data/ID.json, one neighbourhood under a name."""

    id: str
    text: Annotated[dict[str, Neighbourhood], Field(min_length=1, max_length=1)]
    question: Text
    answer: Answers


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a folder in the layout of the released data: text_data/ID.json, questions/ID.txt, answers/ID.txt.

    In the order of their ids, which are numbers. Raises TaskError naming the file that is missing or broken.
    """
    files = sorted((path / "text_data").glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise TaskError(f"{path} has no text_data/ID.json; give the folder that holds text_data, questions and answers")
    for file in files:
        name = file.stem
        question, answer = (
            io.read_text(path / kind / f"{name}.txt", TaskError).strip() for kind in ("questions", "answers")
        )
        yield {"id": name, "text": io.read_json(file, TaskError), "question": question, "answer": answer}


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """Five items per record (see `ego.arranged`): cited works in the record's order, then the paper that reads them.

    Cited works without a text are left out, as in the released code.
    """
    return ego.arranged([_ego(record) for record in checked(ArxivQARecord, records)])


def _ego(record: ArxivQARecord) -> ego.Ego:
    (name, around), *_ = record.text.items()
    cited = [Document(text, "Related work", f"{record.id}/{key}") for key, text in around.cited.items() if text]
    return ego.Ego(
        id=record.id,
        question=record.question,
        references=record.answer,
        documents=(*cited, Document(around.paper, "Paper", f"{record.id}/{name}")),
        links=tuple((i, len(cited)) for i in range(len(cited))),
    )


ARXIV_QA = ego.task(
    name="arxiv-qa",
    about="Arxiv-QA: a paper and the works it cites in full text, among 0 to 2 groups of other papers",
    source="Graph-KV (arXiv 2506.07334) and its arxiv_inference.py; hub Graph-COM/GraphKV, folder arxiv",
    items=items,
    read=read,
)
