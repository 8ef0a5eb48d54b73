"""Raw records of a source, from local files or the hub, and how to go on reading where somebody stopped.

Local files: .jsonl or .ndjson (one JSON object a line) and .json (a list, or an object with a list under "data"), these
also with .gz, and .parquet. A folder is all such files in it, recursively, in sorted order.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from kvgraph.data.task import Hub
from kvgraph.errors import KVGraphError
from kvgraph.train.prepare.source import PrepareError, Row, Source

LINES, WHOLE, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
SUFFIXES = (*LINES, *WHOLE, *PARQUET)
SAMPLES = Path(str(files(f"{__package__}.samples")))
STATE_EVERY = 1000  # rows of a stream; its state is large, so a position is a state and some rows more

Position = Mapping[str, Any]
Parsed = tuple[str, bytes, Callable[[], Any]]  # where a record stands, what it is checked by, and what parses it


class Reader(Protocol):
    """Raw records in a fixed order. identity: what they are of; readers with the same identity read the same."""

    identity: Mapping[str, Any]

    def rows(self, after: Position | None = None) -> Iterator[Row]:
        """All rows, or those after a position. Raises PrepareError naming file and line, also where what stands before
        the position has changed."""
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

    def rows(self, after: Position | None = None) -> Iterator[Row]:
        count, checksum = 0, 0
        known = after or {"rows": 0, "checksum": 0}
        for where, raw, parse in self._parsed():
            if count == known["rows"] and checksum != known["checksum"]:
                break
            count, checksum = count + 1, zlib.crc32(raw, checksum)
            if count > known["rows"]:
                yield Row(count - 1, where, parse(), {"rows": count, "checksum": checksum})
        if count < known["rows"] or (count == known["rows"] and checksum != known["checksum"]):
            raise PrepareError(
                f"{self.path}: the first {known['rows']:,} records aren't those that were read before; "
                "bring them back, or give another folder"
            )

    def _parsed(self) -> Iterator[Parsed]:
        if self.read is not None and self.path.suffix not in (*LINES, *PARQUET):
            for number, record in enumerate(self.read(self.path), 1):
                yield f"{self.path}, record {number}", _raw(record), partial(_same, record)
            return
        for file in _files(self.path):
            try:
                yield from _file(file)
            except (OSError, EOFError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or error or "damaged"
                raise PrepareError(f"can't read {file}: {reason}") from None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
    files = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise PrepareError(f"{path} holds no {', '.join(SUFFIXES)} file")
    return files


def _suffix(path: Path) -> str:
    """The suffix that says what is in a file: that before .gz if there is one."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _file(path: Path) -> Iterator[Parsed]:
    suffix = _suffix(path)
    if suffix in PARQUET:
        yield from _parquet(path)
        return
    if suffix not in SUFFIXES:
        raise PrepareError(f"{path}: {suffix or 'no suffix'} is none of {', '.join(SUFFIXES)}")
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if suffix in WHOLE:
            value = _json(str(path), file.read())
            listed = value.get("data") if isinstance(value, dict) else value
            if not isinstance(listed, list):
                raise PrepareError(f"{path} holds neither a list of records nor one under 'data'")
            for number, record in enumerate(listed, 1):
                yield f"{path}, record {number}", _raw(record), partial(_same, record)
            return
        for number, line in enumerate(file, 1):  # binary files split on b"\n" alone
            if line.strip():
                yield f"{path}:{number}", line, partial(_json, f"{path}:{number}", line)


def _parquet(path: Path) -> Iterator[Parsed]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number, raw = 0, str(path.stat().st_size).encode()
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for i in range(batch.num_rows):
                    number += 1
                    yield f"{path}, row {number}", raw, partial(_cells, batch, i)
    except pyarrow.ArrowException as error:
        raise PrepareError(f"can't read {path}: {_line(error)}") from None


def _cells(batch: Any, i: int) -> dict[str, Any]:
    return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _same(record: Any) -> Any:
    return record


def _raw(record: Any) -> bytes:
    return json.dumps(record, default=str).encode()


def _json(where: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise PrepareError(
            f"{where} is not JSON in UTF-8: {error}; mend or remove it, and run the same again"
        ) from None


class Stream:
    """A data set of the hub, read as it arrives; `datasets` keeps its place."""

    def __init__(self, hub: Hub):
        self.hub = hub
        self.identity: Mapping[str, Any] = _identity(hub)

    def rows(self, after: Position | None = None) -> Iterator[Row]:
        known = after or {"rows": 0, "stream": None, "more": 0}
        name, count, state, more = self.hub.name, known["rows"], known["stream"], 0
        try:
            from datasets import load_dataset

            data = load_dataset(name, self.hub.config, split=self.hub.split, revision=self.hub.revision, streaming=True)
            if state is not None:
                data.load_state_dict(state)
            for record in data:
                more += 1
                if more > known["more"]:
                    count += 1
                    yield Row(count - 1, f"{name}, row {count}", record, {"rows": count, "stream": state, "more": more})
                if more == STATE_EVERY:
                    state, more = data.state_dict(), 0
                    known = {**known, "more": 0}
        except (KVGraphError, ImportError):
            raise
        except Exception as error:  # the libraries' own, requests', ...
            raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> PrepareError:
    return PrepareError(
        f"can't get {name} from the hub: {_line(error)}; run the same again to go on, or give --source PATH"
    )


def reader(source: Source, where: str = "", *, sample: bool = False, revision: str | None = None) -> Reader:
    """The raw records of a source: its sample, or those of a file, a folder, or a data set NAME or NAME:CONFIG of the hub.

    where: unless given, the data set that the source names. revision: of the hub, instead of the commit it has now.
    Raises PrepareError for what isn't there or can't be reached.
    """
    if sample:
        return Files(SAMPLES / source.sample, {"sample": source.sample})
    if where and (Path(where).exists() or where.startswith((".", "/", "~")) or _suffix(Path(where)) in SUFFIXES):
        return Files(Path(where).expanduser().resolve(), read=source.read)
    name, _, config = where.partition(":")
    own = source.hub if name in ("", source.hub.name) else Hub(name, split=source.hub.split)
    return _from_hub(own._replace(config=config) if config else own, revision)


def _from_hub(hub: Hub, revision: str | None) -> Reader:
    """The reader of a data set on the hub, pinned to a commit, so that it stays the same while it is read."""
    try:
        from huggingface_hub import HfApi, hf_hub_download

        pinned = hub._replace(revision=revision or HfApi().dataset_info(hub.name, revision=hub.revision).sha)
        if hub.file is None:
            return Stream(pinned)
        path = hf_hub_download(hub.name, hub.file, repo_type="dataset", revision=pinned.revision)
        return Files(Path(path), _identity(pinned))
    except (KVGraphError, ImportError):
        raise
    except Exception as error:  # the libraries' own, requests', ...
        raise _unreachable(hub.name, error) from None


def _identity(hub: Hub) -> dict[str, str]:
    return {key: value for key, value in hub._asdict().items() if value is not None}


def _line(error: Exception) -> str:
    """An error's first line."""
    return (str(error).strip() or repr(error)).split("\n")[0][:200]
