"""A tenant's records in every tier: kept, found, listed and deleted as its own."""

from __future__ import annotations

import pytest

from kvgraph.store import DiskStore, MemoryStore, TieredStore
from kvgraph.store.base import EVENTS, tenant_id
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
