"""Plans laid out densely give what the published code computes: positions, first-step logits, greedy tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import oracle

CASES = oracle.cases()
TOLERANCE = 5e-4  # the recorded float32 runs differ from float64 by up to 9e-5


def test_every_method_has_cases():
    methods = {case["method"] for case in CASES}
    assert {"vanilla", "gapemp", "gapemp_appr", "gapemp_graph", "gapemp_graph_batch", "kvlink"} <= methods
    assert {"block_parallel", "block_batch", "block_server"} <= methods


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_positions(case):
    """What the last live token sees is, token by token and position by position, the original's cache."""
    method, graph = oracle.problem(case)
    dense = method.plan(graph).dense()
    seen = dense.visible[-1]
    query = case["query_positions"]
    expected = Counter(zip(case["context_tokens"], case["context_positions"], strict=True))
    expected.update(zip(dense.tokens[-len(query) :].tolist(), query, strict=True))
    assert Counter(zip(dense.tokens[seen].tolist(), dense.positions[seen].tolist(), strict=True)) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_logits_and_tokens(case):
    method, graph = oracle.problem(case)
    model = oracle.DenseLlama.load(oracle.model_folder(case))
    first, tokens = model.greedy(method.plan(graph), 16)
    assert np.abs(first - oracle.first_logits(case)).max() <= TOLERANCE
    assert tokens == case["greedy16_ignoring_eos"]
    assert tokens[: len(case["greedy"])] == case["greedy"]
