"""Tasks: where their records come from, how a record becomes an item, and the one prompt that every method gets.

Tasks and methods don't know each other. An item's documents and links become the segments and edges of a context graph,
and any method plans that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvgraph.data.chat import Document
from kvgraph.data.hub import Hub
from kvgraph.errors import KVGraphError
from kvgraph.graph import Edge

__all__ = ["Document", "Hub", "Item", "Task", "TaskError"]


class TaskError(KVGraphError, ValueError):
    """A task's data can't be used: a missing file, a record of another schema. The message names file and record."""


@dataclass(frozen=True)
class Item:
    """One question.

    id: unique in the task and stable between runs.
    question: the question, with its choices if it has some.
    documents: in the order of the record; best first if a retriever ranked them.
    references: every acceptable answer (for a summary: the reference).
    kind: the question's type, for breakdowns ("bridge", "comparison", ...).
    facts: further properties for breakdowns (gold_position, hops, distractors, ...), plain numbers or texts.
    links: edges (source, reader) of the data itself, by index.
    cluster: equal for items that aren't independent (several questions over one corpus, one question in several
        arrangements). Unless given, items that read the same documents form a cluster.
    """

    id: str
    question: str
    references: tuple[str, ...]
    documents: tuple[Document, ...] = ()
    kind: str = ""
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    links: tuple[Edge, ...] = ()
    cluster: str = ""


@dataclass(frozen=True)
class Task:
    """One task.

    items: turns raw records (dicts, in the original schema) into items. It is pure and skips nothing silently: a record
        that it can't use raises TaskError naming the field.
    instruction: the beginning of the prompt.
    question: a template for an item's question, with {question}.
    document: a template for a document, with {title} and {text}, without its rank.
    max_tokens: maximum per answer.
    stop: strings that end the answer.
    metrics: names in `kvgraph.eval.metrics.METRICS`; the first is the headline.
    extract: the part of the answer that is scored: "" for all of it, else a name in `metrics.EXTRACT`.
    edges: the default for methods that read edges: a text for `kvgraph.edges.named_edges`, or "links" for the items'
        own.
    breakdowns: "kind" and names of facts.
    source: the paper, and where the schema comes from.
    read: reads the records of a local path, for layouts without one record per line or list element; raises TaskError.
    generate: makes records from a text of settings; raises a KVGraphError at once for unknown settings.
    """

    name: str
    about: str
    source: str
    items: Callable[[Iterable[Mapping[str, Any]]], Iterable[Item]]
    instruction: str
    question: str
    max_tokens: int
    metrics: tuple[str, ...]
    hub: Hub | None = None
    document: str = "{title}\n{text}\n\n"
    stop: tuple[str, ...] = ()
    extract: str = ""
    edges: str = "all"
    breakdowns: tuple[str, ...] = ("kind",)
    read: Callable[[Path], Iterable[Mapping[str, Any]]] | None = None
    generate: Callable[[str], Iterable[Mapping[str, Any]]] | None = None
