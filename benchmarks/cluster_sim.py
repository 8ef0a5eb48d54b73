"""A simulation of many replicas: what routing requests by their spans would gain. Nothing is served; no model is loaded.

Discrete events. Requests arrive at random times. Each asks for documents of one topic; topics are Zipf-popular, and the
documents of the request are drawn from the topic's, in random order. A replica keeps the last used documents in memory. It
works in steps, as the engine does: a step decodes one token of every row and encodes one missing document, or prefills a
query. Every missing document is computed; in the rows "missing documents loaded" it comes from a store instead. The corpus grows with the number of replicas: together they can hold it once.

The default durations were measured on one CPU thread with a Llama of 124 M parameters, all over 10 documents of 400 tokens:
--warm by `python -m benchmarks.ttft`, --encode by `python -m benchmarks.context` (4,000 tokens), and --decode-1 and --decode-16
by `python -m benchmarks.concurrency`. --load is from the same ttft run: a new process, from disk against from memory. The files in benchmarks/results/ have them.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, report
from kvgraph.cluster.routing import SpanRouter

IMBALANCED = 10  # requests more than the least busy replica has, from which on prefix affinity gives way to load


@dataclass(frozen=True)
class Times:
    """Durations of a replica's work, in seconds."""

    warm: float  # prefill of a query over documents in memory
    document: float  # computing one document
    decode: tuple[float, float]  # a step that decodes: the part that is always there, and the part of each row

    @classmethod
    def of(cls, args: Any) -> Times:
        one, sixteen = args.decode_1 / 1e3, args.decode_16 / 1e3
        each = (sixteen - one) / 15
        return cls(args.warm / 1e3, args.encode / 1e3 * args.tokens, (one - each, each))


@dataclass(eq=False)
class Request:
    """A request, and what became of it."""

    arrival: float
    documents: list[str]
    left: int  # tokens to decode
    measured: bool
    missing: deque[str] = field(default_factory=deque)
    missed: int = 0
    first_token: float = math.nan


class Replica:
    """A replica: a queue, one request in prefill, rows that decode, and a memory of last used documents."""

    def __init__(self, times: Times, capacity: int, rows: int) -> None:
        self.times, self.capacity, self.max_rows = times, capacity, rows
        self.memory: OrderedDict[str, None] = OrderedDict()
        self.queue: deque[Request] = deque()
        self.prefill: Request | None = None
        self.rows: list[Request] = []
        self.working = False
        self.busy = 0.0  # seconds of work of the measured half
        self.gone: list[str] = []  # evicted since the last report

    def use(self, document: str) -> None:
        self.memory[document] = None
        self.memory.move_to_end(document)
        while len(self.memory) > self.capacity:
            self.gone.append(self.memory.popitem(last=False)[0])

    def begin(self) -> float | None:
        """Start a step; its duration, or None if there is nothing to do."""
        if self.prefill is None and self.queue and len(self.rows) < self.max_rows:
            self.prefill = request = self.queue.popleft()
            request.missing = deque(d for d in request.documents if d not in self.memory)
            request.missed = len(request.missing)
            for document in request.documents:
                if document in self.memory:
                    self.use(document)
        if self.prefill is None and not self.rows:
            return None
        always, each = self.times.decode
        seconds = always + each * len(self.rows) if self.rows else 0.0
        if self.prefill is not None:
            seconds += self.times.document if self.prefill.missing else self.times.warm
        return seconds

    def end(self, now: float) -> tuple[Request | None, list[Request]]:
        """End the step: the request that got its first token, and those that ended."""
        for row in self.rows:
            row.left -= 1
        started = None
        if self.prefill is not None:
            if self.prefill.missing:
                self.use(self.prefill.missing.popleft())
            else:
                started, self.prefill = self.prefill, None
                started.first_token = now
                started.left -= 1
                self.rows.append(started)
        ended = [row for row in self.rows if row.left <= 0]
        if ended:
            self.rows = [row for row in self.rows if row.left > 0]
        return started, ended


class Policy:
    """Chooses a replica by its number. The base counts the load; it chooses at random."""

    def __init__(self, replicas: int, tokens: int) -> None:
        self.load = [0] * replicas
        self.random = random.Random(0)

    def route(self, documents: list[str]) -> int:
        chosen = self.choose(documents)
        self.load[chosen] += 1
        return chosen

    def choose(self, documents: list[str]) -> int:
        return self.random.randrange(len(self.load))

    def finished(self, replica: int) -> None:
        self.load[replica] -= 1

    def report(self, replica: int, held: list[str], gone: list[str]) -> None:
        """What a replica says of its memory; most policies don't listen."""


class PowerOfTwo(Policy):
    """The less busy of two random replicas, which is what Ray Serve does by default."""

    def choose(self, documents: list[str]) -> int:
        one, two = self.random.sample(range(len(self.load)), 2)
        return two if self.load[two] < self.load[one] else one


class PrefixAffinity(PowerOfTwo):
    """The replica that last served the longest equal beginning, unless it is much busier than the least busy one."""

    def __init__(self, replicas: int, tokens: int) -> None:
        super().__init__(replicas, tokens)
        self.served: dict[tuple[str, ...], int] = {}

    def choose(self, documents: list[str]) -> int:
        beginnings = [tuple(documents[:n]) for n in range(len(documents), 0, -1)]
        chosen = next((self.served[b] for b in beginnings if b in self.served), None)
        if chosen is None or self.load[chosen] > min(self.load) + IMBALANCED:
            chosen = super().choose(documents)
        self.served.update(dict.fromkeys(beginnings, chosen))
        return chosen


class SpanAffinity(Policy):
    """kvgraph's own router."""

    def __init__(self, replicas: int, tokens: int) -> None:
        super().__init__(replicas, tokens)
        self.names = [f"replica-{i}" for i in range(replicas)]
        self.numbers = {name: i for i, name in enumerate(self.names)}
        self.router = SpanRouter(self.names)
        self.tokens = tokens

    def choose(self, documents: list[str]) -> int:
        return self.numbers[self.router.route(dict.fromkeys(documents, self.tokens)).replica]

    def finished(self, replica: int) -> None:
        super().finished(replica)
        self.router.finished(self.names[replica])

    def report(self, replica: int, held: list[str], gone: list[str]) -> None:
        self.router.report(self.names[replica], held, gone)


POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "random": Policy, "power of two": PowerOfTwo, "prefix affinity": PrefixAffinity, "span affinity": SpanAffinity,
}  # fmt: skip


def requests(args: Any, replicas: int) -> Iterator[Request]:
    """The requests of one run, the same for every policy. The first half warms the memories and isn't measured."""
    rng = np.random.default_rng(args.seed)
    count = max(args.least_requests, args.requests * replicas)
    topics = max(1, args.memory * replicas // args.topic)
    popularity = 1 / np.arange(1, topics + 1) ** args.zipf
    chosen = rng.choice(topics, count, p=popularity / popularity.sum())
    arrivals = np.cumsum(rng.exponential(1 / (args.rate * replicas), count))
    for i in range(count):
        documents = [f"{chosen[i]}/{d}" for d in rng.permutation(args.topic)[: args.documents]]
        yield Request(float(arrivals[i]), documents, args.answer, i >= count // 2)


def simulate(policy: Policy, arriving: Sequence[Request], replicas: Sequence[Replica]) -> None:
    """Run all requests to their end. What became of them is in the requests and the replicas."""
    events: list[tuple[float, int, int]] = [(r.arrival, i, -1) for i, r in enumerate(arriving)]  # time, order, replica
    order = len(events)
    measured_from = next((r.arrival for r in arriving if r.measured), math.inf)
    heapq.heapify(events)
    while events:
        now, number, who = heapq.heappop(events)
        if who < 0:
            request = arriving[number]
            who = policy.route(request.documents)
            replica = replicas[who]
            replica.queue.append(request)
            if replica.working:
                continue
        else:
            replica = replicas[who]
            started, ended = replica.end(now)
            if started is not None:
                policy.report(who, [d for d in started.documents if d in replica.memory], replica.gone)
                replica.gone = []
            for _ in ended:
                policy.finished(who)
        seconds = replica.begin()
        replica.working = seconds is not None
        if seconds is not None:
            if now >= measured_from:
                replica.busy += seconds
            heapq.heappush(events, (now + seconds, order, who))
            order += 1


def row(args: Any, load: str, name: str, replicas: int) -> dict[str, Any]:
    """One policy with one number of replicas, as a row of the table."""
    times = Times.of(args)
    arriving = list(requests(args, replicas))
    many = [Replica(times, args.memory, args.rows) for _ in range(replicas)]
    simulate(POLICIES[name](replicas, args.tokens), arriving, many)
    measured = [r for r in arriving if r.measured]
    ttft = np.array([r.first_token - r.arrival for r in measured]) * 1e3
    read = sum(len(r.documents) for r in measured)
    busy = [r.busy for r in many]
    return {
        "load": load, "policy": name, "replicas": replicas, "requests": len(measured),
        "hit rate": 1 - sum(r.missed for r in measured) / read,
        "tokens computed per request": args.tokens * sum(r.missed for r in measured) / len(measured),
        "TTFT p50 ms": float(np.percentile(ttft, 50)), "TTFT p99 ms": float(np.percentile(ttft, 99)),
        "busiest / mean": max(busy) / statistics.mean(busy),
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Hit rate, TTFT and imbalance by the number of replicas, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(POLICIES, ("#8a8a8a", "#d39b2a", "#b4552d", "#1f6f8b"), strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for at, (column, label, scale) in zip(
        axes.flat,
        (
            ("hit rate", "document tokens found in memory, share", "linear"),
            ("TTFT p50 ms", "time to first token, median (ms)", "log"),
            ("TTFT p99 ms", "time to first token, 99th percentile (ms)", "log"),
            ("busiest / mean", "busiest replica's work / the mean", "linear"),
        ),
        strict=True,
    ):
        for name, color in colors.items():
            line = [r for r in rows if r["policy"] == name]
            at.plot([r["replicas"] for r in line], [r[column] for r in line], marker="o", color=color, label=name)
        sizes = sorted({r["replicas"] for r in rows})
        at.set(xscale="log", yscale=scale, xlabel="replicas", ylabel=label)
        at.set_xticks(sizes, [f"{n:,}" for n in sizes], minor=False)
        at.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        at.grid(alpha=0.25)
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, loc="lower left", fontsize=8)
    figure.suptitle("Simulated: replicas of a 124 M Llama on one CPU thread each", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    args = arguments(
        __doc__, sizes="2,10,100,1000", requests=20, least_requests=4000, rate=0.1, documents=10, tokens=400, topic=20,
        memory=60, zipf=1.0, answer=16, rows=16, warm=176.1, encode=1.818, decode_1=54.2, decode_16=147.3, load=0.0062,
        seed=0, plot="docs/images/cluster-sim.png",
    )  # fmt: skip
    sizes = [int(n) for n in args.sizes.split(",")]
    if min(sizes) < 2 or args.documents > args.topic or args.topic > args.memory * min(sizes):
        raise SystemExit("there must be 2 replicas or more, documents <= topic, and a topic must fit in all memories")
    rows = [row(args, "default", name, n) for n in sizes for name in POLICIES]
    plot(rows, Path(args.plot))
    other = {
        f"topics of {10 * args.topic} documents": {"topic": 10 * args.topic},
        "missing documents loaded": {"encode": args.load},
    }
    middle = sizes[len(sizes) // 2]
    for load, changed in other.items():
        varied = argparse.Namespace(**{**vars(args), **changed})
        rows += [row(varied, load, name, middle) for name in ("power of two", "span affinity")]
    least = {r["policy"]: r for r in rows if r["replicas"] == min(sizes) and r["load"] == "default"}
    share = least["span affinity"]["tokens computed per request"] / least["power of two"]["tokens computed per request"]
    report(
        f"Simulated, not measured: routing to {sizes[0]} to {sizes[-1]:,} replicas", rows, args,
        {f"simulated document tokens computed, span affinity / power of two, {min(sizes)} replicas": (share, "<= 0.55, in a real run")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
