"""Requests while a real server of a tier is killed, paused, flushed, filled, slow or lying: every one is answered, right.

`KVGRAPH_SOAK=1` repeats every fault more often; the code is the same.
"""

import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

import bucket_worker
import families
from commands import Command
from kvgraph import Engine, SamplingParams, models
from kvgraph.graph import ContextGraph
from kvgraph.store import DiskStore, TieredStore, open_store
from remotes import Proxy, RedisServer, has_redis
from soak import SOAK

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
needs_redis = pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")

ROUNDS = 12 if SOAK else 2
TIMEOUT = 0.4  # seconds of a tier's read
COMPUTE = 10.0  # seconds: far more than a recompute takes here, for machines that do other things
DOCUMENTS, GRAPHS = 12, 5


def graphs(seed: int = 0) -> list[ContextGraph]:
    """Each with four of the documents."""
    texts = [[(seed * 31 + 7 * i + j) % 120 for j in range(24)] for i in range(DOCUMENTS)]
    return [ContextGraph([texts[(g * 3 + i) % DOCUMENTS] for i in range(4)], query=[g + 3, 5]) for g in range(GRAPHS)]


GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


@pytest.fixture(scope="module")
def right(llama):
    """The answers of an engine without a store, and their logits."""
    with Engine(llama) as engine:
        return engine.generate(graphs(), "block", GREEDY, first_logits=True)


def ask(llama, where, right, deadline=TIMEOUT) -> tuple[float, dict[str, int]]:
    """One engine with nothing in memory, all graphs at once: answered and right. Seconds, and tokens found by tier."""
    with Engine(llama, store=where) as engine:
        began = time.perf_counter()
        results = engine.generate(graphs(), "block", GREEDY, first_logits=True)
        took = time.perf_counter() - began
        counts = engine.store.counts()
    reused: dict[str, int] = {}
    for found, expected in zip(results, right, strict=True):
        assert found.token_ids == expected.token_ids
        assert (found.first_logits - expected.first_logits).abs().max() < 1e-4
        for tier, tokens in found.usage.reused_tokens.items():
            reused[tier] = reused.get(tier, 0) + tokens
    # Four records are read at once and a breaker opens after three failures: at most two deadlines and a recompute.
    assert took < 3 * deadline + COMPUTE, f"{took} s, {counts}"
    return took, reused


@contextmanager
def meanwhile(*faults, pause=0.1):
    """Faults, one after the other, again and again, beside what runs."""
    end = threading.Event()
    failed = []

    def work():
        try:
            while not end.is_set():
                for fault in faults:
                    fault()
                    if end.wait(pause):
                        return
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failed, failed


@needs_redis
def test_redis_under_load(llama, right, tmp_path):
    server = RedisServer(tmp_path, "--maxmemory", "8mb")
    url = f"{server.url}?timeout={TIMEOUT}"
    try:
        ask(llama, url, right)
        assert ask(llama, url, right)[1].get("redis"), "nothing came from Redis: this test shows nothing"

        def restart():
            server.kill()
            server.start()

        def pause():
            with server.paused():
                time.sleep(0.6)

        def fill():
            try:
                client = server.client()
                for i in range(9):
                    client.set(f"ballast {i}", bytes(1 << 20))
            except Exception as error:
                assert "OOM" in str(error) or "maxmemory" in str(error), error

        def empty():
            server.client().flushall()

        for fault in ([restart], [pause], [empty], [fill, empty], [restart, pause, fill, empty]):
            with meanwhile(*fault):
                for _ in range(ROUNDS):
                    ask(llama, url, right)
        empty()
        ask(llama, url, right)
        deadline = time.monotonic() + 30
        while not ask(llama, url, right)[1].get("redis"):
            assert time.monotonic() < deadline, "it isn't used again"
    finally:
        server.kill()


@pytest.fixture(scope="module")
def s3(s3_server):
    proxy = Proxy(s3_server.address)
    yield s3_server, proxy
    proxy.close()


@pytest.fixture
def bucket(s3, monkeypatch, tmp_path):
    server, proxy = s3
    for name, value in (server.environment | {"AWS_ENDPOINT_URL": proxy.address}).items():
        monkeypatch.setenv(name, value)
    proxy.mode = "fine"
    yield proxy, f"s3://bucket/{tmp_path.name}"
    proxy.mode = "fine"


MODES = ("slow", "silent", "errors", "refuses", "truncates", "shortens", "garbage", "mixes up")


@pytest.mark.parametrize("mode", MODES)
def test_an_object_store_that_misbehaves(llama, right, bucket, mode):
    """From before the first read to the last, and coming and going."""
    proxy, place = bucket
    url = f"{place}?timeout=1"
    ask(llama, url, right, 1)
    assert ask(llama, url, right, 1)[1].get("s3"), "nothing came from S3: this test shows nothing"
    proxy.mode = mode
    spoilt = proxy.spoilt
    _, reused = ask(llama, url, right, 1)
    assert proxy.spoilt > spoilt
    if mode != "slow" and mode != "mixes up":
        assert not reused.get("s3"), reused

    def harm():
        proxy.mode = mode

    def peace():
        proxy.mode = "fine"

    with meanwhile(harm, peace, pause=0.05):
        for _ in range(ROUNDS):
            ask(llama, url, right, 1)
    peace()
    assert ask(llama, url, right, 1)[1].get("s3")


@pytest.mark.parametrize("mode", ["garbage", "mixes up", "shortens", "truncates"])
def test_no_wrong_byte_reaches_a_faster_tier(llama, right, bucket, tmp_path, mode):
    proxy, url = bucket
    ask(llama, url, right, 5)
    proxy.mode = mode
    disk = DiskStore(tmp_path / "kv")
    tiers = TieredStore([disk, open_store(url, llama.fingerprint)])
    ask(llama, tiers, right, 5)
    tiers.flush()
    proxy.mode = "fine"
    assert disk.verify().clean
    _, reused = ask(llama, TieredStore([DiskStore(tmp_path / "kv")]), right)
    assert set(reused) <= {"disk", "shared", "memory"}


def test_a_full_disk_under_load(llama, right, tmp_path):
    """A disk that has room for half of the records, and then for none."""
    folder = tmp_path / "kv"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"NOT SHOWN HERE: this user can't mount a tmpfs ({mount.stderr.strip()})")
    try:
        with Engine(llama, store=folder) as engine:
            results = engine.generate(graphs(), "block", GREEDY)
            engine.flush()
            assert [r.token_ids for r in results] == [r.token_ids for r in right]
            assert engine.store_errors > 0 and "disk is full" in str(engine.store_error)
        for _ in range(ROUNDS):
            ask(llama, folder, right)
        assert DiskStore(folder).verify().clean and not list(folder.glob("records/*/.tmp-*"))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# -- two models and two tenants on one bucket --------------------------------------------------------------------------


def test_two_processes_on_one_bucket_share_no_record_and_delete_none_of_each_other(bucket):
    _, url = bucket
    owners = [("a", "96"), ("b", "96"), ("a", "80")] if SOAK else [("a", "96"), ("b", "80")]
    started = [Command(url, *owner, module="bucket_worker") for owner in owners]
    found = []
    for process in started:
        code, (fingerprint, *keys) = process.wait(300), process.stdout.split()
        assert code == 0 and len(keys) == bucket_worker.DOCUMENTS
        found.append((fingerprint, set(keys)))
    everything = set.union(*(keys for _, keys in found))
    assert len(everything) == bucket_worker.DOCUMENTS * len(owners), "a record in common"
    for number, ((fingerprint, keys), (tenant, _)) in enumerate(zip(found, owners, strict=True)):
        store = open_store(url, fingerprint, tenant=tenant)
        deleted = {key for key in everything if store.delete(key)}  # as somebody does who wants to remove all there is
        assert deleted == keys
        for (other, kept), (of, _) in list(zip(found, owners, strict=True))[number + 1 :]:
            assert {key for key, _ in open_store(url, other, tenant=of).records()} == kept
