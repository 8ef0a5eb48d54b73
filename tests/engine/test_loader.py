"""Reading beside the model: steps go on, and what is late, cancelled or shared is dealt with."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

import families
from dense import dense_greedy
from kvgraph import Engine, SamplingParams, methods, models
from kvgraph.engine import scheduler as scheduler_module
from kvgraph.engine.loader import THREADS
from kvgraph.graph import ContextGraph
from kvgraph.plan import Place, Plan, Span
from kvgraph.store.memory import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


class Gated(MemoryStore):
    """A store whose reads wait until somebody opens the gate."""

    name = "gated"

    def __init__(self):
        super().__init__(1 << 28)
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []
        self.most, self.reading = 0, 0
        self.pause = 0.0
        self.count = threading.Lock()

    def get(self, key):
        with self.count:
            self.reads.append(key)
            self.reading += 1
            self.most = max(self.most, self.reading)
        self.gate.wait(30)
        time.sleep(self.pause)
        with self.count:
            self.reading -= 1
        return super().get(key)


def documents(n: int, seed: int = 0, length: int = 8) -> list[list[int]]:
    return [[(seed * 31 + i * 7 + j) % 120 for j in range(length)] for i in range(n)]


def plan(n: int, seed: int = 0, query: int = 5):
    return methods.get("block").plan(ContextGraph(documents(n, seed), query=[query, 6, 7]))


@pytest.fixture
def store(llama):
    """With the records of plan(6, 0) and plan(6, 1)."""
    made = Gated()
    with Engine(llama, store=made, kv_budget=1 << 26) as engine:
        for seed in (0, 1):
            engine.wait(engine.submit(plan(6, seed), SamplingParams(max_tokens=1)))
    made.close = lambda: None
    with Engine(llama, store=made, kv_budget=1 << 26) as engine:
        for seed in (0, 1):
            engine.wait(engine.submit(plan(6, seed), GREEDY))
    made.reads.clear()
    made.most = 0
    return made


def test_a_cold_read_stops_nobody_who_decodes(llama, store):
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    running = engine.submit(plan(2, 9), SamplingParams(max_tokens=40, ignore_eos=True))
    while not running.token_ids:
        engine.step()
    store.gate.clear()
    cold = engine.submit(plan(6, 0), GREEDY)
    began = time.perf_counter()
    engine.wait(running)
    assert time.perf_counter() - began < 20 and not cold.finished and cold.missing
    store.gate.set()
    result = engine.wait(cold)
    assert result.usage.reused_tokens == {"gated": 48} and result.usage.document_tokens_computed == 0
    assert result.token_ids == dense_greedy(llama, cold.plan, 6)


def test_a_request_whose_records_are_in_memory_overtakes_one_that_reads(llama, store):
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    engine.wait(engine.submit(plan(6, 1), GREEDY))
    store.gate.clear()
    cold, warm = engine.submit(plan(6, 0), GREEDY), engine.submit(plan(6, 1), GREEDY)
    assert engine.wait(warm).usage.reused_tokens == {"memory": 48} and not cold.finished
    store.gate.set()
    assert engine.wait(cold).usage.reused_tokens == {"gated": 48}


def test_records_are_read_side_by_side(llama, store):
    store.pause = 0.1
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    engine.wait(engine.submit(plan(6, 0), GREEDY))
    assert store.most == THREADS


def test_what_one_request_was_just_told_is_missing_is_not_read_again_for_another(llama):
    """The second needs a source at once; the first asks for it only when its reader turns out to be missing, too."""
    source = Span((1,), (0,))
    reader = Span((2,), (1,), sees=(Place(0, 0, 0, 1),))
    prompt = Span((3,), (2,), sees=(Place(1, 1, 0, 1),), cached=False)
    store = Gated()
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    engine.loader.close()  # reads at once
    first = engine.submit(Plan((source, reader, prompt)), GREEDY)
    second = engine.submit(Plan((source, replace(reader, cached=False), prompt)), GREEDY)
    engine.step()
    assert store.reads == [first.keys[1], second.keys[0]]
    engine.step()
    assert engine.scheduler.encodings.keys() <= {*first.keys, *second.keys} and not engine.scheduler.loading
    for request in (first, second):
        assert engine.wait(request).token_ids == dense_greedy(llama, request.plan, 6)
    assert store.reads == [first.keys[1], second.keys[0]]


def test_what_comes_too_late_is_computed(llama, store, monkeypatch):
    monkeypatch.setattr(scheduler_module, "DEADLINE", 0.05)
    store.gate.clear()
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    late = engine.submit(plan(6, 0), GREEDY)
    assert engine.wait(late).token_ids == dense_greedy(llama, late.plan, 6)
    assert late.usage.document_tokens_computed == 48 and engine.loader.counts["late"] == 6
    store.gate.set()
    deadline = time.monotonic() + 20
    while engine.loader.counts["found"] < THREADS and time.monotonic() < deadline:  # the others had not begun
        time.sleep(0.01)
    assert engine.loader.counts["found"] == THREADS
    again = engine.submit(plan(6, 0), GREEDY)  # what came late does no harm
    assert engine.wait(again).token_ids == late.token_ids and again.usage.reused_tokens == {"memory": 48}
    assert engine.scheduler.idle and not engine.scheduler.loading and not engine.scheduler.memory.holds


def test_readers_of_a_missing_record_wait_for_its_sources_too(llama, store, monkeypatch):
    """A reader that isn't stored, whose sources are: they are read, it is computed."""
    graph = ContextGraph(documents(3), query=[5, 6], edges=[(0, 2), (1, 2)])
    made = methods.get("graph-kv").plan(graph)
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    request = engine.submit(made, GREEDY)
    assert engine.wait(request).token_ids == dense_greedy(llama, made, 6)
    assert request.usage.reused_tokens == {"gated": 16} and request.usage.document_tokens_computed == 8


def test_cancelling_one_that_reads_frees_all(llama, store):
    store.gate.clear()
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    one, other = engine.submit(plan(6, 0), GREEDY), engine.submit(plan(6, 0, query=9), GREEDY)
    engine.step()
    assert len(engine.scheduler.loading) == 6
    engine.cancel(one)
    assert len(engine.scheduler.loading) == 6, "the other still waits"
    engine.cancel(other)
    assert not engine.scheduler.loading and not engine.scheduler.memory.holds and engine.scheduler.idle
    store.gate.set()
    assert engine.wait(engine.submit(plan(6, 0), GREEDY)).token_ids == dense_greedy(llama, plan(6, 0), 6)


def test_a_record_is_read_once_for_all_who_wait(llama, store):
    store.gate.clear()
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    requests = [engine.submit(plan(6, 0, query), GREEDY) for query in (5, 6, 7)]
    engine.step()
    store.gate.set()
    assert [engine.wait(r).usage.reused_tokens for r in requests] == [{"gated": 48}] * 3
    assert len(store.reads) == 6


def test_records_are_read_while_a_request_waits_for_memory(llama, store):
    """Up to an eighth of the budget: one record of 8 tokens of a request that needs 53 of 80."""
    engine = Engine(llama, store=store, kv_budget=80 * llama.kv_bytes_per_token)
    first = engine.submit(plan(6, 0), SamplingParams(max_tokens=20, ignore_eos=True))
    while not first.token_ids:
        engine.step()
    store.reads.clear()
    second = engine.submit(plan(6, 1), GREEDY)
    for _ in range(3):
        engine.step()
    assert not first.finished and second in engine.scheduler.waiting
    while not engine.scheduler.ahead and engine.scheduler.loader.pending:  # a step would be a token of the first
        engine.scheduler.loader.wait(20)
        engine.step()
    assert not first.finished and len(store.reads) == len(engine.scheduler.ahead) == 1
    assert engine.scheduler.memory.kv_bytes <= engine.scheduler.memory.budget
    assert engine.wait(second).usage.reused_tokens == {"gated": 48}
    assert len(store.reads) == 6 and not engine.scheduler.ahead


def test_a_closed_engine_still_reads(llama, store):
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    engine.close()
    assert engine.generate(ContextGraph(documents(6), query=[5, 6, 7]), "block", GREEDY).usage.reused_tokens
