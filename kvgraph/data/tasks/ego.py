"""Citation graphs around a question: the papers it is about, and unrelated groups of papers before or after them.

Every question comes in five arrangements, as in Graph-KV's Arxiv-QA (arXiv 2506.07334): alone, and with one or two
distractor groups, the related group first or last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvgraph.data.chat import Document
from kvgraph.data.task import Item
from kvgraph.data.tasks import qa

INSTRUCTION = "Here are research papers and works that they cite.\n\n"
BREAKDOWNS = ("distractors", "related")
task = partial(qa.task, instruction=INSTRUCTION, metrics=("substring_em", "f1"), edges="links", breakdowns=BREAKDOWNS)
"""A task about one group of papers."""

ARRANGEMENTS = ((0, "alone"), (1, "first"), (1, "last"), (2, "first"), (2, "last"))


@dataclass(frozen=True)
class Ego:
    """A question about one group of papers. links: (cited, citing) by index; what is cited stands before what cites."""

    id: str
    question: str
    references: tuple[str, ...]
    documents: tuple[Document, ...]
    links: tuple[tuple[int, int], ...]
    kind: str = ""


def arranged(egos: Sequence[Ego]) -> Iterator[Item]:
    """Five items per question, in the order of ARRANGEMENTS; fewer if there are too few other groups.

    The distractors of a group are the next groups in the list (cyclically) that share no paper with it or with each
    other. Facts: distractors is the number of distractor groups, related the position of the related group,
    gold_positions the positions of its documents.
    """
    for number, ego in enumerate(egos):
        distractors = _distractors([*egos[number + 1 :], *egos[:number]], ego, most=2)
        for count, related in ARRANGEMENTS:
            if count > len(distractors):
                continue
            others = distractors[:count]
            groups = [*others, ego] if related == "last" else [ego, *others]
            start = sum(len(other.documents) for other in others) if related == "last" else 0
            gold = ",".join(str(start + i) for i in range(len(ego.documents)))
            yield Item(
                id=f"{ego.id}/{count}-{related}" if count else ego.id,
                question=ego.question,
                references=ego.references,
                documents=tuple(document for group in groups for document in group.documents),
                kind=ego.kind,
                facts={"distractors": count, "related": related, "gold_positions": gold},
                links=_links(groups),
                cluster=ego.id,
            )


def _distractors(candidates: Sequence[Ego], ego: Ego, most: int) -> list[Ego]:
    """The first `most` candidates that share no paper with the ego or with each other."""
    taken: list[Ego] = []
    seen = {document.text for document in ego.documents}
    for other in candidates:
        if len(taken) == most:
            break
        texts = {document.text for document in other.documents}
        if seen.isdisjoint(texts):
            taken.append(other)
            seen |= texts
    return taken


def _links(groups: Sequence[Ego]) -> tuple[tuple[int, int], ...]:
    """The links of several groups whose documents stand one after the other."""
    links: list[tuple[int, int]] = []
    start = 0
    for group in groups:
        links += [(start + cited, start + citing) for cited, citing in group.links]
        start += len(group.documents)
    return tuple(links)
