"""LongBench v2: multiple-choice questions about one long document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from kvgraph.data.schema import Text, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks.segments import DOCUMENT, segments

SEGMENT = 4000  # characters, about 1,000 tokens
DOMAIN = "Single-Document QA"


class LongBenchRecord(BaseModel):
    """A row of the hub's table or an element of data.json."""

    id: str = Field(alias="_id")
    domain: str
    sub_domain: str
    difficulty: str
    length: str
    question: Text
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: Text


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record of the domain "Single-Document QA"; the other five domains make none."""
    for record in checked(LongBenchRecord, records):
        if record.domain != DOMAIN:
            continue
        documents = segments(record.context, SEGMENT)
        choices = (record.choice_A, record.choice_B, record.choice_C, record.choice_D)
        listed = (f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
        yield Item(
            id=record.id,
            question="\n".join((record.question, *listed)),
            references=(record.answer,),
            documents=documents,
            kind=record.sub_domain,
            facts={"difficulty": record.difficulty, "length": record.length, "segments": len(documents)},
        )


LONGBENCH_V2 = Task(
    name="longbench-v2",
    about="LongBench v2, single-document questions with four choices",
    source="LongBench v2 (arXiv 2412.15204): hub THUDM/LongBench-v2; its answer format and limit of 128 tokens",
    items=items,
    instruction="Here is a text.\n\n",
    document=DOCUMENT,
    question="\n\nAnswer this question about the text.\n{question}\n\n"
    'End with the letter of the one right choice, in these words: "The correct answer is (LETTER)".',
    max_tokens=128,
    metrics=("accuracy",),
    extract="choice",
    edges="chain",
    hub=Hub("THUDM/LongBench-v2", split="train"),
    breakdowns=("kind", "difficulty", "length"),
)
