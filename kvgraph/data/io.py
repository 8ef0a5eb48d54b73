"""Reading and writing files: one reader of records, one random access to lines, one atomic writer, one lock.

Records come from these files, each also with .gz, whatever the case of the suffix:

- .jsonl, .ndjson or no suffix: one JSON object per line; only "\\n" ends a line.
- .json: a list of objects, or an object with a list under "data".
- .csv: a table with a header line.
- .parquet: a table; needs pyarrow.

A folder stands for all files in it, recursively, in sorted order. Hidden files are left out, and links are followed.
JSON is UTF-8, with or without a byte order mark; NaN isn't allowed. Pure Python.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import filelock
import numpy as np

from kvgraph.errors import KVGraphError

LINES, WHOLE, TABLE, PARQUET = ("", ".jsonl", ".ndjson"), (".json",), (".csv",), (".parquet",)
SUFFIXES = (*LINES, *WHOLE, *TABLE, *PARQUET)
ROWS = 1000  # of a Parquet file in memory at once
SCANNED = 1 << 24  # bytes of a file in memory at once while its lines are looked for

csv.field_size_limit(1 << 30)  # the default limit of 128 KiB is too small for a long paper

Error = Callable[[str], KVGraphError]  # makes an error from a message; usually its class


class DataError(KVGraphError, ValueError):
    """A file can't be read. The message names the file, and the line if there is one."""


# -- records ----------------------------------------------------------------------------------------------------------


class UnparsedRecord(NamedTuple):
    """A record that isn't parsed yet.

    where: file and line, for messages.
    raw: bytes that change whenever the record does (for Parquet, the file's size).
    parse: returns the record; raises the reader's error.
    """

    where: str
    raw: bytes
    parse: Callable[[], dict[str, Any]]


def records(path: Path, error: Error = DataError) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, record) of all records of a file or folder. Raises `error` naming file and line."""
    for found in scan(path, error):
        yield found.where, found.parse()


def scan(path: Path, error: Error = DataError) -> Iterator[UnparsedRecord]:
    """As `records`, but a record is parsed only on request, so that earlier ones can be skipped quickly."""
    if not path.is_dir():
        yield from _scanned(path, error)
        return
    inside = [file for file in files(path, error) if suffix(file) in SUFFIXES]
    if not inside:
        raise error(f"{path} holds no {', '.join(filter(None, SUFFIXES))} file")
    for file in inside:
        yield from _scanned(file, error)


def suffix(path: Path) -> str:
    """The suffix that gives a file's format, in lower case, without .gz."""
    return (path.with_suffix("") if is_gz(path) else path).suffix.lower()


def is_gz(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.suffix.lower() == ".gz"


def files(folder: Path, error: Error = DataError) -> list[Path]:
    """All files in a folder, recursively, in sorted order; hidden ones and hidden folders are left out.

    Links to folders are followed, each folder once. Raises `error` for a folder that can't be listed.
    """
    found: list[Path] = []
    seen: set[Path] = set()

    def refuse(refused: OSError) -> None:
        raise error(f"can't read {refused.filename}: {refused.strerror}") from None

    for here, inside, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(here).resolve()
        inside[:] = [name for name in inside if not name.startswith(".") and real not in seen]
        found += [Path(here, name) for name in names if not name.startswith(".") and real not in seen]
        seen.add(real)
    return sorted(found)


@contextmanager
def opened(path: Path, error: Error = DataError) -> Iterator[IO[bytes]]:
    """A file to read, decompressed if its name says so. Failures inside raise `error` naming the file."""
    try:
        file: Any = gzip.open(path) if is_gz(path) else open(path, "rb")
        with file:
            yield file
    except (OSError, EOFError, zlib.error) as refused:
        reason = getattr(refused, "strerror", None) or str(refused) or "damaged"
        raise error(f"can't read {path}: {reason}") from None


def text(raw: bytes, where: Path | str, error: Error = DataError) -> str:
    """UTF-8 bytes as text, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{where} is not UTF-8 text; convert it") from None


def read_text(path: Path, error: Error = DataError) -> str:
    """A whole file as text."""
    with opened(path, error) as file:
        return text(file.read(), path, error)


def parse(raw: bytes, where: Path | str, error: Error = DataError) -> Any:
    """A JSON value. Raises `error` for anything else, NaN and infinities too."""
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as wrong:  # UnicodeDecodeError is a ValueError
        raise error(f"{where} is not JSON in UTF-8: {wrong}; fix or remove it") from None


def read_json(path: Path, error: Error = DataError) -> Any:
    """The JSON value of a whole file."""
    with opened(path, error) as file:
        return parse(file.read(), path, error)


def listed(value: Any, where: Path | str, error: Error = DataError) -> list[Any]:
    """The records of a whole JSON file: a list, or one under "data"."""
    found = value.get("data") if isinstance(value, Mapping) else value
    if not isinstance(found, list):
        raise error(f"{where} holds neither a list of records nor one under 'data'")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} isn't a JSON number")


def _scanned(path: Path, error: Error) -> Iterator[UnparsedRecord]:
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise error(f"{path}: {kind} isn't supported; use {', '.join(filter(None, SUFFIXES))}, each also with .gz")
    with opened(path, error) as file:
        if kind in LINES:
            for number, line in enumerate(file, 1):  # binary files split on b"\n" alone
                if line.strip():
                    where = f"{path}:{number}"
                    yield UnparsedRecord(where, line, partial(_parsed, line, where, error))
        elif kind in WHOLE:
            for number, value in enumerate(listed(parse(file.read(), path, error), path, error), 1):
                where = f"{path}, record {number}"
                yield UnparsedRecord(where, json.dumps(value).encode(), partial(_object, value, where, error))
        elif kind in TABLE:
            yield from _table(file, path, error)
        else:
            yield from _parquet(file, path, error)


def _parsed(line: bytes, where: str, error: Error) -> dict[str, Any]:
    return _object(parse(line, where, error), where, error)


def _object(value: Any, where: str, error: Error) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{where} holds a {type(value).__name__}; every record must be a JSON object")
    return value


def _table(file: IO[bytes], path: Path, error: Error) -> Iterator[UnparsedRecord]:
    """The rows of a CSV table. Quoted cells may contain line ends."""
    try:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        header = next(rows, [])
        for number, cells in enumerate(filter(None, rows), 1):
            where = f"{path}, row {number}"
            if len(cells) != len(header):
                raise error(f"{where} has {len(cells)} cells, but the header names {len(header)} columns")
            record = dict(zip(header, cells, strict=True))
            yield UnparsedRecord(where, json.dumps(cells).encode(), partial(_object, record, where, error))
    except (csv.Error, UnicodeDecodeError) as wrong:
        raise error(f"{path} isn't a table in UTF-8: {wrong}") from None


def _parquet(file: IO[bytes], path: Path, error: Error) -> Iterator[UnparsedRecord]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise error(f"to read {path}, install pyarrow: pip install 'kvgraph[eval]'") from None
    number, raw = 0, str(path.stat().st_size).encode()
    try:
        with ParquetFile(io.BytesIO(file.read()) if is_gz(path) else file) as table:
            for batch in table.iter_batches(ROWS):
                for i in range(batch.num_rows):
                    number += 1
                    yield UnparsedRecord(f"{path}, row {number}", raw, partial(_cells, batch, i))
    except pyarrow.ArrowException as wrong:
        raise error(f"can't read {path}: {first_line(wrong)}") from None


def _cells(batch: Any, i: int) -> dict[str, Any]:
    return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to quote it in a message of one line."""
    return (str(error).strip() or repr(error)).split("\n")[0][:200]


# -- lines by number --------------------------------------------------------------------------------------------------


class Lines:
    """The lines of a file by number, 8 bytes of memory each. `starts` [lines + 1] int64: where each begins, and the end.

    Raises OSError.
    """

    def __init__(self, path: Path, starts: np.ndarray | None = None):
        self.path = path
        self.starts = line_starts(path) if starts is None else starts
        self._file = open(path, "rb")  # as long as the object

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> bytes:
        start, end = (int(at) for at in self.starts[range(len(self))[number] :][:2])
        return os.pread(self._file.fileno(), end - start, start)


def line_starts(path: Path, seen: Callable[[bytes], object] = len) -> np.ndarray:
    """Where each line of a file begins, and where the last one ends: int64 [lines + 1]. seen: gets all bytes, in order."""
    found, size = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(SCANNED):
            seen(block)
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
            size += len(block)
    starts = np.concatenate(found)
    return starts if starts[-1] == size else np.append(starts, size)


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that replaces `path` when the block ends. If the block fails, `path` stays unchanged.

    A path that isn't an ordinary file (a pipe, /dev/stdout) is written to directly.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # a link stays a link
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = str(path)  # the name that users know
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole or not at all."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Replace a file by a JSON value, as a whole or not at all."""
    write(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def line(value: Any) -> bytes:
    """A JSON value as a line of a file. Raises UnicodeEncodeError for half of a surrogate pair, ValueError for NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append(file: IO[bytes], content: bytes | bytearray) -> None:
    """Append to an unbuffered file, all or nothing: after an OSError (a full disk) the file is as before."""
    end, left = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while left:
            written = file.write(left)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
            left = left[written:]
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to. A last line without its end, left by a crash, is cut off."""
    content, end, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(content) + len(end))
    return content.split(b"\n") if end else []


# -- folders written by one process at a time -------------------------------------------------------------------------


@contextmanager
def errors_named(folder: Path, error: Error) -> Iterator[None]:
    """Turn errors of the file system into one line that says where."""
    try:
        yield
    except OSError as refused:
        where = refused.filename or folder
        raise error(
            f"{where}: {refused.strerror or refused}; fix that and run the same command again to continue"
        ) from refused


@contextmanager
def locked(folder: Path, error: Error, name: str = "") -> Iterator[None]:
    """Locks a folder, or with `name` one of its files, so that two processes can't both write it. Makes the folder.

    The lock file (.lock, .NAME.lock) stays there. The lock is released when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{name}.lock" if name else folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise error(
            f"{folder / name} is being written by another process; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
