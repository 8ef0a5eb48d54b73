"""The engine against the dense reference, and everything a request can go through: batching, limits, cancelling, stores."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import strategies
from dense import VOCAB, dense_greedy, dense_logits, random_graph
from kvgraph import (
    CapacityError,
    ContextGraph,
    Engine,
    GraphError,
    KVGraphError,
    PlanError,
    SamplingParams,
    StoreError,
    methods,
    models,
)
from kvgraph.attention.step import Step
from kvgraph.engine.engine import default_budget
from kvgraph.engine.sampling import SamplingError
from kvgraph.engine.scheduler import PAIRS
from kvgraph.engine.scratch import scratch_bytes
from kvgraph.plan import Plan, contiguous
from kvgraph.store.disk import DiskStore
from kvgraph.store.memory import MemoryStore
from remotes import RedisServer, has_redis
from soak import draws
from store_worker import got

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_two_executors_agree_for_every_family(family):
    """Engine logits == dense logits for drawn graphs, lengths and methods, cold and warm."""
    model = models.wrap(families.FAMILIES[family]())
    engine = Engine(model, kv_budget=1 << 26)

    @settings(max_examples=settings().max_examples)
    @given(strategies.problems(VOCAB))
    def agree(problem):
        method, graph = problem
        plan = method.plan(graph)
        expected = dense_logits(model, plan)
        for _ in range(2):  # the second time from stored KV
            got = engine.logits(plan)
            assert (got - expected).abs().max() <= 1e-4

    agree()


@settings(max_examples=draws(15))
@given(st.lists(strategies.problems(VOCAB), min_size=1, max_size=5), st.integers(1, 40))
def test_batching_and_chunking_never_change_a_result(llama, problems, step_tokens):
    plans = [method.plan(graph) for method, graph in problems]
    expected = [dense_greedy(llama, p, 3) for p in plans]
    engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=step_tokens)
    requests = [engine.submit(p, SamplingParams(max_tokens=3, ignore_eos=True), first_logits=True) for p in plans]
    results = [engine.wait(r) for r in requests]
    for plan, result, tokens in zip(plans, results, expected, strict=True):
        assert (result.first_logits - dense_logits(llama, plan)).abs().max() <= 1e-4
        assert result.token_ids == tokens


def test_requests_that_share_documents_encode_them_once(llama):
    engine = Engine(llama, kv_budget=1 << 26)
    base = random_graph(1)
    total = sum(map(len, base.segments)) + 4
    graphs = [base.with_query([i, i + 1]) for i in range(5)]
    results = engine.generate(graphs, "block", GREEDY)
    computed = [r.usage.document_tokens_computed for r in results]
    assert computed == [total, 0, 0, 0, 0]
    assert all(r.usage.reused_tokens == {"shared": total} for r in results[1:])
    assert engine.generate(graphs[0], "block", GREEDY).usage.reused_tokens == {"memory": total}
    assert [r.token_ids for r in results] == [dense_greedy(llama, engine.plan(g, "block"), 6) for g in graphs]


def test_nothing_stored_is_copied_or_changed(llama, monkeypatch):
    engine = Engine(llama, kv_budget=1 << 26)
    graph = random_graph(2)
    engine.encode(graph, "block")
    pool = engine.scheduler.memory.pool
    records = {k: got(pool, k) for k in engine.plan(graph, "block").keys(llama.fingerprint) if k}
    before = {k: [t.clone() for t in (*r.keys, *r.values)] for k, r in records.items()}
    storages = {t.untyped_storage().data_ptr() for r in records.values() for t in r.keys}
    seen = set()
    original = Step.__call__

    def spy(step, layer, *args):
        backend = step.backend

        def look(q, parts, *rest):
            seen.update(p.keys.untyped_storage().data_ptr() for p in parts)
            return backend(q, parts, *rest)

        step.backend = look
        try:
            return original(step, layer, *args)
        finally:
            step.backend = backend

    monkeypatch.setattr(Step, "__call__", spy)
    engine.generate(graph, "block", GREEDY)
    assert storages <= seen  # the very memory of every record is what attention read
    for k, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, (*records[k].keys, *records[k].values), strict=True))


def test_results_survive_a_restart_on_the_same_disk(llama, tmp_path):
    graph = random_graph(3, edges=True)
    with Engine(llama, store=tmp_path, kv_budget=1 << 26) as engine:
        first = engine.generate(graph, "graph-kv", GREEDY, first_logits=True)
        assert first.usage.document_tokens_computed > 0
        warm = engine.generate(graph, "graph-kv", GREEDY, first_logits=True)
    with Engine(llama, store=tmp_path, kv_budget=1 << 26) as engine:
        second = engine.generate(graph, "graph-kv", GREEDY, first_logits=True)
    assert second.usage.document_tokens_computed == 0 and set(second.usage.reused_tokens) == {"disk"}
    assert second.token_ids == warm.token_ids and torch.equal(second.first_logits, warm.first_logits)
    # Cold, the question runs in one step with the documents: matrices of other sizes round differently.
    assert second.token_ids == first.token_ids
    torch.testing.assert_close(second.first_logits, first.first_logits, atol=1e-4, rtol=0)


def test_tenants_and_models_never_share_records(llama, tmp_path):
    graph = random_graph(4)
    other = models.wrap(families.FAMILIES["llama"]().to(torch.bfloat16))
    Engine(llama, store=tmp_path, kv_budget=1 << 26).encode(graph, "block")
    for engine in (
        Engine(llama, store=tmp_path, kv_budget=1 << 26, salt="b"),
        Engine(other, store=tmp_path, kv_budget=1 << 26),
    ):
        assert engine.generate(graph, "block", GREEDY).usage.reused_tokens == {}


class TestMemory:
    def budget(self, model, tokens):
        return tokens * model.kv_bytes_per_token

    def test_a_request_that_can_never_fit_is_refused_with_its_size(self, llama):
        engine = Engine(llama, kv_budget=self.budget(llama, 20))
        with pytest.raises(CapacityError, match=rf"{self.budget(llama, 35):,} bytes"):
            engine.generate(ContextGraph([[1] * 20], query=[1] * 10), "block", max_tokens=6)

    def test_a_request_that_does_not_fit_now_waits_and_is_right(self, llama):
        graphs = [random_graph(10 + i) for i in range(6)]
        plans = [methods.get("block").plan(g) for g in graphs]
        largest = max(sum(map(len, p.spans)) for p in plans) + GREEDY.max_tokens
        engine = Engine(llama, kv_budget=self.budget(llama, largest))
        requests = [engine.submit(p, GREEDY) for p in plans]
        peak = 0
        while engine.step():
            peak = max(peak, engine.scheduler.memory.kv_bytes)
        assert peak <= self.budget(llama, largest)
        assert [r.result.token_ids for r in requests] == [dense_greedy(llama, p, 6) for p in plans]
        assert (
            engine.scheduler.memory.pool.pinned_bytes == 0
            and engine.scheduler.memory.row_bytes == 0
            and not engine.scheduler.memory.holds
        )

    def test_cancelling_frees_what_a_request_held(self, llama):
        engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=8)
        keep, drop = (
            engine.submit(methods.get("graph-kv").plan(random_graph(20, edges=True, query=n)), GREEDY) for n in (4, 5)
        )
        for _ in range(3):
            engine.step()
        engine.cancel(drop)
        assert drop.result.finish_reason == "cancelled"
        assert engine.wait(keep).token_ids == dense_greedy(llama, keep.plan, 6)
        engine.cancel(engine.submit(keep.plan, GREEDY))
        assert engine.scheduler.idle and not engine.scheduler.memory.holds and not engine.scheduler.encodings
        assert engine.scheduler.memory.pool.pinned_bytes == 0 and engine.scheduler.memory.row_bytes == 0

    def test_the_first_of_two_sharers_can_be_cancelled_at_any_step(self, llama):
        for steps in range(8):
            engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=8)
            a, b = (engine.submit(methods.get("graph-kv").plan(random_graph(21, edges=True)), GREEDY) for _ in range(2))
            for _ in range(steps):
                engine.step()
            engine.cancel(a)
            assert engine.wait(b).token_ids == dense_greedy(llama, b.plan, 6)
            assert not engine.scheduler.memory.holds and not engine.scheduler.encodings

    def test_closing_a_stream_cancels(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        stream = engine.stream(random_graph(22), "block", GREEDY)
        next(stream)
        stream.close()
        assert engine.scheduler.idle and engine.scheduler.memory.pool.pinned_bytes == 0


class TestRequests:
    def test_stream_pieces_make_the_result(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        graph = random_graph(30)
        chunks = list(engine.stream(graph, "block", GREEDY))
        assert [t for c in chunks for t in c.token_ids] == engine.generate(graph, "block", GREEDY).token_ids
        assert chunks[-1].result.finish_reason == "length" and all(c.result is None for c in chunks[:-1])

    def test_threads_drive_each_other(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        graphs = [random_graph(40 + i) for i in range(6)]
        results: list = [None] * len(graphs)

        def run(i):
            results[i] = engine.generate(graphs[i], "block", GREEDY).token_ids

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(graphs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results == [dense_greedy(llama, engine.plan(g, "block"), 6) for g in graphs]

    def test_score_gives_the_log_probabilities_of_an_answer(self, llama):
        engine = Engine(llama, kv_budget=1 << 26, max_step_tokens=3)
        graph, answer = random_graph(50), [5, 6, 7]
        result, expected = engine.score(graph, answer, "block"), []
        for i, token in enumerate(answer):
            plan = engine.plan(graph.with_query([*graph.query, *answer[:i]]), "block")
            expected.append(float(torch.log_softmax(dense_logits(llama, plan), -1)[token]))
        assert result.scores.tolist() == pytest.approx(expected, abs=1e-4) and not result.greedy
        best = engine.generate(graph, "block", GREEDY).token_ids
        assert (
            engine.score(graph, best, "block").greedy
            and not engine.score(graph, [*best[:-1], best[-1] ^ 1], "block").greedy
        )

    def test_positions_end_at_the_models_limit(self, llama):
        limit = llama.limit
        engine = Engine(llama, kv_budget=1 << 26)
        with pytest.raises(PlanError, match=f"position {limit}.*limit is {limit}"):
            engine.submit(Plan((contiguous([1, 2], limit - 1, cached=False),)), GREEDY)
        result = engine.wait(engine.submit(Plan((contiguous([1, 2], limit - 4, cached=False),)), GREEDY))
        assert (
            len(result.token_ids) == 3 and result.finish_reason == "length"
        )  # positions limit-2, limit-1, and the last needs none

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_a_prompt_that_is_too_long_is_not_planned(self, llama, monkeypatch, name):
        """Unless its method shares positions: then it may have more tokens than the model has positions."""
        limit, engine, method = llama.limit, Engine(llama, kv_budget=1 << 28), methods.get(name)
        half = [1] * (limit // 2 - 1)
        longest, longer = (ContextGraph([half, half], query, [3]) for query in ([2], [2, 2]))
        engine.prepare(engine.plan(longest, method, probe=False))
        if method.shares_positions:
            engine.prepare(engine.plan(longer, method))
            return
        monkeypatch.setattr(type(method), "plan", None)
        with pytest.raises(PlanError, match=f"the plan reaches position {limit}, but the model's limit is {limit}"):
            engine.plan(longer, method)

    def test_a_plan_that_is_too_long_is_not_hashed(self, llama, monkeypatch):
        monkeypatch.setattr(Plan, "keys", None)
        with pytest.raises(PlanError, match="the model's limit is"):
            Engine(llama, kv_budget=1 << 26).prepare(Plan((contiguous([1], llama.limit, cached=False),)))

    def test_bad_input_is_one_clear_error(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        with pytest.raises(PlanError, match="outside the vocabulary"):
            engine.generate(ContextGraph([[VOCAB]], query=[1]), "block", GREEDY)
        with pytest.raises(GraphError, match="no tokenizer"):
            engine.generate(ContextGraph(["text"], query="text"), "block", GREEDY)
        with pytest.raises(SamplingError, match="unknown sampling parameter 'max_token'"):
            engine.generate(random_graph(60), "block", max_token=3)
        assert engine.scheduler.idle

    def test_wrong_arguments_are_named(self, llama):
        for options in ({"kv_budget": "4GiB"}, {"kv_budget": 0}, {"max_step_tokens": -1}, {"salt": None}, {"store": 5}):
            (name,) = options
            with pytest.raises(KVGraphError, match=name):
                Engine(llama, **options)
        engine = Engine(llama, kv_budget=1 << 26)
        with pytest.raises(GraphError, match="give a ContextGraph"):
            engine.generate("text")
        with pytest.raises(GraphError, match="not the class"):
            engine.generate(random_graph(63), methods.Block)

    def test_the_repetition_penalty_counts_documents_and_query_once(self, llama):
        graph = ContextGraph([[1, 2], [2, 3]], query=[4], prefix=[5])
        engine = Engine(llama, kv_budget=1 << 26)
        logits = engine.logits(engine.plan(graph, "block"))
        penalised = logits.clone()
        for t in (1, 2, 3, 4, 5):
            penalised[t] = logits[t] / 1000 if logits[t] > 0 else logits[t] * 1000
        expected = int(penalised.argmax())
        assert engine.generate(graph, "block", repetition_penalty=1000.0, max_tokens=1).token_ids == [expected]

    def test_an_untuned_method_warns_once(self, llama):
        engine = Engine(llama, kv_budget=1 << 26)
        with pytest.warns(UserWarning, match="doesn't declare tuning for 'block'"):
            engine.plan(random_graph(61), "block")

    def test_a_failing_step_fails_its_requests_and_frees_everything(self, llama, monkeypatch):
        engine = Engine(llama, kv_budget=1 << 26)
        with monkeypatch.context() as m:
            m.setattr(models.Model, "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError("no memory")))
            with pytest.raises(MemoryError):
                engine.generate(random_graph(62), "block", GREEDY)
        assert engine.scheduler.idle and not engine.scheduler.memory.holds and not engine.scheduler.encodings
        graph = random_graph(62)
        assert engine.generate(graph, "block", GREEDY).token_ids == dense_greedy(llama, engine.plan(graph, "block"), 6)


def test_a_store_that_cannot_write_costs_only_recomputes(llama, tmp_path, monkeypatch):
    store = DiskStore(tmp_path)
    monkeypatch.setattr(store, "put_all", lambda records: {record.key: StoreError("disk full") for record in records})
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    graph = random_graph(70)
    assert engine.generate(graph, "block", GREEDY).token_ids == dense_greedy(llama, engine.plan(graph, "block"), 6)
    engine.flush()
    assert engine.store_errors == 4  # three documents and the prefix


def test_a_record_that_cannot_be_removed_keeps_no_other(llama, monkeypatch, caplog):
    store = MemoryStore(1 << 26)
    engine, graph = Engine(llama, store=store, kv_budget=1 << 26), random_graph(70)
    engine.generate(graph, "block", GREEDY)
    keys = [key for key in engine.keys(engine.plan(graph, "block")) if key is not None]
    engine.flush()
    assert len(keys) == len(store) == 4
    delete = store.delete

    def failing(key):
        if key in keys[:2]:
            raise StoreError(f"no answer for {key}")
        return delete(key)

    monkeypatch.setattr(store, "delete", failing)
    engine.forget(keys)
    engine.flush()
    assert [store.contains(key) for key in keys] == [True, True, False, False]
    assert caplog.messages == [f"the store can't remove records (2): no answer for {keys[0]}"]


@pytest.mark.parametrize("most", [3, 1000])
def test_few_bytes_wait_for_a_slow_store(llama, tmp_path, monkeypatch, most):
    """Memory's budget doesn't count what was evicted and isn't written yet."""
    store, waiting, asked = DiskStore(tmp_path), [], threading.Event()
    put, size = store.put_all, 50 * llama.kv_bytes_per_token

    def slow(records):
        asked.wait(0.05 if most == 3 else 60)
        waiting.append(sum(work.nbytes for _, work in engine._pending) + sum(record.nbytes for record in records))
        return put(records)

    monkeypatch.setattr(store, "put_all", slow)
    monkeypatch.setattr("kvgraph.engine.engine.WAITING", most * size)
    engine = Engine(llama, store=store, kv_budget=1 << 26)
    for seed in range(12):
        document = np.random.default_rng(seed).integers(0, VOCAB, 50).tolist()
        engine.generate(ContextGraph([document], query=[1]), "block", max_tokens=1)
    asked.set()
    engine.close()
    assert max(waiting) <= 5 * size if most == 3 else max(waiting) > 6 * size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_scratch_memory_does_not_grow_with_the_square_of_the_context(family):
    """One span of 6,000 tokens: its scores alone would be 576 MB a layer. With windows, parts are masked."""
    window = {"sliding_window": 1500} if family == "Mistral" else {}
    model = models.wrap(families.build(family, max_position_embeddings=8192, num_attention_heads=4, **window))
    engine = Engine(model, kv_budget=1 << 28)
    ids = np.random.default_rng(0).integers(0, VOCAB, 6000).tolist()
    engine.generate(ContextGraph([ids[:600]], query=[1]), "block", max_tokens=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = engine.generate(ContextGraph([ids], query=[1]), "block", max_tokens=1)
    assert result.usage.computed_tokens == 6001
    assert resident("VmHWM") - before < 150


def resident(field: str) -> int:
    """Megabytes of this process: VmRSS now, VmHWM at most since its peak was cleared."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_a_step_takes_no_more_than_the_scratch_that_the_budget_leaves(family):
    """The worst steps: all tokens computed, most pairs seen, most logits scored. Sizes are large enough to be seen in a process."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 30000}
    if family == "Qwen3Moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2048}
    model = models.wrap(families.build(family, max_position_embeddings=8192, **sizes))
    engine = Engine(model, kv_budget=1 << 29)
    ids = np.random.default_rng(0).integers(0, VOCAB, 4000).tolist()
    many = ContextGraph([ids[i : i + 80] for i in range(0, 1600, 80)], query=ids[:300])
    engine.generate(many, "block", max_tokens=1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    engine.generate(many, "block", max_tokens=1)
    engine.scores(ContextGraph([ids[:80]], query=ids[:9]), ids[:600], "block")
    engine.encode(ContextGraph([ids[2000:2600]], query=[1]), "block", progress=False)
    taken = resident("VmHWM") - before
    bound = scratch_bytes(model, 512, PAIRS * 512) >> 20
    assert 0.1 * bound < taken < bound, (taken, bound)


def test_a_long_answer_is_scored_in_steps_that_hold_its_logits(llama, monkeypatch):
    engine = Engine(llama, kv_budget=1 << 26)
    answer = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    graph = ContextGraph([[1, 2, 3]], query=[4] * 40)
    expected = engine.scores(graph, answer, "block")
    asked, original = [], llama.forward

    def forward(tokens, positions, attend, want):
        asked.append(len(want))
        return original(tokens, positions, attend, want)

    monkeypatch.setattr(llama, "forward", forward)
    engine.scheduler.max_step_logits = 64
    torch.testing.assert_close(engine.scores(graph, answer, "block"), expected, atol=1e-4, rtol=0)
    assert max(asked) == 64 and sum(asked) == 300


def test_the_default_budget_leaves_room_for_a_step(llama, monkeypatch):
    free = 1 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    cpu = torch.device("cpu")
    assert default_budget(cpu) == default_budget(cpu, 1 << 28) == free // 2
    assert default_budget(cpu, 3 << 28) == int(free * 0.95) - (3 << 28)
    with pytest.raises(CapacityError, match="smaller max_step_tokens"):
        default_budget(cpu, free)
    with pytest.raises(CapacityError, match="smaller max_step_tokens"):
        Engine(llama, max_step_tokens=1 << 22)


LOSSES = {"fp8": 0.8, "int8": 0.15, "int8+zstd": 0.15, "kivi:group=8": 2.0, "gear:group=8": 1.0}  # wrong KV: 3 and more


@pytest.mark.parametrize("codec", ["zstd", "fp8", "int8", "kivi:group=8", "gear:group=8", "int8+zstd"])
@pytest.mark.parametrize("method", ["full", "graph-kv"])
def test_a_codecs_losses_come_before_the_first_use(llama, tmp_path, codec, method):
    """Computed, from memory, from disk, or partly so: the same logits. A lossy codec does change them."""
    graph = random_graph(31, edges=method == "graph-kv")

    def logits(**options):
        with Engine(llama, kv_budget=1 << 26, **options) as engine:
            return [engine.logits(engine.plan(graph, method)) for _ in range(2)]

    (plain, _), (alone, again) = logits(), logits(codec=codec)
    cold, warm = logits(codec=codec, store=tmp_path)
    disk, _ = logits(codec=codec, store=tmp_path)
    sorted(tmp_path.glob("records/*/*"))[0].unlink()
    partly, _ = logits(codec=codec, store=tmp_path)
    assert torch.equal(warm, disk)
    assert torch.allclose(alone, again, atol=1e-4) and torch.allclose(cold, warm, atol=1e-4)
    # What is computed in a step with others rounds in another order, and a code may fall on the other side.
    for other in (again, partly):
        assert torch.allclose(warm, other, atol=1e-4 if codec == "zstd" else 0.05)
    difference = float((alone - plain).abs().max() / plain.std())
    assert difference == 0 if codec == "zstd" else 1e-5 < difference < LOSSES[codec]


def test_codecs_share_a_folder_without_sharing_a_lossy_record(llama, tmp_path):
    graph = random_graph(32)

    def reused(codec):
        with Engine(llama, kv_budget=1 << 26, store=tmp_path, codec=codec) as engine:
            return sum(engine.generate(graph, "block", GREEDY).usage.reused_tokens.values())

    assert [reused(codec) for codec in ("raw", "int8", "kivi")] == [0, 0, 0]
    assert reused("zstd") == reused("raw") > 0 and reused("int8") > 0


@pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")
def test_a_remote_tier_serves_answers_and_its_death_costs_only_computing(llama, tmp_path):
    graph, server = random_graph(33), RedisServer(tmp_path)
    places = [tmp_path / "kv", f"{server.url}?timeout=0.5"]
    try:
        with Engine(llama, kv_budget=1 << 26, store=places) as engine:
            cold = engine.generate(graph, "block", GREEDY)
        with Engine(llama, kv_budget=1 << 26, store=places[1]) as engine:
            warm = engine.generate(graph, "block", GREEDY)
        with Engine(llama, kv_budget=1 << 26, store=[tmp_path / "other", places[1]]) as engine:
            assert set(engine.generate(graph, "block", GREEDY).usage.reused_tokens) == {"redis"}
        with Engine(llama, kv_budget=1 << 26, store=[tmp_path / "other", places[1]]) as engine:
            assert set(engine.generate(graph, "block", GREEDY).usage.reused_tokens) == {"disk"}, "it was promoted"
        with Engine(llama, kv_budget=1 << 26, store=places[1], salt="tenant") as engine:
            assert not engine.generate(graph, "block", GREEDY).usage.reused_tokens
        server.kill()
        with Engine(llama, kv_budget=1 << 26, store=places[1]) as engine:
            dead = engine.generate(graph, "block", GREEDY)
            engine.flush()
            assert engine.store_errors > 0
    finally:
        server.kill()
    assert cold.token_ids == warm.token_ids == dead.token_ids
    assert set(warm.usage.reused_tokens) == {"redis"} and not dead.usage.reused_tokens
    assert warm.usage.document_tokens_computed == 0
