"""Rows of a table in a file, for tasks that read files of their own."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvgraph.data.task import TaskError

csv.field_size_limit(1 << 30)  # the usual limit of 128 KiB is less than a long paper


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv file, or else of JSON Lines; of either also as .gz. Raises TaskError naming the file and line."""
    gz = path.suffix == ".gz"
    try:
        with (gzip.open if gz else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            if Path(path.stem if gz else path.name).suffix == ".csv":
                yield from csv.DictReader(file)
            else:
                lines = enumerate(file, 1)
                yield from (_object(line, f"{path}, line {number}") for number, line in lines if line.strip())
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"can't read {path}: {getattr(error, 'strerror', None) or error or 'damaged'}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is no table in UTF-8: {error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where}: every line must be a JSON object, not a {type(row).__name__}")
    return row
