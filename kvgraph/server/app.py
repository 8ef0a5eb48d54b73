"""The application: routes, errors and limits around one `Server`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvgraph import __version__
from kvgraph.engine.engine import Engine
from kvgraph.server import compat, errors, health, inspect, openai, playground, segments
from kvgraph.server.core import Server, load_engine
from kvgraph.server.errors import APIError
from kvgraph.server.settings import Settings


def create_app(settings: Settings, load: Callable[[Settings], Engine] = load_engine) -> FastAPI:
    """The ASGI application of a server; the model is loaded when it starts. `load` is another way to get an engine."""
    server = Server(settings, load)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await server.stop()

    app = FastAPI(
        title="kvgraph",
        version=__version__,
        summary="An OpenAI-compatible API over composed KV caches",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    errors.install(app)
    for module in (openai, segments, compat, health, inspect, playground):
        app.include_router(module.router)
    app.add_middleware(SizeLimit, most=settings.max_request_bytes)
    return app


class SizeLimit:
    """Refuses request bodies above a size, whether they say so in Content-Length or not."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = APIError(
            413, f"the request is larger than {self.most:,} bytes; send less at once", code="too_large"
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.most:
            return await errors.response(too_large)(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise too_large
            return message

        await self.app(scope, counted, send)
