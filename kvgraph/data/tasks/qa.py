"""Shared by the question-answering tasks: their prompt, ids, and facts about documents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from kvgraph.data.task import Task

INSTRUCTION = "Here are documents that may help to answer a question. Some of them may have nothing to do with it."
QUESTION = (
    "Use only the documents above to answer the question, in as few words as it takes.\nQuestion: {question}\nAnswer:"
)
SHORT_ANSWER = 200  # tokens, as in KVLink's evaluation scripts
STOP = ("\nQuestion:",)  # a model that doesn't stop asks itself the next question; Graph-KV's server stops here too

task = partial(Task, instruction=INSTRUCTION, question=QUESTION, max_tokens=SHORT_ANSWER, stop=STOP)
"""A task with this prompt."""


def joined(sentences: Iterable[str]) -> str:
    """Sentences as one text. In some data sets a sentence includes the space before it; here each gets one."""
    return " ".join(filter(None, map(str.strip, sentences)))


def support(gold: Sequence[int], documents: int) -> dict[str, str | int]:
    """Facts about which documents hold the answer: their positions, as in "2,7", and how many others there are."""
    return {"gold_positions": ",".join(map(str, gold)), "distractors": documents - len(gold)}


class Ids:
    """Makes ids for records without one from their question, so that ids don't depend on which other records are read.

    A repeated question gets a number after its id.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, question: str, suffix: str = "") -> str:
        """The id of the next record with this question, ending in `suffix`."""
        name = hashlib.sha256(question.encode()).hexdigest()[:12] + suffix
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}-{self._seen[name]}"
