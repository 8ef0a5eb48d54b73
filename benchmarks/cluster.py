"""Two replicas on this machine, whose memories hold half of a corpus each: kvgraph's router against Ray Serve's own.

The requests are those of the simulator (`benchmarks.cluster_sim`), one at a time: documents of one topic in random order,
topics Zipf-popular. The first half warms the memories. There is no store, so what isn't in memory is computed. The same
requests go through the simulator, whose prediction stands beside what was measured, and through a single server, whose
answers must be equal and whose time to first token is compared, over documents in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from ray.serve.config import RequestRouterConfig

from benchmarks import cluster_sim as sim
from benchmarks.common import arguments, report
from kvgraph import demo
from kvgraph.cluster.encoding import LOCAL, connected
from kvgraph.cluster.serving import local_app
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings

READY = 600.0  # seconds that replicas may take to load the model
BYTES = 6144  # of KV of one token of the tiny model
NAMES = {"span affinity": "kvgraph's router", "power of two": "Ray Serve's router"}  # by the simulator's policy


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """An application, served on a thread until the block ends; its base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        deadline = time.monotonic() + READY
        while httpx.get(f"{url}/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        server.should_exit = True
        thread.join(READY)


def body(args: argparse.Namespace, documents: Sequence[str], **more: Any) -> dict[str, Any]:
    """A completion over documents of `tokens` tokens each, one a byte."""
    texts = [{"text": f"{name} ".ljust(args.tokens - 2, "x")} for name in documents]
    return {
        "model": "model",
        "prompt": "why?",
        "documents": texts,
        "kvgraph": {"method": "block"},
        "max_tokens": args.answer,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def asked(args: argparse.Namespace, url: str, wanted: Sequence[sim.Request]) -> tuple[list[str], float]:
    """The answers, and document tokens computed or loaded per measured request."""
    texts, tokens = [], 0
    with httpx.Client(timeout=120) as client:
        for request in wanted:
            answer = client.post(f"{url}/v1/completions", json=body(args, request.documents)).raise_for_status().json()
            texts.append(answer["choices"][0]["text"])
            usage = answer["usage"]["kvgraph"]
            loaded = sum(n for tier, n in usage["reused_tokens"].items() if tier not in ("memory", "shared"))
            tokens += (usage["document_tokens_computed"] + loaded) * request.measured
    return texts, tokens / sum(request.measured for request in wanted)


def ttft(args: argparse.Namespace, url: str) -> float:
    """The median milliseconds to the first event of a stream over documents in memory."""
    wanted, found = body(args, ["a", "b"], stream=True), []
    with httpx.Client(timeout=120) as client:
        for _ in range(args.streams + 3):
            started = time.perf_counter()
            with client.stream("POST", f"{url}/v1/completions", json=wanted) as answer:
                began = None
                for line in answer.iter_lines():
                    if line.startswith("data: {") and began is None and json.loads(line[6:])["choices"][0]["text"]:
                        began = time.perf_counter() - started
            if began is not None:
                found.append(began * 1e3)
    return statistics.median(found[3:])


def simulated(args: argparse.Namespace, policy: str) -> float:
    """Document tokens computed per measured request, as the simulator has them."""
    wanted = list(sim.requests(args, 2))
    for i, request in enumerate(wanted):
        request.arrival = 1e6 * i  # one at a time
    times = sim.Times(1.0, 1.0, (0.1, 0.0))
    sim.simulate(sim.POLICIES[policy](2, args.tokens), wanted, [sim.Replica(times, args.memory, 16) for _ in "ab"])
    measured = [request for request in wanted if request.measured]
    return args.tokens * sum(request.missed for request in measured) / len(measured)


def main() -> None:
    args = arguments(
        __doc__, requests=40, least_requests=80, rate=1.0, documents=4, tokens=48, topic=8, memory=24, zipf=1.0, answer=4,
        streams=40, seed=0,
    )  # fmt: skip
    wanted = list(sim.requests(args, 2))
    own = 64 * BYTES  # of a request: its question and answer
    with tempfile.TemporaryDirectory() as folder, connected(LOCAL):
        model = Path(folder) / "model"
        model.mkdir()
        demo.write_model(model)
        settings = Settings.load(model=str(model), kv_budget=args.memory * args.tokens * BYTES + own, grace=5)
        rows: list[dict[str, Any]] = []
        with served(create_app(settings)) as url:
            alone, tokens = asked(args, url, wanted)
            first = ttft(args, url)
        rows.append({"server": "one process", "tokens": tokens, "simulated": None, "TTFT ms": first, "equal": None})
        for policy, name in NAMES.items():
            more = {} if policy == "span affinity" else {"request_router_config": RequestRouterConfig()}
            with served(local_app(settings, 2, **more)) as url:
                texts, tokens = asked(args, url, wanted)
                added = ttft(args, url)
            equal = sum(a == b for a, b in zip(texts, alone, strict=True)) / len(alone)
            rows.append(
                {
                    "server": f"2 replicas, {name}",
                    "tokens": tokens,
                    "simulated": simulated(args, policy),
                    "TTFT ms": added,
                    "equal": equal,
                }
            )
    ours, theirs = rows[1], rows[2]
    report(
        "Two replicas, half of the corpus in the memory of each", rows, args,
        {
            "document tokens computed or loaded per request, kvgraph's router / Ray Serve's": (ours["tokens"] / theirs["tokens"], "<= 0.55"),
            "answers equal to one process's": (ours["equal"], "= 1"),
            "ms added to the time to first token by the hop to a replica": (ours["TTFT ms"] - rows[0]["TTFT ms"], "<= 30"),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
