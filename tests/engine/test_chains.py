"""Long chains of short spans: one packed forward, gathered copies, and the same numbers as the dense form."""

from __future__ import annotations

import pytest
import torch

import families
from dense import dense_greedy, dense_logits
from kvgraph import ContextGraph, Engine, methods, models
from kvgraph.attention.rows import MANY
from kvgraph.edges import chain
from kvgraph.engine import engine as engine_file
from kvgraph.engine import request as request_file
from kvgraph.engine.runner import Runner


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_oss", "smollm3"])
def model(request):
    return models.wrap(families.FAMILIES[request.param]())


def chat(messages: int, vocab: int = 100) -> ContextGraph:
    pieces = [[(7 * i + 3 * j) % (vocab - 5) + 2 for j in range(1 + i % 4)] for i in range(messages)]
    return ContextGraph([], query=[3, 5], prefix=pieces)


@pytest.mark.parametrize("step_tokens", [7, 40, 512])
def test_a_chain_of_many_messages_equals_its_dense_form(model, step_tokens):
    engine = Engine(model, kv_budget=1 << 24, max_step_tokens=step_tokens)
    graph = chat(2 * MANY + 3)
    plan = engine.plan(graph, "full")
    for _ in ("cold", "warm"):
        result = engine.generate(graph, "full", max_tokens=6, ignore_eos=True, first_logits=True)
        torch.testing.assert_close(result.first_logits, dense_logits(model, plan), atol=1e-4, rtol=0)
        assert result.token_ids == dense_greedy(model, plan, 6)
    longer = engine.generate(chat(2 * MANY + 9), "full", max_tokens=1, first_logits=True)  # the next turns
    expected = dense_logits(model, engine.plan(chat(2 * MANY + 9), "full"))
    torch.testing.assert_close(longer.first_logits, expected, atol=1e-4, rtol=0)
    assert longer.usage.computed_tokens == 2 + sum(1 + i % 4 for i in range(2 * MANY + 3, 2 * MANY + 9))


@pytest.fixture
def forwards(monkeypatch):
    """The numbers of rows of the forwards that run."""
    found = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, rows, want: found.append(len(rows)) or run(self, rows, want))
    return found


@pytest.fixture
def long_spans(monkeypatch):
    """Spans of two tokens count as long: only links of a chain gather them, and long questions that follow one."""
    for file in (request_file, engine_file):
        monkeypatch.setattr(file, "SHORT", 1)


@pytest.mark.parametrize("budget", [1 << 24, None])
def test_a_cold_chain_of_long_spans_fills_its_steps(model, forwards, long_spans, budget):
    graph, step = chat(99).with_query(range(3, 33)), 40
    plan = methods.get("full").plan(graph)
    tokens = sum(map(len, plan.spans))
    engine = Engine(model, kv_budget=budget or (tokens + 8) * model.kv_bytes_per_token, max_step_tokens=step)
    result = engine.generate(graph, "full", max_tokens=4, ignore_eos=True, first_logits=True)
    torch.testing.assert_close(result.first_logits, dense_logits(model, plan), atol=1e-4, rtol=0)
    assert result.token_ids == dense_greedy(model, plan, 4)
    assert engine.scheduler.peak_bytes <= engine.scheduler.memory.budget
    least = -(-tokens // step) + 3
    assert len(forwards) == least if budget else len(forwards) > least  # without room for a copy, steps are smaller


def test_a_cold_chain_or_graph_is_one_forward(model, forwards):
    engine = Engine(model, kv_budget=1 << 24)
    engine.logits(engine.plan(chat(41), "full"))
    segments = [[2 + i, 3, 4 + i] for i in range(6)]
    engine.logits(engine.plan(ContextGraph(segments, [3], [2, 1], chain(6)), "graph-kv:rounds=3"))
    assert len(forwards) == 2


def test_two_chats_with_one_beginning_share_it(model):
    engine = Engine(model, kv_budget=1 << 24)
    a, b = chat(30), ContextGraph([], query=[9, 9, 4], prefix=[*chat(30).prefix[:20], [8, 8], [4]])
    requests = [engine.submit(engine.plan(g, "full")) for g in (a, b)]
    results = [engine.wait(r) for r in requests]
    for graph, result in zip((a, b), results, strict=True):
        assert result.token_ids[:4] == dense_greedy(model, engine.plan(graph, "full"), 4)
    assert results[1].usage.reused_tokens == {"shared": sum(map(len, chat(30).prefix[:20]))}
