"""Sources of training data: which data set one reads, and which training records it makes of each raw record."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from kvgraph.data import schema as schemas
from kvgraph.data.task import Hub, Item, Task, TaskError
from kvgraph.errors import KVGraphError

Made = dict[str, Any]
"""A training record without its id: `docs/reference/data.md` says what the three kinds hold."""

Schema = TypeVar("Schema", bound=BaseModel)


class PrepareError(KVGraphError, ValueError):
    """Data can't be prepared: a missing source, an unreadable record, or a folder that holds other data."""


class Skip(Exception):
    """Raised by a source for a record that it can't use. The reason, a few words, is counted."""


class RawRow(NamedTuple):
    """A raw record. number: how many precede it. where: for people. position: where to continue reading after it."""

    number: int
    where: str
    record: Any
    position: Mapping[str, Any]


class Outcome(NamedTuple):
    """The outcome of a row: training records, or why there are none.

    key: a text shared by all records that must be on the same side of the split, such as their document.
    """

    row: RawRow
    key: str = ""
    made: tuple[Made, ...] = ()
    skipped: str = ""


@dataclass(frozen=True)
class PrepareJob:
    """The means that a source may use while it works.

    rows: reads the raw records again, from the first. folder: the output folder, for the source's own files, named after
    it. settings: all of the source's, by name, as texts. progress: prints messages about long work.
    """

    seed: int
    tokenizer: Any
    folder: Path
    settings: Mapping[str, str]
    rows: Callable[[], Iterator[RawRow]]
    progress: Callable[[str], None]

    def random(self, row: RawRow) -> random.Random:
        """Random draws for one row. They depend only on the seed and the row's number."""
        return random.Random(f"{self.seed}/{row.number}")


class Setting(NamedTuple):
    """A setting of a source: its default, its description, and whether another value gives other data."""

    default: str
    about: str
    changes: bool = True


@dataclass(frozen=True)
class Source:
    """A source of training data.

    outcomes: the outcome of every row, in order; it may read ahead. After a restart, the rows don't begin with the first.
    hub: the place of the data set. sample: a file of the package folder `samples`. schema: of a record. origin: the paper or
    code whose recipe this is. needs_tokenizer: to measure texts. settings: of this source only. read: reads local files
    whose layout isn't one record per line, row or list element (see `kvgraph.data.task.Task`).
    """

    name: str
    about: str
    origin: str
    hub: Hub
    sample: str
    outcomes: Callable[[Iterator[RawRow], PrepareJob], Iterator[Outcome]]
    needs_tokenizer: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict)
    read: Callable[[Path], Iterable[Mapping[str, Any]]] | None = None


def each(
    schema: type[Schema],
    key: Callable[[Schema], str],
    make: Callable[[Schema, PrepareJob, random.Random], Iterable[Made]],
) -> Callable[[Iterator[RawRow], PrepareJob], Iterator[Outcome]]:
    """`Source.outcomes` from a function of one record. make: may raise Skip."""

    def outcomes(rows: Iterator[RawRow], job: PrepareJob) -> Iterator[Outcome]:
        for row in rows:
            record = checked(schema, row)
            try:
                yield Outcome(row, key(record), tuple(make(record, job, job.random(row))))
            except Skip as reason:
                yield Outcome(row, skipped=str(reason))

    return outcomes


def checked(schema: type[Schema], row: RawRow) -> Schema:
    """A row's record as an instance of the schema. Raises PrepareError naming the row and the wrong field."""
    try:
        return next(schemas.checked(schema, [row.record]))
    except TaskError as error:
        raise PrepareError(f"{row.where}: {error}") from None


def task_record(task: Task, item: Item, answer: str) -> Made:
    """The training record of an evaluation task's item. Its prompt will be the task's own."""
    links = {"links": [list(edge) for edge in item.links]} if item.links else {}
    documents = [{"title": document.title, "text": document.text} for document in item.documents]
    return {"task": task.name, "question": item.question, "documents": documents, "answer": answer, **links}
