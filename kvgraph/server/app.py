"""The application: routes, errors and limits around one `Server`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from kvgraph import __version__
from kvgraph.engine.engine import Engine
from kvgraph.server import handlers, playground
from kvgraph.server.middleware import BodyLimit, Observed
from kvgraph.server.routes import compat, health, inspect, metrics, openai, responses, segments, tokenize
from kvgraph.server.runner import EngineThread, Watch
from kvgraph.server.settings import Settings
from kvgraph.server.state import Server, load_engine


def create_app(
    settings: Settings,
    load: Callable[[Settings], Engine] = load_engine,
    run: Callable[[Engine, Watch], EngineThread] = EngineThread,
) -> FastAPI:
    """The ASGI application of a server; the model is loaded when it starts. load, run: other ways to get an engine and
    to drive it, see `Server`."""
    server = Server(settings, load, run)

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
    handlers.install(app)
    for module in (openai, responses, tokenize, segments, compat, health, metrics, inspect, playground):
        app.include_router(module.router)
    app.add_middleware(
        BodyLimit,
        tenants=server.tenants,
        most=settings.max_request_bytes,
        together=settings.max_body_bytes,
        seconds=settings.body_timeout,
    )
    app.add_middleware(Observed, server=server)  # the last one added is the outermost
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app
