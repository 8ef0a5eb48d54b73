"""Remote tiers: against real servers, and against places that fail in every way."""

import os
import random
import threading
import time

import pytest

from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, MemoryStore, TieredStore, format, open_store
from kvgraph.store.codecs.registry import packed, parse
from kvgraph.store.remote import redis as redis_module
from kvgraph.store.remote.base import Address, RemoteFull, Space
from kvgraph.store.remote.breaker import Absent, Breaker
from kvgraph.store.remote.registry import SCHEMES
from kvgraph.store.remote.store import RemoteStore
from remotes import MemoryPlace, RedisServer, has_redis
from store_worker import got, key_of, make, same

needs_redis = pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")


@pytest.fixture(params=[pytest.param("redis", marks=needs_redis), "s3", "memory"])
def place(request, monkeypatch, tmp_path):
    """(a function that opens a store for a model and a tenant, its kind); nothing is kept there yet."""
    if request.param == "memory":
        places = {}

        def opened(fingerprint="m", tenant="", **options):
            kept = places.setdefault((fingerprint, tenant), MemoryPlace())
            return RemoteStore(kept, "memory", "memory://", fingerprint, **options)

        return opened, "memory"
    server = request.getfixturevalue(f"{request.param}_server")
    if request.param == "redis":
        server.client().flushall()
        url = server.url
    else:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://bucket/{tmp_path.name}"
    return (lambda fingerprint="m", tenant="": open_store(url, fingerprint, tenant=tenant)), request.param


# -- every kind --------------------------------------------------------------------------------------------------------


def test_put_get_delete(place):
    opened, kind = place
    store, r = opened(), make(key_of(1))
    assert store.get(r.key) is None and not store.contains(r.key) and not store.delete(r.key)
    opened().put(r)
    assert store.get(r.key) is None, "for a moment, what wasn't there isn't asked for again"
    store = opened()
    store.put(r)
    record, tier = store.get(r.key)
    assert same(record, r) and tier == kind and store.contains(r.key)
    assert dict(store.records()) == {r.key: len(b"".join(format.encode(r, "m")))} and store.size() == len(
        b"".join(format.encode(r, "m"))
    )
    assert store.delete(r.key) and not store.delete(r.key) and store.get(r.key) is None
    assert store.counts()["hits"] == 1 and not store.counts()["errors"]
    store.close()
    store.close()
    assert store.get(key_of(2)) is None


@pytest.mark.parametrize("key", ["", "x", "../../../etc/passwd", "A" * 64, "a" * 64 + "\n", "*" * 64])
def test_what_is_no_key_is_a_miss(place, key):
    store = place[0]()
    assert store.get(key) is None and not store.contains(key) and not store.delete(key)


def test_models_and_tenants_share_nothing_and_cannot_delete_each_others(place):
    opened, _ = place
    stores = [opened("m"), opened("m", "tenant"), opened("other"), opened("other", "tenant")]
    for n, store in enumerate(stores):
        store.put(make(key_of(n)))
        store.put(make(key_of(9)))  # the same key, even
    for n, store in enumerate(stores):
        assert set(dict(store.records())) == {key_of(n), key_of(9)}
        assert not any(opened_again.contains(key_of(n)) for opened_again in stores[:n])
    assert stores[0].delete(key_of(9)) and not stores[0].delete(key_of(1))
    assert all(same(got(store, key_of(9)), make(key_of(9))) for store in stores[1:])


def test_large_records_go_in_parts(place, monkeypatch):
    opened, kind = place
    for module in ("redis", "objects"):
        monkeypatch.setattr(f"kvgraph.store.remote.{module}.{'PART' if module == 'redis' else 'RANGE'}", 10_000)
    for n in range(4):
        opened().put(make(key_of(n)))  # up to 63 parts
        assert same(got(opened(), key_of(n)), make(key_of(n)))
    assert len(dict(opened().records())) == 4


def test_threads(place):
    opened, _ = place
    store, wrong = opened(), []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(25):
            key = key_of(draw.randrange(6))
            action = draw.choice(["put", "put", "get", "get", "delete"])
            if action == "put":
                store.put(make(key))
            elif action == "delete":
                store.delete(key)
            elif (record := got(store, key)) is not None and not same(record, make(key)):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and not store.counts()["bad"]


@pytest.mark.parametrize("spec", ["kivi:bits=2", "int8+zstd"])
def test_packed_records_are_kept_packed(place, spec, tmp_path):
    """From the fast tier to the slow one and back, a record's bytes stay what they were."""
    opened, _ = place
    record = packed(make(key_of(1)), parse(spec))
    remote, disk = opened(), DiskStore(tmp_path, fingerprint="m")
    TieredStore([disk, remote]).put(record)
    disk.delete(record.key)
    tiers = TieredStore([MemoryStore(10**9), disk, opened()])
    assert tiers.get(record.key)[1] != "disk"
    tiers.flush()
    assert same(got(disk, record.key), record)
    assert dict(remote.records())[record.key] == sum(map(len, format.encode(record, "m")))


# -- a place that lies, fails or is slow -------------------------------------------------------------------------------


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


FAULTS = {
    "flipped": flipped,
    "truncated": lambda data: data[:-5],
    "empty": lambda data: b"",
    "another": lambda data: b"".join(format.encode(make(key_of(7)), "m")),
    "another model's": lambda data: b"".join(format.encode(make(key_of(1)), "else")),
    "not a record": lambda data: b"<html>Service unavailable</html>" * 50,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_record_is_a_miss_and_is_replaced(fault):
    kept = MemoryPlace()
    store, r = RemoteStore(kept, "s3", "s3://b", "m"), make(key_of(1))
    store.put(r)
    kept.fault = FAULTS[fault]
    assert store.get(r.key) is None and store.counts()["bad"] == 1
    assert not store.contains(r.key) and not store.breaker.is_open
    calls, kept.fault = kept.calls, None
    assert store.get(r.key) is None and kept.calls == calls, "a bad record isn't asked for again"
    kept.kept[r.key] = b"damaged"
    store.put(r)
    assert same(got(store, r.key), r)


def test_a_dead_place_is_asked_a_few_times_then_left_alone():
    kept = MemoryPlace()
    store = RemoteStore(kept, "s3", "s3://b", "m")
    now = [0.0]
    store.breaker = Breaker(clock=lambda: now[0])
    store.put(make(key_of(1)))
    kept.fault, kept.calls = "dead", 0
    assert all(store.get(key_of(n)) is None for n in range(10))
    assert kept.calls == 3 and store.counts()["errors"] == 3 and store.counts()["skipped"] == 7
    with pytest.raises(StoreError, match="can't keep a record in s3://b: it doesn't answer"):
        store.put(make(key_of(2)))
    assert not store.contains(key_of(1)) and store.size() is None
    now[0] += 1.5
    assert store.get(key_of(1)) is None and kept.calls == 4  # one try
    assert store.get(key_of(1)) is None and kept.calls == 4
    kept.fault = None
    now[0] += 10
    assert same(got(store, key_of(1)), make(key_of(1))) and not store.breaker.is_open


def test_a_slow_place_costs_no_more_than_the_deadline():
    kept = MemoryPlace()
    store = RemoteStore(kept, "redis", "redis://h", "m", timeout=0.05)
    store.put(make(key_of(1)))
    kept.fault = "slow"
    began = time.perf_counter()
    assert all(store.get(key_of(1)) is None for _ in range(50))
    assert time.perf_counter() - began < 3 * 0.05 + 0.5
    assert store.counts()["timeouts"] == 3
    store.close()


def test_a_full_place_is_still_read():
    kept = MemoryPlace()
    store = RemoteStore(kept, "redis", "redis://h", "m")
    store.put(make(key_of(1)))
    kept.fault = "full"
    for n in range(2, 8):
        with pytest.raises(StoreError, match="can't keep a record in redis://h: full"):
            store.put(make(key_of(n)))
    assert same(got(store, key_of(1)), make(key_of(1))) and not store.breaker.is_open


def test_what_was_absent_is_asked_for_again_after_a_while():
    now = [0.0]
    absent = Absent(5, most=3, clock=lambda: now[0])
    for name in "abcd":
        absent.add(name)
    assert [name in absent for name in "abcd"] == [False, True, True, True]
    absent.discard("b")
    now[0] = 4.9
    assert [name in absent for name in "bcd"] == [False, True, True]
    now[0] = 5.1
    assert "c" not in absent


def test_the_breaker_waits_longer_and_longer():
    now = [0.0]
    breaker = Breaker(failures=2, wait=1, longest=4, clock=lambda: now[0])
    tries = []
    for _ in range(400):
        if breaker.allows():
            tries.append(round(now[0], 1))
            breaker.failed()
        now[0] += 0.1
    assert [round(b - a) for a, b in zip(tries[1:], tries[2:], strict=False)][:5] == [1, 2, 4, 4, 4]
    breaker.succeeded()
    assert breaker.allows() and breaker.allows()


# -- Redis -------------------------------------------------------------------------------------------------------------


@needs_redis
def test_redis_killed_paused_flushed_filled_and_restarted(tmp_path):
    server = RedisServer(tmp_path, "--maxmemory", "20mb")
    try:
        store = open_store(f"{server.url}?timeout=0.3", "m")
        record = make(key_of(1))
        store.put(record)
        assert same(got(store, record.key), record)

        with server.paused():
            began = time.perf_counter()
            assert all(store.get(record.key) is None for _ in range(20))
            counts = store.counts()  # whether the socket or the caller stops waiting first is a matter of chance
            assert time.perf_counter() - began < 3 * 0.3 + 1 and counts["timeouts"] + counts["errors"] == 3
        deadline = time.monotonic() + 20
        while store.get(record.key) is None:
            assert time.monotonic() < deadline, "it isn't asked again"
            time.sleep(0.1)

        server.client().flushall()
        assert store.get(record.key) is None

        with pytest.raises(StoreError, match="it is full"):
            for n in range(200):
                store.put(make(key_of(n)))
        kept = [key for key, _ in store.records()]
        assert len(kept) > 10 and all(same(got(store, key), make(key)) for key in kept)

        server.kill()
        assert all(store.get(key) is None for key in kept[:10]) and store.counts()["bad"] == 0
        server.start()
        deadline = time.monotonic() + 20
        while True:
            try:
                store.put(record)
                break
            except StoreError:
                assert time.monotonic() < deadline, "it isn't asked again"
                time.sleep(0.1)
        assert same(got(store, record.key), record)
    finally:
        server.kill()


@needs_redis
def test_a_record_with_an_evicted_part_is_a_miss_and_goes(redis_server, monkeypatch):
    monkeypatch.setattr(redis_module, "PART", 10_000)
    client = redis_server.client()
    client.flushall()
    store, record = open_store(redis_server.url, "m"), make(key_of(1))
    store.put(record)
    parts = [key for key in client.scan_iter() if b":p:" in key]
    assert len(parts) > 2 and all(client.ttl(part) == -1 for part in parts)
    client.delete(parts[1])
    assert open_store(redis_server.url, "m").get(record.key) is None
    assert client.dbsize() == 0
    store.put(record)
    assert same(got(open_store(redis_server.url, "m"), record.key), record)


@needs_redis
def test_records_of_a_full_redis_can_be_removed(redis_server):
    (place,) = places(redis_server, 1)
    client = redis_server.client()
    place.put(key_of(1), [b"x" * 100])
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(RemoteFull):
            place.put(key_of(2), [b"x" * 100])
        assert place.delete(key_of(1)) and client.dbsize() == 0
    finally:
        client.config_set("maxmemory", 0)


@needs_redis
def test_a_writer_that_dies_leaves_nothing_for_long(redis_server, monkeypatch):
    client = redis_server.client()
    client.flushall()
    store = open_store(redis_server.url, "m")

    def die(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        store._remote._client, "pipeline", lambda transaction: die() if transaction else client.pipeline()
    )
    with pytest.raises(KeyboardInterrupt):
        store._remote.put(key_of(1), [b"x" * 100])
    assert [0 < client.pttl(key) <= redis_module.EXPIRES for key in client.scan_iter()] == [True]
    assert store.get(key_of(1)) is None


def places(server, count):
    """So many servers' connections to one empty Redis."""
    server.client().flushall()
    address, space = Address.of(server.url), Space.of("m")
    return [redis_module.Redis(address, space) for _ in range(count)]


@needs_redis
def test_two_servers_that_put_one_record_at_once_leave_one_copy(redis_server, monkeypatch):
    first, second = places(redis_server, 2)
    pipeline = first._client.pipeline

    def overtaken(transaction):
        if transaction:  # its parts are there
            second.put(key_of(1), [b"x" * 100])
        return pipeline(transaction=transaction)

    monkeypatch.setattr(first._client, "pipeline", overtaken)
    first.put(key_of(1), [b"x" * 100])
    client = redis_server.client()
    assert client.dbsize() == 2 and second.get(key_of(1)) == b"x" * 100
    assert second.delete(key_of(1)) and client.dbsize() == 0


@needs_redis
@pytest.mark.parametrize("call", ["get", "delete"])
def test_who_finds_a_record_replaced_leaves_the_new_one(redis_server, monkeypatch, call):
    first, second = places(redis_server, 2)
    first.put(key_of(1), [b"old" * 100])
    get = first._client.get

    def overtaken(head):
        found = get(head)
        second.put(key_of(1), [b"new" * 100])
        return found

    monkeypatch.setattr(first._client, "get", overtaken)
    assert not getattr(first, call)(key_of(1))
    assert second.get(key_of(1)) == b"new" * 100 and redis_server.client().dbsize() == 2


@needs_redis
def test_whatever_servers_do_at_once_no_part_outlives_its_record(redis_server):
    def work(place):
        for _ in range(50):
            place.put(key_of(1), [b"x" * 100])
            place.get(key_of(1))
            place.put(key_of(1), [b"x" * 100])
            place.delete(key_of(1))

    threads = [threading.Thread(target=work, args=(place,)) for place in places(redis_server, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert redis_server.client().dbsize() == 0


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_no_credential_is_ever_shown():
    address = Address.of("redis://user:hunter2@cache.example:6380/3?timeout=0.5&ssl_cert_reqs=none")
    assert address.shown == "redis://cache.example:6380/3" and address.timeout == 0.5
    assert address.url == "redis://user:hunter2@cache.example:6380/3?ssl_cert_reqs=none"
    store = open_store("redis://user:hunter2@127.0.0.1:1/0?timeout=0.2", "m")
    with pytest.raises(StoreError) as error:
        store.put(make(key_of(1)))
    assert "hunter2" not in str(error.value) + repr(error.value.__cause__) and "127.0.0.1:1" in str(error.value)


def test_no_secret_of_the_environment_is_in_an_error(monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_REGION": "r"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = open_store("s3://bucket/x?timeout=1", "m")
    with pytest.raises(StoreError) as error:
        store.put(make(key_of(1)))
    assert "hunter2" not in str(error.value) + repr(error.value.__cause__) and "\n" not in str(error.value)


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "", "1e9"])
def test_a_wrong_timeout_is_refused(timeout):
    with pytest.raises(StoreError, match="must be seconds"):
        open_store(f"redis://h/0?timeout={timeout}", "m")


def test_every_scheme_opens_something(monkeypatch):
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": "a",
        "AZURE_STORAGE_ACCOUNT_KEY": "YQ==",
        "AWS_REGION": "r",
        "GOOGLE_SKIP_SIGNATURE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for scheme in SCHEMES:
        assert isinstance(
            open_store(f"{scheme}://place/x" if scheme[0] != "r" else f"{scheme}://h/0", "m"), RemoteStore
        )


def test_tiers_by_name(tmp_path):
    store = open_store([tmp_path, "redis://127.0.0.1:1/0?timeout=0.2"], "m")
    assert [tier.name for tier in store.tiers] == ["disk", "redis"]
    with pytest.raises(StoreError, match="redis://127.0.0.1:1/0"):
        store.put(make(key_of(1)))
    assert store.get(key_of(1))[1] == "disk", "the other tier kept it"
    assert os.listdir(tmp_path / "records")
