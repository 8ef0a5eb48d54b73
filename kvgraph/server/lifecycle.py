"""The life of a request. Every route that uses the engine takes its requests through the same steps:

    authenticate   the caller's key and tenant           `state.authenticated`, before the route's own code
    parse          the body, as the route's model        FastAPI; `invalid` words the errors
    admit          room, and the limits of the key       `Call.admitted`
    plan           from text to tokens, plans and keys   `Call.prepared`, on a worker thread
    run            queue, encode, prefill, decode        `Call.updates`, on the engine's thread
    answer         at once, or as server-sent events     `Call.collected` or `Call.streamed`
    account        metrics, access line, trace           `middleware.Observed`, from what `Call.submit` notes
    fail           an error of OpenAI's shape            `errors`; in a stream, an event

However a request ends (its client leaves, its deadline passes, something fails), it gives back everything it held.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from kvgraph.engine import request as engine_request
from kvgraph.server import errors, logs
from kvgraph.server.errors import APIError
from kvgraph.server.logs import Inference
from kvgraph.server.runner import EngineJob, Update, merged
from kvgraph.server.state import Server, TheCaller, TheServer
from kvgraph.server.tenants import Caller

T = TypeVar("T")

LINGER = 5.0  # seconds a client has for reading its last events
ALIVE_EVERY = 5.0  # seconds between signs of life until the first event, so that no proxy takes a stream for dead


class ClientLeft(APIError):
    """The client closed the connection before its answer was complete."""


class Call:
    """A request of somebody who may ask. Its steps are named at the top of this file, in the order of their use."""

    def __init__(self, http: Request, server: Server, caller: Caller):
        self.server, self.caller = server, caller
        self._http = http
        self._held = AsyncExitStack()  # what it gives back at its end
        self._deadline = 0.0  # event loop time

    @asynccontextmanager
    async def admitted(self, choices: int = 1, timeout: float | None = None) -> AsyncIterator[None]:
        """A block in which the request has its place, for at most `timeout` seconds (default: the server's).

        A stream that begins in the block keeps the place until its own end. Raises what `Server.admit` raises.
        """
        async with AsyncExitStack() as self._held:
            self.server.admit(self.caller, choices, self._held)
            self._deadline = self.server.deadline(timeout)
            yield

    def generates(self, operation: str, **more: Any) -> Inference:
        """Note, for metrics and traces, that this request generates; for its fields see `logs.Inference`."""
        inference = Inference(operation, **more)
        if (exchange := logs.current.get()) is not None:
            exchange.inference = inference
        return inference

    async def prepared(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of something that takes long and needs no engine. Raises ClientLeft, and APIError 504."""
        return await self.collected(done_by(self._deadline, self.server.workers.run(work, *arguments)))

    def submit(self, request: engine_request.Request) -> EngineJob:
        """Give the engine something to do for this request. It is cancelled, if need be, when the request ends."""
        exchange = logs.current.get()
        job = self.server.runner.submit(request, None if exchange is None else exchange.started)
        if exchange is not None:
            exchange.jobs.append(job)
        self._held.callback(job.cancel)  # also if nobody ever asks for its updates
        return job

    def updates(self, requests: Iterable[engine_request.Request]) -> AsyncGenerator[tuple[int, Update]]:
        """Submit requests; (number, what is new of it) as it comes. Raises what ends one, and APIError 504."""
        return in_time(self._deadline, merged([self.submit(request) for request in requests]))

    async def collected(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client leaves. Raises ClientLeft, and APIError 504."""
        return await unless_gone(self._http, done_by(self._deadline, work))

    def streamed(self, chunks: AsyncGenerator[BaseModel], opening: int = 0, *, named: bool = False) -> EventStream:
        """The response that sends chunks as server-sent events. opening, named: see `events`."""
        return EventStream(self._http, events(chunks, opening, named=named), self._held.pop_all(), self._deadline)


async def call_of(http: Request, server: TheServer, caller: TheCaller) -> Call:
    """The call that a route is asked to answer."""
    return Call(http, server, caller)


TheCall = Annotated[Call, Depends(call_of)]


# -- clients that leave, and deadlines ----------------------------------------------------------------------------------


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. Raises ClientLeft."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            if (exchange := logs.current.get()) is not None:
                exchange.left = True
            raise ClientLeft(499, "the client left", code="client_closed_request")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def done_by(deadline: float, work: Awaitable[T]) -> T:
    """The result of `work`, if it is there by the deadline (event loop time). Raises APIError 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise _late() from None


async def in_time(deadline: float, updates: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The updates until the deadline (event loop time). Raises APIError 504."""
    async with aclosing(updates):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(updates)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _late() from None
            yield item


def _late() -> APIError:
    return APIError(504, "the request took longer than its deadline and was cancelled", code="timeout")


# -- server-sent events -----------------------------------------------------------------------------------------------

# `sse-starlette` isn't simpler here. It ends streams at the first SIGTERM, by a change to uvicorn's own class, where this
# server lets them finish; and deadlines, what a stream holds, and the account of clients that left would still be ours.


class EventStream(StreamingResponse):
    """Server-sent events; `held` is closed when the response ends, also if the client left before its first byte.

    A client that doesn't read is cut off `LINGER` seconds after the deadline (event loop time).
    """

    def __init__(self, http: Request, events: AsyncGenerator[str], held: AsyncExitStack, deadline: float):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._http, self._events, self._held, self._deadline = http, events, held, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._events):
            with suppress(ClientLeft, OSError, TimeoutError):  # nobody is there to be told
                async with asyncio.timeout_at(self._deadline + LINGER):
                    # Sending alone notices that the client has left only when there is something to send.
                    await unless_gone(self._http, self.stream_response(send))


async def events(chunks: AsyncGenerator[BaseModel], opening: int = 0, *, named: bool = False) -> AsyncGenerator[str]:
    """Chunks as server-sent events, and comments before the first token.

    opening: the number of chunks that come before the first token. named: each event has the name of its chunk's type,
    and the last chunk is the end; else "[DONE]" is. An error in the middle is an event of its own, after which nothing
    follows.
    """
    try:
        async with aclosing(chunks):
            for _ in range(opening + 1):
                awaited = asyncio.ensure_future(anext(chunks, None))
                try:
                    while not (await asyncio.wait({awaited}, timeout=ALIVE_EVERY))[0]:
                        yield ": the answer hasn't begun\n\n"
                    if (chunk := awaited.result()) is not None:
                        yield event(chunk.model_dump(), named=named)
                finally:
                    awaited.cancel()
                    await asyncio.gather(awaited, return_exceptions=True)
            async for chunk in chunks:
                yield event(chunk.model_dump(), named=named)
        if not named:
            yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(errors.body(errors.report(error)))


# Line ends that JSON may have as they are, and at which clients that read by Python's idea of a line would cut.
LINE_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}


def event(data: Any, *, named: bool = False) -> str:
    """One server-sent event. Its data stays on one line for every client. named: with the event's type as its name."""
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':')).translate(LINE_ENDS)}\n\n"
