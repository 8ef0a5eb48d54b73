"""What composition costs the requests that are really asked: some of them are laid out by `full` too and compared.

The comparison is made on the first tokens of the answer that was given. Both layouts score them, and the two
next-token distributions are compared at each. The flat layout is one prompt span, so nothing of it is kept.

A share of requests (setting `shadow`) is compared once the engine has nothing else to do. A comparison gives way when
another request comes, which waits for one step at most. A few wait their turn; more aren't taken.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvgraph import methods
from kvgraph.checks.quality import Fidelity, compared
from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.server.metrics import Metrics
from kvgraph.server.runner import EngineThread, Stopped
from kvgraph.server.workers import Workers

log = logging.getLogger("kvgraph.server")

TOKENS = 16  # of an answer that are compared
WAITING = 4  # comparisons that may wait
LOOK_EVERY = 0.02  # seconds between looks at whether the engine has other work


@dataclass(frozen=True)
class Answered:
    """An answered prompt: what it was laid out from, the tenant's salt, the answer's tokens, and its request's id."""

    graph: ContextGraph
    method: Method
    salt: str
    answer: tuple[int, ...]
    request_id: str = ""


class Shadow:
    """Compares answered prompts with `full`. share: of requests, from 0 (none) to 1."""

    def __init__(self, runner: EngineThread, workers: Workers, metrics: Metrics, share: float, seed: int | None = None):
        self._runner, self._workers, self._metrics, self._share = runner, workers, metrics, share
        self._waiting: deque[Answered] = deque()
        self._chosen = random.Random(seed)
        self._task: asyncio.Task[None] | None = None

    def offer(self, answered: Answered) -> None:
        """Compare this one later, if it is of the share. Returns at once."""
        if not self._share or self._chosen.random() >= self._share or not comparable(answered):
            return
        if len(self._waiting) == WAITING:
            return self._metrics.count_shadow(answered.method.name, "skipped")
        self._waiting.append(answered)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give up what waits and what runs."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def compare(self, answered: Answered) -> Fidelity | None:
        """Compare now, beside other requests. None for what can't be compared, and where it would not fit."""
        if not comparable(answered):
            return None
        name = answered.method.name
        try:
            requests = await self._workers.run(_requests, self._runner.engine, answered)
            found = []
            for request in requests:
                result = await self._runner.submit(request).result()
                assert result.answer_logprobs is not None
                found.append(result.answer_logprobs)
        except Stopped:
            return None
        except KVGraphError as error:  # the flat prompt may not fit where the composed one did
            log.info("can't compare an answer with full: %s", error)
            self._metrics.count_shadow(name, "skipped")
            return None
        except asyncio.CancelledError:
            self._metrics.count_shadow(name, "given up")
            raise
        comparison = await self._workers.run(compared, *found)
        self._metrics.count_shadow(name, "compared", comparison)
        fields = {"of": answered.request_id, "method": name, "tokens": comparison.tokens}
        fields |= {"kl": round(comparison.kl, 4), "agreement": round(comparison.agreement, 3)}
        log.info("compared an answer with full", extra={"fields": fields})
        return comparison

    async def _run(self) -> None:
        """Compare what waits, one after the other, whenever the engine has nothing else to do."""
        while self._waiting:
            while self._runner.pending:
                await asyncio.sleep(LOOK_EVERY)
            if not self._runner.takes_work:
                return
            task = asyncio.create_task(self.compare(self._waiting.popleft()))
            try:
                while not (await asyncio.wait({task}, timeout=LOOK_EVERY))[0]:
                    if self._runner.pending > 1:  # somebody asks
                        task.cancel()
                        break
                await asyncio.gather(task, return_exceptions=True)
            finally:
                task.cancel()
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("can't compare an answer with full", exc_info=error)


def comparable(answered: Answered) -> bool:
    """Whether there is something to compare: an answer over documents, by another method than `full`."""
    return bool(answered.answer and answered.graph.segments) and answered.method != methods.get("full")


def flat(graph: ContextGraph) -> Plan:
    """The tokenized graph's text by `full`, as one prompt span: nothing of it is kept or looked up."""
    pieces: list[Sequence[int]] = [*graph.prefix, *(graph.segments[i] for i in graph.read), graph.query]  # type: ignore[list-item]
    return methods.get("full").plan(ContextGraph([], [token for piece in pieces for token in piece]))


def _requests(engine: Engine, answered: Answered) -> tuple[Request, Request]:
    """The scoring of the answer's first tokens by the method and by `full`. Raises PlanError and CapacityError."""
    answer = answered.answer[:TOKENS]
    graph = answered.graph.with_query([*answered.graph.query, *answer[:-1]])
    plans = (engine.plan(graph, answered.method), flat(graph))
    once = SamplingParams(max_tokens=1)
    composed, plain = (
        engine.prepare(plan, once, answer=answer, answer_logprobs=True, salt=answered.salt) for plan in plans
    )
    return composed, plain
