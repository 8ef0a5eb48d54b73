"""Middleware of every request: its id, access line, metrics and trace, and limits on its body."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvgraph.server import errors, logs
from kvgraph.server.errors import APIError
from kvgraph.server.logs import Exchange

if TYPE_CHECKING:
    from kvgraph.server.state import Server
    from kvgraph.server.tenants import Tenants

access = logging.getLogger("kvgraph.access")

PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds: their access lines are for debugging
LINGER = 1.0  # seconds that the rest of a refused body is read and dropped
LEFT = 499  # the status, in logs and metrics, of a request whose client didn't wait for the answer


class Observed:
    """Gives each request an id and counts, logs and traces it; what nobody caught becomes a 500 here.

    X-Request-ID is taken from the request if it is harmless, and always returned.
    """

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, status = Headers(scope=scope), 0
        exchange = Exchange(logs.request_id(headers.get("x-request-id")))

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = exchange.id
            await send(message)

        inner = _tidied(scope)
        token = logs.current.set(exchange)
        span = self.server.tracing.start(scope["method"], headers, exchange)
        self.server.metrics.in_flight.inc()
        try:
            await self.app(inner, receive, noted)
        except Exception as error:
            answer = errors.response(errors.report(error))
            if not status:
                await answer(scope, receive, noted)
        finally:
            self.server.metrics.in_flight.dec()
            seconds = time.perf_counter() - exchange.started
            told = LEFT if exchange.left or not status else status
            route = getattr(inner.get("route"), "path", "unknown")
            self.server.metrics.count_http(route, scope["method"], told, seconds)
            failed = exchange.error or (str(told) if told >= LEFT else None)
            self.server.metrics.count_inference(exchange, failed, seconds)
            self.server.tracing.end(span, scope["method"], route, told, failed, exchange)
            self._log(scope, told, seconds, exchange)
            logs.current.reset(token)

    def _log(self, scope: Scope, status: int, seconds: float, exchange: Exchange) -> None:
        raw: bytes = scope.get("raw_path") or b""  # not the decoded path, which may hold line breaks
        first = exchange.first_token_at
        fields = {
            "method": scope["method"],
            "path": raw.split(b"?")[0][:200].decode("ascii", "backslashreplace"),
            "status": status,
            "seconds": round(seconds, 4),
            "tenant": exchange.tenant or None,
            "error": exchange.error,
            **exchange.tokens(),
            "ttft": None if first is None else round(first - exchange.started, 4),
        }
        level = logging.DEBUG if scope["path"] in PROBES and status < 400 else logging.INFO
        access.log(level, "request", extra={"fields": fields})


def _tidied(scope: Scope) -> Scope:
    """The request as routes see it: HEAD is a GET whose body the HTTP server leaves out, and a last slash is nothing."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


class BodyLimit:
    """Hands a request on when its body is complete, so that a slow client holds nothing but a connection.

    A body that isn't JSON, or is compressed, is refused with 415. Without a valid key nothing is held: the request is
    handed on without its body. Routes that need no key read none, and the others answer 401.

    most: bytes of one body, declared or not; beyond it 413. together: bytes of the bodies of all requests that are being
    read or answered; beyond it 429. One of several tenants gets half of them at most, as in `Server.admit`. seconds: how
    long a client may take to send its body; then 408.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants, most: int, together: int, seconds: float):
        self.app, self.tenants, self.most, self.together, self.seconds = app, tenants, most, together, seconds
        self.share = max(most, together // 2) if tenants.several else together
        self.held: Counter[str] = Counter()  # bytes, by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            tenant = self.tenants.caller(Headers(scope=scope).get("authorization")).tenant
        except APIError:
            return await self.app(scope, _replayed(b"", receive), await _ending(receive, send))
        body = bytearray()
        try:
            if await self._read(scope, receive, body, tenant):
                await self.app(scope, _replayed(bytes(body), receive), send)
        except _Refused as refused:
            await _discard(receive)
            answer = errors.response(refused.error)
            answer.headers["Connection"] = "close"  # there may be more of the body
            await answer(scope, receive, send)
        finally:
            self.held[tenant] -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray, tenant: str) -> bool:
        """Read the whole body; False if the client left meanwhile. Raises _Refused with 408, 413 or 429."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self.most):
            raise self._too_large()
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    body += part
                    self.held[tenant] += len(part)
                    if len(body) > self.most:
                        raise self._too_large()
                    if self.held.total() > self.together or self.held[tenant] > self.share:
                        raise _Refused(
                            429, "too many large requests at once; try again", code="overloaded", retry_after=1
                        )
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise _Refused(
                408, f"the request's body took longer than {self.seconds:g} seconds", code="request_timeout"
            ) from None
        if body:
            _check_type(Headers(scope=scope))
        return True

    def _too_large(self) -> _Refused:
        return _Refused(413, f"the request is larger than {self.most:,} bytes; send less at once", code="too_large")


class _Refused(Exception):
    """A body that isn't read to its end, and the error its client gets."""

    def __init__(self, status: int, message: str, **more: Any):
        self.error = APIError(status, message, **more)


def _check_type(headers: Headers) -> None:
    """Raise _Refused with 415 for a body that isn't plain JSON. A page of another site can send only such ones unasked."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise _Refused(
            415, f"Content-Encoding is {encoding[:50]!r}; send the body uncompressed", code="unsupported_encoding"
        )
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        told = f"Content-Type is {given[:50]!r}" if given else "there is no Content-Type"
        raise _Refused(415, f"{told}; send application/json", code="unsupported_media_type")


async def _discard(receive: Receive) -> bool:
    """Read on for a moment: many clients look at the answer only after they have sent everything. False if there is more."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass
            return True
    return False


async def _ending(receive: Receive, send: Send) -> Send:
    """Drop a body; gives a `send` that also closes the connection if there is more of it."""
    if await _discard(receive):
        return send

    async def ending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    return ending


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
