"""SAMSum: summaries of chats between people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks.segments import DOCUMENT, segments

SEGMENT = 400  # characters, about 100 tokens


class SAMSumRecord(BaseModel):
    """A row of the hub's table or an element of the original files, with one utterance per line."""

    id: str
    dialogue: Text
    summary: Answers


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record: the dialogue in segments that end after an utterance, in reading order."""
    for record in checked(SAMSumRecord, records):
        documents = segments(record.dialogue.replace("\r\n", "\n"), SEGMENT)
        yield Item(
            id=record.id,
            question="Summarize the conversation above in one or two sentences.",
            references=record.summary,
            documents=documents,
            facts={"segments": len(documents)},
        )


SAMSUM = Task(
    name="samsum",
    about="SAMSum: summarize a messenger conversation, cut into segments between utterances",
    source="SAMSum (arXiv 1911.12237): id, dialogue, summary. 128 tokens: LongBench (arXiv 2308.14508)",
    items=items,
    instruction="Here is a conversation.\n\n",
    document=DOCUMENT,
    question="\n\n{question}\nSummary:",
    max_tokens=128,
    metrics=("rougeL", "rouge1", "rouge2"),
    edges="chain",
    hub=Hub("knkarthick/samsum", split="test"),
    breakdowns=(),
)
