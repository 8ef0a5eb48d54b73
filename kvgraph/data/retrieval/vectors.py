"""Embeddings on disk, and exact search among them.

Every row is compared with the question. An index of approximate neighbours (HNSW, IVF) would save time from about a
million passages on: 100,000 rows of 384 numbers take about 30 ms on one core, the first token of an answer takes longer,
and what is encoded into a KV store is seldom more. Exact search needs no training and no further library, it finds the
same passages whatever was added before, and a file of rows can be mapped and appended to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvgraph.data import io
from kvgraph.data.retrieval.base import RetrievalError

EMBEDDED = (
    1024  # passages at a time; a run that goes on starts with such a block, so batches and roundings stay the same
)
SCORED = 1 << 15  # passages compared at a time


def nearest(queries: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows of `vectors` [n, D] with the highest dot products with each query, best first, and these products.

    queries [q, D] float32. Both results are [q, min(count, n)], int64 and float32; of equal rows the first come first.
    Exact: every row is compared, in float32, SCORED at a time.
    """
    count = min(count, len(vectors))
    best = [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries]
    for start in range(0, len(vectors), SCORED):
        products = queries @ np.asarray(vectors[start : start + SCORED], np.float32).T
        for i, row in enumerate(products):
            scores, rows = best[i]
            # A later row must beat the last of those found, so most blocks add little once there are enough.
            near = np.flatnonzero(row > scores[-1]) if len(scores) == count else _highest(row, count)
            scores = np.concatenate([scores, row[near]])
            order = np.argsort(-scores, kind="stable")[:count]
            best[i] = scores[order], np.concatenate([rows, near + start])[order]
    if not best:
        return np.empty((0, count), np.int64), np.empty((0, count), np.float32)
    return np.stack([rows for _, rows in best]), np.stack([scores for scores, _ in best])


def _highest(row: np.ndarray, count: int) -> np.ndarray:
    """Where the highest numbers of a row are, in ascending order of place: `count` of them, or more that are equal."""
    if count >= len(row):
        return np.arange(len(row))
    return np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])


class Rows:
    """An array on disk that grows at its end: rows of `width` numbers, nothing else in the file.

    Beside it, NAME.json says what it is made of. block: what isn't a whole number of blocks was cut off by a crash or
    was the end; it is written again. One process at a time. Raises RetrievalError.
    """

    def __init__(self, folder: Path, name: str, dtype: str, width: int, block: int, made_of: dict[str, Any]):
        self.path, self.dtype, self.width, self.block = folder / f"{name}.{dtype}", np.dtype(dtype), width, block
        with ExitStack() as opening:
            opening.enter_context(io.locked(folder, RetrievalError, self.path.name))
            self._file = opening.enter_context(open(self.path, "ab"))
            self._check(folder / f"{name}.json", made_of)
            self._held = opening.pop_all()

    def _check(self, note: Path, made_of: dict[str, Any]) -> None:
        if self._file.tell() == 0:
            io.write_json(note, made_of)
            return
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if differing := [name for name in made_of if before.get(name) != made_of[name]]:
            raise RetrievalError(
                f"{self.path} was begun with other {differing[0]}; give another folder, or delete the file"
            )

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __len__(self) -> int:
        return self._file.seek(0, os.SEEK_END) // (self.dtype.itemsize * self.width)

    def start(self, total: int) -> int:
        """How many rows of `total` are there for good; whatever follows them is cut off."""
        done = len(self)
        if done < total:
            done -= done % self.block
            self._file.truncate(done * self.dtype.itemsize * self.width)
        return done

    def fill(
        self, total: int, what: str, progress: Callable[[str], None], make: Callable[[int, int], np.ndarray]
    ) -> None:
        """Append what is missing of `total` rows, block by block; make(a, b) gives rows a to b. Raises OSError."""
        for start in range(self.start(total), total, self.block):
            end = min(start + self.block, total)
            self._file.write(make(start, end).astype(self.dtype).tobytes())
            self._file.flush()
            progress(f"{end:,} of {total:,} {what}")

    def read(self) -> np.ndarray:
        """All rows [n, width], mapped from the file; read-only."""
        return mapped(self.path, self.width)


def mapped(path: Path, width: int) -> np.ndarray:
    """The rows [n, width] of a file that `Rows` wrote, mapped; read-only. Its suffix is the type of its numbers."""
    dtype = np.dtype(path.suffix.removeprefix("."))
    count = path.stat().st_size // (dtype.itemsize * width)
    return np.memmap(path, dtype, "r", shape=(count, width)) if count else np.empty((0, width), dtype)


def in_half(vectors: np.ndarray, name: str) -> np.ndarray:
    """Vectors in float16. Raises RetrievalError for numbers that it can't hold."""
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    if not np.isfinite(half).all():
        raise RetrievalError(f"{name} gives numbers that float16 can't hold; give another retriever")
    return half
