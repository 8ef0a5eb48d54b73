"""The probe that CacheBlend needs before it plans: how far the KV of documents encoded alone is off.

Deviations are measured on the second layer, the first whose KV depends on context. Therefore only the first layer runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.rows import Row, RowKV
from kvgraph.attention.step import Step
from kvgraph.errors import PlanError
from kvgraph.graph import ContextGraph
from kvgraph.methods.base import Method, ids
from kvgraph.models import Model
from kvgraph.plan import Plan

LAYER = 1  # layer 0's keys and values depend on a token and its position alone


@dataclass(frozen=True)
class ProbedPlan(Plan):
    """A plan and its cost: tokens run through the model's first layer, and seconds."""

    probe_tokens: int = field(default=0, compare=False)
    probe_seconds: float = field(default=0.0, compare=False)


def cost(plan: Plan) -> tuple[int, float]:
    """(tokens, seconds) of the probe that a plan needed."""
    return (plan.probe_tokens, plan.probe_seconds) if isinstance(plan, ProbedPlan) else (0, 0.0)


def probed(model: Model, graph: ContextGraph, method: Method, step_tokens: int) -> ProbedPlan:
    """The plan of a tokenized graph by a method that needs deviations. At most `step_tokens` tokens run at once.

    The first layer's time grows with the square of the prompt's length, so `Engine.plan` checks before that a plan
    without a selection could run.
    """
    started = time.perf_counter()
    found, tokens = deviations(model, graph, step_tokens)
    plan = method.selecting(found).plan(graph)
    return ProbedPlan(plan.spans, plan.method, probe_tokens=tokens, probe_seconds=time.perf_counter() - started)


@torch.inference_mode()
def deviations(model: Model, graph: ContextGraph, step_tokens: int) -> tuple[list[list[float]], int]:
    """How far every token's KV is off if its segment is encoded alone: (one number per token, by segment; tokens run).

    Of a graph with chosen segments, only these count, in the order chosen.

    The deviation is the Euclidean norm of the difference to a full causal prefill, over the keys and values of all
    heads of layer 1, with the keys at their positions in the prompt; it is 0 in a model of one layer. CacheBlend (arXiv
    2405.16444, section 4.1) says "absolute difference" of KV and leaves the norm open; its released code uses this one,
    on the values alone.

    Every document token runs twice, alone and in the whole prompt, and the prefix once, through layer 0 and layer 1's
    projections. This is 2 / L of a prefill's projections in a model of L layers. Stored KV isn't used, because its last
    bits depend on the batch it was encoded in, and the selection must not. The memory, two layers of KV, is scratch.
    """
    segments = [ids(segment) for segment in graph.restricted().segments]
    prefix = [token for piece in graph.prefix for token in ids(piece)]
    prompt = [*prefix, *(token for segment in segments for token in segment)]
    if prompt and max(prompt) >= model.vocab_size:
        raise PlanError(f"the graph holds a token id outside the vocabulary (0..{model.vocab_size - 1})")
    if len(model.layers) <= LAYER:
        return [[0.0] * len(segment) for segment in segments], 0
    bounds = list(accumulate(map(len, segments), initial=len(prefix)))
    together, *alone = _second_layer(model, [(prompt, 0), *zip(segments, bounds, strict=False)], step_tokens)
    found = []
    for (lo, hi), kv in zip(pairwise(bounds), alone, strict=True):
        pairs = [(together.keys, kv.keys), (together.values, kv.values)]
        squares = sum((a[LAYER][:, lo:hi].float() - b[LAYER].float()).square().sum((0, 2)) for a, b in pairs)
        found.append(torch.as_tensor(squares).sqrt().tolist())
    return found, len(prompt) + sum(map(len, segments))


class _Enough(Exception):
    """Raised once layer 1's keys and values are known; the rest of the forward isn't needed."""


def _second_layer(model: Model, sequences: Sequence[tuple[Sequence[int], int]], step_tokens: int) -> list[RowKV]:
    """KV up to layer 1 of (tokens, first position) sequences, each seeing itself alone."""
    layers = model.layers[: LAYER + 1]
    shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers]
    kvs = [RowKV(shapes, len(tokens), model.dtype, model.device) for tokens, _ in sequences]
    while rows := _next_rows(sequences, kvs, step_tokens):
        step = Step(rows, layers, model.rotaries, model.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *more: Any, step: Step = step) -> Tensor:
            if layer < LAYER:
                return step(layer, q, k, v, *more)
            for row, here in zip(step.rows, step.spans, strict=True):
                new = slice(row.kv.length, row.kv.length + len(row.tokens))
                row.kv.keys[layer][:, new], row.kv.values[layer][:, new] = k[:, here], v[:, here]
            raise _Enough

        try:
            model.forward(step.tokens, step.positions, attend, torch.empty(0, dtype=torch.int64, device=model.device))
        except _Enough:
            pass
        for row in rows:
            row.commit()
    return kvs


def _next_rows(sequences: Sequence[tuple[Sequence[int], int]], kvs: Sequence[RowKV], room: int) -> list[Row]:
    """As many tokens as there is room for, in order; none when all have run."""
    rows = []
    for (tokens, start), kv in zip(sequences, kvs, strict=True):
        here = slice(kv.length, min(kv.length + room, len(tokens)))
        if here.start < here.stop:
            rows.append(Row(tokens[here], np.arange(start + here.start, start + here.stop), (), kv))
            room -= here.stop - here.start
    return rows
