"""Nearest neighbours: a chunk reads the chunks that are most alike."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from kvgraph.data.graphs.base import GraphBuilder, require_bool
from kvgraph.data.retrieval.base import read_as
from kvgraph.data.retrieval.words import WordIndex
from kvgraph.data.table import ChunkTable


@dataclass(frozen=True)
class Neighbours(GraphBuilder):
    """A chunk reads the chunks whose words are most like its own, by BM25 with the chunk as the query.

    within: whether chunks of its own page count.

    It assumes that what shares rare words belongs together. It needs no structure at all, so it is what remains for loose
    notes, and the control for other edges: in `benchmarks.edges` true links have to do better than these.
    """

    name: ClassVar[str] = "neighbours"

    within: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool(self.name, "within", self.within)

    def sources(self, table: ChunkTable) -> Iterator[tuple[int, list[int]]]:
        """The most alike first, equal ones in the order of the table; none that shares no word."""
        if len(table) < 2:
            return
        texts = [read_as(chunk.title, chunk.text) for chunk in table.chunks]
        with tempfile.TemporaryDirectory(prefix="kvgraph-neighbours-") as folder:
            index = WordIndex.build(Path(folder), texts)
            for reader, text in enumerate(texts):
                scores = np.asarray(index.scores(text)).copy()
                scores[reader] = 0
                if not self.within:
                    places = table.pages[table.chunks[reader].page]
                    scores[places.start : places.stop] = 0
                best = np.argsort(-scores, kind="stable")[
                    : 4 * self.k
                ]  # more than it keeps: some may exceed the tokens
                yield reader, [int(i) for i in best if scores[i] > 0]
