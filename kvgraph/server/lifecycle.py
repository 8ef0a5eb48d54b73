"""One request's life: until its client leaves, until its deadline, and why its answer ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request

from kvgraph.engine.result import Result
from kvgraph.server import logs, schema
from kvgraph.server.errors import APIError
from kvgraph.server.runner import Update

T = TypeVar("T")


class ClientLeft(APIError):
    """The client closed the connection before its answer was complete."""


async def unless_gone(http: Request, work: Any) -> Any:
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


def _late() -> APIError:
    return APIError(504, "the request took longer than its deadline; the work was ended", code="timeout")


async def in_time(deadline: float, updates: AsyncIterator[tuple[int, Update]]) -> AsyncIterator[tuple[int, Update]]:
    """The updates until the deadline (event loop time). Raises APIError 504."""
    iterator = aiter(updates)
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _late() from None
            yield item
    finally:
        await updates.aclose()  # type: ignore[attr-defined]


def finish_reason(result: Result) -> schema.FinishReason:
    """Why an answer ended. Raises APIError 503 for one that the server itself cut off."""
    if result.finish_reason == "cancelled":
        raise APIError(503, "the server is shutting down and ended the request", code="shutting_down", retry_after=1)
    return "stop" if result.finish_reason == "stop" else "length"
