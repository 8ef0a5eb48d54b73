"""The gate: does this model, composed from stored KV, give the logits of one plain forward?

Every case compares the composed logits of a plan of random tokens with those of `Plan.dense()` under the model's own
attention. Exact isn't the same as good: `kvgraph.checks.quality` measures what a method costs an untuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvgraph import memo, methods
from kvgraph.edges import all_pairs, chain
from kvgraph.errors import ModelError
from kvgraph.graph import ContextGraph, Edge
from kvgraph.models import Model
from kvgraph.plan import Place, Plan, Span, contiguous
from kvgraph.progress import Progress

# Largest difference of next-token logits from the plain forward's, in standard deviations of the latter. In float32
# there is only rounding. In the 16-bit types the model itself rounds at every layer, in another order than a plain
# forward, and a near-tie in a router can fall the other way; therefore the median of three draws counts. A wrong
# position or a wrong edge moves logits by 0.5 to 5 standard deviations every time, so a first draw within half of the
# limit settles a case.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
DRAWS = {torch.float32: 1, torch.float16: 3, torch.bfloat16: 3}
SHORTEST = 256  # positions a model must allow for the cases to fit
LONGEST = 4096  # maximum tokens of the sliding-window case; larger windows aren't tested

Logits = Callable[[Plan], Tensor]  # next-token logits [V] float32 after a plan's last span, composed span by span


@dataclass(frozen=True)
class Case:
    """One comparison. worst: the largest difference in standard deviations of the plain logits; None if not run."""

    name: str
    what: str
    tokens: int
    worst: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the case is within its limit; one that wasn't run counts as passed."""
        return self.worst is None or self.worst <= self.limit


def gate(model: Model, logits: Logits, progress: bool | None = None) -> list[Case]:
    """Run all cases on a model. logits: see `kvgraph.engine.engine.composed`."""
    if model.limit < SHORTEST:
        raise ModelError(f"{model.name} allows only {model.limit} positions; the gate needs {SHORTEST}")
    plans = [_plans(model, seed) for seed in range(DRAWS[model.dtype])]
    results = []
    with Progress("checking", len(plans[0]), enabled=progress) as bar:
        for draws in zip(*plans, strict=True):
            name, what, plan = draws[0]
            worst = None if plan is None else _worst(model, logits, [p for _, _, p in draws if p is not None])
            tokens = 0 if plan is None else sum(map(len, plan.spans))
            results.append(Case(name, what, tokens, worst, TOLERANCE[model.dtype]))
            bar.advance(1)
    return results


def _plans(model: Model, seed: int) -> list[tuple[str, str, Plan | None]]:
    """(name, description, plan) of every case; the plan is None if the model's window is too long to test."""
    random = Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(random.randrange(model.vocab_size) for _ in range(n))

    def plan(method: str, edges: tuple[Edge, ...] = (), asked: int = 7, **fields: Any) -> Plan:
        return methods.get(method, **fields).plan(ContextGraph(segments, query[:asked], prefix, edges))

    segments, query, prefix = [ids(n) for n in (17, 24, 9)], ids(7), ids(5)
    far = min(model.limit, 1 << 17) - 100
    cases: list[tuple[str, str, Plan | None]] = [
        ("chain", "a causal chain of spans", plan("full")),
        ("alone", "spans encoded alone, read at their places", plan("block")),
        ("token", "the same by one token, as in decoding", plan("block", asked=1)),
        ("shared", "re-encoded readers at shared positions", plan("graph-kv", all_pairs(3))),
        ("moved", "spans read elsewhere than computed", plan("graph-kv-rag", all_pairs(3))),
        ("rounds", "three rounds along a chain", plan("graph-kv", chain(3), rounds=3)),
        ("gaps", "a prompt span with gaps between its tokens", _gaps(ids)),
        ("far", f"spans read at position {far:,}", _shifted(plan("block"), far - 62)),
    ]
    windows = [layer.window for layer in model.layers if layer.window is not None]
    if windows:
        half = max(windows) // 2
        segments = [ids(half), ids(half + 20)]
        fits = 2 * half + 40 <= min(LONGEST, model.limit)
        cases.append(("sliding", f"beyond the sliding window of {max(windows)}", plan("full") if fits else None))
    return cases


def require(model: Model, logits: Logits) -> None:
    """Raise ModelError unless the gate passes. A pass is remembered for this model, these versions and this device."""
    packages = ["kvgraph", "torch", "transformers", *(["numba"] if find_spec("numba") else [])]
    versions = [f"{package} {version(package)}" for package in packages]
    key = " ".join([model.fingerprint, model.device.type, *versions])
    if memo.recall("gate", key):
        return
    failed = [c for c in gate(model, logits, progress=False) if not c.passed]
    if failed:
        raise ModelError(
            f"{model.name} fails the gate: {', '.join(c.name for c in failed)} differ from a plain forward by up to "
            f"{max(c.worst or 0 for c in failed):.2g} standard deviations; run `kvgraph check` for details, or load "
            "with check=False if you accept wrong answers"
        )
    memo.remember("gate", key, True)


def _worst(model: Model, logits: Logits, draws: list[Plan]) -> float:
    """The first draw's difference, or the median of all where the first leaves room for doubt."""
    found = [_difference(model, logits, draws[0])]
    if found[0] > TOLERANCE[model.dtype] / 2:
        found += [_difference(model, logits, plan) for plan in draws[1:]]
    return median(found)


def _difference(model: Model, logits: Logits, plan: Plan) -> float:
    dense = plan.dense()
    plain = (
        model.dense(torch.from_numpy(dense.tokens), torch.from_numpy(dense.positions), torch.from_numpy(dense.visible))[
            -1
        ]
        .float()
        .cpu()
    )
    # Twice: first what is missing is computed, maybe beside its sources, then all that is stored is read.
    composed = [logits(plan), logits(plan)]
    return max(float((found - plain).abs().max() / plain.std()) for found in composed)


def _gaps(ids: Callable[[int], tuple[int, ...]]) -> Plan:
    """Two documents with two prompt tokens after each, then a query: the shape of KVLink, without its reserved ids."""
    spans = [contiguous(ids(5), 0), contiguous(ids(11), 5), contiguous(ids(8), 18)]
    positions = (16, 17, 26, 27, *range(28, 33))
    places = (Place(0, 0), Place(1, 5), Place(2, 18))
    return Plan((*spans, Span(ids(9), positions, places, cached=False)), "gaps")


def _shifted(plan: Plan, by: int) -> Plan:
    """The same plan `by` positions later. Distances stay, and therefore logits."""
    moved = []
    for span in plan.spans:
        positions = tuple(p + by for p in span.positions)
        moved.append(
            Span(span.tokens, positions, tuple(p._replace(at=p.at + by) for p in span.sees), span.cached, span.name)
        )
    return Plan(tuple(moved), plan.method)
