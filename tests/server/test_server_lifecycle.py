"""Deadlines, and clients that leave: what was held is given back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serving import DOCUMENTS, LONG, Live, error, events, token_bytes, until


def test_a_deadline_ends_the_work(live):
    server = live()
    assert error(server.ask(max_tokens=LONG, kvgraph={"timeout": 0.3}), 504)["code"] == "timeout"
    until(server.idle)
    streamed = server.ask(max_tokens=LONG, kvgraph={"timeout": 0.3}, stream=True)
    *before, last = events(streamed.text)
    assert streamed.status_code == 200 and last["error"]["code"] == "timeout" and len(before) > 1
    until(server.idle)
    assert server.metrics()['kvgraph_answers_total{outcome="cancelled"}'] == 2


def one_at_a_time(live: Callable[..., Live]) -> tuple[Live, socket.socket]:
    """A server whose memory is enough for one long request, and that request's connection."""
    server = live(kv_budget=(LONG + 100) * token_bytes())
    running = server.send(max_tokens=LONG, stream=True)
    until(lambda: server.server.runner.load.running == 1)
    return server, running


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_counts_in_the_queue(live, stream):
    server, running = one_at_a_time(live)
    answer = server.ask(max_tokens=LONG, kvgraph={"timeout": 0.3}, stream=stream)
    told = events(answer.text)[-1]["error"] if stream else error(answer, 504)
    assert told["code"] == "timeout"
    until(lambda: server.server.in_work == 1 == server.server.runner.load.running)
    running.close()
    until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_worked_for(live, stream):
    server = live()
    connection = server.send(max_tokens=LONG, stream=stream, documents=DOCUMENTS, n=2)
    until(lambda: server.server.runner.load.running == 2 and server.server.runner.load.pinned > 0)
    connection.close()
    until(server.idle, 5)
    assert server.metrics()['kvgraph_http_requests_total{method="POST",route="/v1/completions",status="4xx"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_not_worked_for(live, stream):
    server, running = one_at_a_time(live)
    waiting = server.send(max_tokens=LONG, stream=stream)
    until(lambda: server.server.runner.pending == 2)
    waiting.close()
    until(lambda: server.server.runner.pending == 1 and server.server.in_work == 1, 5)
    assert server.server.runner.load.running == 1
    running.close()
    until(server.idle)


def test_a_client_that_leaves_before_its_prompt_is_laid_out_is_not_worked_for(live):
    server = live()
    free = threading.Event()
    for _ in range(2):  # both worker threads
        server.server.workers.threads.submit(free.wait, 20)
    connection = server.send(stream=True, max_tokens=LONG)
    until(lambda: server.server.in_work == 1)
    connection.close()
    try:
        until(server.idle, 5)
    finally:
        free.set()


def stream_to(server: Live, send: Callable[[Any], Any], **more: Any) -> None:
    """A streamed request whose client stays, as the application sees it, with a socket of the test's own making."""
    given = [{"type": "http.request", "body": json.dumps(server.body(stream=True, **more)).encode()}]

    async def receive() -> Any:
        return given.pop() if given else await asyncio.Event().wait()

    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.4"}}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": None}
    answered = asyncio.run_coroutine_threadsafe(server.app(scope, receive, send), server.server.runner._loop)
    answered.result(10)


def test_a_client_that_stops_reading_is_cut_off(live, monkeypatch):
    monkeypatch.setattr("kvgraph.server.lifecycle.LINGER", 0.1)
    server = live(timeout=1)
    sent = []

    async def stuck(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream_to(server, stuck)
    assert sent == ["http.response.start", "http.response.body"]
    until(server.idle)


def test_a_client_that_is_gone_when_its_answer_begins_is_not_worked_for(live):
    server = live()

    async def broken(message: Any) -> None:
        raise OSError("the connection is closed")

    stream_to(server, broken, max_tokens=LONG, n=3)
    until(server.idle, 5)


def test_a_cancelled_call_does_not_end_the_engine_thread(live):
    server = live()
    free = threading.Event()
    runner = server.server.runner
    runner.call(lambda: free.wait(20))
    late = runner.call(lambda: 1)
    assert late.cancel()
    free.set()
    assert runner.call(lambda: 2).result(10) == 2 and runner.failed is None
