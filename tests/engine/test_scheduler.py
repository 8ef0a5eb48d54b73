"""The scheduler under random load: memory accounts, fairness, faults in the middle of a step, and always right answers.

A state machine draws requests, steps, cancellations, restarts and damage to the store; after every rule everything the
scheduler keeps account of is counted again from the requests themselves, and every answer is compared with the dense
reference.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import families
import strategies
from kvgraph import CapacityError, ContextGraph, Engine, ModelError, SamplingParams, methods, models
from kvgraph.attention.step import Step
from kvgraph.engine.request import UNCACHED, Request
from kvgraph.engine.sampling import Sampler
from kvgraph.plan import Place, Plan, Span, contiguous
from kvgraph.store.disk import DiskStore
from kvgraph.store.memory import MemoryStore
from soak import draws

VOCAB = 16  # few ids and short documents: drawn requests often share some
LONGEST = 3
TIE = 1e-3  # where the best logits are closer than this, either token is right
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def llama() -> models.Model:
    return models.wrap(families.FAMILIES["llama"]())


class Fault(Exception):
    """What the tests throw into a step."""


def thrower(error: BaseException) -> Any:
    def throw(*args: Any, **kwargs: Any) -> Any:
        raise error

    return throw


def reference(model: models.Model, plan: Plan, answer: list[int]) -> torch.Tensor:
    """Logits [n, V] each token of an answer is chosen from, by the dense reference."""
    live = plan.prompt
    more = range(live.positions[-1] + 1, live.positions[-1] + len(answer))
    grown = replace(live, tokens=(*live.tokens, *answer[:-1]), positions=(*live.positions, *more))
    d = Plan((*plan.spans[:-1], grown)).dense()
    group = None if d.group is None else torch.from_numpy(d.group)
    arrays = (torch.from_numpy(a) for a in (d.tokens, d.positions, d.visible))
    return model.dense(*arrays, group=group, groups=d.groups)[-len(answer) :]


def assert_right(model: models.Model, request: Request) -> None:
    """The result is what greedy decoding by the dense reference gives (ties within TIE aside), and ends where it must."""
    result, params = request.result, request.params
    assert result is not None
    answer = result.token_ids
    if result.finish_reason == "cancelled" and not answer:
        return
    if request.encode_only:
        assert not answer and result.finish_reason in ("length", "cancelled")
        return
    logits = reference(model, request.plan, answer)
    for token, row in zip(answer, logits, strict=True):
        assert row.max() - row[token] <= TIE
    assert (result.first_logits - logits[0]).abs().max() <= 1e-4
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else model.eos_ids)}
    assert not ends & set(answer[:-1])
    if result.finish_reason != "cancelled":
        assert result.finish_reason == ("stop" if answer[-1] in ends else "length")
        assert answer[-1] in ends or len(answer) == params.max_tokens


def with_uncached(plan: Plan, chosen: set[int]) -> Plan:
    """The plan with some spans computed each time, and so all that read them."""
    spans: list[Span] = []
    for i, s in enumerate(plan.spans):
        cached = s.cached and i not in chosen and all(spans[p.span].cached for p in s.sees)
        spans.append(replace(s, cached=cached))
    return Plan(tuple(spans), plan.method)


def distinct(request: Request) -> dict[str, int]:
    """Tokens of every span the request may have to hold, by key."""
    return {k: len(s) for k, s in zip(request.keys, request.plan.spans[:-1], strict=False)}


def own_tokens(request: Request) -> int:
    """Tokens of a request's own KV: the prompt span and the answer, whose last token needs none."""
    return 0 if request.encode_only else len(request.plan.prompt) + request.params.max_tokens - 1


def check_accounts(engine: Engine) -> None:
    """Count again, from the running requests alone, everything the scheduler keeps account of."""
    s, size = engine.scheduler, engine.model.kv_bytes_per_token
    holds: Counter[str] = Counter()
    tokens: dict[str, int] = {}
    for request in s.running:
        assert not request.finished
        needed = distinct(request)
        if not request.missing:  # intermediate versions have been let go
            read = {request.keys[p.span] for p in request.plan.prompt.sees}
            needed = {k: n for k, n in needed.items() if k in read}
            assert all(k in s.memory.pool for k in read)
        assert request.held == set(needed)
        assert request.loads <= request.missing and all(request in s.loading[k].waiters for k in request.loads)
        absent = {request.keys[i] for i in request.absent}  # to be encoded once nothing is being read
        assert not absent or request.loads
        others = request.missing - request.loads - absent
        assert all(request in s.encodings[k].waiters for k in others)
        holds.update(needed.keys())
        tokens.update(needed)
    assert s.memory.holds == {k: (tokens[k] * size, n) for k, n in holds.items()}
    assert s.memory.row_bytes == size * sum(map(own_tokens, s.running))
    for request in s.waiting:
        assert not request.held and not request.missing and request.sequence.kv is None

    pool = {**s.memory.pool._idle, **s.memory.pool._pinned}
    assert set(s.memory.pool._pinned) == set(holds) & set(pool)
    assert all(entry.pins == 1 for entry in s.memory.pool._pinned.values())
    assert s.memory.pool.bytes == sum(e.record.nbytes for e in pool.values())
    assert s.memory.pool.pinned_bytes == sum(e.record.nbytes for e in s.memory.pool._pinned.values())
    assert all(k in holds for k in pool if k.startswith(UNCACHED))

    for key, encoding in s.encodings.items():
        assert encoding.waiters and all(r in s.running and key in r.missing for r in encoding.waiters)
        assert key not in s.memory.pool
        assert all(k in s.memory.pool or k in s.encodings or k in s.loading for k, *_ in encoding.sequence.places)
    for key, loading in s.loading.items():
        assert all(r in s.running and key in r.missing for r in loading.waiters)
        assert key not in s.memory.pool and key not in s.encodings
    half_done = sum(e.sequence.kv.nbytes for e in s.encodings.values() if e.sequence.kv is not None)
    assert s.memory.kv_bytes == s.memory.pool.bytes + half_done + s.memory.row_bytes <= s.memory.budget


def assert_released(engine: Engine) -> None:
    s = engine.scheduler
    assert (
        s.idle
        and not s.memory.holds
        and not s.encodings
        and not any(loading.waiters for loading in s.loading.values())
        and s.memory.row_bytes == 0
        and s.memory.pool.pinned_bytes == 0
    )


class Load(RuleBasedStateMachine):
    """Random load on one engine, with or without a disk store under it that is damaged now and then."""

    model = None

    @initialize(tokens=st.integers(12, 60), step_tokens=st.integers(1, 12), disk=st.booleans())
    def start(self, tokens: int, step_tokens: int, disk: bool) -> None:
        if Load.model is None:
            Load.model = models.wrap(families.FAMILIES["llama"]())
        self.folder = tempfile.TemporaryDirectory() if disk else None
        self.plans: list[Plan] = []
        self.requests: list[Request] = []  # not yet compared with the reference
        self.streams: list[tuple[Iterator, Request, list[int]]] = []
        self.open(tokens, step_tokens)

    def open(self, tokens: int, step_tokens: int) -> None:
        store = None if self.folder is None else DiskStore(self.folder.name, fingerprint=self.model.fingerprint)
        budget = tokens * self.model.kv_bytes_per_token
        self.engine = Engine(self.model, store=store, kv_budget=budget, max_step_tokens=step_tokens)
        if self.engine.loader is not None:  # reads at once, so that a failure can be played again
            self.engine.loader.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan, params: SamplingParams, encode_only: bool = False) -> Request | None:
        """The request, or None if it was refused; it is exactly when it could never fit."""
        keys = plan.keys(self.model.fingerprint)[:-1]
        spans = {k or i: len(s) for i, (k, s) in enumerate(zip(keys, plan.spans, strict=False))}
        own = 0 if encode_only else len(plan.prompt) + params.max_tokens - 1
        fits = (sum(spans.values()) + own) * self.model.kv_bytes_per_token <= self.engine.scheduler.memory.budget
        try:
            request = self.engine.submit(plan, params, first_logits=True, encode_only=encode_only)
        except CapacityError:
            assert not fits
            return None
        assert fits
        self.requests.append(request)
        return request

    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 5),
        stop_token_ids=st.sets(st.integers(0, 127), max_size=40).map(tuple),
        ignore_eos=st.booleans(),
    )

    @rule(problem=strategies.problems(VOCAB, LONGEST), params=params)
    def ask(self, problem: Any, params: SamplingParams) -> None:
        method, graph = problem
        self.plans.append(method.plan(graph))
        self.submit(self.plans[-1], params)

    @rule(plan=strategies.plans(VOCAB, max_length=LONGEST), params=params)
    def ask_any_plan(self, plan: Plan, params: SamplingParams) -> None:
        self.plans.append(plan)
        self.submit(plan, params)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), params=params)
    def ask_again(self, data: st.DataObject, params: SamplingParams) -> None:
        self.submit(data.draw(st.sampled_from(self.plans)), params)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), params=params)
    def ask_with_uncached_spans(self, data: st.DataObject, params: SamplingParams) -> None:
        plan = data.draw(st.sampled_from(self.plans))
        self.submit(with_uncached(plan, data.draw(st.sets(st.integers(0, len(plan.spans))))), params)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def warm(self, data: st.DataObject) -> None:
        self.submit(data.draw(st.sampled_from(self.plans)), SamplingParams(max_tokens=1), encode_only=True)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), params=params)
    def stream(self, data: st.DataObject, params: SamplingParams) -> None:
        request = self.submit(data.draw(st.sampled_from(self.plans)), params)
        if request is not None:
            self.streams.append((self.engine.chunks(request), request, []))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), close=st.booleans())
    def read_stream(self, data: st.DataObject, close: bool) -> None:
        stream = self.streams[data.draw(st.integers(0, len(self.streams) - 1))]
        chunks, request, tokens = stream
        try:
            chunk = next(chunks, None)
        except Fault:  # from an earlier step
            chunk = None
        if chunk is not None:
            tokens.extend(chunk.token_ids)
        if close:
            chunks.close()
            assert request.finished or not tokens  # a generator that never ran has nothing to cancel
        if chunk is None or close or request.finished:
            self.streams.remove(stream)
        if chunk is not None and chunk.result is not None:
            assert tokens == chunk.result.token_ids

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = self.requests[data.draw(st.integers(0, len(self.requests) - 1))]
        self.engine.cancel(request)
        assert request.finished

    # -- steps --------------------------------------------------------------------------------------------------------

    @rule(n=st.integers(1, 4))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()
            check_accounts(self.engine)

    @rule(where=st.sampled_from(["forward", "sampler", "fetch", "save", "memory"]), interrupt=st.booleans())
    def step_with_a_fault(self, where: str, interrupt: bool) -> None:
        """Something raises inside a step: whoever is concerned ends with that error, an interrupt reaches the caller."""
        error = KeyboardInterrupt() if interrupt else Fault()
        s = self.engine.scheduler
        target = {
            "forward": (self.model, "forward"),
            "sampler": (Sampler, "__call__"),
            "fetch": (self.engine.loader or s, "fetch"),
            "save": (s, "save"),
            "memory": (type(s), "_rows"),
        }[where]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*target, thrower(error), raising=where != "fetch")
            try:
                self.engine.step()
            except KeyboardInterrupt:
                assert interrupt
        for request in self.requests:
            if request.error is not None:
                assert request.error is error
        self.requests = [r for r in self.requests if r.error is None]
        self.streams = [x for x in self.streams if x[1].error is None]

    def drain(self) -> None:
        """Run until idle: a step that waits for no record computes a token at least, so what is asked for bounds their number."""
        bound = 1 + sum(sum(distinct(r).values()) + own_tokens(r) for r in self.requests if not r.finished)
        while bound and self.engine.step():
            bound -= not self.engine.scheduler.loading
            check_accounts(self.engine)
        assert_released(self.engine)
        self.compare()

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "engine"):
            return
        check_accounts(self.engine)
        for request in [r for r in self.requests if r.finished]:
            self.requests.remove(request)
            assert request.sequence.kv is None and not request.sequence.views and not request.held
            assert_right(self.model, request)

    # -- the store ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.folder is not None)
    @rule(tokens=st.integers(12, 60), step_tokens=st.integers(1, 12), finish=st.booleans())
    def restart(self, tokens: int, step_tokens: int, finish: bool) -> None:
        if finish:
            self.drain()
        for request in self.requests:
            self.engine.cancel(request)
        assert_released(self.engine)
        self.compare()
        self.streams.clear()
        self.engine.close()
        self.open(tokens, step_tokens)

    @precondition(lambda self: self.folder is not None)
    @rule(
        how=st.sampled_from(["delete", "unlink", "flip", "truncate", "swap"]),
        which=st.integers(0, 99),
        other=st.integers(0, 99),
        at=st.integers(0, 9999),
    )
    def damage(self, how: str, which: int, other: int, at: int) -> None:
        """A record goes or gets wrong behind the engine's back. Files are replaced: what is mapped stays as it was."""
        self.engine.flush()
        files = sorted(Path(self.folder.name).glob("records/*/*.safetensors"))
        if not files:
            return
        file = files[which % len(files)]
        content = bytearray(file.read_bytes())
        if how == "delete":
            assert self.engine.store.delete(file.stem)
        elif how == "unlink":
            file.unlink()
        elif how == "flip" and content:
            content[at % len(content)] ^= 0x40
        elif how == "truncate":
            del content[at % (len(content) + 1) :]
        elif how == "swap":
            content = bytearray(files[other % len(files)].read_bytes())
        if how in ("flip", "truncate", "swap"):
            new = file.with_name(".tmp-damaged")
            new.write_bytes(content)
            os.replace(new, file)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.drain()
            self.engine.close()
            if self.folder is not None:
                self.folder.cleanup()


class TestLoad(Load.TestCase):
    settings = settings(max_examples=draws(8, 500), stateful_step_count=50)


# -- faults, one by one ------------------------------------------------------------------------------------------------


def graph(seed: int, documents: int = 3) -> ContextGraph:
    return ContextGraph([[seed, d, 3, 1, 4, 1] for d in range(documents)], query=[seed, 5])


def block(seed: int, documents: int = 3) -> Plan:
    return methods.get("block").plan(graph(seed, documents))


def run(engine: Engine, most: int = 200) -> None:
    deadline = time.monotonic() + 60
    while most:
        most -= not engine.scheduler.loading
        if not engine.step():
            return assert_released(engine)
        assert time.monotonic() < deadline, "the store doesn't answer"
    raise AssertionError("not done after so many steps")


class UnreliableStore(MemoryStore):
    """Breaks the contract of stores: raises whatever it likes."""

    def __init__(self, get: BaseException | None = None, put: BaseException | None = None):
        super().__init__(1 << 26)
        self.errors = {"get": get, "put": put}

    def get(self, key):
        return super().get(key) if self.errors["get"] is None else thrower(self.errors["get"])()

    def put(self, record):
        return super().put(record) if self.errors["put"] is None else thrower(self.errors["put"])()


class TestFaults:
    def test_a_store_that_raises_on_reading_costs_only_recomputes(self, llama):
        store = UnreliableStore(get=OSError("gone"))
        engine = Engine(llama, store=store, kv_budget=1 << 26)
        first = engine.submit(block(1), GREEDY, first_logits=True)
        run(engine)
        assert_right(llama, first)
        assert engine.loader.counts["failed"] == 3 and not first.usage.reused_tokens

    def test_a_store_that_raises_on_writing_costs_only_recomputes(self, llama):
        engine = Engine(llama, store=UnreliableStore(put=OSError("broken")), kv_budget=1 << 26)
        requests = [engine.submit(block(i, 8), GREEDY, first_logits=True) for i in range(12)]
        run(engine)
        engine.flush()
        for request in requests:
            assert_right(llama, request)
        assert engine.store_errors > 64 and "broken" in str(engine.store_error)  # more than wait for the disk at once
        engine.close()

    @pytest.mark.parametrize("cancel", [False, True])
    def test_a_tokenizer_that_raises_ends_only_its_request(self, llama, cancel):
        engine = Engine(llama, kv_budget=1 << 26)
        good, bad = (engine.submit(block(i), GREEDY, first_logits=True) for i in (1, 2))
        for _ in range(2 * cancel):
            engine.step()
        bad.stream._decode = thrower(IndexError("piece id is out of range"))
        if cancel:
            engine.cancel(bad)
        run(engine)
        assert_right(llama, good)
        with pytest.raises(IndexError, match="piece id"):
            engine.wait(bad)

    def test_an_interrupt_while_results_are_handed_out_ends_only_the_request_at_hand(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        requests = [engine.submit(block(i), GREEDY, first_logits=True) for i in range(3)]
        requests[1].sampler = thrower(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        run(engine)
        assert isinstance(requests[1].error, KeyboardInterrupt)
        assert_right(llama, requests[0])
        assert_right(llama, requests[2])

    def test_nan_logits_end_only_their_request(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        good, bad = (engine.submit(block(i), GREEDY, first_logits=True) for i in (1, 2))
        sampler = bad.sampler
        bad.sampler = lambda logits, best, allowed: sampler(logits * float("nan"))
        run(engine)
        assert_right(llama, good)
        with pytest.raises(ModelError, match="NaN"):
            engine.wait(bad)


class TestThreads:
    def test_generate_cancel_stream_and_flush_from_many_threads(self, llama, tmp_path):
        engine = Engine(llama, store=tmp_path, kv_budget=60 * llama.kv_bytes_per_token, max_step_tokens=16)
        failures: list[BaseException] = []
        done: list[Request] = []

        def guarded(work):
            def target(*args):
                try:
                    work(*args)
                except BaseException as error:
                    failures.append(error)

            return target

        @guarded
        def generate(seed):
            for i in range(4):
                request = engine.submit(block(seed + i), GREEDY, first_logits=True)
                if seed % 3 == 0:
                    threading.Timer(0.003, engine.cancel, [request]).start()
                engine.wait(request)
                done.append(request)

        @guarded
        def stream(seed):
            request = engine.submit(block(seed), GREEDY, first_logits=True)
            tokens = []
            for chunk in engine.chunks(request):
                tokens += chunk.token_ids
                threading.Event().wait(0.005)  # slower than the engine: others drive it meanwhile
            assert tokens == request.result.token_ids
            done.append(request)

        flush = guarded(lambda: [engine.flush() for _ in range(20)])
        threads = [threading.Thread(target=generate, args=(i,)) for i in range(6)]
        threads += [threading.Thread(target=stream, args=(i,)) for i in range(2)] + [threading.Thread(target=flush)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not failures and not any(t.is_alive() for t in threads)
        assert len(done) == 26
        assert_released(engine)
        for request in done:
            assert_right(llama, request)
        engine.close()

    def test_a_request_finished_by_others_while_a_chunk_is_read_loses_nothing(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        request = engine.submit(block(1), GREEDY, first_logits=True)
        stream = engine.chunks(request)
        chunks = [next(stream)]
        engine.wait(request)  # as another thread would
        chunks += stream
        assert [t for c in chunks for t in c.token_ids] == request.result.token_ids
        assert [c.result for c in chunks] == [None, request.result]

    def test_closing_while_others_generate_breaks_nobody(self, llama, tmp_path):
        engine = Engine(llama, store=tmp_path, kv_budget=1 << 26)
        results: list = []
        started = threading.Event()

        def generate():
            for i in range(12):
                results.append(engine.generate(graph(i), "block", GREEDY))
                started.set()

        thread = threading.Thread(target=generate)
        thread.start()
        assert started.wait(60)
        engine.close()
        engine.close()
        thread.join(60)
        assert len(results) == 12
        assert_released(engine)


def test_a_request_with_missing_documents_is_not_starved_by_prefills(llama):
    """Steps full of new requests whose documents are all there: the older, cold one still gets its share."""
    engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=8)
    warm = methods.get("block").plan(ContextGraph([[1, 2, 3]], query=[5] * 8))
    engine.wait(engine.submit(warm, SamplingParams(max_tokens=1)))
    cold = engine.submit(block(9), GREEDY)
    for _ in range(20):
        engine.submit(warm, SamplingParams(max_tokens=1))
        engine.step()
    assert cold.finished


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_what_requests_read_is_not_evicted_for_them(llama, codec):
    """A full pool whose least recently used records are those that are asked for. int8 is read as it is packed, so a
    record takes more room while it is encoded than there would be for two.
    """
    length, short, block = 256, 8, methods.get("block")
    engine = Engine(llama, codec=codec, kv_budget=int((1.3 * length + 60) * llama.kv_bytes_per_token))
    count = 1 if codec == "raw" else 2
    plans = [block.plan(ContextGraph([[n] * length], [1, 2, 3, 4])) for n in range(count)]
    for plan in plans:
        engine.wait(engine.submit(plan, SamplingParams(max_tokens=1), encode_only=True))
    memory = engine.scheduler.memory
    number = 0
    while memory.budget - memory.pool.bytes > (short + 1) * llama.kv_bytes_per_token:
        number += 1
        engine.encode(ContextGraph([[5 + number % 9, number // 9 % VOCAB] * (short // 2)], [1]), block)
    assert all(key in memory.pool for plan in plans for key in engine.keys(plan) if key is not None)
    requests = [engine.submit(plan, SamplingParams(max_tokens=57, ignore_eos=True)) for plan in plans]
    results = [engine.wait(request) for request in requests]  # the second's may be evicted for the first
    assert results[0].usage.document_tokens_computed == 0 and all(len(r.token_ids) == 57 for r in results)


def test_more_decoding_rows_than_a_step_holds(llama):
    engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=3)
    requests = [engine.submit(block(i), GREEDY, first_logits=True) for i in range(8)]
    run(engine)
    for request in requests:
        assert_right(llama, request)


@pytest.mark.parametrize("step_tokens", [1, 3, 5])
def test_no_row_that_decodes_is_left_out_of_a_step(llama, step_tokens):
    """Prompts of a few tokens that see up to 60 places: more of them wait than a step has room for."""
    engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=step_tokens)
    requests = []
    for i, n in enumerate([1, 60, 2, 30, 60, 1, 30, 2]):
        spans = [contiguous([j % VOCAB, 3], 2 * j) for j in range(n)]
        prompt = contiguous([1] * (1 + i % 4), 2 * n, [Place(j, 2 * j) for j in range(n)], cached=False)
        requests.append(engine.submit(Plan((*spans, prompt)), GREEDY, first_logits=True))
    most = 0
    while not all(request.finished for request in requests):
        chosen = {id(owner) for owner, _ in engine.scheduler._choose()}
        decoding = [request for request in engine.scheduler.running if request.token_ids]
        assert all(id(request) in chosen for request in decoding)
        most = max(most, len(decoding))
        engine.step()
    assert (most > 1) == (step_tokens > 1)


def test_a_token_that_sees_many_places_does_not_widen_its_neighbours(llama, monkeypatch):
    """The merge's scratch follows the (token, place) pairs there are, not the step's tokens times the most places."""
    n = 300
    spans = [contiguous([i % VOCAB, 3], 2 * i) for i in range(n)]
    many = Plan((*spans, contiguous([1, 2], 2 * n, [Place(i, 2 * i) for i in range(n)], cached=False)))
    long = Plan((contiguous([k % VOCAB for k in range(600)], 0), contiguous([1], 600, [Place(0, 0)], cached=False)))
    engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=128)
    wide = engine.submit(many, SamplingParams(max_tokens=20, ignore_eos=True), first_logits=True)
    while not wide.token_ids:
        engine.step()
    other = engine.submit(long, GREEDY, first_logits=True)
    ratios, original = [], Step._buckets

    def buckets(step, order, counts, groups):
        made = list(original(step, order, counts, groups))
        padded = sum(len(order) if b.gather is None else b.gather.numel() for b in made)
        ratios.append(padded / len(order))
        return made

    monkeypatch.setattr(Step, "_buckets", buckets)
    run(engine)
    assert max(ratios) <= 2
    assert_right(llama, wide)
    assert_right(llama, other)


def test_finished_requests_keep_no_kv_alive(llama):
    engine = Engine(llama, kv_budget=1 << 26)
    plan = block(1)
    request = engine.submit(plan, GREEDY, first_logits=True)
    engine.step()
    pool = engine.scheduler.memory.pool
    stored = [weakref.ref(pool.get(k)[0].keys[0]) for k in plan.keys(llama.fingerprint) if k in pool]
    engine.step()
    own = weakref.ref(request.sequence.kv)
    run(engine)
    assert stored and own() is None and all(r() is not None for r in stored)
    pool.evict_to(0)
    assert not any(r() is not None for r in stored)
    assert request.result.first_logits.untyped_storage().nbytes() == 4 * llama.vocab_size
    scores = engine.score(graph(2), list(range(10)), "block").scores
    assert scores.untyped_storage().nbytes() == 4 * 10


# -- numbers at the edges ----------------------------------------------------------------------------------------------

TOKENS = (3, 1, 4, 1, 5, 9)
EDGES = {
    "nothing of a place is visible": (contiguous(TOKENS, 0), contiguous((7, 8), 5, [Place(0, 50)], cached=False)),
    "the place begins where the reader stands": (
        contiguous(TOKENS, 0),
        contiguous((7, 8, 9), 5, [Place(0, 5)], cached=False),
    ),
    "two places at the same position": (
        contiguous(TOKENS, 0),
        contiguous(TOKENS[::-1], 0),
        contiguous((7,), 6, [Place(0, 0), Place(1, 0)], cached=False),
    ),
    "the same span three times at one position": (
        contiguous(TOKENS, 0),
        contiguous((7, 8), 6, [Place(0, 0), Place(0, 0), Place(0, 0, 2, 4)], cached=False),
    ),
    "two spans of one key": (
        contiguous(TOKENS, 0),
        contiguous(TOKENS, 100),
        contiguous((7, 8), 106, [Place(0, 94), Place(1, 100)], cached=False),
    ),
    "a cached span that sees nothing of its place": (
        contiguous(TOKENS, 0),
        contiguous((2, 2, 6), 4, [Place(0, 5)]),
        contiguous((7, 8), 11, [Place(1, 4), Place(0, 5)], cached=False),
    ),
    "live tokens before, inside and after a document": (
        contiguous(TOKENS, 2),
        Span((7, 8, 9, 10), (0, 4, 5, 20), (Place(0, 2),), cached=False),
    ),
    "no places": (contiguous((7, 8), 3, cached=False),),
}


@pytest.mark.parametrize("step_tokens", [1, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_places_at_the_edges_are_exact(kv_heads, step_tokens):
    """Multi-query, grouped and multi-head attention; fully hidden, coinciding and repeated places, gaps, any plan."""
    model = models.wrap(families.build("Llama", num_key_value_heads=kv_heads))
    engine = Engine(model, kv_budget=1 << 26, max_step_tokens=step_tokens)

    def exact(plan: Plan) -> None:
        request = engine.submit(plan, GREEDY, first_logits=True)
        run(engine)
        assert_right(model, request)

    for spans in EDGES.values():
        exact(Plan(spans))
    given(strategies.plans(VOCAB, max_spans=6))(exact)()
