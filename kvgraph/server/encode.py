"""Encoding ahead of time: stored segments while their request waits, stored graphs in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import aclosing

from kvgraph import methods
from kvgraph.data.library import Library, State, StoredGraph
from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.engine.result import Usage
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.plan import Plan
from kvgraph.server.runner import EngineJob, EngineThread, Stopped
from kvgraph.server.tenants import Caller
from kvgraph.server.workers import Workers

log = logging.getLogger("kvgraph.server")

JOBS = 4  # encodings of one request or graph in work at once; live requests run between them
GRAPHS = 2  # graphs encoded at once
NOTED_EVERY = 0.25  # seconds between notes of a graph's progress
QUERY = [0]  # any token: a query changes no document


def segment_plan(tokens: Sequence[int]) -> Plan:
    """The plan that encodes one segment alone, as every method but full begins with it."""
    return methods.get("block").plan(ContextGraph([tokens], QUERY))


def encoding(engine: Engine, plan: Plan, salt: str) -> Request:
    """A request that encodes what the plan's query reads. Raises PlanError or CapacityError if it can't be."""
    return engine.prepare(plan, SamplingParams(max_tokens=1), encode_only=True, salt=salt)


def keys_of(engine: Engine, plan: Plan, salt: str) -> list[str]:
    """The keys of a plan's cached spans."""
    return [key for key in engine.keys(plan, salt) if key is not None]


async def encoded(submit: Callable[[Request], EngineJob], requests: AsyncIterable[Request]) -> AsyncGenerator[Usage]:
    """What each request took, in order; a few are in work at once. Raises what ended one, or Stopped.

    `Engine.run` can't do this: it runs the engine's steps on the thread that iterates, and here the engine thread runs
    them while the event loop awaits each job.
    """
    jobs: deque[EngineJob] = deque()
    try:
        async for request in requests:
            jobs.append(submit(request))
            if len(jobs) == JOBS:
                yield await _usage(jobs)
        while jobs:
            yield await _usage(jobs)
    finally:
        for job in jobs:
            job.cancel()


async def _usage(jobs: deque[EngineJob]) -> Usage:
    result = await jobs[0].result()
    jobs.popleft()
    return result.usage


class GraphEncoder:
    """Encodes stored graphs, a few at a time, each segment's versions after those of its sources.

    A graph that wasn't finished when the server stopped is resumed when the next one starts.
    """

    def __init__(self, runner: EngineThread, library: Library, workers: Workers):
        self._runner, self._library, self._workers = runner, library, workers
        self._turn = asyncio.Semaphore(GRAPHS)
        self._tasks: dict[int, asyncio.Task] = {}  # by the graph's row

    async def resume(self) -> None:
        """Start what an earlier server left unfinished."""
        for graph in await asyncio.to_thread(self._library.unfinished):
            self.start(graph)

    def start(self, graph: StoredGraph) -> None:
        """Begin to encode a graph, unless it is done or in work."""
        if graph.state != "ready" and graph.row not in self._tasks:
            task = asyncio.create_task(self._run(graph))
            self._tasks[graph.row] = task
            task.add_done_callback(lambda _: self._tasks.pop(graph.row, None))

    async def stop(self, graph: StoredGraph | None = None) -> None:
        """End the encoding of a graph, or of all; what is encoded stays."""
        tasks = [task for row, task in self._tasks.items() if graph is None or row == graph.row]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, graph: StoredGraph) -> None:
        done = graph.done
        try:
            async with self._turn:
                noted = time.monotonic()
                await self._note(graph, "running", done)
                async with aclosing(encoded(self._runner.submit, self._requests(graph))) as finished:
                    async for _ in finished:
                        done += 1
                        if time.monotonic() - noted > NOTED_EVERY:
                            await self._note(graph, "running", done)
                            noted = time.monotonic()
                await self._note(graph, "ready", done)
        except Stopped:
            log.info("graph %r isn't finished; it is resumed when the server starts again", graph.id)
        except Exception as error:
            log.error("can't encode graph %r: %s", graph.id, error, exc_info=not isinstance(error, KVGraphError))
            reason = str(error) if isinstance(error, KVGraphError) else "an unexpected error; see the server's log"
            await self._workers.run(self._library.progress, graph, "failed", done, reason)

    async def _note(self, graph: StoredGraph, state: State, done: int) -> None:
        """Write down how many segments are encoded, once their records are written."""
        await asyncio.to_thread(
            self._runner.engine.flush
        )  # requests are planned on the workers, and a store may be slow
        await self._workers.run(self._library.progress, graph, state, done)

    async def _requests(self, graph: StoredGraph) -> AsyncIterator[Request]:
        for place in range(graph.done, graph.segments):
            yield await self._workers.run(self._request, graph, place)

    def _request(self, graph: StoredGraph, place: int) -> Request:
        """The encoding of all that a query over one segment of the graph reads."""
        plan = graph.method.plan(self._library.part(graph, [place]).graph(QUERY))
        return encoding(self._runner.engine, plan, Caller(graph.tenant).salt)
