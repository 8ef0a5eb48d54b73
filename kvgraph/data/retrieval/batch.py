"""The best passages for each of many questions, by embeddings. Whatever is large is on disk.

Embeddings and results are appended to files whose length says how far they are, so that work that was killed goes on
where it stopped and ends with the bytes of an unbroken run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from kvgraph.data import io
from kvgraph.data.retrieval.base import Embedder, RetrievalError, read_as
from kvgraph.data.retrieval.vectors import EMBEDDED, Rows, in_half, nearest

SEARCHED = 2048  # questions at a time
TSV = ("id", "text", "title")


class Passages:
    """The passages of a file, by number: {"title", "text"} each.

    The file has one a line and isn't compressed: JSON Lines with `title` and `text`, or, named .tsv, the columns id, text
    and title under a line that says so, as in DPR's Wikipedia (arXiv 2004.04906). 8 bytes of memory a passage.
    sha: of the file's bytes. Raises RetrievalError naming file and line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tsv = path.suffix == ".tsv"
        digest = xxhash.xxh3_128()
        try:
            self._lines = io.Lines(path, io.line_starts(path, digest.update))
        except OSError as error:
            raise RetrievalError(f"can't read {path}: {error.strerror}") from None
        self.sha = digest.hexdigest()
        if self._tsv and (not len(self._lines) or tuple(self._cells(self._lines[0])) != TSV):
            raise RetrievalError(f"{path}:1 must name the columns {', '.join(TSV)}, with tabs between them")

    def __len__(self) -> int:
        return len(self._lines) - self._tsv

    def __getitem__(self, number: int) -> dict[str, str]:
        line = self._lines[number + self._tsv]
        try:
            fields = dict(zip(TSV, self._cells(line), strict=True)) if self._tsv else json.loads(line)
            passage = {"title": fields["title"], "text": fields["text"]}
        except (ValueError, LookupError, TypeError):
            passage = {}
        if not passage or not all(isinstance(value, str) for value in passage.values()):
            what = "the columns id, text and title" if self._tsv else "an object with a title and a text"
            raise RetrievalError(f"{self.path}:{number + 1 + self._tsv} isn't {what}")
        return passage

    @staticmethod
    def _cells(line: bytes) -> list[str]:
        return next(csv.reader([line.decode().rstrip("\r\n")], delimiter="\t"), [])


def best(
    embedder: Embedder,
    passages: Passages,
    questions: Sequence[str],
    count: int,
    folder: Path,
    index: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """The numbers of each question's best passages, best first, in a file of `folder`: [questions, count] int64, with
    fewer columns if there are fewer passages.

    index: the folder for the passages' embeddings, 2 bytes a number; it can be shared by several sets of questions.
    progress: told what is being done. Raises RetrievalError: no passages, or files that were begun for others.
    """
    if not len(passages):
        raise RetrievalError(f"{passages.path} holds no passages")
    count = min(count, len(passages))
    made_of = {"retriever": embedder.name, "width": embedder.width, "passages": passages.sha}
    with Rows(index, "embeddings", "float16", embedder.width, EMBEDDED, made_of) as embeddings:
        embeddings.fill(len(passages), "passages embedded", progress, lambda a, b: _embedded(embedder, passages, a, b))
        asked = xxhash.xxh3_128_hexdigest("\0".join(questions).encode())
        with Rows(folder, "best", "int64", count, SEARCHED, made_of | {"questions": asked}) as found:
            vectors = embeddings.read()
            found.fill(
                len(questions),
                "questions searched",
                progress,
                lambda a, b: nearest(embedder.questions(questions[a:b]), vectors, count)[0],
            )
            return found.read()


def ranked(
    embedder: Embedder, question: str, passages: Sequence[dict[str, str]], count: int
) -> tuple[dict[str, str], ...]:
    """The best `count` of a few passages for a question, best first; passages that are alike keep their order."""
    if not passages:
        return ()
    vectors = embedder.passages([read_as(p["title"], p["text"]) for p in passages])
    rows, _ = nearest(embedder.questions([question]), vectors, count)
    return tuple(passages[int(i)] for i in rows[0])


def _embedded(embedder: Embedder, passages: Passages, start: int, end: int) -> np.ndarray:
    """Embeddings of passages `start` to `end`, in float16."""
    texts = [read_as(passage["title"], passage["text"]) for passage in (passages[i] for i in range(start, end))]
    return in_half(embedder.passages(texts), embedder.name)
