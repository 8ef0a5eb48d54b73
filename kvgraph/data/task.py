"""What a task is: where its records come from, how one becomes an item, and the one prompt every method gets.

A task says nothing about methods and a method nothing about tasks: an item's documents and links become the segments
and edges of a context graph, and any method plans that graph.
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
    """A task's data can't be used: no such file, a record of another schema. The message names the file and record."""


@dataclass(frozen=True)
class Item:
    """One question. Its documents are in the order of the record: best first where a retriever ranked them.

    id: unique in the task and stable between runs. references: every acceptable answer (for a summary: the reference).
    kind: the question's type, for breakdowns ("bridge", "comparison", ...). facts: further things to break down by
    (gold_position, hops, distractors, ...), plain numbers or texts. links: edges (source, reader) that the data itself
    has, by index. cluster: what the item shares with others, so that they tell less than as many unrelated ones (several
    questions over one corpus, one question in several arrangements); unless given, items that read the same documents
    share. `question` holds the choices too, where there are any.
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
    """One task. `items` turns raw records (dicts, in the original schema) into items; it is pure and skips nothing
    silently: a record it can't use raises TaskError naming the field.

    instruction: what the model is told first. question: how an item's question is put, with {question}. document: how a
    document is written, with {title} and {text}; never its rank. max_tokens: of the answer. stop: strings that end it.
    metrics: names in `kvgraph.eval.metrics.METRICS`, the first being the headline. extract: what of the answer is scored
    ("" = all of it, else a name in `metrics.EXTRACT`). edges: the default for methods that read edges: a name that
    `kvgraph.edges.named_edges` knows, or "links" for the items' own. breakdowns: "kind" and names of facts.
    source: paper and where the schema comes from.
    read: the records of a local path, for layouts that aren't one record a line or list element; raises TaskError.
    generate: makes records from a text of settings; raises a KVGraphError, at once, for settings that don't exist.
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
