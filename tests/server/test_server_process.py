"""How the process starts and ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import httpx
import pytest

from kvgraph.cli import main
from kvgraph.server.settings import Settings
from kvgraph.server.state import Server
from serving import DOCUMENTS, LONG, Process, error, events, until


def test_sigterm_finishes_streams_and_keeps_what_was_computed(folder, tmp_path):
    with Process(folder, "--store", tmp_path / "kv", fresh=True) as server:
        with httpx.Client(base_url=server.url) as client, server.stream(max_tokens=400, documents=DOCUMENTS) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: client.get("/ready").status_code == 503, 2)
            time.sleep(0.5)  # the sockets stay open: a load balancer asks now and then
            with server.connect() as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b" 503 " in connection.recv(1000)
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/completions", json={"model": folder.name, "prompt": "why?"})
            assert error(refused, 503)["code"] == "shutting_down" and int(refused.headers["Retry-After"]) > 0
            chunks = events("\n\n".join(line for line in lines if line))
        assert chunks[-1] == "[DONE]" and chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert list((tmp_path / "kv").rglob("*.safetensors"))


def test_sigint_ends_streams_after_the_grace(folder):
    with Process(folder, KVGRAPH_GRACE="0.5") as server, server.stream(max_tokens=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        chunks = events("\n\n".join(line for line in lines if line))
        assert chunks[-1]["error"]["code"] == "shutting_down"
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_at_once(folder):
    with Process(folder) as server, server.stream(max_tokens=LONG) as answer:
        lines = answer.iter_lines()  # kept: the end of the iterator would close the connection
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(3) == 128 + signal.SIGTERM


@pytest.fixture
def refused(capsys) -> Iterator[Callable[..., list[str]]]:
    """Run a `kvgraph serve` that can't start: what it says on stderr, with exit code 1."""
    loggers = [logging.getLogger(name) for name in ("", "kvgraph")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    shown = warnings.showwarning

    def run(*flags: object) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, flags)])
        assert ended.value.code == 1
        return capsys.readouterr().err.splitlines()

    yield run
    warnings.showwarning = shown
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_model_that_is_not_there_ends_the_process(refused, tmp_path):
    lines = refused("--model", tmp_path / "nothing", "--port", 0)
    errors = [line for line in lines if " ERROR " in line]
    assert len(errors) == 1 and "nothing" in errors[0] and "Traceback" not in "".join(lines)


def test_a_port_that_is_taken_ends_the_process_before_the_model_is_loaded(refused, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lines = refused("--model", folder, "--port", port)
    assert lines == [f"kvgraph: can't listen on 127.0.0.1, port {port}: Address already in use"]


def test_ending_does_not_wait_for_loading():
    loading = threading.Event()

    async def life() -> None:
        server = Server(Settings(model="m"), lambda _: loading.wait(20))  # type: ignore[arg-type,return-value]
        server.start()
        await asyncio.sleep(0.1)
        assert not server.ready
        await server.stop()

    started = time.monotonic()
    asyncio.run(life())  # which waits for the event loop's own threads
    assert time.monotonic() - started < 5
    loading.set()
