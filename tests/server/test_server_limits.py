"""What is refused, and when: rates, slots, queues, bodies; and what tenants see of each other."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
import uvicorn

from kvgraph import Engine
from kvgraph.server import serve as process
from serving import (
    ANNA,
    BEN,
    DOCUMENTS,
    KEYS,
    LONG,
    SECRETS,
    Live,
    application,
    code_of,
    error,
    head,
    until,
    wait_ready,
)


def test_a_key_has_its_rate(live):
    server = live(api_keys=[{**KEYS[0], "requests_per_minute": 2}, KEYS[1]])
    assert [server.ask(ANNA).status_code for _ in range(3)] == [200, 200, 429]
    refused = server.ask(ANNA)
    assert error(refused, 429)["code"] == "rate_limit_exceeded" and 1 <= int(refused.headers["Retry-After"]) <= 30
    assert server.ask(BEN).status_code == 200


def test_a_key_has_its_number_of_requests_at_once(live):
    server = live(api_keys=[{**KEYS[0], "concurrent": 1}, KEYS[1]])
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=server.body(stream=True, max_tokens=LONG), headers=ANNA
    ):
        assert error(server.ask(ANNA), 429)["code"] == "concurrency_limit_exceeded"
        assert server.ask(BEN).status_code == 200
    until(server.idle)
    assert server.ask(ANNA).status_code == 200


def test_the_queue_has_an_end_and_no_tenant_fills_it(live):
    server = live(api_keys=KEYS, max_pending=4)
    with ExitStack() as open_:

        def hold(headers: dict[str, str]) -> None:
            body = server.body(stream=True, max_tokens=LONG)
            open_.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers))

        hold(ANNA)
        assert server.ask(ANNA, n=2).status_code == 429  # three of four would be Anna's
        hold(ANNA)
        refused = server.ask(ANNA)
        assert error(refused, 429)["code"] == "overloaded" and refused.headers["Retry-After"] == "1"
        assert server.ask(BEN).status_code == 200
        hold(BEN)
        assert server.ask(BEN, n=2).status_code == 429
    until(server.idle)


def test_requests_still_being_tokenized_count_too(live):
    server = live(max_pending=2)
    free = threading.Event()
    for _ in range(2):  # both worker threads
        server.server.workers.threads.submit(free.wait, 20)
    try:
        connections = [server.send() for _ in range(2)]
        until(lambda: server.server.in_work == 2)
        assert error(server.ask(), 429)["code"] == "overloaded"
    finally:
        free.set()
    assert [b" 200 " in connection.recv(100) for connection in connections] == [True, True]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_its_size(live, chunked):
    server = live(max_request_bytes=10_000)
    content = json.dumps(server.body(prompt="x" * 20_000)).encode()
    parts = (content[i : i + 1000] for i in range(0, len(content), 1000)) if chunked else content
    answer = httpx.post(f"{server.url}/v1/completions", content=parts, headers={"Content-Type": "application/json"})
    assert error(answer, 413)["code"] == "too_large"
    assert server.ask().status_code == 200


def test_all_bodies_together_have_their_size(live):
    server = live(max_body_bytes=50_000)
    unfinished = [server.connect() for _ in range(2)]
    for connection in unfinished:
        connection.sendall(head(30_000) + b" " * 20_000)
    until(lambda: code_of(server.ask(prompt="x" * 20_000)) == "overloaded")
    for connection in unfinished:
        connection.close()
    until(lambda: server.ask(prompt="x" * 200).status_code == 200)


def test_a_body_without_a_key_is_not_held(live):
    server = live(api_keys=KEYS, max_body_bytes=50_000, cors_origins=["https://a.example"])
    with ExitStack() as open_:
        unfinished = [open_.enter_context(server.connect()) for _ in range(3)]
        for connection, path in zip(unfinished, ("/v1/completions", "/v1/graphs", "/none"), strict=True):
            connection.sendall(head(30_000, path) + b" " * 20_000)
        for _ in range(20):  # bodies for which those that stall would leave no room
            assert server.ask(ANNA, metadata={"padding": "x" * 20_000}).status_code == 200
        # The server closes the connections.
        answers = [b"".join(iter(lambda c=c: c.recv(4096), b"")) for c in unfinished]
    assert [answer.split()[1] for answer in answers] == [b"401", b"401", b"404"]
    assert b"invalid_api_key" in answers[0] and b"connection: close" in answers[0].lower()
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/completions", headers=preflight).status_code == 200
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


def test_a_body_that_came_whole_keeps_its_connection(live):
    server = live(api_keys=KEYS)
    with httpx.Client(base_url=server.url) as http:
        refused = http.post("/v1/completions", content=b"no JSON at all")
        assert error(refused, 401)["code"] == "invalid_api_key" and "Connection" not in refused.headers
        assert http.post("/v1/completions", json=server.body(), headers=ANNA).status_code == 200


def test_bodies_of_a_tenant_leave_room_for_others(live):
    server = live(api_keys=KEYS, max_body_bytes=50_000, max_request_bytes=25_000)
    key = f"\r\nAuthorization: {ANNA['Authorization']}\r\n\r\n".encode()
    with ExitStack() as open_:
        for _ in range(2):
            connection = open_.enter_context(server.connect())
            connection.sendall(head(20_000).removesuffix(b"\r\n\r\n") + key + b" " * 12_000)
        until(lambda: code_of(server.ask(ANNA, prompt="x" * 10_000)) == "overloaded")
        assert server.ask(BEN, prompt="x" * 10_000).status_code == 200


def test_a_slow_body_holds_nothing_but_its_connection(live):
    server = live(body_timeout=0.5, max_pending=1)
    with server.connect() as connection:
        connection.sendall(head(100) + b"{")
        for _ in range(3):
            time.sleep(0.1)
            connection.sendall(b" ")
            assert server.server.in_work == 0
        assert server.ask().status_code == 200
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # the server closes the connection
        assert b" 408 " in answer and b"request_timeout" in answer


def test_a_slow_head_is_not_waited_for(model, monkeypatch):
    monkeypatch.setattr(process, "HEAD_TIMEOUT", 1.0)
    app = application(Engine(model, kv_budget=1 << 28))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=process.Protocol, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    address = server.servers[0].sockets[0].getsockname()
    try:
        url = f"http://127.0.0.1:{address[1]}"
        wait_ready(url)
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
            started = time.monotonic()
            assert connection.recv(100) == b"" and time.monotonic() - started < 4
        with httpx.Client() as client:  # one connection, kept: requests after one another aren't cut off
            for length in (150, 1):
                assert client.post(f"{url}/v1/completions", json=Live(app, url).body(max_tokens=length)).is_success
    finally:
        server.should_exit = True
        thread.join(20)


def test_tenants_share_no_record(live, tmp_path):
    server = live(api_keys=KEYS, store=tmp_path)
    engine = server.server.engine

    def records() -> set[str]:
        engine.flush()
        return {path.stem for path in tmp_path.rglob("*.safetensors")}

    def computed(headers: dict[str, str]) -> int:
        answer = server.ask(headers, documents=DOCUMENTS, kvgraph={"method": "graph-kv", "edges": "all"}, seed=1)
        return answer.json()["usage"]["kvgraph"]["document_tokens_computed"]

    first = computed(ANNA)
    hers = records()
    assert first > 0 == computed(ANNA) and hers and records() == hers
    assert computed(BEN) == first
    his = records() - hers
    assert len(his) == len(hers)
    pool = engine.scheduler.memory.pool
    assert all(key in pool for key in hers | his) and computed(BEN) == 0


def test_nobody_chooses_a_tenant(live):
    server = live(api_keys=KEYS)
    server.ask(ANNA, documents=DOCUMENTS)
    forged = {"X-Tenant": "anna", "X-Kvgraph-Salt": "anna", "OpenAI-Organization": "anna"}
    answer = server.ask({**BEN, **forged}, documents=DOCUMENTS, user="anna", metadata={"tenant": "anna"})
    assert answer.json()["usage"]["kvgraph"]["reused_tokens"] == {}
    for name in ("tenant", "salt"):
        answer = server.ask(BEN, documents=[{"text": "hers"}], **{name: "anna"}).json()["usage"]["kvgraph"]
        assert answer["ignored"] == [name] and server.server.tenants.caller(BEN["Authorization"]).salt == "ben"
        assert name in error(server.ask(BEN, kvgraph={name: "anna"}), 400)["message"]
    for authorization in ("Bearer anna", "Basic " + SECRETS[2], "Bearer", SECRETS[2]):
        assert error(server.ask({"Authorization": authorization}), 401)["code"] == "invalid_api_key"
