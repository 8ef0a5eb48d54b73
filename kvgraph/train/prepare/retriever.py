"""The best passages for each question, by an embedding retriever. Large data is on disk.

The search is exact and written here, in 15 lines over a mapped file. An index of faiss or hnswlib isn't simpler: a flat
one holds all vectors in memory, and an approximate one makes the training data depend on how it was built.

Embeddings and results are appended to files whose length shows the progress. Killed work resumes where it stopped and ends
with the same bytes as an unbroken run.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from kvgraph.data import io
from kvgraph.errors import KVGraphError

if TYPE_CHECKING:
    from torch import Tensor

CONTRIEVER = "facebook/contriever"
EMBEDDED = 1024  # passages at a time; a resumed run starts with a whole block, so batches and rounding stay the same
SEARCHED, SCORED = 2048, 1 << 15  # questions and passages at a time: 256 MiB of scores
TSV = ("id", "text", "title")


class RetrieverError(KVGraphError):
    """Passages can't be found: a bad collection, a missing model, or files of another collection or model."""


class Encoder(Protocol):
    """Turns texts into vectors whose dot product is their similarity. name: changes whenever the vectors do."""

    name: str
    width: int

    def questions(self, texts: Sequence[str]) -> Tensor:
        """[n, width] float32."""

    def passages(self, texts: Sequence[str]) -> Tensor:
        """[n, width] float32."""


class SentenceEncoder:
    """A sentence-transformers model with its own pooling, prompts and similarity (cosine or dot product).

    Any other encoder, such as Contriever (arXiv 2112.09118), is used with the mean of its last hidden states and the dot
    product. Runs on a GPU if there is one. Raises RetrieverError if the library or the model is missing.
    """

    def __init__(self, name: str):
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.util import is_sentence_transformer_model
        except ImportError:
            raise RetrieverError(
                "to find passages, install sentence-transformers: pip install 'kvgraph[retriever]'; or --set retriever=none"
            ) from None
        try:
            self._model = SentenceTransformer(name)
            similarity = self._model.similarity_fn_name if is_sentence_transformer_model(name) else "dot"
        except Exception as error:  # the library's own, transformers', the hub's
            raise RetrieverError(f"can't load the retriever {name}: {io.first_line(error)}") from None
        if similarity not in ("cosine", "dot"):
            raise RetrieverError(f"the retriever {name} compares by {similarity}; give one with cosine or dot product")
        self.name = name
        self._options: dict[str, Any] = {
            "convert_to_tensor": True,
            "normalize_embeddings": similarity == "cosine",
            "show_progress_bar": False,
        }
        self.width = self.questions([name]).shape[1]

    def questions(self, texts: Sequence[str]) -> Tensor:
        """See Encoder."""
        return self._model.encode_query(list(texts), **self._options).float().cpu()

    def passages(self, texts: Sequence[str]) -> Tensor:
        """See Encoder."""
        return self._model.encode_document(list(texts), **self._options).float().cpu()


class Passages:
    """The passages of a file, by number: {"title", "text"} each.

    The file has one passage per line and isn't compressed: JSON Lines with `title` and `text`, or, if named .tsv, the
    columns id, text and title under a header line, as in DPR's Wikipedia (arXiv 2004.04906). Takes 8 bytes of memory per
    passage. sha: of the file's bytes. Raises RetrieverError naming file and line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tsv = path.suffix == ".tsv"
        digest = xxhash.xxh3_128()
        try:
            self._lines = io.Lines(path, io.line_starts(path, digest.update))
        except OSError as error:
            raise RetrieverError(f"can't read {path}: {error.strerror}") from None
        self.sha = digest.hexdigest()
        if self._tsv and (not len(self._lines) or tuple(self._cells(self._lines[0])) != TSV):
            raise RetrieverError(f"{path}:1 must name the columns {', '.join(TSV)}, with tabs between them")

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
            raise RetrieverError(f"{self.path}:{number + 1 + self._tsv} isn't {what}")
        return passage

    @staticmethod
    def _cells(line: bytes) -> list[str]:
        return next(csv.reader([line.decode().rstrip("\r\n")], delimiter="\t"), [])


def best(
    encoder: Encoder,
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
    progress: called with messages. Raises RetrieverError if there are no passages, or for files of other data.
    """
    if not len(passages):
        raise RetrieverError(f"{passages.path} holds no passages")
    count = min(count, len(passages))
    made_of = {"retriever": encoder.name, "width": encoder.width, "passages": passages.sha}
    with Rows(index, "embeddings", "float16", encoder.width, EMBEDDED, made_of) as embeddings:
        _fill(embeddings, len(passages), "passages embedded", progress, lambda a, b: _embedded(encoder, passages, a, b))
        asked = xxhash.xxh3_128_hexdigest("\0".join(questions).encode())
        with Rows(folder, "best", "int64", count, SEARCHED, made_of | {"questions": asked}) as found:
            vectors = embeddings.read()
            _fill(
                found,
                len(questions),
                "questions searched",
                progress,
                lambda a, b: search(encoder.questions(questions[a:b]), vectors, count).cpu().numpy(),
            )
            return found.read()


def ranked(
    encoder: Encoder, question: str, passages: Sequence[dict[str, str]], count: int
) -> tuple[dict[str, str], ...]:
    """The best `count` of a few passages for a question, best first; equally good ones keep their order."""
    if not passages:
        return ()
    scores = encoder.passages([_read(p) for p in passages]) @ encoder.questions([question])[0]
    order = scores.argsort(descending=True, stable=True)[:count]
    return tuple(passages[int(i)] for i in order)


def search(queries: Tensor, vectors: np.ndarray, count: int) -> Tensor:
    """The `count` rows of `vectors` [n, D] with the highest dot products with each query: [q, count] int64, best first.

    queries [q, D] float32. Exact: every row is compared, in float32, a block at a time.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries = queries.to(device)
    scores = torch.empty(len(queries), 0, device=device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(vectors), SCORED):
        block = torch.from_numpy(np.array(vectors[start : start + SCORED])).to(device).float()
        top = (queries @ block.T).topk(min(count, len(block)), dim=1)
        scores, rows = torch.cat([scores, top.values], 1), torch.cat([rows, top.indices + start], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        scores, rows = scores.gather(1, order), rows.gather(1, order)
    return rows


class Rows:
    """An array on disk that grows at its end: rows of `width` numbers, nothing else in the file.

    NAME.json beside it describes its data. block: an incomplete last block was cut off by a crash, or was the end; it is
    written again. One process at a time. Raises RetrieverError.
    """

    def __init__(self, folder: Path, name: str, dtype: str, width: int, block: int, made_of: dict[str, Any]):
        self.path, self.dtype, self.width, self.block = folder / f"{name}.{dtype}", np.dtype(dtype), width, block
        with ExitStack() as opening:
            opening.enter_context(io.locked(folder, RetrieverError, self.path.name))
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
            raise RetrieverError(
                f"{self.path} was begun with other {differing[0]}; give another folder, or delete the file"
            )

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __len__(self) -> int:
        return self._file.seek(0, os.SEEK_END) // (self.dtype.itemsize * self.width)

    def start(self, total: int) -> int:
        """The number of complete rows, of `total`; anything after them is cut off."""
        done = len(self)
        if done < total:
            done -= done % self.block
            self._file.truncate(done * self.dtype.itemsize * self.width)
        return done

    def append(self, rows: np.ndarray) -> None:
        """Write rows [n, width] at the end. Raises OSError when the disk is full."""
        self._file.write(rows.astype(self.dtype).tobytes())
        self._file.flush()

    def read(self) -> np.ndarray:
        """All rows [n, width], mapped from the file; read-only."""
        return np.memmap(self.path, self.dtype, "r", shape=(len(self), self.width)) if len(self) else self._nothing()

    def _nothing(self) -> np.ndarray:
        return np.empty((0, self.width), self.dtype)


def _fill(
    rows: Rows, total: int, what: str, progress: Callable[[str], None], make: Callable[[int, int], np.ndarray]
) -> None:
    """Append the missing rows of `total`, block by block; make(a, b) gives rows a to b."""
    for start in range(rows.start(total), total, rows.block):
        end = min(start + rows.block, total)
        rows.append(make(start, end))
        progress(f"{end:,} of {total:,} {what}")


def _embedded(encoder: Encoder, passages: Passages, start: int, end: int) -> np.ndarray:
    """Embeddings of passages `start` to `end`, in float16."""
    vectors = encoder.passages([_read(passages[i]) for i in range(start, end)]).half()
    if not vectors.isfinite().all():
        raise RetrieverError(f"{encoder.name} gives numbers that float16 can't hold; give another retriever")
    return vectors.numpy()


def _read(passage: dict[str, str]) -> str:
    """The text that is embedded for a passage: title and text, as in Contriever's own retrieval."""
    return f"{passage['title']} {passage['text']}".strip()
