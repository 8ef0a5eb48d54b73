"""Raw records, from a local path or the hub, and the items a task makes of them.

Local files: .jsonl or .ndjson (one JSON object a line; also a file without a suffix), .json (a list, or an object with a
list under "data"), .parquet, the first three also with .gz. A folder is all such files in it, recursively, in sorted
order. A task that knows its own layout (`Task.read`) reads the path itself. Some tasks make their records
(`Task.generate`): "generated", or "generated:SETTINGS".
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kvgraph.data.task import Hub, Item, Task, TaskError
from kvgraph.errors import KVGraphError

HUB, GENERATED = "hub", "generated"
LINES, WHOLE, PARQUET = (".jsonl", ".ndjson", ""), (".json",), (".parquet",)
SUFFIXES = (*LINES, *WHOLE, *PARQUET)

Record = tuple[str, Mapping[str, Any]]  # (where it stands, the record)


class Data(NamedTuple):
    """Items to evaluate, and where they come from. sha256: of the raw records that were read to make them."""

    items: tuple[Item, ...]
    source: str = ""
    sha256: str = ""
    limit: int | None = None
    shuffled: bool = False


def read(task: Task, source: str | Path, limit: int | None = None, *, shuffle: bool = False, seed: int = 0) -> Data:
    """The items of a task from a local path or, for source "hub", from where the task says the full set is.

    A task that makes its records does so for "generated" and "generated:SETTINGS", and for "hub" if it has no set there.
    limit: the first so many items, of which no more records are read than they need; with `shuffle`, so many drawn
    without replacement by `seed`. Raises TaskError, naming file and line where there is one: nothing there, offline, no
    valid JSON (NaN isn't), a record that lacks a field, items with the same id, no item at all.
    """
    if source == HUB and task.hub is None and task.generate is not None:
        source = GENERATED
    rows = _Rows(_records(task, source))
    try:
        found = islice(_items(task, rows), None if shuffle else limit)
        items = tuple(_unique(found, rows))
    except TaskError as error:
        raise TaskError(f"{rows.where}: {error}" if rows.where else str(error)) from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a task stumbles over
        raise TaskError(f"{rows.where}: {task.name} can't use this record: {error!r}") from None
    if not items:
        raise TaskError(f"{source} holds no items of {task.name}")
    if shuffle:
        items = tuple(random.Random(seed).sample(items, min(len(items), limit or len(items))))
    return Data(items, str(source), rows.sha256.hexdigest(), limit, shuffle)


class _Rows:
    """Records on their way to a task: hashed, and with their place at hand."""

    def __init__(self, records: Iterator[Record]):
        self.records = records
        self.where = ""
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for where, record in self.records:
            self.where = where
            if not isinstance(record, Mapping):
                raise TaskError(f"a record is a JSON object, not a {type(record).__name__}")
            text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
            try:
                self.sha256.update(text.encode() + b"\n")
            except UnicodeEncodeError:
                raise TaskError("the record holds half of a surrogate pair, which is no text") from None
            yield record
        self.where = ""


def _items(task: Task, rows: _Rows) -> Iterator[Item]:
    """Yields from task.items, so that nothing is read before the first item is asked for."""
    yield from task.items(rows)


def _unique(items: Iterable[Item], rows: _Rows) -> Iterator[Item]:
    """The items themselves; TaskError for one that can't be scored, or whose id came before."""
    seen: dict[str, str] = {}
    for item in items:
        if not item.id or item.id in seen:
            first = f", as at {seen[item.id]}" if seen.get(item.id) else ""
            raise TaskError(f"the item's id {item.id!r} is {'used twice' + first if item.id else 'empty'}")
        if not item.golds or not all(isinstance(gold, str) and gold.strip() for gold in item.golds):
            raise TaskError(f"item {item.id!r} has no answer, or an empty one, so nothing could be right")
        for name, value in item.facts.items():
            if not isinstance(value, str) and not math.isfinite(value):
                raise TaskError(f"item {item.id!r}: {name} is {value}")
        seen[item.id] = rows.where
        yield item


def _records(task: Task, source: str | Path) -> Iterator[Record]:
    if source == HUB:
        return _hub(task)
    kind, _, settings = str(source).partition(":")
    if kind == GENERATED and task.generate is not None:
        made = task.generate(settings)
        return ((f"{source}, record {number}", record) for number, record in enumerate(made, 1))
    return _local(task, Path(source))


def _local(task: Task, path: Path) -> Iterator[Record]:
    if not path.exists():
        raise TaskError(f"there is no file or folder {path}; --data takes a path, or {HUB!r}")
    if task.read is not None:
        for number, record in enumerate(task.read(path), 1):
            yield f"{path}, record {number}", record
    elif path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
        for file in inside:
            if not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield from _file(file)
    else:
        yield from _file(path)


def _suffix(path: Path) -> str:
    """The suffix that says what is in a file: that before .gz if there is one."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _file(path: Path) -> Iterator[Record]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise TaskError(
            f"{path}: {suffix} is none of {', '.join(filter(None, SUFFIXES))}, the first three also with .gz"
        )
    if suffix in PARQUET:
        yield from _parquet(path)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if suffix in WHOLE:
                yield from _whole(str(path), file.read())
                return
            for number, line in enumerate(file, 1):  # binary files split on b"\n" alone
                if line.strip():
                    yield f"{path}:{number}", _json(f"{path}:{number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"can't read {path}: {getattr(error, 'strerror', None) or error or 'damaged'}") from None


def _whole(where: str, raw: bytes) -> Iterator[Record]:
    value = _json(where, raw)
    listed = value.get("data") if isinstance(value, dict) else value
    if not isinstance(listed, list):
        raise TaskError(f"{where} holds neither a list of records nor one under 'data'")
    for number, record in enumerate(listed, 1):
        yield f"{where}, record {number}", record


def _json(where: str, raw: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise TaskError(f"{where} is not JSON in UTF-8: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise TaskError(f"to read {path}, install pyarrow: pip install 'kvgraph[eval]'") from None
    try:
        number = 0
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (OSError, pyarrow.ArrowException) as error:
        raise TaskError(f"can't read {path}: {_line(error)}") from None


def _hub(task: Task) -> Iterator[Record]:
    if task.hub is None:
        raise TaskError(f"{task.name} has no data set on the hub; give --data PATH")
    try:
        if task.hub.file is not None:
            yield from _local(task, _download(task.hub))
            return
        for number, record in enumerate(_stream(task.hub), 1):
            yield f"{task.hub.name}, record {number}", record
    except ImportError:
        raise TaskError("to read from the hub, install datasets: pip install 'kvgraph[eval]'") from None
    except KVGraphError:
        raise
    except Exception as error:  # the libraries' own, requests', ...
        raise TaskError(f"can't get {task.hub.name} from the hub: {_line(error)}; or give --data PATH") from None


def _download(hub: Hub) -> Path:
    """One file of a data set, in the hub's own cache."""
    from huggingface_hub import hf_hub_download

    assert hub.file is not None
    return Path(hf_hub_download(hub.name, hub.file, repo_type="dataset", revision=hub.revision))


def _stream(hub: Hub) -> Iterator[Mapping[str, Any]]:
    """A data set's records as they arrive."""
    from datasets import load_dataset

    return iter(load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True))


def _line(error: Exception) -> str:
    """An error's first line."""
    return (str(error).strip() or repr(error)).split("\n")[0][:200]
