"""What the question-answering tasks share: their prompt, records checked against a schema, ids, golds and facts.

A schema is a pydantic model with the public data set's own field names; fields it doesn't name are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from kvgraph.data.task import TaskError
from kvgraph.eval.metrics import flatten

INSTRUCTION = "Here are documents that may help to answer a question. Some of them may have nothing to do with it."
QUESTION = (
    "Use only the documents above to answer the question, in as few words as it takes.\nQuestion: {question}\nAnswer:"
)
SHORT_ANSWER = 200  # tokens; KVLink's evaluation scripts allow as many
STOP = ("\nQuestion:",)  # a model that goes on asks itself the next question; Graph-KV's server stops there too

Schema = TypeVar("Schema", bound=BaseModel)


def checked(schema: type[Schema], records: Iterable[Mapping[str, Any]]) -> Iterator[Schema]:
    """The records as instances of the schema. Raises TaskError naming the first record and field that don't fit."""
    for number, record in enumerate(records, 1):
        try:
            yield schema.model_validate(record)
        except ValidationError as error:
            first, *others = error.errors(include_url=False, include_context=False)
            field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
            also = f" (and {len(others)} more)" if others else ""
            raise TaskError(f"record {_name(record) or number}: {field}{first['msg']}{also}") from None


def _name(record: Any) -> str:
    """What a raw record is called in messages: its id, or how its question begins."""
    keys = ("_id", "id", "question_id", "question", "query")
    return next((repr(record[key])[:60] for key in keys if record.get(key)), "") if isinstance(record, Mapping) else ""


def rows(*columns: str) -> BeforeValidator:
    """Lets a list of rows also be given as {column: list} or as JSON text, as data sets on the hub store them."""

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, Mapping) and all(isinstance(value.get(column), list) for column in columns):
            value = list(zip(*(value[column] for column in columns), strict=True))
        return value

    return BeforeValidator(convert)


Paragraphs = Annotated[list[tuple[str, list[str]]], rows("title", "sentences"), Field(min_length=1)]
"""HotpotQA's `context`: a title and its sentences for each paragraph."""

SupportingFacts = Annotated[list[tuple[str, int]], rows("title", "sent_id")]
"""HotpotQA's `supporting_facts`: a paragraph's title and the number of a sentence in it."""


def golds(answers: Any) -> tuple[str, ...]:
    """Every answer of a text or of nested lists of texts, each once, in order. Raises ValueError when there is none."""
    try:
        found = flatten(answers)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError("there is no answer")
    return found


Answers = Annotated[tuple[str, ...], BeforeValidator(golds)]
"""The acceptable answers, given as one text or as nested lists."""


def joined(sentences: Iterable[str]) -> str:
    """Sentences as one text. Data sets differ in whether a sentence brings the space before it; here all get one."""
    return " ".join(filter(None, map(str.strip, sentences)))


def support(gold: Sequence[int], documents: int) -> dict[str, str | int]:
    """Facts about which documents hold the answer: their positions, as in "2,7", and how many others there are."""
    return {"gold_positions": ",".join(map(str, gold)), "distractors": documents - len(gold)}


class Ids:
    """Makes ids for records without one from their question: they don't depend on which other records are read.

    A question that comes again gets a number after its id.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, question: str, suffix: str = "") -> str:
        """The id of the next record with this question, ending in `suffix`."""
        name = hashlib.sha256(question.encode()).hexdigest()[:12] + suffix
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}-{self._seen[name]}"
