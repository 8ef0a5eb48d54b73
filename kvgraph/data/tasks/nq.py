"""Natural Questions among distractors, with the gold passage at a known position (the lost-in-the-middle files)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel

from kvgraph.data.chat import Document
from kvgraph.data.schema import Answers, checked
from kvgraph.data.task import Item, TaskError
from kvgraph.data.tasks import qa


class Passage(BaseModel):
    """A retrieved passage, or the gold one, which has no id."""

    id: str = "gold"
    title: str
    text: str
    isgold: bool


def _one_gold(passages: list[Passage]) -> list[Passage]:
    if (count := sum(passage.isgold for passage in passages)) != 1:
        raise ValueError(f"exactly one passage must have isgold, not {count}")
    return passages


class NQRecord(BaseModel):
    """A line of nq-open-*_total_documents_gold_at_*.jsonl.gz."""

    question: str
    answers: Answers
    ctxs: Annotated[list[Passage], AfterValidator(_one_gold)]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, with its passages in the file's order: distractors in the retriever's order, the gold one at
    the file's position. Files with the gold passage at several positions can be read as one."""
    ids = qa.Ids()
    for record in checked(NQRecord, records):
        yield _item(record, record.ctxs, ids)


def items_at_every_position(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """As many items per record as it has passages: the gold one stands first, second, ..., last.

    The distractors keep their order, so these are the items of the files for the other positions. Raises TaskError if
    two of these files are read as one, because every item would occur twice.
    """
    ids = qa.Ids()
    position = None
    for record in checked(NQRecord, records):
        given = _gold(record.ctxs)
        position = given if position is None else position
        if given != position:
            raise TaskError(
                f"the gold passage is at {given} here and at {position} before; give only one gold_at_K file"
            )
        others = [passage for passage in record.ctxs if not passage.isgold]
        for at in range(len(record.ctxs)):
            yield _item(record, [*others[:at], record.ctxs[given], *others[at:]], ids)


def _gold(passages: Sequence[Passage]) -> int:
    return next(i for i, passage in enumerate(passages) if passage.isgold)


def _item(record: NQRecord, passages: Sequence[Passage], ids: qa.Ids) -> Item:
    position = _gold(passages)
    return Item(
        id=ids(record.question, f"@{position}"),
        question=record.question,
        references=record.answers,
        documents=tuple(Document(p.text, p.title, p.id) for p in passages),
        facts={"gold_position": position, **qa.support([position], len(passages))},
    )


NQ = qa.task(
    name="nq",
    about="Natural Questions, one gold passage among distractors: the gold_at_K files",
    source="Lost in the Middle (arXiv 2307.03172): github.com/nelson-liu/lost-in-the-middle, qa_data/",
    items=items,
    metrics=("substring_em", "em", "f1"),
    breakdowns=("gold_position",),
)

NQ_POSITIONS = replace(
    NQ,
    name="nq-positions",
    about="Natural Questions, each question once for every position of its gold passage; give it one gold_at_K file",
    items=items_at_every_position,
)
