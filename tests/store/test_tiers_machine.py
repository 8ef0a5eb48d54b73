"""Every tier and codec under random use and faults: what is read is what was written, or a miss."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvgraph.errors import StoreError
from kvgraph.store import DiskStore, MemoryStore, Record, TieredStore, open_store
from kvgraph.store.codecs.registry import packed, parse
from kvgraph.store.remote.breaker import Absent, Breaker
from kvgraph.store.remote.store import RemoteStore
from remotes import MemoryPlace, RedisServer, has_redis
from soak import draws
from store_worker import got, key_of, same

UNIVERSE = 5
CODECS = ["raw", "zstd", "fp8", "int8", "kivi:bits=2", "gear"]


def made(number: int, spec: str) -> Record:
    """The one record of a key, as a codec leaves it. Sizes differ, 0.5 to 20 kB."""
    draw = torch.Generator().manual_seed(number)
    keys, values = (torch.randn(2, 4 + 20 * number, 16, generator=draw) for _ in range(2))
    record = Record(key_of(number), (keys,), (values,), torch.arange(4 + 20 * number))
    return record if spec == "raw" else packed(record, parse(spec))


class Tiers(RuleBasedStateMachine):
    """A store of one to three tiers, whose files and places are damaged, lost, filled and brought back."""

    numbers = st.integers(0, UNIVERSE - 1)

    @initialize(
        kinds=st.lists(
            st.sampled_from(["memory", "disk", "small disk", "remote"]), min_size=1, max_size=3, unique=True
        ),
        spec=st.sampled_from(CODECS),
    )
    def start(self, kinds: list[str], spec: str) -> None:
        self.kinds, self.spec = kinds, spec
        self.strange: set[Path] = set()  # files that no store wrote
        self.folder = tempfile.TemporaryDirectory()
        self.place = MemoryPlace()
        self.right = {key_of(n): made(n, spec) for n in range(UNIVERSE)}
        self.open()

    def open(self) -> None:
        def tier(kind: str):
            if kind == "memory":
                return MemoryStore(60_000)
            if kind == "remote":
                store = RemoteStore(self.place, "remote", "memory://", "m", timeout=5)
                later = itertools.count(step=100).__next__  # so that each try comes after any wait
                store.breaker, store._absent = Breaker(clock=later), Absent(clock=later)
                return store
            capacity = 30_000 if kind == "small disk" else None
            return DiskStore(Path(self.folder.name) / kind, capacity, fingerprint="m")

        self.store = TieredStore([tier(kind) for kind in self.kinds])

    @rule(number=numbers)
    def put(self, number: int) -> None:
        try:
            self.store.put(self.right[key_of(number)])
        except StoreError:
            assert self.place.fault in ("dead", "full") or "small disk" in self.kinds
            return
        if self.place.fault is None and "small disk" not in self.kinds:
            assert self.store.contains(key_of(number))

    @rule(number=numbers)
    def get(self, number: int) -> None:
        found = self.store.get(key_of(number))
        if found is not None:
            assert same(found[0], self.right[key_of(number)]) and found[1] in ("memory", "disk", "remote")
        self.store.flush()

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        key = key_of(number)
        try:
            self.store.delete(key)
        except StoreError:
            assert self.place.fault == "dead"
            return
        if not callable(self.place.fault):
            assert self.store.get(key) is None

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(fault=st.sampled_from([None, None, "dead", "full", lambda d: d[:-3], lambda d: d[:50] + b"!" + d[51:]]))
    def change_the_place(self, fault) -> None:
        self.place.fault = fault

    @rule(number=numbers, other=numbers)
    def mix_up(self, number: int, other: int) -> None:
        """A record under another's name, in the place and in the files."""
        a, b = key_of(number), key_of(other)
        if a in self.place.kept:
            self.place.kept[b] = self.place.kept[a]
        for path in Path(self.folder.name).glob(f"*/records/*/{a}.safetensors"):
            target = path.parents[1] / b[:2] / f"{b}.safetensors"
            target.parent.mkdir(exist_ok=True)
            data = path.read_bytes()
            target.unlink(missing_ok=True)
            target.write_bytes(data)
            self.strange.add(target)

    @rule(number=numbers, at=st.integers(0, 10_000), lost=st.booleans())
    def damage(self, number: int, at: int, lost: bool) -> None:
        key = key_of(number)
        for path in Path(self.folder.name).glob(f"*/records/*/{key}.safetensors"):
            data = bytearray(path.read_bytes())
            path.unlink()
            if not lost:
                data[at % len(data)] ^= 0x55
                path.write_bytes(data)

    @invariant()
    def the_small_disk_stays_small(self) -> None:
        if hasattr(self, "folder"):
            files = (Path(self.folder.name) / "small disk" / "records").glob("*/*.safetensors")
            assert sum(file.stat().st_size for file in files if file not in self.strange) <= 30_000

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.place.fault = None
            self.store.close()
            for tier in self.store.tiers:
                if isinstance(tier, DiskStore):
                    tier.verify()
                    assert tier.verify().clean
            self.folder.cleanup()


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=draws(30), stateful_step_count=30, deadline=None)


@pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")
def test_two_models_and_a_fight_over_one_redis(tmp_path):
    """Two namespaces and two codecs on one small server that evicts: no record in common, no wrong one."""
    server = RedisServer(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "allkeys-random")
    try:
        stores = [open_store(server.url, "m"), open_store(server.url, "other")]
        for round_ in range(8):
            for store, spec in zip(stores, ("raw", "kivi:bits=2"), strict=True):
                for n in range(40):
                    record = made(n, spec)
                    if got(store, record.key) is None and (n + round_) % 3:
                        store.put(record)
                for n in range(40):
                    record = made(n, spec)
                    found = got(store, record.key)
                    assert found is None or same(found, record)
        assert all(store.counts()["bad"] == 0 and store.counts()["hits"] > 0 for store in stores)
    finally:
        server.kill()
