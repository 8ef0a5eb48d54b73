"""Tuning without labels: the model itself under `full` is the teacher, the model with an adapter under a method the student.

Both read the same tokens, and the loss is the KL divergence of their next-token distributions on everything after the
documents. No source: distillation of a model's own behaviour in another context is common (Snell et al. 2022, Learning by
Distilling Context, arXiv 2209.15189).
Shapes: N rows of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraph import methods
from kvgraph.errors import PlanError
from kvgraph.graph import ContextGraph
from kvgraph.train.example import Example, Question
from kvgraph.train.pack import Packed, lay


@dataclass(frozen=True)
class Lesson:
    """What the teacher reads beside a packed sequence.

    taught: its sequence, whose rows are those of the student's, one by one. held [N] bool: whether the student reads the row by
    `full` too, to stay as it was.
    """

    taught: Packed
    held: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """Rows (of methods, of `full`)."""
        held = int(self.held.sum())
        return len(self.held) - held, held


def everything(example: Example) -> Example:
    """The example with all that follows the documents to be learned, of each query all but the first token.

    What several queries begin with is learned once.
    """
    made: list[Question] = []
    for question in example.questions:
        text = (*question.query, *question.answer)
        shared = min(_common(made[0].answer, text) if made else 1, len(question.query))
        made.append(Question((), text, tuple(i >= max(1, shared) for i in range(len(text)))))
    return Example(example.graph, made)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two texts begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def taught(example: Example, laid: Packed) -> Packed:
    """What the teacher of an example reads, which `laid` is by some method: the same under `full`.

    Raises PlanError where the method leaves other tokens to learn.
    """
    graph = example.graph
    plain = ContextGraph(graph.segments, (), graph.prefix, (), graph.names)
    made = lay(Example(plain, example.questions), methods.resolve(None))
    if not torch.equal(made.targets, laid.targets):
        raise PlanError("the method doesn't leave the question and the answer as they are; it can't be distilled")
    return made


def loss(student: Tensor, teacher: Tensor, held: Tensor, *, hold: float, totals: tuple[int, int]) -> Tensor:
    """Mean KL(teacher || student) over the rows of methods + hold * that over the rows of `full`, in nats.

    student, teacher [N, V]: logits; held [N] bool. totals: what to divide the two sums by, the rows of a whole optimizer step
    (sums of `Lesson.counts`), so that the losses of its sequences add up.
    """
    methods, full = totals
    each = kl(student, teacher)
    return (each * torch.where(held, hold / max(full, 1), 1 / max(methods, 1))).sum()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of every row [N], of logits [N, V]."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)
