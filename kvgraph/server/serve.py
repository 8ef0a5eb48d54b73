"""The process: sockets, signals and logs around the application."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from kvgraph.server import logs
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.state import Server

log = logging.getLogger("kvgraph.server")

HEAD_TIMEOUT = 30.0  # seconds a client may take to send a request's head
LINGER = 5.0  # seconds that clients get, once all work has ended, to read what was sent


def run(settings: Settings, make: Callable[[Settings], FastAPI] = create_app) -> int:
    """Serve until SIGTERM or SIGINT; running requests get `settings.grace` seconds to end. Returns the exit code.

    Raises SettingsError before the model is loaded if the address can't be listened on, or traces have nowhere to go.
    """
    listener = _listening(settings)
    app = make(settings)
    logs.setup(settings.log_format)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(LINGER),
    )
    process = Process(config, app.state.server)
    with listener:
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        process.run(sockets=[listener])
    return 0 if app.state.server.failed is None else 1


def _listening(settings: Settings) -> socket.socket:
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror  # a name that can't be resolved has none
        raise SettingsError(f"can't listen on {settings.host}, port {settings.port}: {reason}") from None


class Process(uvicorn.Server):
    """Ends in order at the first SIGTERM or SIGINT, and at once at the second.

    In order: new requests are refused with 503. When the work in hand has ended, the sockets are closed.
    """

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server
        server.on_failure = self._give_up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._server.closing:
            os._exit(128 + sig)  # records appear on the disk whole or not at all, whenever that is
        self._server.closing = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the work in hand while the sockets are open, then close them."""
        log.info("shutting down; a second signal ends at once")
        await self._server.drain()
        await super().shutdown(sockets)

    def _give_up(self) -> None:
        self.should_exit = True


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP/1.1 that doesn't wait for a request's head forever. (uvicorn itself limits only the pause between two.)"""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Some of a head, or of a body."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif not answering and self._patience is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """They have gone."""
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._patience = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)
