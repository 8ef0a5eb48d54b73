"""Many streaming clients of one server over a shared corpus, some of which leave early; then one client at a time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.common import arguments, report
from kvgraph import ContextGraph, Engine, demo, methods
from kvgraph.edges import named_edges
from kvgraph.engine.result import Result

CORPUS = [d.text[:200] for d in demo.documents()[:8]]
METHODS = (("block", "none"), ("full", "none"), ("pcw", "none"), ("kvlink:links=0", "none"), ("graph-kv", "chain"))
LEAVING = 0.1  # the share of requests whose client disconnects in the middle
READY = 120.0  # seconds a server may take to load its model and pass its gate


@dataclass(frozen=True)
class Ask:
    """A question over documents of the corpus, given by number, with a method. The answer always has `tokens` tokens."""

    documents: tuple[int, ...]
    method: str
    edges: str
    question: str
    tokens: int

    def body(self) -> dict[str, Any]:
        """The JSON of a streamed completion. logprobs=0 makes each chunk list its tokens, even those without text."""
        return {
            "model": "model",
            "prompt": self.question,
            "documents": [{"text": CORPUS[i]} for i in self.documents],
            "kvgraph": {"method": self.method, "edges": self.edges},
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }

    def answer(self, engine: Engine) -> Result:
        """The engine's answer, without a server, with the two likeliest tokens of every step."""
        names = [f"doc {i}" for i in range(len(self.documents))]
        segments = [f"{CORPUS[i]}\n\n" for i in self.documents]
        graph = ContextGraph(segments, self.question, edges=named_edges(self.edges, names))
        return engine.generate(graph, methods.parse(self.method), max_tokens=self.tokens, ignore_eos=True, logprobs=2)


@dataclass
class Served:
    """A request as its client saw it. Times are seconds on one clock; `arrivals` are those of its tokens.

    end: finished; left (by the client); refused (with an HTTP error status); error (an error event in the stream); closed
    (the connection closed before the stream's end).
    """

    ask: Ask
    started: float
    end: Literal["finished", "left", "refused", "error", "closed"] = "closed"
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    detail: str = ""


def asks(count: int, seed: int = 0, tokens: tuple[int, int] = (16, 48)) -> list[Ask]:
    """Different questions over three documents of the corpus each, in the corpus' order."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        method, edges = METHODS[i % len(METHODS)]
        documents = tuple(sorted(rng.sample(range(len(CORPUS)), 3)))
        made.append(Ask(documents, method, edges, f"Question {i}: what follows? ", rng.randint(*tokens)))
    return made


async def load(
    url: str,
    asked: Sequence[Ask],
    clients: int,
    seconds: float,
    *,
    leaving: float = LEAVING,
    seed: int = 0,
    served: list[Served] | None = None,
) -> list[Served]:
    """Run `clients` clients for `seconds`, each with one request after the other. A refused or broken connection ends a client.

    served: a list to fill, to watch the progress; it is also returned.
    """
    rng = random.Random(seed)
    served = [] if served is None else served
    until = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one() -> None:
            while time.perf_counter() < until:
                ask = rng.choice(asked)
                most = rng.randrange(ask.tokens) if rng.random() < leaving else None
                served.append(now := Served(ask, time.perf_counter()))
                try:
                    await _stream(client, now, most)
                except httpx.TransportError as error:
                    now.detail = repr(error)
                    return

        await asyncio.gather(*(one() for _ in range(clients)))
    return served


async def _stream(client: httpx.AsyncClient, served: Served, most: int | None) -> None:
    """Send one request and record its events; the client leaves after `most` events."""
    async with client.stream("POST", "/v1/completions", json=served.ask.body()) as response:
        if response.status_code != 200:
            served.end, served.detail = "refused", f"{response.status_code} {(await response.aread()).decode()}"
            return
        seen = 0
        async for line in response.aiter_lines():
            if most is not None and seen >= most:
                served.end = "left"
                return
            if line == "data: [DONE]":
                served.end = "finished"
            elif line.startswith("data: "):  # a comment is a sign of life
                seen += 1
                _take(served, json.loads(line.removeprefix("data: ")))


def _take(served: Served, event: dict[str, Any]) -> None:
    """Record an event."""
    if "error" in event:
        served.end, served.detail = "error", event["error"]["message"]
        return
    (choice,) = event["choices"]
    served.text += choice["text"]
    served.arrivals += [time.perf_counter()] * len((choice["logprobs"] or {"tokens": ()})["tokens"])


def figures(side: str, served: Sequence[Served], seconds: float) -> dict[str, Any]:
    """A row of the table: throughput, the wait for the first token, and the time between further tokens."""
    first = [s.arrivals[0] - s.started for s in served if s.arrivals]
    between = [b - a for s in served for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return {
        "side": side,
        "requests": len(served),
        "left early": sum(s.end == "left" for s in served),
        "tokens/s": sum(len(s.arrivals) for s in served) / seconds,
        "TTFT p50 ms": 1000 * percentile(first, 50),
        "TTFT p99 ms": 1000 * percentile(first, 99),
        "inter-token p50 ms": 1000 * percentile(between, 50),
        "inter-token p99 ms": 1000 * percentile(between, 99),
    }


def percentile(values: Sequence[float], p: int) -> float:
    """The p-th percentile; NaN for fewer than two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1] if len(values) > 1 else float("nan")


@contextmanager
def server(folder: Path, threads: int) -> Iterator[str]:
    """`kvgraph serve` as a process of its own, ready; gives its URL."""
    command = [sys.executable, "-m", "kvgraph.cli", "serve", "--model", str(folder), "--served-name", "model"]
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen([*command, "--port", "0"], stderr=log, env=environment)
        try:
            until = time.monotonic() + READY
            while True:
                log.seek(0)
                found = re.search(r"http://127\.0\.0\.1:\d+", said := log.read())
                if found and httpx.get(f"{found[0]}/ready").status_code == 200:
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server doesn't start:\n{said}")
                time.sleep(0.1)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    args = arguments(__doc__, clients=64, seconds=120.0, asks=200)
    asked = asks(args.asks)
    with tempfile.TemporaryDirectory() as name:
        demo.write_model(Path(name))
        with server(Path(name), args.threads) as url:
            rows = []
            for clients, seconds in ((args.clients, args.seconds), (1, args.seconds / 4)):
                started = time.perf_counter()
                served = asyncio.run(load(url, asked, clients, seconds))
                if failed := [s for s in served if s.end not in ("finished", "left")]:
                    raise SystemExit(f"{len(failed)} requests failed, the first: {failed[0].end} {failed[0].detail}")
                side = f"{clients} clients" if clients > 1 else "one at a time"
                rows.append(figures(side, served, time.perf_counter() - started))
    many, one = (row["tokens/s"] for row in rows)
    report(
        f"Streaming from one server over a shared corpus of {len(CORPUS)} documents",
        rows,
        args,
        {f"throughput of {args.clients} clients / one at a time": (many / one, ">= 5")},
    )


if __name__ == "__main__":
    main()
