"""Records that are copied to a device beside the steps: nobody reads what hasn't arrived, and nothing waits longer than it must."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import families
from kvgraph import Engine, SamplingParams, methods, models
from kvgraph.attention.rows import RowKV, View, flat
from kvgraph.engine import engine as engines
from kvgraph.engine import transfers as module
from kvgraph.engine.transfers import Arrival, Transfers
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.store.disk import DiskStore
from kvgraph.store.record import Record
from streams import Late

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")

CPU = torch.device("cpu")
SHAPES = [(2, 8, 8), (1, 4, 8), (2, 8, 4)]
FIRST = SamplingParams(max_tokens=1, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


def host_record(tokens: int, key: str = "0") -> Record:
    kv = RowKV(SHAPES, tokens, torch.float32, CPU)
    kv.buffer.normal_()
    return Record(key * 64, kv.keys, kv.values, torch.arange(tokens))


def same(a: Record, b: Record) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))


def view(record: Record) -> View:
    return View(record, 0, 0, len(record))


@pytest.fixture
def late():
    return Late()


@pytest.fixture
def moving(late):
    return Transfers(CPU, SHAPES, late, Late())


def test_records_that_came_together_arrive_layer_by_layer(moving, late, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1)
    sources = [host_record(5), host_record(3)]
    brought = [moving.bring(source) for source in sources]
    (arrival,) = moving.on_the_way([view(record) for record in brought])
    assert brought[0].arrival is brought[1].arrival is arrival and not late.marks and late.follows == 2
    for layer in range(3):
        arrival.wait(layer)
        for record, source in zip(brought, sources, strict=True):
            for later in range(3):
                arrived = [torch.equal(a, b) for a, b in zip(record.layer(later), source.layer(later), strict=True)]
                assert arrived == [later <= layer] * 2
        assert arrival.done == (layer == 2)
    assert moving.on_the_way([view(record) for record in brought]) == []
    assert len(late.marks) == 3 and [mark.waits for mark in late.marks] == [1, 1, 1]


def test_who_reads_all_of_it_waits_for_the_last_layer(moving, late):
    source = host_record(5)
    brought = moving.bring(source)
    brought.arrival.wait()
    assert same(brought, source) and brought.arrival.done
    brought.arrival.wait()
    assert sum(mark.waits for mark in late.marks) == 1


@pytest.mark.parametrize(
    ("records", "copies", "least", "events"), [(4, 12, 1, 3), (4, 8, 1, 2), (400, 8, 1, 1), (1, 99, 300, 2)]
)
def test_small_copies_hold_several_layers(moving, late, monkeypatch, records, copies, least, events):
    monkeypatch.setattr(module, "COPIES", copies)
    monkeypatch.setattr(module, "LEAST", least)
    sources = [host_record(2) for _ in range(records)]  # layers of 256, 96 and 192 bytes
    brought = [moving.bring(source) for source in sources]
    for layer in range(3):
        brought[0].arrival.wait(layer)
    assert len(late.marks) == events and all(map(same, brought, sources))


def test_records_after_the_beginning_of_a_batch_are_another_one(moving, late):
    first = moving.bring(host_record(5))
    moving.begin()
    second = moving.bring(host_record(5))
    assert first.arrival is not second.arrival and not second.arrival.begun
    moving.begin()
    moving.begin()
    assert len(moving.on_the_way([view(first), view(second)])) == 2
    second.arrival.wait()
    assert first.arrival.done, "a stream keeps the order"


def test_a_source_is_let_go_once_it_has_been_copied(moving):
    source = host_record(5)
    gone = weakref.ref(flat(source).untyped_storage())
    whole = flat(source).clone()
    brought = moving.bring(source)
    del source
    moving.begin()
    moving.begin()
    brought.arrival.wait()
    assert torch.equal(flat(brought), whole)
    moving.begin()
    gc.collect()
    assert not moving._arrivals and gone() is None and not brought.arrival._sources


def test_after_an_error_nothing_counts_as_arrived(moving, late):
    source = host_record(5)
    brought = moving.bring(source)
    late.broken = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no copies"):
            brought.arrival.wait(0)
    assert not brought.arrival.done
    late.broken = False
    brought.arrival.wait()
    assert same(brought, source)


def test_what_is_read_becomes_one_buffer(moving):
    record = host_record(5)
    apart = Record(record.key, tuple(k.clone() for k in record.keys), record.values, record.positions)
    assert flat(apart) is None and flat(record) is not None
    assert same(moving.pinned(apart), record) and flat(moving.pinned(apart)) is not None


@pytest.mark.parametrize("together", [True, False])
def test_a_computed_record_is_copied_to_the_host(moving, together):
    record = host_record(5)
    if not together:
        record = Record(record.key, tuple(k.clone() for k in record.keys), record.values, record.positions)
    copied = moving.on_host(record)
    assert same(copied, record) and flat(copied) is not None and copied.keys[0].data_ptr() != record.keys[0].data_ptr()
    assert moving._outgoing.follows == 1


def test_sizes_are_those_of_the_layers(late):
    arrival = Arrival(late, [heads * (key + value) for heads, key, value in SHAPES])
    source = host_record(7)
    arrival.add(torch.empty_like(flat(source)), flat(source), 7)
    assert arrival._prefix[-1] * 7 == flat(source).numel()


# -- an engine whose memory is filled by such copies -----------------------------------------------------------------


def documents(n: int, length: int = 8, seed: int = 0) -> list[list[int]]:
    return [[(seed * 31 + i * 7 + j) % 120 for j in range(length)] for i in range(n)]


def plan(n: int = 6, length: int = 8, query: int = 5):
    return methods.get("block").plan(ContextGraph(documents(n, length), query=[query, 6, 7]))


def moved(llama, folder, budget: int = 1 << 26, **options) -> Engine:
    """An engine with a store, whose records arrive late."""
    engine = Engine(llama, store=folder, kv_budget=budget, **options)
    pooling = engine.scheduler.pooling
    pooling.transfers = Transfers(llama.device, pooling._shapes, Late(), Late())
    return engine


@pytest.fixture
def folder(llama, tmp_path):
    """A store with the records of plan()."""
    with moved(llama, tmp_path / "kv") as engine:
        engine.wait(engine.submit(plan(), FIRST))
        engine.wait(engine.submit(plan(20, 2), FIRST))
        engine.flush()
    return tmp_path / "kv"


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """What hasn't arrived is NaN, which is close to nothing."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def arriving(engine: Engine) -> None:
    """Admit a request, and let some of its records come."""
    engine.step()
    engine.loader.wait(10)
    with engine._lock, torch.inference_mode():
        engine.scheduler._collect()
    assert engine.scheduler.pooling.transfers._arrivals


@pytest.mark.parametrize("shape", [(6, 8), (20, 2)], ids=["documents", "gathered"])
def test_answers_from_a_store_are_those_without_one(llama, folder, shape):
    plain = Engine(llama, kv_budget=1 << 26)
    with moved(llama, folder) as engine:
        for _ in range(2):
            results = []
            for e in (plain, engine):
                request = e.submit(plan(*shape), GREEDY, first_logits=True)
                results.append(e.wait(request))
            close(results[0].first_logits, results[1].first_logits)
            assert results[0].token_ids == results[1].token_ids and results[1].usage.document_tokens_computed == 0
            engine.scheduler.memory.pool.evict_to(0)


def test_a_request_that_is_cancelled_leaves_its_records_for_others(llama, folder):
    with moved(llama, folder) as engine:
        first = engine.submit(plan(), FIRST)
        arriving(engine)
        engine.cancel(first)
        result = engine.wait(engine.submit(plan(), FIRST, first_logits=True))
        close(result.first_logits, Engine(llama, kv_budget=1 << 26).logits(plan()))


def test_records_that_are_evicted_on_their_way_are_read_again(llama, folder):
    with moved(llama, folder) as engine:
        first = engine.submit(plan(), FIRST)
        arriving(engine)
        engine.cancel(first)
        engine.scheduler.memory.pool.evict_to(0)
        result = engine.wait(engine.submit(plan(), FIRST, first_logits=True))
        assert result.usage.document_tokens_computed == 0
        close(result.first_logits, Engine(llama, kv_budget=1 << 26).logits(plan()))


def test_a_record_that_finds_no_room_on_the_device_is_computed(llama, folder, monkeypatch):
    with moved(llama, folder) as engine:
        monkeypatch.setattr(
            engine.scheduler.pooling.transfers, "bring", lambda record: (_ for _ in ()).throw(RuntimeError("full"))
        )
        result = engine.wait(engine.submit(plan(), FIRST, first_logits=True))
        assert result.usage.document_tokens_computed == 48
        close(result.first_logits, Engine(llama, kv_budget=1 << 26).logits(plan()))


def test_copies_that_fail_end_the_request_and_leave_nothing_wrong_behind(llama, folder):
    with moved(llama, folder) as engine:
        late = engine.scheduler.pooling.transfers._incoming
        late.broken = True
        request = engine.submit(plan(), FIRST, first_logits=True)
        with pytest.raises(RuntimeError, match="no copies"):
            engine.wait(request)
        late.broken = False
        result = engine.wait(engine.submit(plan(), FIRST, first_logits=True))
        close(result.first_logits, Engine(llama, kv_budget=1 << 26).logits(plan()))


def test_a_file_is_read_straight_into_the_memory_that_is_copied(llama, folder):
    given = []

    def memory(size):
        given.append(torch.empty(size, dtype=torch.uint8))
        return given[-1]

    with Engine(llama, kv_budget=1 << 26) as engine:
        key = engine.keys(plan())[0]
    mapped, read = (DiskStore(folder, fingerprint=llama.fingerprint) for _ in range(2))
    read.memory = memory
    for _ in range(2):  # checked, then not
        (a, _), (b, _) = mapped.get(key), read.get(key)
        assert same(a, b) and flat(b).untyped_storage().data_ptr() == given[-1].data_ptr()
    path = read._path(key)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert read.get(key) is None and read.counts()["bad"] == 1


# -- copies in the host's memory ---------------------------------------------------------------------------------------


@pytest.fixture
def hosted(llama, monkeypatch):
    """Makes engines with a host tier, on a CPU that is treated as a GPU."""
    monkeypatch.setattr(engines, "PINS", ("cpu",))

    def make(budget: int = 1 << 26, host: int = 1 << 26, **options) -> Engine:
        engine = Engine(llama, kv_budget=budget, host_budget=host, **options)
        pooling = engine.scheduler.pooling
        pooling.transfers = Transfers(llama.device, pooling._shapes, Late(), Late())
        return engine

    return make


def test_what_memory_lost_comes_back_from_the_host(llama, hosted):
    with hosted() as engine:
        wanted = engine.wait(engine.submit(plan(), GREEDY, first_logits=True))
        engine.flush()
        for _ in range(3):
            engine.scheduler.memory.pool.evict_to(0)
            found = engine.wait(engine.submit(plan(), GREEDY, first_logits=True))
            assert found.usage.reused_tokens == {"host": 48} and found.token_ids == wanted.token_ids
            close(found.first_logits, wanted.first_logits)
        assert engine.wait(engine.submit(plan(), GREEDY)).usage.reused_tokens == {"memory": 48}


def test_a_record_comes_back_bit_by_bit(llama, hosted):
    with hosted() as engine:
        request = engine.submit(plan(), FIRST)
        engine.wait(request)
        engine.flush()
        pool = engine.scheduler.memory.pool
        keys = [key for key in request.keys if key in pool]
        records = {key: pool.get(key)[0] for key in keys}
        assert len(keys) == 6 and all(same(engine.host.get(key)[0], records[key]) for key in keys)


def test_what_is_read_from_a_store_stays_in_the_host_as_well(llama, hosted, folder):
    with hosted(store=folder) as engine:
        assert engine.wait(engine.submit(plan(), FIRST)).usage.reused_tokens == {"disk": 48}
        engine.scheduler.memory.pool.evict_to(0)
        request = engine.submit(plan(), FIRST)
        assert engine.tier(request.keys[0]) == "host" and [tier.name for tier in engine.tiers] == ["host", "disk"]
        assert engine.wait(request).usage.reused_tokens == {"host": 48}


def test_the_host_keeps_what_was_used_last(llama, hosted):
    with hosted() as engine:
        request = engine.submit(plan(), FIRST)
        engine.wait(request)
        engine.flush()
        engine.host.evict_to(engine.host.bytes)  # nothing goes
        first = request.keys[0]
        engine.wait(engine.submit(plan(1), FIRST))  # of the first document: it is in memory
        engine.host.evict_to(engine.host.bytes // 6)
        assert first in engine.host and len(engine.host) == 1


def test_the_hosts_memory_is_bounded_by_what_its_buffers_take(llama, hosted):
    size = 1 << (8 * llama.kv_bytes_per_token - 1).bit_length()
    with hosted(host=3 * size + 5) as engine:
        engine.wait(engine.submit(plan(), FIRST))
        engine.flush()
        assert len(engine.host) == 3 and engine.host.size() == 3 * size


def test_forgotten_records_are_nowhere(llama, hosted):
    with hosted() as engine:
        request = engine.submit(plan(), FIRST)
        engine.wait(request)
        engine.forget([request.keys[0]])
        engine.flush()
        assert (
            engine.tier(request.keys[0]) is None and engine.tier(request.keys[1]) == "memory" and len(engine.host) == 5
        )


def test_small_memory_turns_over_and_answers_stay(llama, hosted):
    """Two requests that never fit together, many times: every one evicts what the other one's records were."""
    budget = 60 * llama.kv_bytes_per_token
    plans = [methods.get("block").plan(ContextGraph(documents(6, seed=seed), query=[5, 6])) for seed in range(3)]
    plain = Engine(llama, kv_budget=1 << 26)
    wanted = [plain.logits(plan) for plan in plans]
    with hosted(budget) as engine:
        for round_ in range(4):
            for plan_, logits in zip(plans, wanted, strict=True):
                found = engine.wait(engine.submit(plan_, FIRST, first_logits=True))
                engine.flush()
                close(found.first_logits, logits)
                assert round_ == 0 or found.usage.document_tokens_computed == 0


def test_a_host_budget_is_for_gpus(llama):
    with pytest.raises(KVGraphError, match="larger kv_budget"):
        Engine(llama, kv_budget=1 << 26, host_budget=1 << 20)
    with pytest.raises(KVGraphError, match="number of bytes"):
        Engine(llama, kv_budget=1 << 26, host_budget=-1)
