"""Answers compared with `full` while the server runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvgraph import ContextGraph, SamplingParams, methods
from kvgraph.checks.quality import compared
from kvgraph.server.prompts import lay_out
from kvgraph.server.schema import CompletionRequest
from kvgraph.server.shadow import TOKENS, Answered, comparable, flat
from serving import DOCUMENTS, Live, events, until

BLOCK = {"method": "block"}
COMPARED = 'kvgraph_shadow_total{method="block",outcome="compared"}'


def test_a_request_is_told_what_its_method_costs(server):
    sent = server.body(documents=DOCUMENTS, max_tokens=20, temperature=0, kvgraph=BLOCK | {"shadow": True})
    told = server.ask(**sent).json()["usage"]["kvgraph"]["shadow"]
    engine, caller = server.server.engine, server.server.tenants.caller(None)
    (prompt,) = lay_out(server.server, caller, CompletionRequest.model_validate(sent))
    graph = prompt.graph
    answer = engine.generate(graph, "block", max_tokens=20, ignore_eos=True).token_ids[:TOKENS]
    rows = {
        method: torch.stack(
            [
                engine.logits(engine.plan(graph.with_query([*graph.query, *answer[:n]]), method)).log_softmax(-1)
                for n in range(len(answer))
            ]
        )
        for method in ("block", "full")
    }
    wanted = compared(rows["block"], rows["full"])
    assert told["tokens"] == wanted.tokens == TOKENS
    assert told["kl"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6) and told["kl"] > 0
    assert told["agreement"] == pytest.approx(wanted.agreement)


@pytest.mark.parametrize("given", [{"kvgraph": {"method": "full", "shadow": True}}, {"documents": []}])
def test_there_is_nothing_to_compare(server, given):
    asked = {"documents": DOCUMENTS, "kvgraph": BLOCK | {"shadow": True}} | given
    assert "shadow" not in server.ask(**asked).json()["usage"]["kvgraph"]


def test_streams_tell_it_too(server):
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.ask(documents=DOCUMENTS, kvgraph=BLOCK | {"shadow": True}, **streamed)
    assert events(answer.text)[-2]["usage"]["kvgraph"]["shadow"]["tokens"] == 4


def test_a_share_of_requests_is_compared_when_the_engine_is_idle(live):
    server = live(shadow=1.0)
    assert "shadow" not in server.ask(documents=DOCUMENTS, kvgraph=BLOCK).json()["usage"]["kvgraph"]
    found = shown(server, lambda found: found.get(COMPARED))
    assert found['kvgraph_shadow_tokens_total{method="block"}'] == 4
    assert found['kvgraph_shadow_kl_nats_count{method="block"}'] == 1
    assert found['kvgraph_shadow_agreeing_tokens_total{method="block"}'] <= 4
    off = live()
    off.ask(documents=DOCUMENTS, kvgraph=BLOCK)
    assert not [name for name in off.metrics() if name.startswith("kvgraph_shadow_total")]


def test_a_comparison_gives_way_to_requests(live, monkeypatch):
    server = live(shadow=1.0, max_step_tokens=8)
    engine, asked, held = server.server.engine, threading.Event(), threading.Event()
    step, documents = engine.step, [{"text": "one fact " * 40}]

    def slow() -> bool:
        """Let a comparison's long prompt take long, until somebody asks."""
        if any(r.keep_answer for r in (*engine.scheduler.running, *engine.scheduler.waiting)):
            held.set()
            asked.wait(20)
        return step()

    server.ask(documents=documents, kvgraph=BLOCK)
    shown(server, lambda found: found.get(COMPARED))
    monkeypatch.setattr(engine, "step", slow)
    server.ask(documents=documents, kvgraph=BLOCK)
    assert held.wait(20)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.ask()))
    thread.start()
    time.sleep(0.2)  # it is noticed by now
    asked.set()
    thread.join(20)
    assert answers[0].status_code == 200
    shown(server, lambda found: found.get('kvgraph_shadow_total{method="block",outcome="given up"}'))
    assert engine.scheduler.idle


def test_only_a_few_wait(live):
    server = live(shadow=1.0)
    free = threading.Event()
    shadow, loop = server.server.shadow, server.server.runner._loop
    graph = ContextGraph([[1, 2], [3]], [4])
    asked = Answered(graph, methods.get("block"), "", (5, 6))
    server.server.runner.call(lambda: free.wait(20))
    job = server.server.engine.prepare(server.server.engine.plan(graph, "block"), SamplingParams(max_tokens=1))
    loop.call_soon_threadsafe(server.server.runner.submit, job)
    loop.call_soon_threadsafe(lambda: [shadow.offer(asked) for _ in range(10)])
    try:
        shown(server, lambda found: found.get('kvgraph_shadow_total{method="block",outcome="skipped"}') == 6)
    finally:
        free.set()
    shown(server, lambda found: found.get(COMPARED) == 4)


def test_a_prompt_without_room_in_full_is_answered_without(server, monkeypatch):
    monkeypatch.setattr(server.server.engine.model, "limit", 200)
    documents = [{"text": "one fact " * 12}] * 9  # side by side for pcw, one after the other for full
    answer = server.ask(documents=documents, kvgraph={"method": "pcw", "shadow": True})
    assert answer.status_code == 200 and "shadow" not in answer.json()["usage"]["kvgraph"]
    assert server.metrics()['kvgraph_shadow_total{method="pcw",outcome="skipped"}'] == 1


def test_the_flat_layout_keeps_nothing():
    graph = ContextGraph([[1, 2], [3], []], [4], prefix=[[7], [8]], edges=[(0, 1)])
    plan = flat(graph)
    assert [span.tokens for span in plan.spans] == [(7, 8, 1, 2, 3, 4)] and not plan.spans[0].cached
    assert not comparable(Answered(graph, methods.get("block"), "", ()))


def shown(server: Live, there: Callable[[dict[str, float]], Any]) -> dict[str, float]:
    """The server's metrics once they show something."""
    until(lambda: there(server.metrics()), 20)
    return server.metrics()
