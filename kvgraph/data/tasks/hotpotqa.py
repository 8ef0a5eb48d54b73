"""HotpotQA, distractor setting: two gold paragraphs among ten. 2WikiMultiHopQA comes in the same format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, Paragraphs, SupportingFacts, checked
from kvgraph.data.task import Hub, Item
from kvgraph.data.tasks import qa


class HotpotRecord(BaseModel):
    """An element of hotpot_dev_distractor_v1.json, or a row of the hub's table."""

    id: str = Field(validation_alias=AliasChoices("_id", "id"))
    question: str
    answer: Answers
    type: str
    level: str = ""
    context: Paragraphs
    supporting_facts: SupportingFacts


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its paragraphs in the record's order, which doesn't depend on which are gold.

    Some files in circulation have records without `context`. They raise TaskError like any record of another schema,
    because without documents it would be another task.
    """
    for record in checked(HotpotRecord, records):
        supporting = {title for title, _ in record.supporting_facts}
        gold = [i for i, (title, _) in enumerate(record.context) if title in supporting]
        level = {"level": record.level} if record.level else {}
        yield Item(
            id=record.id,
            question=record.question,
            references=record.answer,
            documents=tuple(Document(qa.joined(sentences), title) for title, sentences in record.context),
            kind=record.type,
            facts={"hops": len(supporting), **level, **qa.support(gold, len(record.context))},
        )


HOTPOTQA = qa.task(
    name="hotpotqa",
    about="HotpotQA (distractor): bridge and comparison questions over two of ten paragraphs",
    source="HotpotQA (arXiv 1809.09600): hotpotqa.github.io, hotpot_dev_distractor_v1.json",
    items=items,
    metrics=("substring_em", "em", "hotpot_f1"),
    hub=Hub("hotpotqa/hotpot_qa", "distractor", "validation"),
    breakdowns=("kind", "level"),
)
