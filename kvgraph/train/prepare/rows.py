"""Raw records of a source, from local files or the hub, and how to resume reading where an earlier run stopped.

`kvgraph.data.io` says which local files are read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from kvgraph.data import hub, io
from kvgraph.data.hub import Hub
from kvgraph.train.prepare.source import PrepareError, RawRow, Source

SAMPLES = Path(str(files(f"{__package__}.samples")))
STATE_EVERY = 1000  # rows of a stream; its state is large, so a position is a state plus a number of rows

Position = Mapping[str, Any]


class Reader(Protocol):
    """Raw records in a fixed order. identity: names their origin; readers with the same identity read the same."""

    identity: Mapping[str, Any]

    def rows(self, after: Position | None = None) -> Iterator[RawRow]:
        """All rows, or those after a position. Raises PrepareError naming file and line, also if records before the
        position have changed."""
        ...


class Files:
    """Local files. identity: unless given, their path. read: for a layout of its own (see `Source.read`)."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any] | None = None,
        read: Callable[[Path], Iterable[Mapping[str, Any]]] | None = None,
    ):
        if not path.exists():
            raise PrepareError(f"there is no file or folder {path}")
        self.path, self.read = path, read
        self.identity: Mapping[str, Any] = {"path": str(path)} if identity is None else identity

    def rows(self, after: Position | None = None) -> Iterator[RawRow]:
        count, checksum = 0, 0
        known = after or {"rows": 0, "checksum": 0}
        for where, raw, parse in self._found():
            if count == known["rows"] and checksum != known["checksum"]:
                break
            count, checksum = count + 1, zlib.crc32(raw, checksum)
            if count > known["rows"]:
                yield RawRow(count - 1, where, parse(), {"rows": count, "checksum": checksum})
        if count < known["rows"] or (count == known["rows"] and checksum != known["checksum"]):
            raise PrepareError(
                f"{self.path}: the first {known['rows']:,} records have changed since they were read; "
                "restore them, or give another folder"
            )

    def _found(self) -> Iterator[io.UnparsedRecord]:
        if self.read is not None and self.path.suffix.lower() not in (".jsonl", ".ndjson", *io.PARQUET):
            for number, record in enumerate(self.read(self.path), 1):
                raw = json.dumps(record, default=str).encode()
                yield io.UnparsedRecord(f"{self.path}, record {number}", raw, partial(dict, record))
            return
        yield from io.scan(self.path, _again)


def _again(text: str) -> PrepareError:
    return PrepareError(f"{text}; run the same command again to resume")


class Stream:
    """A data set of the hub, read as it arrives; `datasets` keeps its place."""

    def __init__(self, data_set: Hub):
        self.hub = data_set
        self.identity: Mapping[str, Any] = _identity(data_set)

    def rows(self, after: Position | None = None) -> Iterator[RawRow]:
        known = after or {"rows": 0, "stream": None, "more": 0}
        name, count, state, more = self.hub.name, known["rows"], known["stream"], 0
        data = hub.HubStream(self.hub, _unreachable, state)
        for record in data:
            more += 1
            if more > known["more"]:
                count += 1
                yield RawRow(count - 1, f"{name}, row {count}", record, {"rows": count, "stream": state, "more": more})
            if more == STATE_EVERY:
                state, more = data.state(), 0
                known = {**known, "more": 0}


def _unreachable(text: str) -> PrepareError:
    return PrepareError(f"{text}; run the same command again to resume, or give --source PATH")


def reader(source: Source, where: str = "", *, sample: bool = False, revision: str | None = None) -> Reader:
    """The raw records of a source: its sample, or those of a file, a folder, or a data set NAME or NAME:CONFIG of the hub.

    where: by default the data set that the source names. revision: on the hub, by default the current commit.
    Raises PrepareError if the data is missing or can't be reached.
    """
    if sample:
        return Files(SAMPLES / source.sample, {"sample": source.sample})
    path = Path(where).expanduser()
    if where and (path.exists() or where.startswith((".", "/", "~")) or io.suffix(path) in io.SUFFIXES[1:]):
        return Files(path.absolute(), {"path": str(path.resolve())}, source.read)
    name, _, config = where.partition(":")
    own = source.hub if name in ("", source.hub.name) else Hub(name, split=source.hub.split)
    return _from_hub(own._replace(config=config) if config else own, revision)


def _from_hub(data_set: Hub, revision: str | None) -> Reader:
    """The reader of a data set on the hub, pinned to a commit, so that it can't change while it is read."""
    pinned = hub.pinned(data_set, revision, _unreachable)
    if pinned.file is None:
        return Stream(pinned)
    return Files(hub.download(pinned, _unreachable), _identity(pinned))


def _identity(data_set: Hub) -> dict[str, str]:
    return {key: value for key, value in data_set._asdict().items() if value is not None}
