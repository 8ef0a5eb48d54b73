"""MultiHop-RAG: questions whose evidence is spread over two to four news articles, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, checked
from kvgraph.data.task import Hub, Item, Task, TaskError
from kvgraph.data.tasks import qa


class Evidence(BaseModel):
    """One of a question's `evidence_list` (`gold_list` after retrieval): a sentence of an article."""

    title: str
    url: str
    fact: str


class Article(BaseModel):
    """One article of corpus.json."""

    title: str
    url: str
    body: str


class RetrievedChunk(BaseModel):
    """One of `retrieval_list`. Its text has the article's title in it; the score is the retriever's, higher is better."""

    text: str
    score: float = Field(allow_inf_nan=False)


class MultiHopRAGRecord(BaseModel):
    """An element of MultiHopRAG.json, or of the public retrieval script's output, with `retrieval_list`.

    articles: those that the evidence is from, in its order, if the file is read together with corpus.json.
    """

    query: str
    answer: Answers
    question_type: str
    evidence_list: list[Evidence] | None = None
    gold_list: list[Evidence] = []
    retrieval_list: list[RetrievedChunk] | None = None
    articles: list[Article] | None = None

    @model_validator(mode="after")
    def _has_documents(self) -> MultiHopRAGRecord:
        if self.evidence_list is None and self.retrieval_list is None:
            raise ValueError("there must be an evidence_list or a retrieval_list")
        return self


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """Records of a JSON file, or of a folder with MultiHopRAG.json and corpus.json, which has their `articles`."""
    if not path.is_dir():
        yield from _load(path)
        return
    articles = _load(path / "corpus.json")
    corpus = {article.url: raw for article, raw in zip(checked(Article, articles), articles, strict=True)}
    records = _load(path / "MultiHopRAG.json")
    for record, raw in zip(checked(MultiHopRAGRecord, records), records, strict=True):
        urls = dict.fromkeys(evidence.url for evidence in _evidence(record))
        if missing := [url for url in urls if url not in corpus]:
            raise TaskError(f"{path / 'corpus.json'} has no article {missing[0]!r}, which {record.query[:60]!r} needs")
        yield {**raw, "articles": [corpus[url] for url in urls]}


def _load(path: Path) -> list[Mapping[str, Any]]:
    return [record for _, record in io.records(path, TaskError)]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record. Its documents are the retrieved chunks, best first, as in the paper; without them, the
    articles of the evidence; without corpus.json, the evidence sentences themselves.

    A null_query has no evidence, and therefore no documents unless chunks were retrieved for it.
    """
    ids = qa.Ids()
    for record in checked(MultiHopRAGRecord, records):
        documents, gold = _documents(record)
        yield Item(
            id=ids(record.query),
            question=record.query,
            references=record.answer,
            documents=documents,
            kind=record.question_type,
            facts={"hops": len(_evidence(record)), **qa.support(gold, len(documents))},
        )


def _evidence(record: MultiHopRAGRecord) -> list[Evidence]:
    return record.gold_list if record.evidence_list is None else record.evidence_list


def _documents(record: MultiHopRAGRecord) -> tuple[tuple[Document, ...], list[int]]:
    """The documents, and which of them contain evidence."""
    if record.retrieval_list is not None:
        ranked = sorted(record.retrieval_list, key=lambda chunk: chunk.score, reverse=True)
        facts = [_squeezed(evidence.fact) for evidence in _evidence(record)]
        gold = [i for i, chunk in enumerate(ranked) if any(fact in _squeezed(chunk.text) for fact in facts)]
        return tuple(Document(chunk.text) for chunk in ranked), gold
    if record.articles is not None:
        documents = tuple(Document(article.body, article.title, article.url) for article in record.articles)
    else:
        documents = tuple(Document(evidence.fact, evidence.title) for evidence in _evidence(record))
    return documents, list(range(len(documents)))


def _squeezed(text: str) -> str:
    """Text without white space, as the public retrieval_evaluate.py compares facts and chunks."""
    return "".join(text.split())


MULTIHOP_RAG = Task(
    name="multihop-rag",
    about="MultiHop-RAG: inference, comparison, temporal and unanswerable questions over news articles",
    source="MultiHop-RAG (arXiv 2401.15391): github.com/yixuantt/MultiHop-RAG, dataset/ and simple_retrieval.py",
    items=items,
    read=read,
    instruction=qa.INSTRUCTION,
    question=(
        "Use only the documents above to answer the question with a word or a name. If they don't tell enough, answer "
        "'Insufficient information.'\nQuestion: {question}\nAnswer:"
    ),
    max_tokens=qa.SHORT_ANSWER,
    stop=qa.STOP,
    metrics=("word_overlap", "substring_em", "em", "f1"),
    extract="answer_quote",
    hub=Hub("yixuantt/MultiHopRAG", "MultiHopRAG", "train"),
    breakdowns=("kind", "hops"),
)
