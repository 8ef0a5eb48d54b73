"""A tenant's records in every tier, kept, found, listed and deleted as its own; and several records kept at once."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from kvgraph.store import DiskStore, MemoryStore, TieredStore, format
from kvgraph.store.base import EVENTS, tenant_id
from kvgraph.store.disk import store as disk_module
from kvgraph.store.remote.base import Space
from kvgraph.store.remote.breaker import Breaker
from kvgraph.store.remote.store import RemoteStore
from remotes import MemoryPlace
from store_worker import got, key_of, make, same

MODEL = "a" * 64


@pytest.fixture(params=["disk", "remote", "tiers"])
def store(request, tmp_path):
    disk = DiskStore(tmp_path / "kv", fingerprint=MODEL)
    remote = RemoteStore(MemoryPlace(), "remote", "memory://", MODEL)
    return {"disk": disk, "remote": remote, "tiers": TieredStore([MemoryStore(1 << 20), disk, remote])}[request.param]


def test_each_tenant_has_its_own(store):
    anna, ben = store.for_tenant("anna"), store.for_tenant("ben")
    for n, view in enumerate((store, anna, ben)):
        view.put(make(key_of(n)))
    for n, view in enumerate((store, anna, ben)):
        assert same(got(view, key_of(n)), make(key_of(n))) and view.contains(key_of(n))
    assert store.size() > 0 and not store.counts()["bad"]


def test_nobody_reads_or_deletes_anothers(tmp_path):
    """Keys cover the tenant, so nobody asks for another's record. If somebody does, there is none."""
    disk, place = DiskStore(tmp_path, fingerprint=MODEL), MemoryPlace()
    for store in (disk, RemoteStore(place, "remote", "memory://", MODEL)):
        anna, ben = store.for_tenant("anna"), store.for_tenant("ben")
        anna.put(make(key_of(1)))
        for other in (ben, store):
            assert other.get(key_of(1)) is None and not other.delete(key_of(1))
        assert same(got(anna, key_of(1)), make(key_of(1)))
        assert anna.delete(key_of(1)) and not anna.contains(key_of(1)) and not store.counts()["bad"]


def test_a_bucket_is_cut_by_model_and_tenant():
    place = MemoryPlace()
    store = RemoteStore(place.within(Space.of(MODEL)), "remote", "memory://", MODEL)
    store.put(make(key_of(1)))
    store.for_tenant("anna").put(make(key_of(2)))
    assert {space: set(kept.kept) for space, kept in place.others.items()} == {
        Space(MODEL, "all"): {key_of(1)},
        Space(MODEL, tenant_id("anna")): {key_of(2)},
    }
    assert store.for_tenant("anna") is store.for_tenant("anna")


def test_tenants_share_breaker_and_counts():
    """A place that is dead for one is dead for all."""
    place = MemoryPlace()
    store = RemoteStore(place, "remote", "memory://", MODEL)
    store.breaker = Breaker(failures=2)
    anna, ben = store.for_tenant("anna"), store.for_tenant("ben")
    for kept in place.others.values():
        kept.fault = "dead"
    assert anna.get(key_of(1)) is None is ben.get(key_of(1))
    assert not store.available and not anna.available and store.counts()["errors"] == 2
    assert anna.get(key_of(2)) is None and store.counts()["skipped"] == 1 and anna.counts() == store.counts()


def test_what_was_written_before_tenants_were_is_still_found(tmp_path):
    DiskStore(tmp_path, fingerprint=MODEL).put(make(key_of(1)))
    assert same(got(DiskStore(tmp_path, fingerprint=MODEL).for_tenant("anna"), key_of(1)), make(key_of(1)))


def test_the_index_knows_tenants_also_when_it_is_made_again(tmp_path):
    store = DiskStore(tmp_path, fingerprint=MODEL)
    store.put(make(key_of(1)))
    store.for_tenant("anna").put(make(key_of(2)))
    kept = {entry.key: entry.tenant for entry in store.ls()}
    assert kept == {key_of(1): "", key_of(2): tenant_id("anna")}
    store.close()
    (tmp_path / "index.sqlite").unlink()
    assert {entry.key: entry.tenant for entry in DiskStore(tmp_path).ls()} == kept


def test_bytes_read_and_written_are_counted(store):
    record = make(key_of(1))
    store.put(record)
    got(store, record.key)
    counts = store.counts()
    assert counts.keys() == set(EVENTS)
    assert 0 < counts["read_bytes"] <= counts["written_bytes"]
    for tier in store.tiers:
        assert tier.available


# -- several at once ---------------------------------------------------------------------------------------------------


def test_several_records_are_kept_as_each_alone(store, tmp_path):
    """Also those that are there already, and one that comes twice. What can't be kept is named, and stops no other."""
    store.put(make(key_of(0)))
    wrong = replace(make(key_of(7)), key="no key")
    errors = store.put_all([make(key_of(n)) for n in (0, 1, 2, 2)] + [wrong, make(key_of(3))])
    assert set(errors) == {"no key"} and "isn't a record's key" in str(errors["no key"])
    for n in range(4):
        assert same(got(store, key_of(n)), make(key_of(n)))
    assert store.put_all([]) == {}
    anna = store.for_tenant("anna")
    assert not anna.put_all([make(key_of(n)) for n in (4, 5)]) and same(got(anna, key_of(5)), make(key_of(5)))
    for disk in (tier for tier in store.tiers if isinstance(tier, DiskStore)):
        assert disk.verify().clean and {entry.key for entry in disk.ls()} == {key_of(n) for n in range(6)}
        assert {entry.tenant for entry in disk.ls() if entry.key == key_of(5)} == {tenant_id("anna")}


def test_a_batch_stays_within_the_capacity(tmp_path):
    """However the batch is cut, the files never take more, and the last ones are there."""
    size = sum(map(len, format.encode(make(key_of(3)), MODEL)))
    for most in (size * 2.5, size * 6, size * 100):
        folder = tmp_path / f"{most}"
        store = DiskStore(folder, int(most), fingerprint=MODEL)
        records = [replace(make(key_of(3)), key=key_of(n)) for n in range(20)]
        assert not store.put_all(records)
        files = [path.stat().st_size for path in folder.glob("records/*/*.safetensors")]
        assert sum(files) <= most and len(files) == min(20, int(most // size))
        assert store.contains(key_of(19)) and store.verify().clean
    assert set(DiskStore(tmp_path / "small", 100).put_all([make(key_of(1)), make(key_of(2))])) == {key_of(1), key_of(2)}


def test_a_batch_beside_pinned_records(tmp_path):
    size = sum(map(len, format.encode(make(key_of(3)), MODEL)))
    store = DiskStore(tmp_path, size * 3, fingerprint=MODEL)
    records = [replace(make(key_of(3)), key=key_of(n)) for n in range(6)]
    store.put_all(records[:2])
    for record in records[:2]:
        store.pin(record.key)
    assert not store.put_all(records[2:])
    assert {entry.key for entry in store.ls()} == {key_of(0), key_of(1), key_of(5)}


def test_a_batch_on_a_full_disk(tmp_path, monkeypatch):
    """Files that can't be written or synced are named; those that could are there, and no leftovers."""
    store = DiskStore(tmp_path, fingerprint=MODEL)
    store.put_all([make(key_of(n)) for n in range(2)])
    synced = []

    def fail(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(disk_module.os, "fsync", fail)
    monkeypatch.setattr(disk_module, "SYNCS", 1)
    errors = store.put_all([make(key_of(n)) for n in (2, 3, 4)])
    assert len(errors) == 1 and "the disk is full" in str(next(iter(errors.values())))
    monkeypatch.undo()
    assert len(store.ls()) == 4 and store.verify().clean and store.verify().temporary == 0
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_killed_batch_leaves_whole_records_or_none(tmp_path):
    """SIGKILL while batches are written: what has a name is whole, and the rest is taken for abandoned."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from store_worker import key_of, make\nfrom kvgraph.store import DiskStore\nfrom itertools import count\n"
        "store = DiskStore(sys.argv[1]); print('begun', flush=True)\n"
        "for n in count(0, 16): store.put_all([make(key_of(n + i)) for i in range(16)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *sys.path], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("records/*/*.safetensors"))) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    store = DiskStore(tmp_path)
    report = store.verify()
    assert report.clean and report.good >= 20 and store.verify().temporary == 0
    assert not list(tmp_path.rglob(".tmp-*"))


def test_totals_are_the_sums_of_the_rows(tmp_path):
    """Whatever happens to rows: kept, kept again, pinned, removed, made again from the files, or lost."""
    store = DiskStore(tmp_path, fingerprint=MODEL)

    def right():
        entries = store.ls()
        sums = sum(entry.size for entry in entries), sum(entry.size for entry in entries if entry.pinned)
        assert store._with_index(lambda index: index.total()) == sums and store.size() == sums[0]

    right()
    store.put_all([make(key_of(n)) for n in range(5)])
    right()
    store.put(make(key_of(1)))
    store.pin(key_of(2))
    store.pin(key_of(2))
    store.pin(key_of(3))
    right()
    store.unpin(key_of(3))
    store.delete(key_of(2))
    store.prune(max_bytes=store.size() - 1)
    right()
    next(tmp_path.glob("records/*/*.safetensors")).unlink()
    store.verify()
    right()
    with store._index.db as db:
        db.execute("DELETE FROM totals")
    store.put(make(key_of(9)))
    right()
    store.close()
    (tmp_path / "index.sqlite").unlink()
    right()
