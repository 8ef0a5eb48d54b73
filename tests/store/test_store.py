"""The tiers: what they keep, what leaves first, what people see of them."""

import os
import sqlite3
import threading
import time
from collections import OrderedDict
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, MemoryStore, Record, Store, TieredStore, format, tiered
from kvgraph.store.base import EVENTS
from soak import draws
from store_worker import got, key_of, make, same


def small(number: int, tokens: int = 4) -> Record:
    """A record of 32 bytes a token."""
    kv = torch.full((1, tokens, 4), float(number))
    return Record(key_of(number), (kv,), (kv + 1,), torch.arange(tokens))


def path_of(store: DiskStore, number: int):
    key = key_of(number)
    return store.folder / "records" / key[:2] / f"{key}.safetensors"


def present(store: Store, numbers) -> list[int]:
    return [n for n in numbers if store.contains(key_of(n))]


@pytest.fixture(params=["memory", "disk", "tiered"])
def store(request, tmp_path):
    disk = DiskStore(tmp_path / "kv")
    made = {"memory": MemoryStore(10**6), "disk": disk, "tiered": TieredStore([MemoryStore(10**6), disk])}
    yield made[request.param]
    made[request.param].close()


# -- every tier --------------------------------------------------------------------------------------------------------


def test_put_get_delete(store):
    r = small(1)
    assert store.get(r.key) is None and not store.contains(r.key) and not store.delete(r.key)
    store.put(r)
    store.put(r)
    assert same(got(store, r.key), r) and store.contains(r.key)
    held = got(store, r.key)
    assert store.delete(r.key) and not store.delete(r.key)
    assert store.get(r.key) is None and same(held, r)


@pytest.mark.parametrize("key", ["", "x", "../../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "\0" * 64])
def test_what_is_no_key_is_a_miss(store, key):
    assert store.get(key) is None and not store.contains(key) and not store.delete(key)


def test_threads(store):
    wrong = []

    def work(seed):
        for i in range(60):
            number = (i * seed) % 11
            store.put(small(number))
            found = got(store, key_of(number))
            if found is None or not same(found, small(number)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_every_store_says_what_happened_and_where(store):
    store.put(small(1))
    record, tier = store.get(key_of(1))
    assert same(record, small(1)) and tier == store.tiers[0].name
    assert store.get(key_of(2)) is None
    first = store.tiers[0].counts()
    assert set(first) == set(EVENTS) and first["hits"] == 1 and first["misses"] == 1
    assert store.counts()["misses"] == len(store.tiers) and store.size() == sum(t.size() for t in store.tiers) > 0


# -- memory ------------------------------------------------------------------------------------------------------------


class NaiveMemory:
    """What MemoryStore should do, written to be obvious. Sizes by key; `order` is the least recently used first."""

    def __init__(self, capacity):
        self.capacity, self.sizes, self.pins, self.order = capacity, {}, {}, OrderedDict()

    def evict_to(self, size):
        for key in [k for k in self.order if not self.pins.get(k)]:
            if sum(self.sizes.values()) <= size:
                return
            self.delete(key)

    def use(self, key):
        if key in self.order:
            self.order.move_to_end(key)

    def put(self, key, size):
        if key not in self.sizes:
            if size + sum(s for k, s in self.sizes.items() if self.pins.get(k)) > self.capacity:
                return
            self.evict_to(self.capacity - size)
            self.sizes[key] = size
            self.order[key] = None
        self.use(key)

    def pin(self, key):
        if key in self.sizes:
            self.pins[key] = self.pins.get(key, 0) + 1

    def unpin(self, key):
        if self.pins.get(key):
            self.pins[key] -= 1
            if not self.pins[key]:
                self.use(key)

    def delete(self, key):
        for table in (self.sizes, self.pins, self.order):
            table.pop(key, None)


OPERATIONS = st.tuples(st.sampled_from(["put", "put", "get", "pin", "unpin", "delete", "evict_to"]), st.integers(0, 7))


def test_memory_store_evicts_the_least_recently_used():
    store = MemoryStore(3 * small(0).nbytes)
    for n in range(3):
        store.put(small(n))
    store.get(key_of(0))
    store.put(small(1))
    store.put(small(3))
    assert present(store, range(4)) == [0, 1, 3]


@settings(deadline=None, max_examples=draws(150))
@given(st.lists(OPERATIONS, min_size=20, max_size=60))
def test_memory_store_does_what_the_naive_one_does(operations):
    store, naive = MemoryStore(1100), NaiveMemory(1100)
    for name, number in operations:
        r = small(number, tokens=1 + 5 * number)  # 32 to 1,152 bytes: the largest never fits
        if name == "put":
            store.put(r)
            naive.put(r.key, r.nbytes)
        elif name == "get":
            found = store.get(r.key)
            assert (found is not None) == (r.key in naive.sizes)
            naive.use(r.key)
        elif name == "evict_to":
            store.evict_to(150 * number)
            naive.evict_to(150 * number)
        else:
            try:
                getattr(store, name)(r.key)
            except KeyError:
                assert not naive.pins.get(r.key) and (name == "unpin" or r.key not in naive.sizes)
            getattr(naive, name)(r.key)
        assert {key_of(n) for n in range(8) if key_of(n) in store} == naive.sizes.keys()
        assert len(store) == len(naive.sizes) and store.bytes == sum(naive.sizes.values())
        assert store.pinned_bytes == sum(s for k, s in naive.sizes.items() if naive.pins.get(k))


# -- disk --------------------------------------------------------------------------------------------------------------


def test_records_outlive_the_store(tmp_path):
    r = make(key_of(3))
    with_bf16 = replace(
        r, key=key_of(4), keys=tuple(k.bfloat16() for k in r.keys), values=tuple(v.bfloat16() for v in r.values)
    )
    store = DiskStore(tmp_path, fingerprint="m")
    store.put(r)
    store.put(with_bf16)
    store.close()
    again = DiskStore(tmp_path, fingerprint="m")
    assert same(got(again, r.key), r) and same(got(again, with_bf16.key), with_bf16)
    assert [(e.fingerprint, e.codec) for e in again.ls()] == [("m", "raw")] * 2
    stat = again.stat()
    assert stat.records == 2 and stat.tokens == 2 * len(r) and stat.counts["hits"] == 2
    assert stat.bytes == sum(p.stat().st_size for p in tmp_path.glob("records/*/*"))


def test_many_mapped_records_hold_no_file_open(tmp_path):
    store = DiskStore(tmp_path)
    store.put(small(0))
    before = len(os.listdir("/proc/self/fd"))
    held = [store.get(key_of(0)) for _ in range(50)]
    assert all(held) and len(os.listdir("/proc/self/fd")) <= before + 1


def test_the_least_recently_used_leave_first(tmp_path):
    probe = DiskStore(tmp_path / "probe")
    probe.put(small(0))
    size = probe.ls()[0].size
    store = DiskStore(tmp_path / "kv", capacity_bytes=3 * size)
    for n in range(3):
        store.put(small(n))
    store.get(key_of(0))
    store.put(small(3))
    assert present(store, range(4)) == [0, 2, 3]
    store.pin(key_of(2))
    store.put(small(4))
    store.put(small(5))
    assert present(store, range(6)) == [2, 4, 5]
    assert store.stat().bytes <= 3 * size and store.stat().pinned == 1
    for n in (4, 5):
        store.pin(key_of(n))
    with pytest.raises(StoreError, match=r"can't fit the capacity .* beside .* pinned"):
        store.put(small(6))
    store.unpin(key_of(4))
    store.put(small(6))
    assert present(store, range(7)) == [2, 5, 6]
    with pytest.raises(StoreError, match="can't fit"):
        store.put(small(7, tokens=1000))
    assert present(store, range(8)) == [2, 5, 6]


def test_uses_by_one_process_count_for_the_other(tmp_path):
    a, b = DiskStore(tmp_path), DiskStore(tmp_path)
    for n in range(3):
        a.put(small(n))
    a.capacity = a.stat().bytes
    b.get(key_of(0))
    b.close()  # writes its last uses
    a.put(small(3))
    assert present(a, range(4)) == [0, 2, 3]


def test_files_without_a_row_are_counted_before_anything_leaves(tmp_path):
    """A writer killed between its rename and its row mustn't make the store grow for ever."""
    store = DiskStore(tmp_path)
    for n in range(6):
        store.put(small(n))
    total = store.stat().bytes
    store.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("DELETE FROM records WHERE key != ?", [key_of(5)])
    store = DiskStore(tmp_path, capacity_bytes=total // 3)
    for n in range(6, 9):
        store.put(small(n))
    assert sum(p.stat().st_size for p in tmp_path.glob("records/*/*")) <= total // 3


def test_prune(tmp_path):
    store = DiskStore(tmp_path)
    now = time.time()
    for n in range(6):
        store.put(small(n))
        os.utime(path_of(store, n), (now - 1000 + n,) * 2)
    store.close()
    (tmp_path / "index.sqlite").unlink()  # rows made from files count their writing as their last use
    size = store.ls()[0].size
    store.pin(key_of(0))
    assert store.prune(older_than=997.5) == (2, 2 * size)
    assert present(store, range(6)) == [0, 3, 4, 5]
    assert store.prune(max_bytes=2 * size) == (2, 2 * size)
    assert present(store, range(6)) == [0, 5]
    assert store.prune() == (0, 0)
    assert store.prune(max_bytes=0) == (1, size) and present(store, range(6)) == [0]


def test_only_what_is_read_whole_is_read_ahead(tmp_path, monkeypatch):
    """An index is made anew from the records' headers, however large they are."""
    ahead: list[object] = []
    monkeypatch.setattr(format, "_read_ahead", ahead.append)
    with closing(DiskStore(tmp_path)) as store:
        store.put(small(0))
    (tmp_path / "index.sqlite").unlink()
    with closing(DiskStore(tmp_path)) as store:
        assert len(store.ls()) == 1 and not ahead
        assert store.get(key_of(0)) is not None and len(ahead) == 1


def test_rm_takes_the_beginning_of_a_key(tmp_path):
    store = DiskStore(tmp_path)
    store.put(small(0))
    twin = key_of(0)[:10] + "0" * 54
    store.put(replace(small(1), key=twin))
    with pytest.raises(StoreError, match="2 records start with"):
        store.rm(twin[:6])
    with pytest.raises(StoreError, match="no records start with 'ffff'"):
        store.rm("ffff")
    for bad in ("", "abc", "../.."):
        with pytest.raises(StoreError, match="at least 4"):
            store.rm(bad)
    assert store.rm(twin[:12]) == twin
    assert [e.key for e in store.ls()] == [key_of(0)]


def test_pins_need_a_record_and_outlive_verify(tmp_path):
    store = DiskStore(tmp_path)
    store.put(small(0))
    store.put(small(1))
    store.pin(key_of(0))
    path_of(store, 1).unlink()
    report = store.verify()
    assert (report.rows_added, report.rows_removed) == (0, 1)
    (entry,) = store.ls()
    assert entry.pinned
    with pytest.raises(StoreError, match="no record"):
        store.pin(key_of(9))


def test_put_again_keeps_the_file_and_gives_it_a_row(tmp_path):
    store = DiskStore(tmp_path)
    store.put(small(0))
    inode = path_of(store, 0).stat().st_ino
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("DELETE FROM records")
    store.put(small(0))
    assert path_of(store, 0).stat().st_ino == inode and store.ls()[0].key == key_of(0)


def test_a_folder_that_cannot_be_a_store(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="can't open the store"):
        DiskStore(file)


# -- tiered ------------------------------------------------------------------------------------------------------------


class Broken(MemoryStore):
    name = "broken"

    def put(self, record):
        raise StoreError("full")


def test_promotion_and_tiers(tmp_path):
    fast, slow = MemoryStore(10**6), DiskStore(tmp_path)
    tiers = TieredStore([fast, slow])
    slow.put(small(1))
    assert tiers.get(key_of(1))[1] == "disk"
    tiers.flush()
    assert fast.contains(key_of(1)) and tiers.get(key_of(1))[1] == "memory"
    assert tiers.get(key_of(2)) is None
    tiers.put(small(2))
    assert fast.contains(key_of(2)) and slow.contains(key_of(2))


def test_a_broken_lower_tier_is_told_after_the_upper_kept_it():
    fast, last = MemoryStore(10**6), MemoryStore(10**6)
    tiers = TieredStore([fast, Broken(10**6), last])
    with pytest.raises(StoreError, match="full"):
        tiers.put(small(1))
    assert fast.contains(key_of(1)) and last.contains(key_of(1))
    fast.close()
    assert tiers.get(key_of(1))[1] == "memory"
    tiers.flush()
    assert fast.contains(key_of(1))


class Slow(MemoryStore):
    """A disk that takes nothing until somebody opens the gate."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__(10**6)
        self.gate = threading.Event()

    def put(self, record):
        assert self.gate.wait(30)
        super().put(record)


@pytest.fixture
def slow_above():
    """A store of a slow disk, which has nothing, and a remote tier that has 100 records."""
    disk, remote = Slow(), MemoryStore(10**6)
    for n in range(100):
        remote.put(small(n))
    tiers = TieredStore([disk, remote])
    yield tiers, disk
    disk.gate.set()
    tiers.close()


def test_a_slow_disk_delays_no_remote_read(slow_above):
    """All are read while the disk takes none; only so many wait for it, each once."""
    tiers, disk = slow_above
    for n in (*range(100), 0):
        assert same(got(tiers, key_of(n)), small(n)) and not len(disk)
    disk.gate.set()
    tiers.flush()
    assert len(disk) == tiered.MOST and disk.contains(key_of(0)) and tiers.get(key_of(0))[1] == "slow"
    assert got(tiers, key_of(99)) and not tiers.flush() and disk.contains(key_of(99))


@pytest.mark.parametrize(("most", "copied"), [(300, 2), (100, 1)])
def test_few_bytes_wait_for_a_slow_disk(slow_above, monkeypatch, most, copied):
    """A record takes 128 bytes. One that is larger than all that may wait is still copied."""
    monkeypatch.setattr(tiered, "WAITING", most)
    tiers, disk = slow_above
    for n in range(10):
        assert same(got(tiers, key_of(n)), small(n))
    disk.gate.set()
    tiers.flush()
    assert [n for n in range(10) if disk.contains(key_of(n))] == list(range(copied))
    assert got(tiers, key_of(9)) and not tiers.flush() and disk.contains(key_of(9)), "what was copied waits no more"


def test_what_one_tier_cannot_remove_goes_from_the_others(monkeypatch):
    tiers = [MemoryStore(10**6) for _ in range(4)]
    store = TieredStore(tiers)
    store.put(small(1))

    def fail(reason):
        raise StoreError(reason)

    monkeypatch.setattr(tiers[1], "delete", lambda key: fail("the second"))
    monkeypatch.setattr(tiers[2], "delete", lambda key: fail("the third"))
    with pytest.raises(StoreError, match="the second"):
        store.delete(key_of(1))
    assert [tier.contains(key_of(1)) for tier in tiers] == [False, True, True, False]


def test_what_is_deleted_while_it_is_copied_does_not_come_back(slow_above):
    tiers, disk = slow_above
    assert tiers.get(key_of(1))
    threading.Timer(0.1, disk.gate.set).start()
    assert tiers.delete(key_of(1)) and tiers.get(key_of(1)) is None and not len(disk)


def test_closing_finishes_copies(slow_above, monkeypatch):
    tiers, disk = slow_above
    assert tiers.get(key_of(1)) and tiers.get(key_of(2))
    disk.gate.set()
    monkeypatch.setattr(disk, "close", lambda: None)
    tiers.close()
    assert len(disk) == 2
