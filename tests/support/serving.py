"""Live servers for tests: in this process on a thread, or as a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from kvgraph.engine.engine import Engine
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings

STARTED = re.compile(r"http://127\.0\.0\.1:\d+")


@contextmanager
def serve(model: Path | Engine, **settings: Any) -> Iterator[str]:
    """Serve a model folder (without the gate), or an engine that is there, on a thread; gives the base URL."""
    with serving(application(model, **settings)) as url:
        yield url


def application(model: Path | Engine, **settings: Any) -> FastAPI:
    """The application that `serve` serves; `app.state.server` is its `Server`."""
    name = model.model.name if isinstance(model, Engine) else str(model)

    def load(_: Settings) -> Engine:
        if isinstance(model, Engine):
            return model
        return Engine.load(model, check=False, store=settings.get("store"), kv_budget=settings.get("kv_budget"))

    return create_app(Settings.load(model=name, **settings), load)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application on a thread until the block ends; gives the base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        wait_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server doesn't end"


@contextmanager
def spawn(*flags: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """`kvgraph serve --port 0 FLAGS` as a process, killed at the end of the block; gives it and its base URL when ready."""
    command = [sys.executable, "-m", "kvgraph.cli", "serve", "--port", "0", *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := STARTED.search(line):
                break
        else:
            raise AssertionError("the server ended at once: " + "".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        wait_ready(found[0])
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def wait_ready(url: str, seconds: float = 60) -> None:
    """Wait until a server's model is loaded."""
    deadline = time.monotonic() + seconds
    while (answer := httpx.get(f"{url}/ready")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.02)
