"""MoreHopQA: multi-hop questions with one more step of arithmetic, symbolic or commonsense reasoning on top."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, Paragraphs, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks import qa


class ReasoningStep(BaseModel):
    """One of a record's `question_decomposition`; steps that need no paragraph have an empty title."""

    paragraph_support_title: str = ""


class MoreHopRecord(BaseModel):
    """An element of morehopqa_final.json."""

    id: str = Field(validation_alias="_id")
    question: str
    answer: Answers
    context: Paragraphs
    question_decomposition: list[ReasoningStep]
    answer_type: str
    no_of_hops: int
    reasoning_type: str


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its paragraphs in the record's order. `hops` is the authors' `no_of_hops`.

    The kind is `reasoning_type` with its parts in alphabetical order; the records have them in any order.
    """
    for record in checked(MoreHopRecord, records):
        supporting = {step.paragraph_support_title for step in record.question_decomposition}
        gold = [i for i, (title, _) in enumerate(record.context) if title in supporting]
        yield Item(
            id=record.id,
            question=record.question,
            references=record.answer,
            documents=tuple(Document(qa.joined(sentences), title) for title, sentences in record.context),
            kind=", ".join(sorted(record.reasoning_type.split(", "))),
            facts={
                "hops": record.no_of_hops,
                "answer_type": record.answer_type,
                **qa.support(gold, len(record.context)),
            },
        )


MOREHOPQA = Task(
    name="morehopqa",
    about="MoreHopQA: generated answers after reasoning over two paragraphs, by hops",
    source="MoreHopQA (arXiv 2406.13397): github.com/Alab-NII/morehopqa, datasets/files/morehopqa_final.json",
    items=items,
    instruction=qa.INSTRUCTION,
    question=(
        "Use only the documents above. Think step by step, then end with a line that begins with 'Answer:' and holds "
        "the answer alone: a date as YYYY-MM-DD, a number in digits.\nQuestion: {question}\n"
    ),
    max_tokens=1024,  # it reasons first; Graph-KV's server allows as many for plain prompts
    stop=qa.STOP,
    metrics=("substring_em", "em", "hotpot_f1"),
    extract="answer_line",
    hub=Hub("alabnii/morehopqa", "verified", "test"),
    breakdowns=("hops", "kind", "answer_type"),
)
