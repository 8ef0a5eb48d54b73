"""Reading records beside the model: threads that fetch from the store while steps run.

A step never waits for a disk or a network. What it misses is asked for here; what has come is collected before the next
step; what comes too late is computed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from kvgraph.store.base import Found

log = logging.getLogger("kvgraph.engine")

THREADS = 4  # records read at once; unpacking and checking them takes processor time from the model
NICENESS = 5  # of these threads: where cores are few, the model's thread must not share its own with four others
DEADLINE = 10.0  # seconds after which a span is computed instead; remote tiers give up sooner
PAGE = 4096
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds, of `Durations`


class Durations:
    """How long something took, many times: a histogram. counts[i]: of durations up to BOUNDS[i]; the last one: above all."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


class Loader:
    """Fetches records in threads. `start` and `cancel` are called under the engine's lock, `wait` without it.

    fetch(key, salt): the record and its tier's name, or None. It may take long, and an exception counts as a miss.
    threads: 0 fetches at once, in the thread that starts it.

    counts: of loads, by how they ended: "found", "missing", "failed", "late" (it was given up, and the span computed),
        "cancelled" (nobody needed it any more). Of lookahead: "ahead" (begun), "ahead_used" (what came was needed).
    seconds: from a load's start until it was there, by the tier that had it.
    """

    def __init__(self, fetch: Callable[[str, str], Found | None], threads: int = THREADS):
        self.fetch = fetch
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, Durations] = {}
        self._lock = threading.Lock()  # guards what threads count
        self._finished: deque[tuple[str, Found | None]] = deque()
        self._news = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "kvgraph-loader", _give_way) if threads else None
        self._futures: dict[str, Future[None]] = {}

    @property
    def pending(self) -> int:
        """Loads that have begun, or wait for a thread."""
        return len(self._futures)

    def start(self, key: str, salt: str = "") -> None:
        """Begin to fetch a tenant's record; `finished` has it when it has come."""
        now = time.perf_counter()
        try:
            if self._pool is not None:
                self._futures[key] = self._pool.submit(self._load, key, salt, now)
                return
        except RuntimeError:  # closed
            pass
        self._load(key, salt, now)

    def cancel(self, key: str) -> None:
        """Nobody waits for it any more. A read that has begun ends by itself; what it brings is dropped."""
        future = self._futures.pop(key, None)
        if future is not None and future.cancel():
            self.count("cancelled")

    def finished(self) -> list[tuple[str, Found | None]]:
        """What has come since the last time, each once."""
        self._news.clear()
        found = []
        while self._finished:
            found.append(self._finished.popleft())
            self._futures.pop(found[-1][0], None)
        return found

    def wait(self, timeout: float) -> None:
        """Wait until something has come, or for so many seconds."""
        self._news.wait(timeout)

    def close(self) -> None:
        """End the threads once they are done with what was started. Later reads are done where they are started."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def count(self, what: str) -> None:
        """One more of `counts`."""
        with self._lock:
            self.counts[what] += 1

    def _load(self, key: str, salt: str, started: float) -> None:
        found = None
        try:
            found = self.fetch(key, salt)
            if found is not None:
                _touch(found)
                seconds = time.perf_counter() - started
                with self._lock:
                    self.seconds.setdefault(found[1], Durations()).add(seconds)
            self.count("missing" if found is None else "found")
        except BaseException as error:  # it is a cache: what can't be read is computed
            found = None
            self.count("failed")
            if self.counts["failed"] == 1:
                log.warning("the store can't be read, computing instead: %r", error)
        self._finished.append((key, found))
        self._news.set()


def _give_way() -> None:
    """Let threads that run the model go first. Elsewhere than on Linux, threads have no priority of their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + NICENESS)


def _touch(found: Found) -> None:
    """Read a byte of every page, so that a record mapped from a file is in memory before a step looks at it."""
    record = found[0]
    if record.keys and record.keys[0].is_pinned():  # it was copied there just now
        return
    packed = record.packed.tensors.values() if record.packed and not record.keys else ()
    for tensor in (*record.keys, *record.values, *packed):
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().view(torch.uint8).reshape(-1)[::PAGE].max()
