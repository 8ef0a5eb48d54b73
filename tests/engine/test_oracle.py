"""The real engine against what the original Graph-KV and KVLink code computes: logits, greedy tokens, cached positions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

import oracle
from kvgraph import Engine, SamplingParams
from soak import some
from store_worker import got

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
@pytest.mark.parametrize("case", some(CASES, 22), ids=lambda c: c["id"])
def test_case(case):
    method, graph = oracle.problem(case)
    run = engine(case["model"])
    plan = run.plan(graph, method)
    # The originals stop at the model's end tokens (KVLink's also at the end-of-turn token, its case's eos_id).
    params = SamplingParams(max_tokens=16, ignore_eos=True, stop_token_ids=(case["eos_id"],))
    whole = SamplingParams(max_tokens=16, ignore_eos=True)
    cold = run.wait(run.submit(plan, params, first_logits=True))
    stored, longer = run.submit(plan, params, first_logits=True), run.submit(plan, whole)  # in the same steps
    for result in (cold, run.wait(stored)):
        assert np.abs(result.first_logits.numpy() - oracle.first_logits(case)).max() <= 5e-4
        assert result.token_ids == case["greedy"]
    assert run.wait(longer).token_ids == case["greedy16_ignoring_eos"]


def _cached(run: Engine, plan) -> dict[tuple[int, int], list[torch.Tensor]]:
    """(token, position) -> keys and values [layers, 2, kv heads, D] of what the prompt span reads, keys turned to place."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    keys, rotary = plan.keys(run.model.fingerprint), run.model.rotaries[0]
    for place in plan.prompt.sees:
        record = got(run.scheduler.memory.pool, keys[place.span])
        table = rotary.table(torch.full((len(record),), place.at))  # stored keys are canonical: token 0 at 0
        layers = torch.stack(
            [torch.stack([rotary.rotate(k, *table), v]) for k, v in zip(record.keys, record.values, strict=True)]
        )
        for i in range(place.lo, place.hi):
            slot = (plan.spans[place.span].tokens[i], place.at + int(record.positions[i]))
            found.setdefault(slot, []).append(layers[:, :, :, i])
    return found


@pytest.mark.parametrize("case", [c for c in CASES if oracle.kv_cache(c) is not None], ids=lambda c: c["id"])
def test_stored_kv_is_what_the_original_cached(case):
    """Token by token and position by position, for the recorded caches (live link tokens and prompts are not stored)."""
    method, graph = oracle.problem(case)
    run = engine(case["model"])
    plan = run.plan(graph, method)
    run.encode(graph, method)
    ours, theirs = _cached(run, plan), oracle.kv_cache(case)
    compared = 0
    for slot, at in enumerate(zip(case["context_tokens"], case["context_positions"], strict=True)):
        if candidates := ours.get(tuple(at)):
            expected = torch.from_numpy(np.stack([theirs[0][:, :, slot], theirs[1][:, :, slot]], 1))
            distances = [float((c - expected).abs().max()) for c in candidates]
            best = int(np.argmin(distances))
            assert distances[best] <= 5e-4
            candidates.pop(best)
            compared += 1
    assert not any(ours.values()) and compared == sum(p.hi - p.lo for p in plan.prompt.sees)
