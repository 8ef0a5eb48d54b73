"""The items that a task makes from raw records of a local path or the hub.

Local files are read by `kvgraph.data.io`. A task with its own layout (`Task.read`) reads the path itself. Some tasks
generate their records (`Task.generate`), for "generated" or "generated:SETTINGS".
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kvgraph.data import hub, io
from kvgraph.data.task import Item, Task, TaskError

HUB, GENERATED = "hub", "generated"
Placed = tuple[str, Mapping[str, Any]]  # (a record's file and line, the record)


class Data(NamedTuple):
    """Items to evaluate, and where they come from. sha256: of the raw records that they were made from."""

    items: tuple[Item, ...]
    source: str = ""
    sha256: str = ""
    limit: int | None = None
    shuffled: bool = False


def read(task: Task, source: str | Path, limit: int | None = None, *, shuffle: bool = False, seed: int = 0) -> Data:
    """The items of a task from a local path or, for source "hub", from the task's full data set.

    A task that generates its records does so for "generated" and "generated:SETTINGS", and for "hub" if it has no data
    set there.

    limit: maximum number of items. Without `shuffle` they are the first, and no further records are read.
    shuffle: draw the items without replacement, by `seed`.

    Raises TaskError, naming file and line if possible, for missing data, no network, invalid JSON (including NaN), a
    record without a needed field, items with the same id, and no items.
    """
    if source == HUB and task.hub is None and task.generate is not None:
        source = GENERATED
    rows = _Rows(_records(task, source))
    try:
        found = islice(_items(task, rows), None if shuffle else limit)
        items = tuple(_unique(found, rows))
    except _Unreadable:
        raise
    except TaskError as error:
        raise TaskError(f"{rows.where}: {error}" if rows.where else str(error)) from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # errors in a task's own code
        raise TaskError(f"{rows.where}: {task.name} can't use this record: {error!r}") from None
    if not items:
        raise TaskError(f"{source} holds no items of {task.name}")
    if shuffle:
        items = tuple(random.Random(seed).sample(items, min(len(items), limit or len(items))))
    return Data(items, str(source), rows.sha256.hexdigest(), limit, shuffle)


class _Unreadable(TaskError):
    """An error whose message has its own file and line; the record read last isn't the cause."""


class _Rows:
    """Records passed to a task: it hashes them and remembers the file and line of the last."""

    def __init__(self, records: Iterator[Placed]):
        self.records = records
        self.where = ""
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for where, record in self.records:
            self.where = where
            text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
            try:
                self.sha256.update(text.encode() + b"\n")
            except UnicodeEncodeError:
                raise TaskError("the record contains half of a surrogate pair, which isn't valid text") from None
            yield record
        self.where = ""


def _items(task: Task, rows: _Rows) -> Iterator[Item]:
    """Yields from task.items, so that nothing is read before the first item is requested."""
    yield from task.items(rows)


def _unique(items: Iterable[Item], rows: _Rows) -> Iterator[Item]:
    """The items themselves. Raises TaskError for one that can't be scored, or whose id occurred before."""
    seen: dict[str, str] = {}
    for item in items:
        if not item.id or item.id in seen:
            first = f", as at {seen[item.id]}" if seen.get(item.id) else ""
            raise TaskError(f"the item's id {item.id!r} is {'used twice' + first if item.id else 'empty'}")
        if not item.references or not all(isinstance(r, str) and r.strip() for r in item.references):
            raise TaskError(f"item {item.id!r} has no answer, or an empty one, so nothing could be right")
        for name, value in item.facts.items():
            if not isinstance(value, str) and not math.isfinite(value):
                raise TaskError(f"item {item.id!r}: {name} is {value}")
        seen[item.id] = rows.where
        yield item


def _records(task: Task, source: str | Path) -> Iterator[Placed]:
    if source == HUB:
        return _hub(task)
    kind, _, settings = str(source).partition(":")
    if kind == GENERATED and task.generate is not None:
        made = task.generate(settings)
        return ((f"{source}, record {number}", record) for number, record in enumerate(made, 1))
    return _local(task, Path(source))


def _local(task: Task, path: Path) -> Iterator[Placed]:
    if not path.exists():
        raise TaskError(f"there is no file or folder {path}; --data takes a path, or {HUB!r}")
    if task.read is not None:
        for number, record in enumerate(task.read(path), 1):
            yield f"{path}, record {number}", record
    else:
        yield from io.records(path, _Unreadable)


def _hub(task: Task) -> Iterator[Placed]:
    if task.hub is None:
        raise TaskError(f"{task.name} has no data set on the hub; give --data PATH")
    if task.hub.file is not None:
        return _local(task, hub.download(task.hub, _no_hub))
    name = task.hub.name
    return ((f"{name}, record {i}", record) for i, record in enumerate(hub.HubStream(task.hub, _no_hub), 1))


def _no_hub(text: str) -> TaskError:
    return _Unreadable(f"{text}; or give --data PATH")
