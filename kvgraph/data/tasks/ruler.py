"""RULER's needle-in-a-haystack tasks: find the values of a key among many."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, model_validator

from kvgraph.data.schema import Answers, Text, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks import qa
from kvgraph.data.tasks.segments import DOCUMENT, segments

SEGMENT = 1000  # characters; needles are single sentences, so none is cut
INTRODUCTION = re.compile(r"^.* I will quiz you about .*\n")


class RulerRecord(BaseModel):
    """A line that RULER's niah.py writes (input, outputs, length), or a row of the hub's table (context, question,
    answer_prefix, answer, task). An input is an introduction, the haystack and a question, each from a new line."""

    context: Text
    question: Text
    answer_prefix: str = ""
    outputs: Answers = Field(validation_alias=AliasChoices("outputs", "answer"))
    length: int | None = None
    task: str = ""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, record: Any) -> Any:
        if isinstance(record, Mapping) and isinstance(record.get("input"), str):
            context, _, question = record["input"].rstrip().rpartition("\n")
            record = {**record, "context": context, "question": question}
        return record

    @model_validator(mode="after")
    def _has_needles(self) -> RulerRecord:
        self.context = INTRODUCTION.sub("", self.context, count=1)
        if not self.task or self.task.startswith("niah"):
            for value in self.outputs:
                if value not in self.context:
                    raise ValueError(f"the output {value!r} isn't in the haystack")
        return self


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record: the haystack in segments, in reading order.

    The hub's table holds all of RULER; only its needle tasks (niah_...) make items here. The question ends with the
    beginning of the answer, as RULER's does. Facts: depth is that of the first value in percent, to the nearest 10;
    gold_position the segment it is in; needles the number of values; length the tokens that RULER aimed at (a power of
    2).
    """
    ids = qa.Ids()
    for record in checked(RulerRecord, records):
        if record.task and not record.task.startswith("niah"):
            continue
        documents = segments(record.context, SEGMENT)
        value = record.outputs[0]
        facts: dict[str, int] = {
            "depth": round(10 * record.context.index(value) / len(record.context)) * 10,
            "gold_position": next(i for i, document in enumerate(documents) if value in document.text),
            "needles": len(record.outputs),
        }
        if record.length:
            facts["length"] = 1 << (record.length - 1).bit_length()
        yield Item(
            id=ids(record.question),
            question=" ".join(filter(None, (record.question.strip(), record.answer_prefix.strip()))),
            references=record.outputs,
            documents=documents,
            kind=record.task or _sought(record.question),
            facts=facts,
        )


def _sought(question: str) -> str:
    """What the values are: "uuid", "number" or "word"."""
    found = re.search(r"special magic (\w+?)s? for ", question)
    return found[1] if found else ""


RULER = Task(
    name="ruler",
    about="RULER, needle tasks (niah): the values of keys hidden in a long text",
    source="RULER (arXiv 2404.06654): github.com/NVIDIA/RULER, scripts/data/synthetic/niah.py",
    items=items,
    instruction="Special magic numbers, words or uuids are hidden in the following text. Remember them.\n\n",
    document=DOCUMENT,
    question="\n\n{question}",
    max_tokens=128,
    metrics=("string_match_all",),
    edges="chain",
    hub=Hub("simonjegou/ruler", "4096", "test"),
    breakdowns=("kind", "length", "depth"),
)
