"""Training examples: a context graph, and questions about it with their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

from kvgraph.errors import GraphError, PlanError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Place, Plan, Span


class Question(NamedTuple):
    """Token ids of a query, which may be empty, and of the answer (or continuation) to learn.

    learned: whether each token of the answer is a target; empty: all are. A conversation is an answer in which the
    user's turns aren't learned.
    """

    query: tuple[int, ...]
    answer: tuple[int, ...]
    learned: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Example:
    """A tokenized graph without a query, and questions about it that don't see each other.

    Raises GraphError for a graph of text, a graph with a query of its own, an example without questions, and an answer
    without any token to learn.
    """

    graph: ContextGraph
    questions: tuple[Question, ...]

    def __init__(self, graph: ContextGraph, questions: Iterable[Sequence[Sequence[Any]]]) -> None:
        if not graph.is_tokenized:
            raise GraphError("an example holds token ids but the graph holds text; call graph.tokenized(encode) first")
        if graph.has_query:
            raise GraphError("the graph of an example has a query; use Example.of, or give it among the questions")
        object.__setattr__(self, "graph", graph)
        asked: list[Any] = [map(tuple, given) for given in questions]
        object.__setattr__(self, "questions", tuple(Question(*given) for given in asked))
        if not self.questions:
            raise GraphError("an example needs at least one question")
        for i, question in enumerate(self.questions):
            if not question.answer or (question.learned and not any(question.learned)):
                raise GraphError(f"nothing of question {i}'s answer is learned; leave the question out")
            if question.learned and len(question.learned) != len(question.answer):
                raise GraphError(
                    f"question {i} has {len(question.answer)} tokens of answer and {len(question.learned)} learned flags"
                )

    @classmethod
    def of(cls, graph: ContextGraph, answer: Sequence[int]) -> Example:
        """An example with one question: the graph's own query."""
        query = graph.query if isinstance(graph.query, tuple) else ()  # text would be refused
        return cls(graph.with_query(()) if query else graph, [(query, answer)])

    def plans(self, method: Method) -> list[Plan]:
        """One plan per question, as the engine runs it to score the answer.

        The prompt span holds the query and all but the answer's last token.

        Raises GraphError if the method can't plan the graph.
        """
        return [method.plan(self.graph.with_query((*q.query, *q.answer[:-1]))) for q in self.questions]


class Target(NamedTuple):
    """A token to learn: `token` comes after token number `at` of span number `span`."""

    span: int
    at: int
    token: int


@dataclass(frozen=True)
class Joined:
    """The plans of one example as one list of spans.

    spans: the shared spans, then the beginning that all prompt spans have in common, then one prompt span for each
    question. roots: the prompt spans. answers, documents: the targets.
    """

    spans: tuple[Span, ...]
    roots: tuple[int, ...]
    answers: tuple[Target, ...]
    documents: tuple[Target, ...]


def join(example: Example, method: Method, *, documents: bool = False, through_links: bool = False) -> Joined:
    """All questions of an example on one layout of its context, as the method plans it.

    Each token of an answer is learned from the token before it in the prompt span.
    documents: learn the segments' tokens too. Each distinct segment is learned where it is first encoded, from its second
        token on.
    through_links: questions see the prefix and what precedes them in the prompt span (the links), but no document.
    Raises GraphError if the method can't plan the graph, PlanError if its plan can't be trained.
    """
    shared, sees, lives, before = _lives(example, method)
    n = before if through_links else _common(lives) if len(lives) > 1 else 0
    spans, roots = list(shared), []
    if n:
        spans.append(_live(lives[0][:n], sees, "beginning"))
    if through_links:
        if not before or min(map(len, lives)) == before:
            raise PlanError(f"{method.name} has no link tokens for a question to see instead of the documents")
        segments = set(example.graph.segments)
        sees = tuple(place for place in sees if shared[place.span].tokens not in segments)
    if n:
        sees = (*sees, Place(len(shared), spans[-1].start, 0, n))
    answers = []
    for i, (live, question) in enumerate(zip(lives, example.questions, strict=True)):
        roots.append(len(spans))
        spans.append(_live(live[n:], sees, f"question {i}"))
        wanted = question.learned or repeat(True)
        first = len(live) - len(question.answer)
        for at, (token, learn) in enumerate(zip(question.answer, wanted, strict=False), first):
            if learn and at >= 0 and _goes_on(live, at):
                answers.append(Target(len(shared), at, token) if at < n else Target(roots[-1], at - n, token))
    learned = _document_targets(example, shared) if documents else ()
    return Joined(tuple(spans), tuple(roots), tuple(answers), tuple(learned))


class _Lives(NamedTuple):
    """The shared part of several plans: the spans, and the prompt span's places; and for each plan the (token, position) pairs
    of its prompt span, of which `before` precede the query."""

    shared: tuple[Span, ...]
    sees: tuple[Place, ...]
    lives: list[list[tuple[int, int]]]
    before: int


def _lives(example: Example, method: Method) -> _Lives:
    """The shared part of the plans of all questions.

    A prompt span is a part that doesn't depend on the query, followed by the query. Therefore two plans are enough, and
    the others are put together from them. tests/train/test_train_pack.py compares the result with `Example.plans`.
    """
    asked = [(*question.query, *question.answer[:-1]) for question in example.questions]
    planned = sorted(asked, key=len, reverse=True)[:2]  # the longest isn't empty, so it shows where queries start
    plans = [method.plan(example.graph.with_query(query)) for query in planned]
    shared, sees = plans[0].spans[:-1], plans[0].prompt.sees
    before, *others = (
        list(zip(plan.prompt.tokens, plan.prompt.positions, strict=True))[: len(plan.prompt) - len(query)]
        for plan, query in zip(plans, planned, strict=True)
    )
    same = all(plan.spans[:-1] == shared and plan.prompt.sees == sees for plan in plans)
    if not same or any(other != before for other in others):
        raise PlanError(f"{method.name} encodes documents by the question; give every question an example of its own")
    start = plans[0].prompt.positions[-1] + 1 - len(planned[0])
    lives = [[*before, *zip(query, range(start, start + len(query)), strict=True)] for query in asked]
    if any(span.groups for plan in plans for span in plan.spans):
        raise PlanError(
            f"{method.name} weighs groups of keys, which no attention mask can do; train with another method"
        )
    return _Lives(shared, sees, lives, len(before))


def _live(tokens: Sequence[tuple[int, int]], sees: tuple[Place, ...], name: str) -> Span:
    """A prompt span of (token, position) pairs."""
    ids, positions = zip(*tokens, strict=True)
    return Span(ids, positions, sees, cached=False, name=name)


def _goes_on(live: Sequence[tuple[int, int]], at: int) -> bool:
    """Whether the next token of the prompt span stands right after token `at`. Only with an empty query it may not: the token
    before the answer may then be one that is recomputed in the middle of the documents.
    """
    return at + 1 == len(live) or live[at + 1][1] == live[at][1] + 1


def _common(lives: Sequence[Sequence[tuple[int, int]]]) -> int:
    """The number of tokens at the beginning that all prompt spans share, leaving each at least one token of its own."""
    shortest = min(map(len, lives)) - 1
    return next((i for i in range(shortest) if any(live[i] != lives[0][i] for live in lives)), shortest)


def _document_targets(example: Example, spans: Sequence[Span]) -> list[Target]:
    """The tokens of every segment except its first one, at the place where that text is first encoded."""
    left = {tuple(segment) for segment in example.graph.segments}
    found = []
    for i, span in enumerate(spans):
        if span.tokens in left:
            left.discard(span.tokens)
            found += [Target(i, at, token) for at, token in enumerate(span.tokens[1:])]
    return found
