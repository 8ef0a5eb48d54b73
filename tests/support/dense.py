"""The slow reference, for any plan: logits and greedy tokens of one dense forward; and small random graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kvgraph import ContextGraph, models
from kvgraph.edges import all_pairs
from kvgraph.plan import Plan

VOCAB = 128  # of the families' models


def dense_logits(model: models.Model, plan: Plan) -> torch.Tensor:
    d = plan.dense()
    group = None if d.group is None else torch.from_numpy(d.group)
    arrays = (torch.from_numpy(a) for a in (d.tokens, d.positions, d.visible))
    return model.dense(*arrays, group=group, groups=d.groups)[-1]


def dense_greedy(model: models.Model, plan: Plan, n: int) -> list[int]:
    """Greedy tokens by the slow reference: the prompt span grows by one token a step and all is computed anew."""
    out = []
    for _ in range(n):
        out.append(int(dense_logits(model, plan).argmax()))
        live = plan.prompt
        positions = (*live.positions, live.positions[-1] + 1)
        plan = Plan((*plan.spans[:-1], replace(live, tokens=(*live.tokens, out[-1]), positions=positions)))
    return out


def random_graph(seed: int, documents: int = 3, edges: bool = False, query: int = 5) -> ContextGraph:
    r = np.random.default_rng(seed)
    segments = [r.integers(0, VOCAB, r.integers(1, 14)).tolist() for _ in range(documents)]
    return ContextGraph(
        segments,
        query=r.integers(0, VOCAB, query).tolist(),
        prefix=r.integers(0, VOCAB, 4).tolist(),
        edges=all_pairs(documents) if edges else (),
    )
