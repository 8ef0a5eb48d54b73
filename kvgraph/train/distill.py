"""Tuning without labels: the model itself under `full` is the teacher, the model with an adapter under a method the student.

Both read the same tokens. The loss is the KL divergence of their next-token distributions on everything after the
documents. This follows no single paper; distilling a model's own behaviour in another context is common (Snell et al. 2022, Learning by
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
    """The teacher's counterpart of a packed sequence.

    taught: the teacher's sequence. Its rows correspond one by one to the student's.
    held [N] bool: whether the student reads the row by `full` too, in order to stay as it was.
    """

    taught: Packed
    held: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """Rows (of methods, of `full`)."""
        held = int(self.held.sum())
        return len(self.held) - held, held


def everything(example: Example) -> Example:
    """The example with everything after the documents as targets, except the first token of each query.

    A beginning that several queries share is learned once.
    """
    made: list[Question] = []
    for question in example.questions:
        text = (*question.query, *question.answer)
        shared = min(_common(made[0].answer, text) if made else 1, len(question.query))
        made.append(Question((), text, tuple(i >= max(1, shared) for i in range(len(text)))))
    return Example(example.graph, made)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The number of tokens that two texts have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def taught(example: Example, laid: Packed) -> Packed:
    """The teacher's layout of an example that `laid` lays out by some method: the same example under `full`.

    Raises PlanError if the method leaves other tokens to learn.
    """
    graph = example.graph
    plain = ContextGraph(graph.segments, (), graph.prefix, (), graph.names)
    made = lay(Example(plain, example.questions), methods.resolve(None))
    if not torch.equal(made.targets, laid.targets):
        raise PlanError("the method doesn't leave the question and the answer as they are; it can't be distilled")
    return made


def loss(student: Tensor, teacher: Tensor, held: Tensor, *, hold: float, totals: tuple[int, int]) -> Tensor:
    """Mean KL(teacher || student) over the rows of methods + hold * that over the rows of `full`, in nats.

    student, teacher [N, V]: logits. held [N] bool. totals: the divisors of the two sums. They are the rows of a whole
    optimizer step (sums of `Lesson.counts`), so that the losses of its sequences add up.
    """
    methods, full = totals
    each = kl(student, teacher)
    return (each * torch.where(held, hold / max(full, 1), 1 / max(methods, 1))).sum()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of every row [N], of logits [N, V]."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)
