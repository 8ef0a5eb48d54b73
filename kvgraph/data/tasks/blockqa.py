"""The processed question-answering sets of Block-Attention, which Graph-KV evaluates and KVLink trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, checked
from kvgraph.data.task import Hub, Item, Task
from kvgraph.data.tasks import qa


class Passage(BaseModel):
    """One of a record's `documents`; the score is the retriever's (Contriever's), higher is better."""

    title: str
    text: str
    score: float = Field(allow_inf_nan=False)


class BlockQARecord(BaseModel):
    """A line of datahub/rag/*/dataset. Its `prompt`, `generated` and `inputs` are for training."""

    question: str
    answers: Answers
    documents: Annotated[list[Passage], Field(min_length=1)]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its documents by score, best first, as top-k and layered edges expect.

    Graph-KV's own runs put the best document last.
    """
    ids = qa.Ids()
    for record in checked(BlockQARecord, records):
        ranked = sorted(record.documents, key=lambda document: document.score, reverse=True)
        yield Item(
            id=ids(record.question),
            question=record.question,
            references=record.answers,
            documents=tuple(Document(d.text, d.title) for d in ranked),
        )


def _task(name: str, about: str, folder: str) -> Task:
    return qa.task(
        name=name,
        about=f"{about} with ten passages ranked by a retriever, as processed by Block-Attention",
        source="Block-Attention (arXiv 2409.15355): github.com/TemporaryLoRA/Block-Attention, data_process/rag",
        items=items,
        metrics=("substring_em", "em", "f1"),
        hub=Hub("Graph-COM/GraphKV", file=f"datahub/rag/{folder}/dataset"),
        breakdowns=(),
    )


BLOCK_2WIKI = _task("block-2wiki", "2WikiMultiHopQA", "2wiki_dev")
BLOCK_HOTPOTQA = _task("block-hotpotqa", "HotpotQA", "hqa_eval")
BLOCK_NQ = _task("block-nq", "Natural Questions", "nq_eval")
BLOCK_TRIVIAQA = _task("block-triviaqa", "TriviaQA", "tqa_eval")
