"""Processes that write and read one store until they are killed. Run as a program: `store_worker.py FOLDER CAPACITY`.

It imports what it needs once and forks a child for every line it reads: `write SEED`, `fight SEED` or `read SEED`; it
answers with the child's pid. `wait PID` answers the child's exit status: 0, WRONG if it was served a wrong record.
Records are made from their keys alone, so that anybody can tell a right one from a wrong one.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import forks
from kvgraph.store import DiskStore, Record, Store

UNIVERSE = 40  # different records
WRONG = 3


def key_of(number: int) -> str:
    return hashlib.sha256(f"record {number}".encode()).hexdigest()


def make(key: str) -> Record:
    """The one right record of a key: 2 layers, 4 heads of 32, 8 to 307 tokens (17 to 630 kB)."""
    rng = np.random.default_rng(int(key[:16], 16))
    n = int(rng.integers(8, 308))
    layers = [torch.from_numpy(rng.standard_normal((4, n, 32), dtype=np.float32)) for _ in range(4)]
    return Record(key, tuple(layers[:2]), tuple(layers[2:]), torch.arange(n))


def got(store: Store, key: str) -> Record | None:
    """The record of a key, wherever it was found."""
    found = store.get(key)
    return None if found is None else found[0]


def same(a: Record, b: Record) -> bool:
    """Whether two records are equal bit by bit."""
    pairs = zip((*a.keys, *a.values, a.positions), (*b.keys, *b.values, b.positions), strict=True)
    return a.key == b.key and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def check(record: Record | None, key: str) -> bool:
    """Whether a record was found; ends the process if it is a wrong one."""
    if record is not None and not same(record, make(key)):
        os._exit(WRONG)
    return record is not None


def write(store: DiskStore, rng: random.Random) -> None:
    """What an encoding process does, until killed."""
    while True:
        key = key_of(rng.randrange(UNIVERSE))
        if not check(got(store, key), key):
            store.put(make(key))


def fight(store: DiskStore, rng: random.Random) -> None:
    """Write, read and delete the same key as others do."""
    key = key_of(0)
    for _ in range(60):
        store.put(make(key))
        check(got(store, key), key)
        if rng.random() < 0.5:
            store.delete(key)


def read(store: DiskStore, rng: random.Random) -> None:
    """Read, and look at records again after others have evicted their files."""
    held: list[Record] = []
    for _ in range(300):
        key = key_of(rng.randrange(UNIVERSE))
        record = got(store, key)
        if check(record, key):
            held.append(record)
        if len(held) > 5:
            old = held.pop(0)
            check(old, old.key)


def main() -> None:
    torch.set_num_threads(1)
    assert "transformers" not in sys.modules, "workers must start fast"
    store = DiskStore(sys.argv[1], capacity_bytes=int(sys.argv[2]))
    store.put(make(key_of(0)))  # its index is open when children are forked
    commands = {"write": write, "fight": fight, "read": read}
    forks.serve({name: partial(_seeded, run, store) for name, run in commands.items()})


def _seeded(run: Callable[[DiskStore, random.Random], None], store: DiskStore, seed: str) -> None:
    run(store, random.Random(seed))


if __name__ == "__main__":
    main()
