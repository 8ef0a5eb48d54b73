"""XSum: a news article in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, Field

from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks import qa
from kvgraph.data.tasks.segments import DOCUMENT, segments

SEGMENT = 400  # characters, about 100 tokens
H2O_HEAD, H2O_TAIL = "###\nArticle: ", "\n\nSummarize the above article in 1 sentence.\n"


def _article(text: str) -> str:
    """The article alone: H2O's file has a prompt around it."""
    return text.removeprefix(H2O_HEAD).removesuffix(H2O_TAIL)


class XSumRecord(BaseModel):
    """A row of the hub's table (document, summary, id), or a line of H2O's xsum_0shot.jsonl (article, summary_gt)."""

    document: Annotated[Text, AfterValidator(_article)] = Field(validation_alias=AliasChoices("document", "article"))
    summary: Answers = Field(validation_alias=AliasChoices("summary", "summary_gt"))
    id: str = ""


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record: the article in segments, in reading order."""
    ids = qa.Ids()
    for record in checked(XSumRecord, records):
        documents = segments(record.document, SEGMENT)
        yield Item(
            id=record.id or ids(record.document),
            question="Summarize the article above in one sentence.",
            references=record.summary,
            documents=documents,
            facts={"segments": len(documents)},
        )


XSUM = Task(
    name="xsum",
    about="XSum: summarize a news article, cut into segments, in one sentence",
    source="XSum (arXiv 1808.08745). KVLink (arXiv 2502.16002) trains on its articles in segments of 100 or 220 tokens; a "
    f"task knows no tokenizer, so here they are sentences up to {SEGMENT} characters. 64 tokens: H2O's xsum_0shot.jsonl",
    items=items,
    instruction="Here is a news article.\n\n",
    document=DOCUMENT,
    question="\n\n{question}\nSummary:",
    max_tokens=64,
    metrics=("rougeL", "rouge1", "rouge2"),
    edges="chain",
    hub=Hub("EdinburghNLP/xsum", split="test", revision="refs/convert/parquet"),
    breakdowns=(),
)
