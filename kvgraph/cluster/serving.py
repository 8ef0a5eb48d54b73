"""Serving on Ray: one process that speaks HTTP and plans requests, and replicas that execute plans.

The process that speaks HTTP is the server of `kvgraph.server` itself: its routes, limits, tenants, library and kept
responses. Only what it calls the engine is another one. `Planner` has a model without weights, and `ReplicaRunner` hands each
prepared request to a replica, chosen by its spans (`kvgraph.cluster.routes`), and brings back the updates of its answer.
So deadlines, cancellation and streaming work as they do in a single process.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from fastapi import FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from kvgraph import models
from kvgraph.cluster.encoding import LOCAL, connect
from kvgraph.cluster.router import SpanRequestRouter
from kvgraph.cluster.routes import ROUTES
from kvgraph.engine.engine import Engine, default_budget
from kvgraph.engine.request import UNCACHED, Request
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled, SamplingParams
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.server.app import create_app
from kvgraph.server.errors import LostError
from kvgraph.server.metrics import EngineMetrics
from kvgraph.server.runner import EngineJob, EngineThread, Load, Stopped, Update, Watch
from kvgraph.server.settings import Settings
from kvgraph.server.state import load_engine
from kvgraph.store.codecs.registry import fingerprint_with, parse
from kvgraph.store.open import open_store

log = logging.getLogger("kvgraph.server")

T = TypeVar("T")

NAME = "kvgraph"  # of the application
TRIES = 5  # replicas that a request is given to, one after the other, while nothing of its answer was sent
PAUSE = 0.2  # seconds before the second try; twice as many before each other
LOADING = 3600.0  # seconds that replicas may take to load the model
CALL = 60.0  # seconds that a short call to a replica may take
# What a replica's engine depends on. It needs no key of a caller.
OF_ENGINE = (
    "model", "adapter", "dtype", "quantize", "device", "store_size", "codec", "kv_budget", "host_budget", "max_step_tokens",
    "allow_untested", "chat_template", "grace",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """A prepared request, as it goes to a replica. options: of `Engine.prepare`."""

    plan: Plan
    params: SamplingParams | None
    options: dict[str, Any]


@dataclass
class Piece:
    """What is new of an answer, and of the replica: its name, and spans that it evicted."""

    update: Update
    replica: str
    gone: list[str]
    scored: list[Sampled] = field(default_factory=list)


# -- replicas ---------------------------------------------------------------------------------------------------------


class Replica:
    """An engine of its own. fields: settings by name."""

    async def __init__(self, fields: dict[str, Any]):  # type: ignore[misc]  # Ray awaits it
        settings = Settings(**fields)
        self.name = serve.get_replica_context().replica_id.unique_id
        self.engine = await asyncio.to_thread(load_engine, settings)
        self._runner = EngineThread(self.engine)
        self._runner.start()
        self._metrics = EngineMetrics(self._runner)
        self._gone: deque[str] = deque()  # the engine's thread adds to it
        self.engine.scheduler.memory.pool.on_evict = self._gone.append

    def describe(self) -> tuple[models.Model, int]:
        """The model without its weights, and the KV budget in bytes."""
        return weightless(self.engine.model), self.engine.scheduler.memory.budget

    async def answer(self, order: Order, *, ticket: str, spans: Mapping[str, int]) -> AsyncGenerator[Piece]:
        """The updates of a request. The last has its result, or the error that ended it. ticket, spans: for the router."""
        try:
            request = await asyncio.to_thread(partial(self.engine.prepare, order.plan, order.params, **order.options))
            scored = False
            async with aclosing(self._runner.submit(request).updates()) as updates:
                async for update in updates:
                    if update.result is not None and request.encode_only:
                        await asyncio.to_thread(self.engine.flush)  # who asked may say that it is stored
                    message = self._message(update)
                    if not scored and request.scored:
                        message.scored, scored = request.scored, True
                    yield message
        except KVGraphError as error:
            yield self._message(Update(error=error))

    def _message(self, update: Update) -> Piece:
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        return Piece(update, self.name, gone)

    def probe(self, graph: ContextGraph, method: Method) -> Plan:
        """The plan of a method that must run the model to make it."""
        return self.engine.plan(graph, method)

    async def forget(self, keys: list[str], salt: str, *, replica: str) -> None:
        """Drop records from memory and store. replica: this one, for the router."""
        await asyncio.wrap_future(self._runner.call(lambda: self.engine.forget(keys, salt)))
        await asyncio.to_thread(self.engine.flush)

    async def metrics(self, *, replica: str) -> list[Metric]:
        """What a server says of its engine and its stores. replica: this one, for the router."""
        await asyncio.to_thread(self._metrics.measure)
        return list(self._metrics.collect())

    def check_health(self) -> None:
        """Raise what ended the engine; Ray then starts another replica."""
        if self._runner.failed is not None:
            raise self._runner.failed

    def __del__(self) -> None:
        """The requests have ended; write what is pending. Ray calls it before it ends the process."""
        if hasattr(self, "engine"):
            self.engine.close()


def weightless(model: models.Model) -> models.Model:
    """What a planner needs of a model: all but its weights."""
    light = copy.copy(model)
    configs = {"config": model.hf.config, "generation_config": getattr(model.hf, "generation_config", None)}
    light.hf = SimpleNamespace(**configs)  # type: ignore[assignment]
    light.device = torch.device("cpu")
    return light


# -- the process that plans -------------------------------------------------------------------------------------------


class Planner(Engine):
    """An engine that plans and prepares, and computes nothing. ended: called when it is closed."""

    handle: DeploymentHandle
    orders: WeakKeyDictionary[Request, Order]
    ended: Callable[[], None]

    @classmethod
    def of(cls, handle: DeploymentHandle, settings: Settings, ended: Callable[[], None] = lambda: None) -> Planner:
        """The planner of the replicas behind a handle; waits until one of them has loaded the model."""
        model, budget = handle.describe.remote().result(timeout_s=LOADING)
        store = None
        if settings.store:  # only asked which records it has
            fingerprint = fingerprint_with(model.fingerprint, parse(settings.codec))
            store = open_store([place.text for place in settings.store], fingerprint)
        made = cls(model, store=store, kv_budget=budget, codec=settings.codec)
        made.handle, made.orders, made.ended = handle, WeakKeyDictionary(), ended
        return made

    def _probed(self, graph: ContextGraph, method: Method) -> Plan:
        """See `Engine._probed`; the probe runs on a replica."""
        found: Plan = self.handle.probe.remote(graph, method).result(timeout_s=CALL)
        return found

    def prepare(self, plan: Plan, params: SamplingParams | None = None, **options: Any) -> Request:
        """See `Engine.prepare`; what it was given is kept for the replica."""
        request = super().prepare(plan, params, **options)
        self.orders[request] = Order(plan, params, {"salt": self.salt} | options)
        return request

    def tier(self, key: str, salt: str | None = None) -> str | None:
        """See `Engine.tier`; memory is that of any replica, by their last reports."""
        return "memory" if ROUTES.holds(key) else super().tier(key, salt)

    def forget(self, keys: Iterable[str], salt: str | None = None) -> None:
        """See `Engine.forget`; every replica does."""
        keys, salt = list(keys), self.salt if salt is None else salt
        calls = [(name, self.handle.forget.remote(keys, salt, replica=name)) for name in ROUTES.replicas]
        for name, call in calls:
            ROUTES.report(name, gone=keys)
            try:
                call.result(timeout_s=CALL)
            except (RayError, RayServeException, TimeoutError) as error:
                log.warning("a replica can't forget records: %s", error)

    def close(self) -> None:
        """Let go of the store, and of the replicas. Idempotent."""
        super().close()
        ended, self.ended = self.ended, lambda: None
        ended()


class ReplicaRunner(EngineThread):
    """Drives requests on replicas; see `EngineThread`, which drives them here. It belongs to the event loop."""

    engine: Planner

    def __init__(self, engine: Engine, watch: Watch):
        assert isinstance(engine, Planner)
        super().__init__(engine, watch)
        self._answer = engine.handle.options(method_name="answer", stream=True)
        self._tasks: dict[EngineJob, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(1, "kvgraph-calls")
        self.tokens: Counter[tuple[str, str]] = Counter()  # (replica, "computed", "loaded" or "memory") -> span tokens
        self.retried = 0

    def parts(self) -> dict[str, list[Metric]]:
        """What each replica says of its engine and its stores."""
        said = {}
        calls = {name: self.engine.handle.metrics.remote(replica=name) for name in ROUTES.replicas}
        for name, call in calls.items():
            try:
                said[name] = call.result(timeout_s=CALL)
            except (RayError, RayServeException, TimeoutError) as error:
                log.warning("a replica doesn't tell its metrics: %s", str(error).splitlines()[0])
        return said

    def start(self) -> None:
        """Take jobs, on the event loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def submit(self, request: Request, started: float | None = None) -> EngineJob:
        """Give a prepared request to a replica. Raises Stopped."""
        if not self.takes_work:
            raise self._stopped()
        job = EngineJob(request, self, time.perf_counter() if started is None else started)
        self._pending.add(job)
        task = self._tasks[job] = asyncio.ensure_future(self._follow(job))
        task.add_done_callback(lambda _: self._tasks.pop(job, None))
        return job

    def cancel(self, job: EngineJob) -> None:
        """End a job; its replica gives back what it held."""
        task = self._tasks.get(job)
        if task is None or job.request.finished:
            return
        request = job.request
        request.result = Result("", list(request.token_ids), "cancelled", request.usage)
        task.cancel()
        self._hand_out([(job, Update(result=request.result))])

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run something on a thread beside the event loop."""
        return self._threads.submit(work)

    async def stop(self) -> None:
        """Take no new jobs, cancel those there are. Idempotent."""
        self._stopping = True
        tasks = list(self._tasks.values())
        for job in list(self._pending):
            self.cancel(job)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    async def _follow(self, job: EngineJob) -> None:
        """Hand out the updates of a job as they come."""
        try:
            async with aclosing(self._updates(job)) as updates:
                async for update in updates:
                    self._hand_out([(job, update)])
        except Exception as error:
            job.request.error = error
            self._hand_out([(job, Update(error=error))])

    async def _updates(self, job: EngineJob) -> AsyncGenerator[Update]:
        """The updates of a job. If its replica is lost, another one begins it again. Raises LostError."""
        request = job.request
        for attempt in range(TRIES):
            begun = False
            try:
                async with aclosing(self._messages(request)) as messages:
                    async for message in messages:
                        begun = True
                        yield self._taken(request, message)
                        if request.finished:
                            return
            except RayTaskError:
                raise  # an error of our own there, which its log tells
            except (RayError, RayServeException) as error:
                log.warning("a replica was lost: %s", str(error).splitlines()[0])
            except Stopped as error:
                log.info("a replica takes no work any more: %s", error)
            if begun:
                request.token_ids, request.sampled, request.scored = [], [], []
                yield Update(again=True)  # who has sent what came before ends the job
            self.retried += 1
            await asyncio.sleep(PAUSE * 2**attempt)
        raise LostError()

    async def _messages(self, request: Request) -> AsyncGenerator[Piece]:
        """What a replica says of a request. Leaving early cancels it there."""
        ticket = uuid.uuid4().hex
        stream = self._answer.remote(self.engine.orders[request], ticket=ticket, spans=spans_of(request))
        try:
            first = True
            async for message in stream:
                ROUTES.report(message.replica, gone=message.gone)
                if first:  # all that it reads is in memory now
                    ROUTES.report(message.replica, held=spans_of(request))
                    first = False
                if isinstance(message.update.error, Stopped):
                    raise message.update.error
                if message.update.result is not None:
                    self._count(message.replica, message.update.result)
                yield message
        finally:
            stream.cancel()  # of no effect on one that has ended
            ROUTES.finished(ticket)
            self.load = Load(running=sum(ROUTES.loads().values()))

    def _taken(self, request: Request, message: Piece) -> Update:
        """The update of a message, noted in the request as the engine would."""
        update = message.update
        if update.sampled and not request.token_ids:
            request.first_token_at = time.perf_counter()
        request.token_ids += [sampled.token for sampled in update.sampled]
        request.sampled += update.sampled
        request.scored = request.scored or message.scored
        request.result, request.error = update.result, update.error
        if update.result is not None:
            request.usage = update.result.usage
        return update

    def _count(self, replica: str, result: Result) -> None:
        usage = result.usage
        self.tokens[replica, "computed"] += usage.document_tokens_computed
        for tier, n in usage.reused_tokens.items():
            self.tokens[replica, "memory" if tier in ("memory", "shared") else "loaded"] += n

    def collect(self) -> Iterator[Metric]:
        """Metrics of the replicas, and of the router."""
        yield GaugeMetricFamily("kvgraph_replicas", "Replicas that take requests.", value=len(ROUTES.replicas))
        running = GaugeMetricFamily("kvgraph_replica_requests", "Requests given to a replica.", labels=("replica",))
        for name, load in ROUTES.loads().items():
            running.add_metric((name,), load)
        tokens = CounterMetricFamily(
            "kvgraph_replica_tokens",
            "Span tokens that requests read, by where they were.",
            labels=("replica", "source"),
        )
        for (name, source), n in self.tokens.items():
            tokens.add_metric((name, source), n)
        routed = CounterMetricFamily("kvgraph_routed", "Requests routed by their spans, or by load.", labels=("by",))
        for by in ("spans", "load"):
            routed.add_metric((by,), ROUTES.counts[by])
        yield from (running, tokens, routed)
        yield CounterMetricFamily("kvgraph_retried", "Requests given to another replica.", value=self.retried)


def spans_of(request: Request) -> dict[str, int]:
    """The spans that a request reads and replicas keep: key -> tokens."""
    pairs = zip(request.keys, request.plan.spans[:-1], strict=True)
    return {key: len(span) for key, span in pairs if not key.startswith(UNCACHED)}


# -- applications -----------------------------------------------------------------------------------------------------


def replicas(settings: Settings, **options: Any) -> Any:
    """The deployment of replicas with these settings, bound. options: of a Ray Serve deployment."""
    fields = {name: getattr(settings, name) for name in OF_ENGINE}
    fields["store"] = [place.text for place in settings.store]
    given = {
        "name": "Replica",
        "max_ongoing_requests": 10_000,  # the server in front of them bounds what is let in
        "graceful_shutdown_timeout_s": settings.grace,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2,
        "request_router_config": RequestRouterConfig(request_router_class=SpanRequestRouter),
    }
    return serve.deployment(**(given | options))(Replica).bind(fields)


def _driving(engine: Engine, watch: Watch, register: Callable[[Any], None]) -> EngineThread:
    remote = ReplicaRunner(engine, watch)
    register(remote)
    return remote


def make_app(settings: Settings, load: Callable[[Settings], Engine]) -> FastAPI:
    """The server's application in front of replicas. load: gives the planner of these."""
    app = create_app(
        settings, load, lambda engine, watch: _driving(engine, watch, app.state.server.metrics.registry.register)
    )
    return app


def local_replicas(settings: Settings, count: int, **options: Any) -> Any:
    """The deployment of `count` replicas that share this machine, bound."""
    budget = settings.kv_budget or default_budget(torch.device("cpu")) // count
    cores = os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    actor = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}}
    if settings.device.startswith("cuda"):
        actor["num_gpus"] = 1
        budget = settings.kv_budget  # type: ignore[assignment]  # each has a device of its own
    given = settings.model_copy(update={"kv_budget": budget})
    return replicas(given, **({"num_replicas": count, "ray_actor_options": actor} | options))


def local_app(settings: Settings, count: int, **options: Any) -> FastAPI:
    """The application in this process, in front of `count` replicas on a Ray that it starts."""
    # Here, as Ray's processes end with the thread that started them; and before the server has its signal handlers, as Ray's
    # own would abort this process three seconds after a SIGTERM.
    connect(LOCAL)

    def load(settings: Settings) -> Engine:
        ours = ExitStack()
        ours.callback(serve.shutdown)
        try:
            serve.start(proxy_location="Disabled")
            handle = serve.run(local_replicas(settings, count, **options), name=NAME, route_prefix=None)
            ours.callback(serve.delete, NAME)  # waits until they have written what is pending
            return Planner.of(handle, settings, ours.close)
        except BaseException:
            ours.close()
            raise

    return make_app(settings, load)


@serve.ingress()
class Ingress:
    """The application in a deployment of its own, for clusters. There is one: limits and routes are counted in it."""

    def __init__(self, settings: dict[str, Any], handle: DeploymentHandle):
        self._app = make_app(Settings.load(**settings), lambda given: Planner.of(handle, given))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray serves it."""
        return self._app


def application(settings: dict[str, Any]) -> Any:
    """What `serve run kvgraph.cluster:app` runs. settings: as in a configuration file, and `replicas`, how many."""
    count = int(settings.pop("replicas", 1))  # `serve run` gives words
    bound = replicas(Settings.load(**settings), num_replicas=count)
    ingress = serve.deployment(name="Ingress", num_replicas=1, max_ongoing_requests=10_000)(Ingress)
    return ingress.bind(settings, bound)
