"""Checking raw records against a schema, and field types that several data sets share.

A schema is a pydantic model with the public data set's own field names. Fields that it doesn't name are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, ValidationError

from kvgraph.data.task import TaskError

Schema = TypeVar("Schema", bound=BaseModel)

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""A field that holds more than white space."""


def checked(schema: type[Schema], records: Iterable[Mapping[str, Any]]) -> Iterator[Schema]:
    """The records as instances of the schema. Raises TaskError naming the first record and field that don't fit."""
    for number, record in enumerate(records, 1):
        try:
            yield schema.model_validate(record)
        except ValidationError as error:
            raise TaskError(f"record {_name(record) or number}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """Pydantic's errors in one line: the first wrong field, and the number of others."""
    first, *others = error.errors(include_url=False, include_context=False)
    field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
    return f"{field}{first['msg'].removeprefix('Value error, ')}" + (f" (and {len(others)} more)" if others else "")


def _name(record: Any) -> str:
    """The record's name in messages: its id, or the beginning of its question."""
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


def references(answers: Any) -> tuple[str, ...]:
    """The answers in a text, a number, or nested lists of them, as texts, without duplicates and blank ones, in order.

    Raises ValueError for anything else, and if no answer is left.
    """
    found = tuple(dict.fromkeys(_flat(answers)))
    if not found:
        raise ValueError("there is no answer")
    return found


def _flat(answers: Any) -> Iterator[str]:
    if isinstance(answers, list | tuple):
        for answer in answers:
            yield from _flat(answer)
    elif isinstance(answers, int | float) and not isinstance(answers, bool):
        yield str(answers)
    elif isinstance(answers, str):
        yield from [answers] * bool(answers.strip())
    elif answers is not None:
        raise ValueError(f"answers are texts, numbers or lists of them, not {type(answers).__name__}")


Answers = Annotated[tuple[str, ...], BeforeValidator(references)]
"""The acceptable answers, given as one text or as nested lists."""
