"""A disk store of very many small records: open, put, get, list, verify, prune, and where that bends.

Records are of a tiny model (2 layers, 1 head of 4, 2 tokens: 128 bytes of KV), so that the store's own work is all there is to
see. Figures are per record, at several fill levels, each of the last 1,000 records put or of 1,000 drawn at random.
`--fast` leaves out the two syncs of a record, which say more about the disk than about the store.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, report
from kvgraph.store import DiskStore, Record

SAMPLE = 1000


def record(number: int) -> Record:
    kv = torch.full((4, 1, 2, 4), float(number % 1000))
    key = hashlib.sha256(f"small {number}".encode()).hexdigest()
    return Record(key, (kv[0], kv[1]), (kv[2], kv[3]), torch.arange(2))


def timed(times: int, work: Any) -> float:
    """Microseconds of one of `times` repetitions."""
    began = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - began) / times


def puts(store: DiskStore, begin: int, end: int) -> None:
    for number in range(begin, end):
        store.put(record(number))


def gets(store: DiskStore, numbers: list[int]) -> None:
    for number in numbers:
        found = store.get(record(number).key)
        assert found is not None and float(found[0].keys[0][0, 0, 0]) == number % 1000


def main() -> None:
    args = arguments(__doc__, records=100_000, fast=0, folder="")
    if args.fast:
        os.fsync = lambda _: None  # type: ignore[assignment]
    rng, rows = random.Random(0), []
    levels = sorted({level for level in (1_000, 10_000, 100_000, 1_000_000) if level <= args.records} | {args.records})
    with tempfile.TemporaryDirectory(dir=args.folder or None) as name:
        folder, at = Path(name) / "kv", 0
        store = DiskStore(folder)
        for level in levels:
            while at < level - SAMPLE:
                store.put(record(at))
                at += 1

            row: dict[str, Any] = {"records": level, "put us": timed(level - at, partial(puts, store, at, level))}
            at = level
            numbers = [rng.randrange(level) for _ in range(SAMPLE)]
            store.close()
            store = DiskStore(folder)
            row["get us"] = timed(SAMPLE, partial(gets, store, numbers))
            row["get again us"] = timed(SAMPLE, partial(gets, store, numbers))
            row["size ms"] = timed(1, store.size) / 1e3
            row["list s"] = timed(1, store.ls) / 1e6
            store.close()
            began = time.perf_counter()
            store = DiskStore(folder)
            store.put(record(0))
            row["open ms"] = 1e3 * (time.perf_counter() - began)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
        began = time.perf_counter()
        verified = store.verify()
        seconds = time.perf_counter() - began
        assert verified.clean and verified.good == args.records
        began = time.perf_counter()
        store.close()
        for file in folder.glob("index.sqlite*"):
            file.unlink()
        store = DiskStore(folder)
        assert store.size() is not None
        rebuilt = time.perf_counter() - began
        began = time.perf_counter()
        removed, _ = store.prune(max_bytes=(store.size() or 0) // 2)
        pruned = time.perf_counter() - began
        assert 0.49 * args.records < removed < 0.51 * args.records
    goals = {
        "verify, us a record": (1e6 * seconds / args.records, "no goal"),
        "rebuild a lost index, us a record": (1e6 * rebuilt / args.records, "no goal"),
        "prune half, us a removed record": (1e6 * pruned / removed, "no goal"),
        "MB of memory at most": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "no goal"),
        "put at the end against put at 1,000": (rows[-1]["put us"] / rows[0]["put us"], "1.5 at most"),
    }
    report(f"{args.records:,} small records in one folder", rows, args, goals)


if __name__ == "__main__":
    main()
