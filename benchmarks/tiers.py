"""Time to first token when a request's documents are in memory, on disk, in Redis, or in an S3 server on this machine.

"at once": the request finds an idle engine, whose memory has none of its documents except in the row "memory". "after waiting": it
waits until another request has given memory back, and time counts from then; with lookahead its records were read meanwhile.
Disk is cold: files are out of the page cache. Records hold random numbers, since their values don't affect the timing. Redis
and S3 (moto) run beside the engine on this machine, and are left out where they aren't installed. The last figure compares
reading and checking records from a cold disk with reading the same files plainly.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, documents, engine_on, hf_model, ids, median, report
from benchmarks.reading import fill, forget, places
from kvgraph import ContextGraph, Engine, SamplingParams
from kvgraph.engine import scheduler
from kvgraph.store import open_store

AHEAD, NEVER = scheduler.AHEAD, 1 << 62
FIRST = SamplingParams(max_tokens=1)
STEPS = 20  # of the other request while one waits; more until everything that may be read ahead is there


def at_once(engine: Engine, graph: ContextGraph) -> float:
    """Seconds from submission to the first token."""
    request = engine.submit(engine.plan(graph, "block"), FIRST)
    engine.wait(request)
    assert request.usage.document_tokens_computed == 0, request.usage
    return request.usage.ttft


def after_waiting(engine: Engine, graph: ContextGraph, lookahead: bool) -> float:
    """Seconds from the moment when memory is free to the first token."""
    scheduler.AHEAD = AHEAD if lookahead else NEVER
    memory, per_token = engine.scheduler.memory, engine.model.kv_bytes_per_token
    filling = SamplingParams(max_tokens=memory.budget // per_token - 100, ignore_eos=True)  # room that it never uses
    other = engine.submit(engine.plan(documents(1, 50, 8, first=500), "block"), filling)
    while not other.token_ids:
        engine.step()
    request = engine.submit(engine.plan(graph, "block"), FIRST)
    engine.step()
    for _ in range(STEPS):
        engine.step()
    while engine.scheduler.loading:
        engine.step()
    assert request in engine.scheduler.waiting, "it was to wait"
    engine.cancel(other)
    started = time.perf_counter()
    engine.wait(request)
    assert request.usage.document_tokens_computed == 0, request.usage
    return request.first_token_at - started


def rates(folder: Path, keys: list[str], fingerprint: str) -> tuple[float, float]:
    """Bytes per second of cold files read plainly, and of records."""
    files = sorted(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    forget(folder)
    started = time.perf_counter()
    for file in files:
        file.read_bytes()
    plain = time.perf_counter() - started
    forget(folder)
    store = open_store(folder, fingerprint)
    started = time.perf_counter()
    for key in keys:
        assert store.get(key) is not None
    records = time.perf_counter() - started
    store.close()
    return size / plain, size / records


def main() -> None:
    args = arguments(__doc__, documents=10, length=400, repeats=5)
    hf, rows, shares = hf_model(args.device), [], []
    graph = ContextGraph([ids(args.length, 1000 + i) for i in range(args.documents)], query=ids(30, 7))
    with tempfile.TemporaryDirectory() as name, places(Path(name)) as found:
        folder = Path(name)

        def engine(place: Any) -> Engine:
            size = (AHEAD + 1) * (args.documents * args.length + 100) * per_token
            return engine_on(hf, store=place, kv_budget=size)

        with engine_on(hf) as plain:
            per_token = plain.model.kv_bytes_per_token
            fingerprint = plain.fingerprint
            keys = [key for key in plain.keys(plain.plan(graph, "block")) if key is not None]
        for tier, place in found.items():
            times: dict[str, list[float]] = {}
            with engine(place) as first:
                size = fill(first, place, graph)
            for _ in range(args.repeats):
                for how in ("at once", "after waiting", "after waiting, lookahead"):
                    forget(folder)
                    with engine(place) as cold:
                        if how == "at once":
                            seconds = at_once(cold, graph)
                            if tier == "disk":
                                times.setdefault("memory", []).append(at_once(cold, graph))
                        else:
                            seconds = after_waiting(cold, graph, how.endswith("lookahead"))
                        times.setdefault(how, []).append(seconds)
                    del cold  # files that its memory has mapped would stay in the page cache
                    gc.collect()
            if "memory" in times:
                rows.append({"from": "memory", "MB": size / 1e6, "at once: TTFT s": median(times["memory"])})
                shares = [
                    records / read for read, records in (rates(place, keys, fingerprint) for _ in range(args.repeats))
                ]
            rows.append({
                "from": tier, "MB": size / 1e6, "at once: TTFT s": median(times["at once"]),
                "after waiting: TTFT s": median(times["after waiting"]),
                "with lookahead: TTFT s": median(times["after waiting, lookahead"]),
            })  # fmt: skip
    goals = {"cold records against plain read of their files": (median(shares), "0.8 or more")}
    report(f"TTFT of {args.documents} x {args.length} tokens by where their records are", rows, args, goals)


if __name__ == "__main__":
    main()
