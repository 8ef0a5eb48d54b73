"""Records that stay packed in memory: attention reads of them exactly what it reads of decoded ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from dense import dense_greedy
from kvgraph import Engine, SamplingParams, methods, models
from kvgraph.attention.backends import cpu
from kvgraph.engine import pooling
from kvgraph.errors import CapacityError
from kvgraph.graph import ContextGraph
from kvgraph.store import MemoryStore, Record, TieredStore
from kvgraph.store.codecs.base import InPlace
from kvgraph.store.codecs.registry import CODECS, in_place, packed, parse, reads_in_place
from kvgraph.store.disk import DiskStore
from soak import draws, some
from store_worker import key_of

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")

SPECS = ["int8", "kivi", "kivi:bits=2,group=7,residual=5", "kivi:group=100,residual=90"]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


def graph(documents: int = 3, length: int = 23, query: int = 5, edges: bool = False) -> ContextGraph:
    segments = [[(13 * i + 7 * j + j * j) % 120 for j in range(length - i)] for i in range(documents)]
    found = [(i, documents - 1) for i in range(documents - 1)] if edges else []
    return ContextGraph(segments, query=[query, 6, 7], edges=found)


def decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from now on decode all records at once, as they do those of other codecs."""
    monkeypatch.setattr(pooling, "reads_in_place", lambda codec: False)


def records(engine: Engine, found: ContextGraph) -> list[Record]:
    keys = engine.keys(engine.plan(found, "block"))[:-1]
    return [engine.scheduler.memory.pooled(key) for key in keys]


@settings(max_examples=draws(30, 1500), deadline=None)
@given(
    st.sampled_from([*SPECS, "kivi+zstd"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 150),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.data(),
)
def test_any_tokens_are_those_of_the_decoded_record(spec, dtype, n, dims, data):
    draw = torch.Generator().manual_seed(n)
    kv = [tuple(torch.randn(2, n, d, generator=draw).to(dtype) for _ in range(2)) for d in dims]
    decoded = packed(Record(key_of(1), *kv, torch.arange(n)), parse(spec))
    small = in_place(decoded)
    assert not small.keys and not small.values and small.held == n
    for layer in range(2):
        for side, exact in zip(small.layer(layer), decoded.layer(layer), strict=True):
            assert side.shape == exact.shape and side.dtype == exact.dtype
            assert torch.equal(side.to(dtype), exact)
            lo = data.draw(st.integers(0, n - 1))
            hi = data.draw(st.integers(lo + 1, n))
            cut = data.draw(st.integers(1, hi - lo))
            assert torch.equal(side[:, lo:hi][:, -cut:].float(), exact[:, hi - cut : hi].float())


@pytest.mark.parametrize("spec", ["int8", "kivi"])
@pytest.mark.parametrize("family", some(sorted(families.FAMILIES), 7))
def test_every_family_reads_what_it_would_decoded(family, spec, monkeypatch):
    """Several requests at once, over steps of few tokens, with places that are masked, windowed and whole: bit by bit."""
    model = models.wrap(families.FAMILIES[family]())
    asked = [(graph(), "block"), (graph(query=9), "epic"), (graph(2, 9, edges=True), "graph-kv"), (graph(), "kvlink")]
    found = []
    for _ in range(2):
        with Engine(model, codec=spec, kv_budget=1 << 26, max_step_tokens=40) as engine:
            plans = [engine.plan(g, method) for g, method in asked]
            requests = [engine.submit(plan, GREEDY, first_logits=True) for plan in plans]
            found.append([engine.wait(request) for request in requests])
            pool = [entry.record for entry in engine.scheduler.memory.pool._idle.values()]
            assert all((not r.keys) == (len(found) == 1) for r in pool) and pool
        decoding(monkeypatch)
    for mine, exact in zip(*found, strict=True):
        assert torch.equal(mine.first_logits, exact.first_logits) and mine.token_ids == exact.token_ids


@pytest.mark.parametrize("spec", [*SPECS, "int8+zstd"])
@pytest.mark.parametrize("tile", [2048, 5])
def test_every_codec_reads_what_it_would_decoded(spec, tile, llama, monkeypatch):
    monkeypatch.setattr(cpu, "TILE", tile)
    found = []
    for _ in range(2):
        with Engine(llama, codec=spec, kv_budget=1 << 26) as engine:
            found.append(engine.generate(graph(), "block", GREEDY, first_logits=True))
        decoding(monkeypatch)
    assert torch.equal(found[0].first_logits, found[1].first_logits) and found[0].token_ids == found[1].token_ids


@pytest.mark.parametrize("spec", ["int8", "kivi:bits=2"])
def test_bfloat16_and_gathered_views_are_the_same_too(spec, monkeypatch):
    """Keys and values are rounded to the model's dtype as the decoded ones are; short views are copied side by side."""
    hf = families.FAMILIES["llama"]().bfloat16()
    many = ContextGraph([[(i * 5 + j) % 120 for j in range(4)] for i in range(20)], query=[3, 4])
    found = []
    for _ in range(2):
        with Engine(models.wrap(hf), codec=spec, kv_budget=1 << 26) as engine:
            found.append([engine.generate(g, "block", GREEDY, first_logits=True) for g in (graph(), many)])
        decoding(monkeypatch)
    for mine, exact in zip(*found, strict=True):
        assert torch.equal(mine.first_logits, exact.first_logits)


@pytest.mark.parametrize("spec", ["int8", "kivi", "kivi+zstd"])
def test_memory_and_disk_hold_the_same_bytes(spec, llama, tmp_path):
    """What is computed, read from disk, and read through a tier of memory: equal tokens from equally small records."""
    raw = sum(map(len, graph().segments)) * llama.kv_bytes_per_token
    answers = []
    for store in (tmp_path / "kv", tmp_path / "kv", TieredStore([MemoryStore(1 << 26), DiskStore(tmp_path / "kv")])):
        with Engine(llama, codec=spec, kv_budget=1 << 26, store=store) as engine:
            answers.append(engine.generate(graph(), "block", GREEDY, first_logits=True))
            found = records(engine, graph())
            sizes = [r.nbytes for r in found]
            assert all(not r.keys for r in found) and sum(sizes) == engine.scheduler.memory.pool.bytes
            assert sizes == [engine.scheduler.pooling.nbytes(len(r)) for r in found]
            assert sum(sizes) == sum(r.packed.nbytes for r in found) < raw / (3 if spec == "int8" else 5)
    assert answers[0].usage.kv_bytes < raw / 2
    assert answers[1].usage.document_tokens_computed == 0 and answers[1].usage.reused_tokens == {"disk": 66}
    for answer in answers[1:]:
        assert torch.equal(answer.first_logits, answers[0].first_logits)
        assert answer.token_ids == answers[0].token_ids


def test_a_budget_that_raw_records_exceed_holds_packed_ones(llama):
    """Ten documents of 40 tokens in the memory of 250: each is encoded when there is room for its tokens unpacked."""
    size = llama.kv_bytes_per_token
    documents = ContextGraph([[(i * 11 + j) % 120 for j in range(40)] for i in range(10)], query=[5, 6])
    plan = methods.get("block").plan(documents)
    with pytest.raises(CapacityError, match="at once"):
        Engine(llama, kv_budget=250 * size).submit(plan, GREEDY)
    with Engine(llama, codec="kivi", kv_budget=250 * size, max_step_tokens=64) as engine:
        memory = engine.scheduler.memory
        requests = [engine.submit(plan, GREEDY), engine.submit(methods.get("block").plan(graph()), GREEDY)]
        encoding = 0
        while not all(r.finished for r in requests):
            engine.step()
            assert memory.kv_bytes <= memory.budget
            encoding = max(encoding, memory._extra_now())
        assert encoding > 0 and all(r.error is None for r in requests)
        again = engine.submit(plan, GREEDY)
        assert engine.wait(again).token_ids == requests[0].result.token_ids
        assert again.usage.reused_tokens == {"memory": 400}
        assert not memory.holds and not memory._extras and memory.row_bytes == 0
    with Engine(llama, codec="kivi", kv_budget=1 << 26) as roomy:
        assert roomy.wait(roomy.submit(plan, GREEDY)).token_ids == requests[0].result.token_ids


@settings(max_examples=draws(4, 250), deadline=None)
@given(st.integers(60, 140), st.integers(1, 40), st.data())
def test_no_load_exceeds_the_budget_or_waits_forever(tokens, step_tokens, data):
    model = models.wrap(families.FAMILIES["llama"]()) if not MODEL else MODEL[0]
    MODEL[:] = [model]
    with Engine(
        model, codec="kivi", kv_budget=tokens * model.kv_bytes_per_token, max_step_tokens=step_tokens
    ) as engine:
        memory, requests = engine.scheduler.memory, []
        for _ in range(data.draw(st.integers(1, 6))):
            shape = data.draw(st.tuples(st.integers(1, 5), st.integers(6, 60), st.booleans()))
            plan = methods.get("graph-kv").plan(graph(shape[0], shape[1], edges=shape[2]))
            try:
                requests.append(engine.submit(plan, GREEDY))
            except CapacityError:
                continue
            for _ in range(data.draw(st.integers(0, 4))):
                engine.step()
                assert memory.kv_bytes <= memory.budget
        for _ in range(3000):
            if all(r.finished for r in requests):
                break
            engine.step()
            assert memory.kv_bytes <= memory.budget
        assert all(r.finished and r.error is None for r in requests)
        assert not memory.holds and not memory._extras and memory.row_bytes == 0


MODEL: list[models.Model] = []


def test_other_codecs_are_decoded_when_they_are_loaded(llama, tmp_path):
    assert {name for name in CODECS if reads_in_place(parse(name))} == {"int8", "kivi"}
    assert isinstance(parse("int8"), InPlace) and not isinstance(parse("gear"), InPlace)
    for _ in range(2):
        with Engine(llama, codec="gear", store=tmp_path) as engine:
            plan = engine.plan(graph(), "block")
            tokens = engine.wait(engine.submit(plan, GREEDY)).token_ids
            assert all(r.keys and r.packed is None for r in records(engine, graph()))
    assert len(tokens) == len(dense_greedy(llama, plan, 4))
