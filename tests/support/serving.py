"""Live servers for tests: in this process on a thread, or as a process of their own."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from commands import Command
from kvgraph import demo
from kvgraph.engine.engine import Engine
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings

STARTED = re.compile(r"http://127\.0\.0\.1:\d+")
LONG = 10_000  # tokens: far more than a test waits for
SECRETS = ("the-prompt-itself", "the-document-itself", "key-of-anna-123", "key-of-ben-4567", "a-wrong-key-99")
ANNA, BEN = {"Authorization": f"Bearer {SECRETS[2]}"}, {"Authorization": f"Bearer {SECRETS[3]}"}
KEYS = [{"key": SECRETS[2], "tenant": "anna"}, {"key": SECRETS[3], "tenant": "ben"}]
DOCUMENTS = [{"text": "one fact"}, {"text": "another"}]


def token_bytes() -> int:
    """Bytes of the KV of a token of the random model."""
    return demo.LAYERS * 2 * demo.KV_HEADS * demo.HEAD_DIM * 4


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
def serving(app: FastAPI, seconds: float = 60) -> Iterator[str]:
    """Serve an application on a thread until the block ends; gives the base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        wait_ready(url, seconds)
        yield url
    finally:
        server.should_exit = True
        thread.join(max(30, seconds))
        assert not thread.is_alive(), "the server doesn't end"


@contextmanager
def spawn(*flags: object) -> Iterator[tuple[Command, str]]:
    """`kvgraph serve --port 0 FLAGS` as a process, killed at the end of the block; gives it and its base URL when ready."""
    process = Command("serve", "--port", 0, *flags)
    try:
        yield process, started(process)
    finally:
        process.kill()
        process.wait()


def started(process: Command) -> str:
    """The base URL of a server that is a process, once its model is loaded."""
    until(lambda: STARTED.search(process.stderr) or process.poll() is not None, 60)
    found = STARTED.search(process.stderr)
    assert found, process.stderr
    wait_ready(found[0])
    return found[0]


def wait_ready(url: str, seconds: float = 60) -> None:
    """Wait until a server's model is loaded."""
    deadline = time.monotonic() + seconds
    while (answer := httpx.get(f"{url}/ready", timeout=60)).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.02)


class Live:
    """A server on a thread, and what it holds."""

    def __init__(self, app: FastAPI, url: str):
        self.app, self.url, self.server = app, url, app.state.server
        self.name = self.server.settings.name

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": self.name, "prompt": "why?", "max_tokens": 4, "ignore_eos": True, **more}

    def ask(self, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=self.body(**more), headers=headers, timeout=60)

    def send(self, **more: Any) -> socket.socket:
        """A connection on which a request was just sent."""
        connection = self.connect()
        payload = json.dumps(self.body(**more)).encode()
        connection.sendall(head(len(payload)) + payload)
        return connection

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def metrics(self) -> dict[str, float]:
        return metrics(self.url)

    def idle(self) -> bool:
        """Whether nothing is held any more: requests, KV rows, pins, encodings, bodies."""
        load, scheduler = self.server.runner.load, self.server.engine.scheduler
        held = (self.server.in_work, self.server.runner.pending, load.running, load.encoding, load.pinned)
        return not any(held) and not scheduler.memory.row_bytes and not scheduler.memory.holds and scheduler.idle


def head(length: int, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def metrics(url: str) -> dict[str, float]:
    """{'name{label="value"}': value} of a server's metrics."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it didn't come to that"
        time.sleep(0.01)


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def events(text: str) -> list[Any]:
    """The data of server-sent events; "[DONE]" as it is."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


def code_of(answer: httpx.Response) -> str | None:
    return answer.json().get("error", {}).get("code")


class Process:
    """`kvgraph serve` as a process, ready."""

    def __init__(self, folder: Path, *flags: object, **options: Any):
        self.name = folder.name
        self.process = Command("serve", "--model", folder, "--port", 0, *flags, **options)

    def __enter__(self) -> Process:
        try:
            self.url = started(self.process)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.process.stderr

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=20)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(30)

    def stream(self, **more: Any) -> Any:
        body = {"model": self.name, "prompt": "why?", "stream": True, "ignore_eos": True, **more}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60)
