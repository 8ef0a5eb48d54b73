"""The real engine against what the original Graph-KV and KVLink code computes: logits, greedy tokens, cached positions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import oracle
import pytest

from kvgraph import Engine, SamplingParams

CASES = oracle.cases()


@lru_cache
def engine(model: str) -> Engine:
    return Engine.load(oracle.folder() / "models" / model, dtype="float32", kv_budget=1 << 28)


def test_every_method_has_cases():
    methods = {c["method"] for c in CASES}
    assert methods >= {
        "vanilla",
        "block_server",
        "block_parallel",
        "block_batch",
        "gapemp",
        "gapemp_appr",
        "gapemp_graph",
        "gapemp_graph_batch",
        "kvlink",
    }


@pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_case(case):
    method, graph = oracle.problem(case)
    run = engine(case["model"])
    plan = run.plan(graph, method)
    # The originals stop at the model's end tokens (KVLink's also at the end-of-turn token, its case's eos_id).
    params = SamplingParams(max_tokens=16, ignore_eos=True, stop_token_ids=(case["eos_id"],))
    for _ in range(2):  # cold, then from stored KV
        result = run.wait(run.submit(plan, params, first_logits=True))
        assert np.abs(result.first_logits.numpy() - oracle.first_logits(case)).max() <= 5e-4
        assert result.token_ids == case["greedy"]
    whole = SamplingParams(max_tokens=16, ignore_eos=True)
    assert run.wait(run.submit(plan, whole)).token_ids == case["greedy16_ignoring_eos"]
