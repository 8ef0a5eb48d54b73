"""A search index in a folder: words, embeddings if there is a model for them, and the names of what is found.

`index.json` names the folder of the present files, which is complete before it is named. So a reader sees one state or
the other, and a build that was killed leaves the old one. A build takes over the embeddings of passages that an earlier
one, finished or not, has embedded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvgraph.data import io
from kvgraph.data.retrieval import words
from kvgraph.data.retrieval.base import Embedder, Hit, Retrievable, RetrievalError, read_as
from kvgraph.data.retrieval.vectors import EMBEDDED, Rows, in_half, mapped, nearest

FORMAT = 1
INDEX, PASSAGES, DIGESTS, VECTORS = "index.json", "passages.jsonl", "digests.npy", "vectors"
POOL = 100  # passages of each ranking that are fused
RRF = 60  # of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): a passage at rank r gets 1 / (60 + r)
# Chosen on every second question of `benchmarks.retrieval`, by words alone:
SEEDS = 3  # best passages whose sources are looked at
FADE = 0.97  # of a reader's score, for what it reads: a place some two ranks behind the reader's

Sources = Mapping[str, Iterable[str]] | Callable[[str], Iterable[str]]
"""The ids that a passage reads, by its id."""


class SearchIndex:
    """Passages that can be searched, opened from a folder (`build`, `open`). Safe to use from several threads.

    embedder: the name of the model of its embeddings, None if it has none. ids: of the passages, in the order given.
    """

    def __init__(self, folder: Path, load: Callable[[str], Embedder | None] | None = None):
        self.folder = folder
        note = _note(folder)
        here = folder / note["files"]
        try:
            lines = [json.loads(line) for line in (here / PASSAGES).read_bytes().splitlines()]
            self.ids, self._titles, self._sizes = zip(*lines, strict=True)
            self._words = words.WordIndex(here)
            self.embedder: str | None = note["embedder"]
            self._vectors = None if self.embedder is None else mapped(here / f"{VECTORS}.float16", note["width"])
            if self._vectors is not None and len(self._vectors) != len(self.ids):
                raise ValueError(f"{len(self._vectors)} embeddings of {len(self.ids)} passages")
        except (OSError, ValueError, LookupError) as error:
            raise RetrievalError(
                f"the index {folder} is damaged ({io.first_line(error)}); delete the folder and build it again"
            ) from None
        self._numbers = {id: i for i, id in enumerate(self.ids)}
        self._load = load
        self._model: Embedder | None = None

    @classmethod
    def build(
        cls,
        folder: Path,
        passages: Iterable[Retrievable],
        embedder: Embedder | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> SearchIndex:
        """Make the index of these passages, in their order, in place of the one that the folder held; returns it.

        embedder: without one, words alone are searched. progress: told what takes long. Raises RetrievalError: no passages,
        two of one id, a folder that can't be written, or another process that builds there.
        """
        listed = list(passages)
        _check(listed)
        with io.errors_named(folder, RetrievalError), io.locked(folder, RetrievalError):
            digests = [xxhash.xxh3_128_digest(read_as(p.title, p.text).encode(errors="replace")) for p in listed]
            lines = b"".join(io.line([p.id, p.title, _size(p)]) for p in listed)
            about = json.dumps([FORMAT, embedder and embedder.name])
            name = xxhash.xxh3_128_hexdigest(about.encode() + lines + b"".join(digests))
            here = folder / name
            if not (folder / INDEX).is_file() or _note(folder)["files"] != name:
                here.mkdir(exist_ok=True)
                np.save(here / DIGESTS, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16))
                if embedder is not None:
                    _embed(folder, here, listed, digests, embedder, progress)
                progress(f"indexing the words of {len(listed):,} passages")
                words.WordIndex.build(here, (read_as(p.title, p.text) for p in listed))
                io.write(here / PASSAGES, lines)
                note = {"format": FORMAT, "files": name, "passages": len(listed)}
                note |= {"embedder": embedder and embedder.name, "width": embedder and embedder.width}
                io.write_json(folder / INDEX, note)
            for old in folder.iterdir():
                if old.name != name and _is_build(old):
                    shutil.rmtree(old, ignore_errors=True)  # what was opened from it stays mapped
        index = cls(folder)
        index._model = embedder
        return index

    @classmethod
    def open(cls, folder: Path, load: Callable[[str], Embedder | None] | None = None) -> SearchIndex:
        """The index in a folder. load: gives the embedder of a name, at the first search that needs it; without it, or if it
        gives None, words alone are searched. Raises RetrievalError if there is none, or it is damaged.
        """
        return cls(folder, load)

    def __len__(self) -> int:
        return len(self.ids)

    def by_words(self, query: str, count: int) -> list[tuple[int, float]]:
        """(number, BM25 score) of the best passages that share a word with the query, best first."""
        scores = self._words.scores(query)
        rows, products = nearest(np.ones((1, 1), np.float32), scores[:, None], count)
        return [(int(row), float(score)) for row, score in zip(rows[0], products[0], strict=True) if score > 0]

    def by_vectors(self, query: str, count: int) -> list[tuple[int, float]]:
        """(number, similarity) of the passages nearest to the query, best first. Raises RetrievalError without a model."""
        if self._vectors is None or self.embedder is None:
            raise RetrievalError(f"the index {self.folder} has no embeddings; build it with a model")
        model = self._embeds()
        if model is None:
            raise RetrievalError(f"the index {self.folder} was opened without a model; it needs {self.embedder}")
        rows, products = nearest(model.questions([query]), self._vectors, count)
        return [(int(row), float(score)) for row, score in zip(rows[0], products[0], strict=True)]

    def search(
        self, query: str, top: int, sources: Sources | None = None, tokens: int | None = None, hops: int = 1
    ) -> list[Hit]:
        """The best `top` passages for a query, best first: words and embeddings fused by reciprocal rank.

        sources: who reads whom; what the best passages read, up to `hops` edges away, comes soon after them. tokens: at most so
        many in all; a passage that is too long is left out. Deterministic: equal scores go by the order of the passages.
        """
        rankings = [[row for row, _ in self.by_words(query, POOL)]]
        if self._embeds() is not None:
            rankings.append([row for row, _ in self.by_vectors(query, POOL)])
        scores: dict[int, float] = {}
        for ranking in rankings:
            _fuse(scores, ranking)
        via: dict[int, str] = {}
        if sources is not None:
            via = self._expand(scores, sources, hops)
        hits: list[Hit] = []
        for row in _ordered(scores):
            if len(hits) == top:
                break
            if tokens is None or self._sizes[row] <= tokens:
                tokens = None if tokens is None else tokens - self._sizes[row]
                hits.append(Hit(self.ids[row], self._titles[row], scores[row], via.get(row, "")))
        return hits

    def _embeds(self) -> Embedder | None:
        """The model for questions, loaded when it is first needed."""
        if self._model is None and self._load is not None and self.embedder is not None:
            self._model, self._load = self._load(self.embedder), None
        return None if self.embedder is None else self._model

    def _expand(self, scores: dict[int, float], sources: Sources, hops: int) -> dict[int, str]:
        """Raise what the best passages read to FADE of their scores, `hops` edges far; returns what led to it, by number.

        So a source stands a few places behind its best reader, and no passage gains by being read often.
        """
        read = sources if callable(sources) else lambda id: sources.get(id, ())
        via: dict[int, str] = {}
        frontier = _ordered(scores)[:SEEDS]
        for _ in range(hops):
            reached: dict[int, float] = {}
            for row in frontier:
                for source in (self._numbers[id] for id in read(self.ids[row]) if id in self._numbers):
                    if FADE * scores[row] > max(scores.get(source, 0.0), reached.get(source, 0.0)):
                        reached[source] = FADE * scores[row]
                        via[source] = self.ids[row]
            scores |= reached
            frontier = _ordered(reached)
        return via


def _fuse(scores: dict[int, float], ranking: Sequence[int]) -> None:
    for rank, row in enumerate(ranking, 1):
        scores[row] = scores.get(row, 0.0) + 1 / (RRF + rank)


def _ordered(scores: Mapping[int, float]) -> list[int]:
    """Numbers by their scores, best first; of equal ones the lower number."""
    return sorted(scores, key=lambda row: (-scores[row], row))


def _check(passages: Sequence[Retrievable]) -> None:
    if not passages:
        raise RetrievalError("there are no passages to index")
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise RetrievalError(f"two passages have the id {passage.id[:100]!r}; give each its own")
        seen.add(passage.id)


def _size(passage: Retrievable) -> int:
    tokens = getattr(passage, "tokens", None)
    return len(words.words(read_as(passage.title, passage.text)) if tokens is None else tokens)


def _is_build(folder: Path) -> bool:
    """Whether a folder has the name and files of a build, finished or not; any other is the user's."""
    return re.fullmatch("[0-9a-f]{32}", folder.name) is not None and (folder / DIGESTS).is_file()


def _note(folder: Path) -> dict[str, Any]:
    """What index.json says. Raises RetrievalError."""
    try:
        note: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise RetrievalError(
            f"there is no index in {folder} ({error.strerror}); build one with `kvgraph index`"
        ) from None
    except ValueError:
        note = {}
    if note.get("format") != FORMAT or not {"files", "embedder", "width"} <= note.keys():
        raise RetrievalError(f"{folder / INDEX} isn't one of this version; delete the folder and build the index again")
    return note


def _embed(
    folder: Path,
    here: Path,
    passages: Sequence[Retrievable],
    digests: Sequence[bytes],
    embedder: Embedder,
    progress: Callable[[str], None],
) -> None:
    """Write the embeddings of passages; those that an earlier build has aren't computed again."""
    made_of = {"retriever": embedder.name, "width": embedder.width}
    with Rows(here, VECTORS, "float16", embedder.width, EMBEDDED, made_of) as rows:
        known = _known(folder, here, embedder)

        def block(start: int, end: int) -> np.ndarray:
            made = np.empty((end - start, embedder.width), np.float16)
            new = []
            for i in range(start, end):
                if digests[i] in known:
                    vectors, row = known[digests[i]]
                    made[i - start] = vectors[row]
                else:
                    new.append(i)
            if new:
                texts = [read_as(passages[i].title, passages[i].text) for i in new]
                made[[i - start for i in new]] = in_half(embedder.passages(texts), embedder.name)
            return made

        rows.fill(len(passages), "passages embedded", progress, block)


def _known(folder: Path, here: Path, embedder: Embedder) -> dict[bytes, tuple[np.ndarray, int]]:
    """Where the other builds in a folder have embeddings by this model, by the digest of what was embedded."""
    found: dict[bytes, tuple[np.ndarray, int]] = {}
    for old in sorted(folder.iterdir()):
        if old == here or not (old / f"{VECTORS}.json").is_file():
            continue
        try:
            made_of = json.loads((old / f"{VECTORS}.json").read_text(encoding="utf-8"))
            if made_of != {"retriever": embedder.name, "width": embedder.width}:
                continue
            vectors = mapped(old / f"{VECTORS}.float16", embedder.width)
            digests = np.load(old / DIGESTS)
        except (OSError, ValueError, EOFError):
            continue  # a build that was killed at its start; it has nothing to give
        for row, digest in enumerate(digests[: len(vectors)]):
            found.setdefault(digest.tobytes(), (vectors, row))
    return found
