"""What `ask --index` and `chat` share: finding chunks for a question, and a prompt over their stored KV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvgraph.data import chat
from kvgraph.data.chat import Document, Prompt
from kvgraph.data.retrieval import Hit
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine

IndexName = Annotated[
    str | None,
    typer.Option("--index", metavar="NAME", help="Find documents in this index or stored graph (see `kvgraph index`)."),
]
Retrieve = Annotated[int, typer.Option(min=1, max=1000, help="With --index: how many chunks to find for a question.")]


def model_of(store: Path | None, index: str | None) -> str:
    """The model of an index, or else that of `kvgraph demo`."""
    from kvgraph import demo, indexing

    if store is not None and index is not None and index in indexing.names(store):
        return str(indexing.described(store, index)["model"])
    return str(demo.adapter())


def folder_of(places: Sequence[str] | None) -> Path:
    """The folder among the places of the store, where an index is. Raises BadParameter."""
    for place in places or ():
        if "://" not in place:
            return Path(place).expanduser()
    raise typer.BadParameter("--index needs --store FOLDER, the one that was indexed into")


class Indexed:
    """An index, opened for an engine whose store is in the same folder. Raises KVGraphError if it hasn't this index."""

    def __init__(self, engine: Engine, folder: Path, name: str):
        from kvgraph.data.library import LIBRARY, Library, NotStoredError
        from kvgraph.data.retrieval.stored import GraphIndexes
        from kvgraph.models.embedder import SentenceEmbedder

        self._engine = engine
        self._library = Library(folder / LIBRARY, engine.model.fingerprint)
        self._indexes = GraphIndexes(self._library, folder, SentenceEmbedder)
        try:
            self._graph = self._library.graph("", name)
        except NotStoredError:
            self.close()
            raise KVGraphError(
                f"{folder} has no index {name!r} of this model; give the model it was made with, or make it with "
                f"`kvgraph index SOURCE --name {name} --store {folder}`"
            ) from None

    @property
    def method(self) -> Method:
        """The method that it was encoded with."""
        return self._graph.method

    def find(self, question: str, count: int) -> list[Hit]:
        """The best chunks for a question, best first."""
        return self._indexes.search(self._graph, question, count)

    def prompt(self, said: Sequence[Mapping[str, str]], question: str, hits: Iterable[Hit]) -> ContextGraph:
        """The question after what was said before it, over the chunks that were found."""
        part = self._library.part(self._graph, [hit.id for hit in hits])
        documents = [Document(id=segment.id, tokens=segment.tokens) for segment in part.segments]
        made = _prompt(self._engine.model.tokenizer, said, question, documents).graph((), [d.id for d in documents])
        return ContextGraph(made.segments, made.query, list(made.prefix), part.edges, made.names, part.chosen)

    def close(self) -> None:
        """Let go of the files."""
        self._indexes.close()
        self._library.close()


def _prompt(tokenizer: Any, said: Sequence[Mapping[str, str]], question: str, documents: Sequence[Document]) -> Prompt:
    """The prompt of the question-answering tasks, which the shipped adapter was tuned on, after a conversation."""
    # Not at the top: the tasks take longer to import than the rest of the command line.
    from kvgraph.data.tasks import qa

    asked = qa.QUESTION.format(question=question) if documents else question
    if not getattr(tokenizer, "chat_template", None):
        return chat.plain(tokenizer, f"{qa.INSTRUCTION}\n\n", documents, asked)
    system = [{"role": "system", "content": qa.INSTRUCTION}] if documents else []
    try:
        return chat.chat(tokenizer, [*system, *said, {"role": "user", "content": asked}], documents)
    except chat.ChatError:  # some templates take no system message
        return chat.chat(tokenizer, [*said, {"role": "user", "content": asked}], documents)


def citations(hits: Iterable[Hit]) -> str:
    """What an answer was read from, a line each."""
    return "".join(f"[{i}] {hit.title or hit.id} ({hit.id})\n" for i, hit in enumerate(hits, 1))
