"""One thread that owns the engine's steps, fed by one queue of commands. Each step wakes up the event loop once.

All long work without engine state (tokenizing, planning, hashing) happens before, on other threads.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import Metric

from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled
from kvgraph.errors import KVGraphError

log = logging.getLogger("kvgraph.server")

T = TypeVar("T")


class Stopped(KVGraphError, RuntimeError):
    """The server is shutting down, or its engine thread has failed; no new work is taken."""


@dataclass
class Update:
    """What a step gave one job: new text (may be empty) and its tokens; the last one has the result or the error.

    again: the job is begun again elsewhere, and what came before is void.
    """

    text: str = ""
    sampled: list[Sampled] = field(default_factory=list)
    result: Result | None = None
    error: BaseException | None = None
    again: bool = False


class EngineJob:
    """A request on its way through the engine, as the event loop sees it: iterate over its updates, once.

    started: when its HTTP request came, if it is one's, and last_token_at: both by `time.perf_counter`.
    """

    def __init__(self, request: Request, runner: EngineThread, started: float):
        self.request, self._runner, self.started = request, runner, started
        self.last_token_at: float | None = None
        self._updates: list[Update] = []
        self._news = asyncio.Event()
        self._handed_out = 0  # sampled tokens; used by the engine thread alone

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds of each token after the first; None for an answer of fewer than two."""
        first, last, more = self.request.first_token_at, self.last_token_at, len(self.request.token_ids) - 1
        return (last - first) / more if first and last is not None and more > 0 else None

    async def updates(self) -> AsyncGenerator[Update]:
        """Updates as steps give them; raises what ended the request, or Stopped. Leaving early cancels it."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                updates, self._updates = self._updates, []
                for update in updates:
                    if update.error is not None:
                        raise update.error
                    if update.result is not None and update.result.finish_reason == "cancelled":
                        raise Stopped("the server is shutting down and ended the request")
                    yield update
                    if update.result is not None:
                        return
        finally:
            self.cancel()

    async def result(self) -> Result:
        """The finished request; raises what ended it."""
        async for update in self.updates():
            if update.result is not None:
                return update.result
        raise AssertionError("updates end with a result or an error")

    def cancel(self) -> None:
        """End the request and free what it holds. No effect on a finished one."""
        if not self.request.finished:
            self._runner.cancel(self)

    def _take(self) -> Update | None:
        """What is new since the last step; called by the engine thread after each."""
        request = self.request
        fresh, request.fresh = request.fresh, []
        if not fresh and not request.finished:
            return None
        tokens = request.sampled[self._handed_out :]
        self._handed_out += len(tokens)
        return Update("".join(text for text, _ in fresh), tokens, request.result, request.error)

    def _deliver(self, update: Update) -> None:
        self._updates.append(update)
        self._news.set()


Watch = Callable[[EngineJob, Update], None]


@dataclass(frozen=True)
class Load:
    """What the engine held after its last step: requests admitted, spans being encoded, bytes of KV, pinned ones."""

    running: int = 0
    encoding: int = 0
    kv_bytes: int = 0
    pinned: int = 0


class EngineThread:
    """Drives an engine on a thread of its own. Its public methods are for the event loop's thread (or any other).

    watch is called on the event loop with every update, also those of jobs that nobody waits for any more.

    Jobs of a failed step end with its error; if the loop itself fails, all jobs do and `failed` tells why.
    """

    def __init__(self, engine: Engine, watch: Watch = lambda job, update: None):
        self.engine, self._watch = engine, watch
        self.failed: BaseException | None = None
        self.step_seconds = 0.0  # time spent in steps
        self.steps = 0
        self.load = Load()
        self._commands: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]]] = queue.SimpleQueue()
        self._ended = False
        self._ending = threading.Lock()  # no command is put into a queue that nobody reads any more
        self._live: dict[EngineJob, None] = {}  # in order of submission; the engine thread's own
        self._pending: set[EngineJob] = set()  # the event loop's own: submitted, last update not yet delivered
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="kvgraph-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; to be called from the event loop that jobs are awaited on."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs submitted and not finished."""
        return len(self._pending)

    def parts(self) -> Mapping[str, Sequence[Metric]] | None:
        """Metrics of engines elsewhere that this drives, by their names; may wait. None: it drives its own."""
        return None

    @property
    def takes_work(self) -> bool:
        """Whether `submit` would take a job."""
        return not self._stopping and self.failed is None

    def submit(self, request: Request, started: float | None = None) -> EngineJob:
        """Queue a prepared request (see `Engine.prepare`). started: see `EngineJob`; default: now. Raises Stopped."""
        if not self.takes_work:
            raise self._stopped()
        job = EngineJob(request, self, time.perf_counter() if started is None else started)
        self._pending.add(job)

        def start() -> None:
            self._live[job] = None
            self.engine.enqueue(request)

        def refuse() -> None:
            request.error = self._stopped()
            self._send([(job, Update(error=request.error))])

        self._order(start, refuse)
        return job

    def cancel(self, job: EngineJob) -> None:
        """Cancel a job; its last update comes with the next step."""
        self._order(lambda: self.engine.cancel(job.request))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run something short on the engine thread between two steps. The future raises Stopped if there is none left."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # nobody waits any more
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._order(run, lambda: future.set_exception(self._stopped()))
        return future

    def _order(self, command: Callable[[], None], refuse: Callable[[], None] = lambda: None) -> None:
        """Have a command run by the thread; if that has ended, `refuse` instead."""
        with self._ending:
            if not self._ended:
                return self._commands.put((command, refuse))
        refuse()

    def _stopped(self) -> Stopped:
        return Stopped("the server is shutting down" if self.failed is None else f"the engine failed: {self.failed!r}")

    async def stop(self) -> None:
        """Take no new jobs, cancel those there are, end the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        self._stopping = True
        if self._pending:
            log.warning("cancelling %d unfinished requests", len(self._pending))
        for job in list(self._pending):
            self.cancel(job)
        self._order(self._stop)
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # the last updates are delivered

    def _stop(self) -> None:
        raise SystemExit

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                started = time.perf_counter()
                if self.engine.step():
                    self.steps += 1
                    self.step_seconds += time.perf_counter() - started
                self.load = self._measured()
                self._publish()
        except SystemExit:
            pass
        except BaseException as error:
            log.exception("the engine thread failed")
            self.failed = error
            for job in self._live:
                if not job.request.finished:
                    job.request.error = error
        with self._ending:
            self._ended = True
        while not self._commands.empty():
            self._commands.get()[1]()
        self.load = self._measured()
        self._publish()

    def _measured(self) -> Load:
        scheduler = self.engine.scheduler
        return Load(
            len(scheduler.running),
            len(scheduler.encodings),
            scheduler.memory.kv_bytes,
            scheduler.memory.pool.pinned_bytes,
        )

    def _obey(self) -> None:
        """Run all commands that came in; wait for one when there is nothing else to do."""
        while True:
            try:
                command, _ = self._commands.get(block=not self._live)
            except queue.Empty:
                return
            command()

    def _publish(self) -> None:
        updates: list[tuple[EngineJob, Update]] = []
        for job in list(self._live):
            update = job._take()
            if update is not None:
                updates.append((job, update))
                if job.request.finished:
                    del self._live[job]
        if updates:
            self._send(updates)

    def _send(self, updates: list[tuple[EngineJob, Update]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_out, updates)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("updates after the event loop was closed")

    def _hand_out(self, updates: list[tuple[EngineJob, Update]]) -> None:
        for job, update in updates:
            if update.result is not None or update.error is not None:
                self._pending.discard(job)
            self._watch(job, update)
            job._deliver(update)


async def merged(jobs: list[EngineJob]) -> AsyncGenerator[tuple[int, Update]]:
    """Updates of several jobs as they come, each with its job's index. Leaving early cancels all of them."""
    if len(jobs) == 1:
        async for update in jobs[0].updates():
            yield 0, update
        return
    news: asyncio.Queue[tuple[int, Update] | BaseException] = asyncio.Queue()

    async def forward(index: int, job: EngineJob) -> None:
        try:
            async for update in job.updates():
                news.put_nowait((index, update))
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(forward(i, job)) for i, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            item = await news.get()
            if isinstance(item, BaseException):
                raise item
            left -= item[1].result is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        for job in jobs:
            job.cancel()
