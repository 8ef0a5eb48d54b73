"""Multi-News: one summary of several articles on an event."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks import qa

BETWEEN = re.compile(r"(?:^|\n)Passage \d+:\n|\|\|\|\|\|")
NEWLINE = re.compile(r" ?NEWLINE_CHAR ?")


class MultiNewsRecord(BaseModel):
    """A row of the hub's table (document, summary), its articles between |||||; or a line of LongBench's
    multi_news.jsonl (context, answers, _id), its articles under "Passage N:"."""

    document: Text = Field(validation_alias=AliasChoices("document", "context"))
    summary: Answers = Field(validation_alias=AliasChoices("summary", "answers"))
    id: str = Field("", validation_alias=AliasChoices("_id", "id"))


def articles(text: str) -> tuple[Document, ...]:
    """The articles of a record, each one document. Empty ones, as after a final |||||, are left out."""
    bodies = (NEWLINE.sub("\n", body).strip() for body in BETWEEN.split(text))
    return tuple(Document(body, id=str(i)) for i, body in enumerate(filter(None, bodies)))


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its articles in the record's order."""
    ids = qa.Ids()
    for record in checked(MultiNewsRecord, records):
        documents = articles(record.document)
        yield Item(
            id=record.id or ids(record.document),
            question="Write one summary of all the news above.",
            references=record.summary,
            documents=documents,
            facts={"articles": len(documents)},
        )


MULTI_NEWS = Task(
    name="multi-news",
    about="Multi-News: one summary of two to ten articles on an event",
    source="Multi-News (arXiv 1906.01749); LongBench (arXiv 2308.14508), with its limit of 512 tokens",
    items=items,
    instruction="Here are news articles about one event.\n\n",
    question="{question}\nSummary:",
    max_tokens=512,
    metrics=("rougeL", "rouge1", "rouge2"),
    edges="all",
    hub=Hub("alexfabbri/multi_news", split="test", revision="refs/convert/parquet"),
    breakdowns=("articles",),
)
