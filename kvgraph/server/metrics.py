"""`GET /metrics`, for Prometheus. No label has a value that callers choose, and no metric distinguishes tenants.

Counters and histograms are updated as things happen, on the event loop. Gauges are sampled at scrape time, from the
state that the engine thread left after its last step. A scrape never waits for a step, and at most `PATIENCE` seconds
for a store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as written
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from kvgraph import __version__
from kvgraph.checks.quality import Fidelity
from kvgraph.engine.engine import Engine
from kvgraph.engine.loader import BOUNDS, Loader
from kvgraph.server.logs import Exchange
from kvgraph.server.runner import EngineJob, EngineThread, Update
from kvgraph.store.base import Store

PATIENCE = 0.5  # seconds a scrape waits for the size of a store; then it shows the previous size
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
QUICK = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
# Of OpenTelemetry's GenAI conventions, which name the metrics gen_ai.server.* and advise these buckets
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_response_model")
PROVIDER = "kvgraph"
NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)  # a token
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


class Metrics:
    """A server's metrics, in a registry of their own.

    model: the served model's name. ready: whether requests are taken. What there is to say of the engine and its stores
    is said from `observe` on.
    """

    def __init__(self, model: str, ready: Callable[[], bool]):
        self.registry = CollectorRegistry()
        self._state = _Gauges(model, ready)
        self._measuring: asyncio.Task[None] | None = None
        registry = self.registry
        registry.register(self._state)
        ProcessCollector(registry=registry)
        self._http = Counter(
            "kvgraph_http_requests", "HTTP requests answered.", ("route", "method", "status"), registry=registry
        )
        self._http_seconds = Histogram(
            "kvgraph_http_request_seconds", "From a request's head to the end of its answer.", ("route",),
            registry=registry, buckets=SLOW,
        )  # fmt: skip
        self.in_flight = Gauge("kvgraph_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self._answers = Counter(
            "kvgraph_answers", "Answers, one per choice, by how they ended.", ("outcome",), registry=registry
        )
        self._computed = Counter("kvgraph_tokens_computed", "Prompt tokens run through the model.", registry=registry)
        self._reused = Counter(
            "kvgraph_tokens_reused", "Prompt tokens whose KV was reused, by tier.", ("tier",), registry=registry
        )
        self._generated = Counter("kvgraph_tokens_generated", "Tokens of answers.", registry=registry)
        self._queued = Histogram(
            "kvgraph_queue_seconds", "From the queue's end to admission.", registry=registry, buckets=SLOW
        )
        self._ttft = Histogram(
            "kvgraph_time_to_first_token_seconds", "From a request's head to its answer's first token.",
            registry=registry, buckets=SLOW,
        )  # fmt: skip
        self._between = Histogram(
            "kvgraph_inter_token_seconds", "From one token of an answer to the next.", registry=registry, buckets=QUICK
        )
        self._model = model
        self._inference_seconds = Histogram(
            "gen_ai_server_request_duration_seconds", "From a request's head to the end of its answer.",
            (*GEN_AI, "error_type"), registry=registry, buckets=DURATION,
        )  # fmt: skip
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "From a request's head to its first token, if it ended well.",
            GEN_AI, registry=registry, buckets=FIRST_TOKEN,
        )  # fmt: skip
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean of an answer's tokens after its first, if it ended well.",
            GEN_AI, registry=registry, buckets=PER_TOKEN,
        )  # fmt: skip

        self._shadow = Counter(
            "kvgraph_shadow", "Answers chosen for a comparison with full, by what came of it.", ("method", "outcome"),
            registry=registry,
        )  # fmt: skip
        self._shadow_kl = Histogram(
            "kvgraph_shadow_kl_nats", "KL(full || method) of an answer's first tokens, a token.", ("method",),
            registry=registry, buckets=NATS,
        )  # fmt: skip
        self._shadow_tokens = Counter(
            "kvgraph_shadow_tokens", "Tokens of answers that were compared with full.", ("method",), registry=registry
        )
        self._shadow_agreeing = Counter(
            "kvgraph_shadow_agreeing_tokens", "Of these, tokens whose most likely successor is full's too.",
            ("method",), registry=registry,
        )  # fmt: skip

    def observe(self, runner: EngineThread) -> None:
        """Show gauges of this runner, its engine and the engine's stores too."""
        self._state.observe(runner)

    def count_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request has been answered. route: its template, never its path."""
        known = method if method in METHODS else "other"
        self._http.labels(route, known, f"{status // 100}xx").inc()
        self._http_seconds.labels(route).observe(seconds)

    def count_inference(self, exchange: Exchange, error: str | None, seconds: float) -> None:
        """A request has ended; if it was one that generates, count it. error: the code of what ended it."""
        if exchange.inference is None:
            return
        labels = (exchange.inference.operation, PROVIDER, self._model, self._model)
        self._inference_seconds.labels(*labels, error or "").observe(seconds)
        if error is not None:
            return
        if (first := exchange.first_token_at) is not None:
            self._first_token.labels(*labels).observe(first - exchange.started)
        for job in exchange.jobs:
            if (each := job.time_per_token) is not None:
                self._per_token.labels(*labels).observe(each)

    def count_shadow(self, method: str, outcome: str, found: Fidelity | None = None) -> None:
        """An answer was chosen to be compared with `full`. outcome: compared, skipped, or given up for a request."""
        self._shadow.labels(method, outcome).inc()
        if found is not None:
            self._shadow_kl.labels(method).observe(found.kl)
            self._shadow_tokens.labels(method).inc(found.tokens)
            self._shadow_agreeing.labels(method).inc(round(found.agreement * found.tokens))

    def saw(self, job: EngineJob, update: Update) -> None:
        """Something new of a job, on the event loop. Nobody waits for a comparison's tokens, so they aren't counted."""
        if job.request.keep_answer:
            return
        now, tokens = time.perf_counter(), len(update.sampled)
        if tokens:
            if job.last_token_at is None:
                self._ttft.observe(now - job.started)
            else:
                for _ in range(tokens):
                    self._between.observe((now - job.last_token_at) / tokens)
            job.last_token_at = now
        if update.result is not None or update.error is not None:
            self._count(job, "error" if update.result is None else update.result.finish_reason)

    def _count(self, job: EngineJob, outcome: str) -> None:
        usage = job.request.usage
        done = job.request.encode_only and outcome == "length"
        self._answers.labels("encoded" if done else outcome).inc()
        self._computed.inc(usage.computed_tokens)
        for tier, n in usage.reused_tokens.items():
            self._reused.labels(tier).inc(n)
        self._generated.inc(len(job.request.token_ids))
        if usage.queued:
            self._queued.observe(usage.queued)

    async def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(asyncio.to_thread(self._state.measure))
        await asyncio.wait({self._measuring}, timeout=PATIENCE)
        return written(self.registry)


class _Gauges(Collector):
    """Gauges, sampled at scrape time."""

    def __init__(self, model: str, ready: Callable[[], bool]):
        self._model, self._ready = model, ready
        self._runner: EngineThread | None = None
        self._engine: EngineMetrics | None = None
        self._parts: Mapping[str, Sequence[Metric]] | None = None

    def observe(self, runner: EngineThread) -> None:
        self._runner, self._engine = runner, EngineMetrics(runner)

    def measure(self) -> None:
        """Ask what may wait: the stores for their sizes, and engines elsewhere."""
        if self._runner is not None and self._engine is not None:
            self._parts = self._runner.parts()
            if self._parts is None:
                self._engine.measure()

    def collect(self) -> Iterator[Metric]:
        """Before the model is loaded: only which server this is, and that it isn't ready."""
        built = GaugeMetricFamily("kvgraph_build_info", "Always 1.", labels=("version", "model"))
        built.add_metric((__version__, self._model), 1)
        yield built
        yield GaugeMetricFamily("kvgraph_ready", "1 while requests are taken.", value=float(self._ready()))
        runner, engine = self._runner, self._engine
        if runner is None or engine is None:
            return
        yield GaugeMetricFamily(
            "kvgraph_requests_running", "Requests admitted by the engine.", value=runner.load.running
        )
        waiting = max(0, runner.pending - runner.load.running)
        yield GaugeMetricFamily("kvgraph_requests_waiting", "Requests that wait for the engine.", value=waiting)
        yield from engine.collect() if self._parts is None else _by_replica(self._parts)


def _by_replica(parts: Mapping[str, Sequence[Metric]]) -> Iterator[Metric]:
    """The metrics of several engines, with the label `replica`."""
    made: dict[str, Metric] = {}
    for name, metrics in parts.items():
        for one in metrics:
            whole = made.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            for sample in one.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    yield from made.values()


class EngineMetrics(Collector):
    """What there is to say of an engine and its stores."""

    def __init__(self, runner: EngineThread):
        self._runner = runner
        self._sizes: dict[Store, int] = {}

    def measure(self) -> None:
        """Ask the stores for their sizes; that may wait for a disk."""
        for store in self._runner.engine.tiers:
            size = store.size()
            if size is not None:
                self._sizes[store] = size

    def collect(self) -> Iterator[Metric]:
        """As the engine's last step left them."""
        runner, load = self._runner, self._runner.load
        yield GaugeMetricFamily("kvgraph_spans_encoding", "Missing spans being encoded.", value=load.encoding)
        yield SummaryMetricFamily("kvgraph_step_seconds", "Forward passes.", runner.steps, runner.step_seconds)
        yield GaugeMetricFamily("kvgraph_kv_bytes", "KV held in memory.", value=load.kv_bytes)
        yield GaugeMetricFamily(
            "kvgraph_kv_pinned_bytes", "KV in memory that running requests read.", value=load.pinned
        )
        budget = runner.engine.scheduler.memory.budget
        yield GaugeMetricFamily("kvgraph_kv_budget_bytes", "The limit of KV held in memory.", value=budget)
        yield from self._of_stores(runner.engine)

    def _of_stores(self, engine: Engine) -> Iterator[Metric]:
        stores = engine.tiers
        for event, help in (
            ("hits", "Records found."),
            ("misses", "Records not found."),
            ("bad", "Corrupt records, moved to quarantine."),
            ("unreadable", "Records that couldn't be opened or read by this version."),
            ("untrusted", "Records that aren't signed with this server's KVGRAPH_STORE_KEY."),
            ("index_errors", "Times the index couldn't be used."),
            ("errors", "Calls of a remote store that failed."),
            ("timeouts", "Calls of a remote store without an answer in time."),
            ("skipped", "Calls of a remote store that weren't made, because those before them had failed."),
            ("read_bytes", "Bytes of records found, as the tier keeps them."),
            ("written_bytes", "Bytes of records kept, as the tier keeps them."),
        ):
            counted = CounterMetricFamily(f"kvgraph_store_{event}", help, labels=("tier",))
            for store in stores:
                counted.add_metric((store.name,), store.counts()[event])
            yield counted
        answers = GaugeMetricFamily(
            "kvgraph_store_available", "0 while a tier isn't asked, because earlier calls failed.", labels=("tier",)
        )
        for store in stores:
            answers.add_metric((store.name,), float(store.available))
        yield answers
        if engine.loader is not None:
            yield from _of_loader(engine.loader)
        yield GaugeMetricFamily("kvgraph_store_writes_pending", "Records that wait to be kept.", value=engine.writing)
        failed = engine.store_errors
        yield CounterMetricFamily("kvgraph_store_write_errors", "Records that couldn't be kept.", value=failed)
        held = GaugeMetricFamily("kvgraph_store_bytes", "Record files, of all processes.", labels=("tier",))
        most = GaugeMetricFamily("kvgraph_store_capacity_bytes", "The store's limit, if any.", labels=("tier",))
        for store in stores:
            if store in self._sizes:
                held.add_metric((store.name,), self._sizes[store])
            if store.capacity is not None:
                most.add_metric((store.name,), store.capacity)
        yield from (held, most)


def _of_loader(loader: Loader) -> Iterator[Metric]:
    """Loads by outcome, how long they took by tier, those under way, and what lookahead did."""
    counts = dict(loader.counts)
    outcomes = CounterMetricFamily("kvgraph_loads", "Records asked for, by how it ended.", labels=("outcome",))
    for outcome in ("found", "missing", "failed", "late", "cancelled"):
        outcomes.add_metric((outcome,), counts.get(outcome, 0))
    yield outcomes
    taken = HistogramMetricFamily(
        "kvgraph_load_seconds", "From asking for a record until it is in memory, by tier.", labels=("tier",)
    )
    for tier, durations in dict(loader.seconds).items():
        buckets, total = [], 0
        for bound, n in zip((*map(str, BOUNDS), "+Inf"), durations.counts, strict=True):
            total += n
            buckets.append((bound, total))
        taken.add_metric((tier,), buckets, durations.total)
    yield taken
    yield GaugeMetricFamily("kvgraph_loads_pending", "Records being read, or waiting for it.", value=loader.pending)
    ahead = CounterMetricFamily(
        "kvgraph_lookahead", "Records read for requests that wait for memory: begun, and used.", labels=("what",)
    )
    ahead.add_metric(("begun",), counts.get("ahead", 0))
    ahead.add_metric(("used",), counts.get("ahead_used", 0))
    yield ahead
