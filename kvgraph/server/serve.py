"""The process: sockets, signals and logs around the application."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvicorn

from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings


class Process(uvicorn.Server):
    """uvicorn's server, but that work begins to end with the signal, not when the last connection is closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once after a signal; returns when all connections and the application have ended."""
        draining = asyncio.create_task(self.config.app.state.server.drain())  # type: ignore[union-attr]
        await super().shutdown(sockets)
        if not self.force_exit:
            await draining


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; running requests get `settings.grace` seconds to end. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.grace) + 5,
        server_header=False,
    )
    server = Process(config)

    def give_up(*_: object) -> None:
        server.should_exit = True

    app.state.server.on_failure = give_up
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them once more when it has ended
        signal.signal(number, give_up)
    server.run()
    return 1 if app.state.server.failed is not None or not server.started else 0
