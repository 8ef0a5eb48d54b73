"""Memory and decoding speed with records that stay packed: raw beside int8 and KIVI, on a CPU.

Requests decode after the same documents, whose records are in memory. Attention unpacks them layer by layer, once a step
for all requests that read them. Every codec's steps are timed in turn with the others', so that a drifting machine affects all alike.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.common import arguments, documents, engine_on, hf_model, ids, median, report
from kvgraph import Engine, SamplingParams

SPECS = ("raw", "int8", "kivi", "kivi:bits=2")


def decoding(engine: Engine, count: int, args: Any) -> list[Any]:
    """Requests that have their first token and decode on."""
    params = SamplingParams(max_tokens=args.steps + 2, ignore_eos=True)
    graph = documents(args.documents, args.length)
    plans = [engine.plan(graph.with_query(ids(8, i)), "block") for i in range(count)]
    requests = [engine.submit(plan, params) for plan in plans]
    while not all(r.token_ids for r in requests):
        engine.step()
    return requests


def main() -> None:
    args = arguments(__doc__, documents=10, length=400, running=16, steps=30)
    hf = hf_model(args.device)
    engines = {spec: engine_on(hf, codec=spec, kv_budget=2 << 30) for spec in SPECS}
    seconds: dict[tuple[str, int], list[float]] = {}
    memory = {}
    for count in (1, args.running):
        running = {spec: decoding(engine, count, args) for spec, engine in engines.items()}
        for _ in range(args.steps):
            for spec, engine in engines.items():
                started = time.perf_counter()
                engine.step()
                seconds.setdefault((spec, count), []).append(time.perf_counter() - started)
        for spec, engine in engines.items():
            for request in running[spec]:
                engine.cancel(request)
            memory[spec] = engine.scheduler.memory.pool.bytes
    tokens = args.documents * args.length
    rows = [
        {
            "codec": spec,
            "memory MB / 1,000 tokens": memory[spec] / tokens / 1e3,
            "smaller": memory["raw"] / memory[spec],
            **{f"tokens/s, {n} running": n / median(seconds[spec, n]) for n in (1, args.running)},
        }
        for spec in SPECS
    ]
    goals = {
        "int8 takes less memory than raw": (rows[1]["smaller"], "3.5 or more of float32"),
        "kivi takes less memory than raw": (rows[2]["smaller"], "7 or more of float32"),
    }
    report(f"Decoding after {tokens:,} tokens of packed records", rows, args, goals)


if __name__ == "__main__":
    main()
