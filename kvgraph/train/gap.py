"""What composition costs a model, and how much of that an adapter recovers, on held-out documents.

For every question and method there are three numbers: nats per token of the answer, the KL divergence from the reference
under `full`, and how often both have the same likeliest next token. The base model and the tuned model run on the same
tokens.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from kvgraph import methods
from kvgraph.errors import GraphError, PlanError
from kvgraph.train import distill
from kvgraph.train.example import Example
from kvgraph.train.mixture import with_edges
from kvgraph.train.pack import Packed, concatenated, lay
from kvgraph.train.records import Records

FULL = "full"
ANSWER, RECITATION = KINDS = ("answers", "recitations")

Way = tuple[str, str]  # a method as commands write it, and edges for it
States = Mapping[
    str, Callable[[], AbstractContextManager[None]]
]  # by name, what makes the model that; the first is the reference


class Scored(NamedTuple):
    """One answer by one method. document: the number of its record. kind: "answers" or "recitations". nats, kl, agrees: means
    over the answer's tokens; kl and agrees compare with the reference under `full`.
    """

    record: int
    kind: str
    state: str
    method: str
    edges: str
    nats: float
    kl: float
    agrees: float
    exact: bool


def score(
    run: Callable[[Packed], Tensor],
    states: States,
    records: Records,
    numbers: Iterable[int],
    ways: Sequence[Way],
    length: int,
) -> Iterator[Scored]:
    """Score records of a prepared folder by each of these methods, in sequences of at most `length` tokens.

    run: gives the logits [N, V] of a packed sequence's rows. A record is skipped for a method that can't lay it out.
    """
    chunk: list[tuple[int, Example, int, dict[Way, Packed]]] = []
    for number in numbers:
        example, given = records[number], len(records.record(number).get("questions", [None]))
        if example is None:
            continue
        laid = {way: one for way in dict.fromkeys(((FULL, "none"), *ways)) if (one := laid_by(example, way, number))}
        if (FULL, "none") not in laid or max(map(len, laid.values())) > length:
            continue
        if any(sum(len(c[3].get(way, ())) for c in chunk) + len(one) > length for way, one in laid.items()):
            yield from _scored(run, states, chunk)
            chunk = []
        chunk.append((number, example, given, laid))
    if chunk:
        yield from _scored(run, states, chunk)


def laid_by(example: Example, way: Way, number: int) -> Packed | None:
    """The example by a method and edges; None if it can't be laid out. Random edges are drawn from the number."""
    method, edges = methods.parse(way[0]), way[1]
    try:
        told = with_edges(example, edges if method.reads_edges else "none", random.Random(number))
        return lay(told, method)
    except (GraphError, PlanError):  # more documents than link tokens, for one
        return None


@torch.no_grad()
def _scored(
    run: Callable[[Packed], Tensor], states: States, chunk: list[tuple[int, Example, int, dict[Way, Packed]]]
) -> Iterator[Scored]:
    reference: dict[int, Tensor] = {}
    for way in dict.fromkeys(way for _, _, _, laid in chunk for way in laid):
        there = [(number, example, given, laid[way]) for number, example, given, laid in chunk if way in laid]
        packed = concatenated([laid for *_, laid in there])
        for state, entered in states.items():
            with entered():
                found = run(packed)
            parts = found.split([len(laid.rows) for *_, laid in there])
            if not reference:  # the first method is `full`, the first state the reference; every record has it
                reference = {number: part for (number, *_), part in zip(there, parts, strict=True)}
            for (number, example, given, laid), part in zip(there, parts, strict=True):
                yield from _rows(number, example, given, laid, part, reference[number], state, way)


def _rows(
    number: int, example: Example, given: int, laid: Packed, found: Tensor, reference: Tensor, state: str, way: Way
) -> Iterator[Scored]:
    targets = laid.targets.to(found.device)
    nats = torch.nn.functional.cross_entropy(found, targets, reduction="none")
    best = found.argmax(-1)
    told = torch.stack(
        [nats, distill.kl(found, reference), (best == reference.argmax(-1)).float(), (best == targets).float()]
    )
    at = 0
    values = told.cpu()
    for i, question in enumerate(example.questions):
        here = values[:, at : at + len(question.answer)]
        at += len(question.answer)
        nll, kl, agrees, right = here.mean(1).tolist()
        kind = ANSWER if i < given else RECITATION
        yield Scored(number, kind, state, *way, nll, kl, agrees, right == 1.0)


class GapRow(NamedTuple):
    """A line of the table: means over answers, with the half-width of their 95 % interval, clustered by record."""

    kind: str
    method: str
    edges: str
    before: float
    after: float
    kl_before: float
    kl_after: float
    agrees_before: float
    agrees_after: float
    exact_before: float
    exact_after: float
    closed: float
    interval: float
    answers: int


def table(rows: Iterable[Scored], before: str, after: str) -> list[GapRow]:
    """The gap to `full` by kind and method. closed: how much of the gap in nats between a method and `full` before tuning is
    closed after it. interval: the half-width of its 95 % interval, from a bootstrap of records.
    """
    cells: dict[tuple[str, str, str], dict[str, dict[int, list[Scored]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        cells[row.kind, row.method, row.edges][row.state][row.record].append(row)
    lines = []
    for (kind, method, edges), by_state in cells.items():
        full = cells[kind, FULL, "none"][before]
        found = {name: by_state[name] for name in (before, after)}
        shared = sorted(full.keys() & found[before].keys() & found[after].keys())
        nats = [[_mean(part[record], "nats") for record in shared] for part in (full, found[before], found[after])]
        closed, interval = _closed(nats)
        stats = {
            f"{what}_{when}": _mean([row for record in shared for row in found[state][record]], what)
            for what in ("kl", "agrees", "exact")
            for when, state in (("before", before), ("after", after))
        }
        means = [sum(values) / len(values) for values in nats]
        count = sum(len(found[after][record]) for record in shared)
        lines.append(
            GapRow(kind, method, edges, means[1], means[2], **stats, closed=closed, interval=interval, answers=count)
        )
    return sorted(lines, key=lambda line: KINDS.index(line.kind))


def _mean(rows: Sequence[Scored], what: str) -> float:
    return sum(float(getattr(row, what)) for row in rows) / len(rows)


def _closed(nats: list[list[float]], draws: int = 1000) -> tuple[float, float]:
    """The closed share of the gap, from (full, before, after) for each record, and the half-width of its interval."""
    values = torch.tensor(nats, dtype=torch.float64)
    picked = torch.randint(values.shape[1], (draws, values.shape[1]), generator=torch.Generator().manual_seed(0))
    means = values[:, picked].mean(-1)
    drawn = (means[1] - means[2]) / (means[1] - means[0])
    full, before, after = values.mean(1).tolist()
    low, high = drawn.nan_to_num(0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ((before - after) / (before - full) if before != full else math.nan), (high - low) / 2


def text(lines: Sequence[GapRow]) -> str:
    """The table as text, for people."""
    head = f"{'':44} {'nats':>15} {'gap closed':>14} {'KL to full':>15} {'agrees':>15} {'exact':>13}"
    made = [head]
    for line in lines:
        name = f"{line.kind} ({line.answers})  {line.method.partition(':')[0]} {line.edges.replace('none', '')}"
        made.append(
            f"{name:44} {line.before:7.3f} {line.after:7.3f} {line.closed:8.1%} ±{line.interval:4.0%} "
            f"{line.kl_before:7.3f} {line.kl_after:7.3f} {line.agrees_before:7.1%} {line.agrees_after:7.1%} "
            f"{line.exact_before:6.1%} {line.exact_after:6.1%}"
        )
    return "\n".join(made)
