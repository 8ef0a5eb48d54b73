"""The synthetic world: questions that need several documents in a row, and chunks that need each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import BaseModel

from kvgraph.data.chat import Document
from kvgraph.data.schema import checked
from kvgraph.data.task import Item, Task
from kvgraph.data.world import world


class Told(BaseModel):
    """A document, or a chunk of one."""

    id: str
    text: str


class WorldRecord(BaseModel):
    """A line that `kvgraph data world` writes."""

    id: str
    corpus: str
    kind: str
    question: str
    answer: str
    documents: list[Told]
    edges: list[tuple[int, int]]
    facts: dict[str, str | int | float]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record; those over one corpus are a cluster. Facts are the record's. One of them is floor: how often
    a guess that knows only the relation asked for is right."""
    for record in checked(WorldRecord, records):
        yield Item(
            id=record.id,
            question=record.question,
            references=(record.answer,),
            documents=tuple(Document(told.text, id=told.id) for told in record.documents),
            kind=record.kind,
            facts=record.facts,
            links=tuple(record.edges),
            cluster=record.corpus,
        )


def generate(settings: str, kind: str) -> Iterator[dict[str, Any]]:
    """Records of the world with these settings, as `kvgraph.data.world.world.World.parse` reads them."""
    return world.records(world.World.parse(kind, settings))


WORLD_HOPS = Task(
    name="world-hops",
    about="synthetic people, firms and cities: questions that need 1, 2 or 3 documents in a row, or compare two",
    source="kvgraph.data.world",
    items=items,
    instruction="",
    document="{text}\n",
    question="{question}",
    max_tokens=8,
    stop=(".", "\n"),
    metrics=("em", "substring_em"),
    edges="links",
    breakdowns=("kind", "hops", "edges"),
    generate=partial(generate, kind=world.HOPS),
)

WORLD_CHUNKS = replace(
    WORLD_HOPS,
    name="world-chunks",
    about='synthetic documents cut into chunks; only the first says whom the others mean by "she"',
    breakdowns=("kind", "order", "edges", "prefix"),
    generate=partial(generate, kind=world.CHUNKS),
)
