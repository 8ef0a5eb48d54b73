"""Decoding while another request reads its documents cold: from disk, from Redis, or from an S3 server on this machine.

16 requests decode. Then a request arrives whose documents are in the store but not in memory. Measured are the time between
two tokens of the 16, undisturbed and during the read, and the new request's time to first token. The records hold random
numbers, since their values don't affect the timing. Stores whose server (Redis, moto) isn't installed are left out.
Both servers run with a low priority, because elsewhere they would have a machine of their own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, documents, engine_on, hf_model, ids, report
from kvgraph import ContextGraph, Engine, SamplingParams
from kvgraph.store import Record, open_store

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from remotes import RedisServer, S3Server, has_redis


def fill(engine: Engine, place: Any, graph: ContextGraph) -> int:
    """Put random records of a graph's documents where the engine will look for them; their bytes."""
    store = open_store(place, engine.fingerprint)
    plan, model = engine.plan(graph, "block"), engine.model
    total = 0
    for key, span in zip(engine.keys(plan), plan.spans, strict=True):
        if key is not None:
            kv = [
                tuple(torch.randn(layer.kv_heads, len(span), size, dtype=model.dtype) for layer, size in sides)
                for sides in zip(*(((x, x.key_dim), (x, x.value_dim)) for x in model.layers), strict=True)
            ]
            store.put(Record(key, kv[0], kv[1], torch.arange(len(span))))
            total += len(span) * model.kv_bytes_per_token
    store.close()
    return total


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def places(folder: Path) -> Iterator[dict[str, Any]]:
    """The stores that records are read from, by name."""
    found: dict[str, Any] = {"disk": folder / "kv"}
    servers: list[Any] = []
    try:
        if has_redis():
            servers.append(RedisServer(folder))
            found["redis"] = f"{servers[-1].url}?timeout=60"
        try:
            servers.append(S3Server())
            os.environ.update(servers[-1].environment)
            found["s3"] = "s3://bucket/kv?timeout=60"
        except (AssertionError, ImportError) as error:
            print(f"without S3: {error}")
        for server in servers:
            os.setpriority(os.PRIO_PROCESS, server.process.pid, 10)
        yield found
    finally:
        for server in servers:
            server.kill()


def between(engine: Engine, until: Any, least: int = 0) -> list[float]:
    """Seconds of each step until one after which a condition holds, that one left out, and at least so many steps."""
    times: list[float] = []
    while True:
        started = time.perf_counter()
        engine.step()
        if until() and len(times) >= least:
            return sorted(times)
        times.append(time.perf_counter() - started)


def main() -> None:
    args = arguments(__doc__, documents=40, length=1000, running=16, steps=60)
    hf, rows = hf_model(args.device), []
    with tempfile.TemporaryDirectory() as folder, places(Path(folder)) as found:
        for name, place in found.items():
            cold = ContextGraph([ids(args.length, 1000 + i) for i in range(args.documents)], query=ids(8, 7))
            with engine_on(hf, kv_budget=3 << 30, store=place) as engine:
                size = fill(engine, place, cold)
                forget(Path(folder))
                params = SamplingParams(max_tokens=2000, ignore_eos=True)
                small = documents(2, 100, 8)
                running = [
                    engine.submit(engine.plan(small.with_query(ids(8, i)), "block"), params)
                    for i in range(args.running)
                ]
                while not all(r.token_ids for r in running):
                    engine.step()
                alone = between(engine, lambda: True, args.steps)
                request = engine.submit(engine.plan(cold, "block"), SamplingParams(max_tokens=1))
                # The step that collects the last record also computes the request's own prompt.
                read = between(engine, lambda r=request: not r.loads and r not in engine.scheduler.waiting)
                engine.wait(request)
                assert request.usage.document_tokens_computed == 0, request.usage
                for r in running:
                    engine.cancel(r)
            rows.append({
                "from": name, "MB": size / 1e6, "TTFT s": request.usage.ttft,
                "alone: median ms": 1e3 * alone[len(alone) // 2], "p99 ms": 1e3 * alone[-1 - len(alone) // 100],
                "reading: median ms": 1e3 * read[len(read) // 2], "p99  ms": 1e3 * read[-1 - len(read) // 100],
                "steps": len(read),
            })  # fmt: skip
    goals = {
        f"{row['from']}: median, p99 against alone": (
            row["reading: median ms"] / row["alone: median ms"],
            f"1.2 at most; p99 {row['p99  ms'] / row['p99 ms']:.2f}, 2 at most",
        )
        for row in rows
    }
    report(f"{args.running} requests decode while one reads cold", rows, args, goals)


if __name__ == "__main__":
    main()
