"""Running a server: metrics, logs, traces, limits, deadlines, clients that leave, tenants, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from kvgraph import Engine, demo, models
from kvgraph.cli import main
from kvgraph.server import serve as process
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.state import Server
from serving import STARTED, application, serving, wait_ready

ROOT = Path(__file__).parents[2]
LONG = 3000  # tokens: far more than a test waits for
SECRETS = ("the-prompt-itself", "the-document-itself", "key-of-anna-123", "key-of-ben-4567", "a-wrong-key-99")
ANNA, BEN = {"Authorization": f"Bearer {SECRETS[2]}"}, {"Authorization": f"Bearer {SECRETS[3]}"}
KEYS = [{"key": SECRETS[2], "tenant": "anna"}, {"key": SECRETS[3], "tenant": "ben"}]
DOCUMENTS = [{"text": "one fact"}, {"text": "another"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    demo.write_model(made)
    return made


@pytest.fixture(scope="module")
def model(folder) -> models.Model:
    return models.load(folder)


@pytest.fixture
def live(model) -> Iterator[Callable[..., Live]]:
    """Start a server on a thread: live(kv_budget=…, store=…, **settings)."""
    with ExitStack() as stack:

        def start(kv_budget: int = 1 << 28, store: Path | None = None, **settings: Any) -> Live:
            app = application(Engine(model, store=store, kv_budget=kv_budget), **settings)
            return Live(app, stack.enter_context(serving(app)))

        yield start


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
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
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


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_usage_tells(live, tmp_path):
    server = live(store=tmp_path)
    first, second = (server.ask(documents=DOCUMENTS, kvgraph={"method": "block"}).json()["usage"] for _ in range(2))
    found = server.metrics()
    used = [first["kvgraph"], second["kvgraph"]]
    assert used[1]["reused_tokens"]["memory"] > 0 == used[1]["document_tokens_computed"]
    assert found["kvgraph_tokens_computed_total"] == sum(u["computed_tokens"] for u in used)
    assert found['kvgraph_tokens_reused_total{tier="memory"}'] == used[1]["reused_tokens"]["memory"]
    assert found["kvgraph_tokens_generated_total"] == 8
    assert found['kvgraph_answers_total{outcome="length"}'] == 2
    assert found["kvgraph_time_to_first_token_seconds_count"] == 2
    assert found["kvgraph_inter_token_seconds_count"] == 6
    assert found['kvgraph_http_requests_total{method="POST",route="/v1/completions",status="2xx"}'] == 2
    assert found['kvgraph_store_misses_total{tier="disk"}'] > 0
    server.server.engine.flush()
    assert server.metrics()['kvgraph_store_bytes{tier="disk"}'] == server.server.engine.store.stat().bytes > 0
    assert found["kvgraph_kv_bytes"] > 0 == found["kvgraph_kv_pinned_bytes"] == found["kvgraph_requests_running"]
    assert found["kvgraph_http_requests_in_flight"] == 1  # the scrape itself


def test_no_label_comes_from_a_caller(live):
    server = live(api_keys=KEYS)
    httpx.get(f"{server.url}/v1/models/{SECRETS[0]}", headers=ANNA)
    httpx.get(f"{server.url}/{SECRETS[0]}")
    httpx.request("BREW", f"{server.url}/v1/models", headers=BEN)
    server.ask(ANNA)
    text = httpx.get(f"{server.url}/metrics").text
    assert not [word for word in (*SECRETS, "anna", "ben", "BREW") if word in text]
    assert 'route="unknown"' in text and 'route="/v1/models/{name}"' in text.replace(":path", "")


def test_a_scrape_waits_for_neither_the_engine_nor_the_store(live, tmp_path):
    server = live(store=tmp_path)
    free = threading.Event()
    server.server.runner.call(lambda: free.wait(20))
    try:
        with server.server.engine.store._index_lock:
            started = time.monotonic()
            assert metrics(server.url)["kvgraph_ready"] == 1
            assert time.monotonic() - started < 5
    finally:
        free.set()


def test_the_documented_metrics_are_those_there_are(live, tmp_path):
    server = live(store=tmp_path)
    server.ask(documents=DOCUMENTS)
    server.ask(documents=DOCUMENTS)
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    there = {(f.name, f.type) for f in families if f.name.startswith("kvgraph_") and not f.name.endswith("_created")}
    table = re.findall(r"^\| `(kvgraph_\w+)`[^|]*\| (\w+) \|", (ROOT / "docs/how-to/operate.md").read_text(), re.M)
    assert {(name.removesuffix("_total"), kind) for name, kind in table} == there


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("", False), ("a" * 129, False), ("a b", False)])
def test_a_request_has_an_id(live, given, kept):
    server = live()
    back = httpx.get(f"{server.url}/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert back == given if kept else re.fullmatch("[0-9a-f]{32}", back)


def test_logs_are_json_with_ids_and_tell_no_secret(folder, tmp_path):
    prompt, document = SECRETS[:2]
    config = tmp_path / "server.toml"
    config.write_text("".join(f'[[api_keys]]\nkey = "{k["key"]}"\ntenant = "{k["tenant"]}"\n' for k in KEYS))
    with Process(folder, "--config", config, "--log-format", "json", KVGRAPH_MAX_REQUEST_BYTES="2000") as server:
        body = {
            "model": folder.name,
            "prompt": prompt,
            "max_tokens": 3,
            "ignore_eos": True,
            "documents": [{"text": document}],
        }

        def post(payload: Any, **headers: str) -> int:
            content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            headers = {"Content-Type": "application/json", **headers}
            return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers).status_code

        assert post(body, **ANNA, **{"X-Request-ID": "mine"}) == 200
        assert post({**body, "stream": True}, **BEN) == 200
        assert post(body, Authorization=f"Bearer {SECRETS[4]}") == 401
        assert post({**body, "kvgraph": {"edges": [[prompt, document]]}}, **ANNA) == 400
        assert post({**body, "temperature": prompt}, **ANNA) == 400
        assert post(f'{{"prompt": "{prompt}"'.encode(), **ANNA) == 400
        assert post({**body, "prompt": prompt * 1000}, **ANNA) == 413
        assert httpx.get(f"{server.url}/%0aFORGED?key={SECRETS[2]}").status_code == 404
        with server.connect() as connection:
            connection.sendall(f"GET {prompt}\r\n\r\n".encode())
            assert b"400" in connection.recv(1000)
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.said().splitlines()]
    assert not [secret for secret in SECRETS if secret in server.said()]
    requests = [line for line in lines if line["logger"] == "kvgraph.access" and line["path"] != "/ready"]
    assert [r["status"] for r in requests] == [200, 200, 401, 400, 400, 400, 413, 404]
    mine = requests[0]
    assert (mine["request_id"], mine["tenant"], mine["method"], mine["path"]) == (
        *("mine", "anna", "POST", "/v1/completions"),
    )
    assert mine["generated"] == 3 and mine["computed"] > 0 and 0 < mine["ttft"] <= mine["seconds"]
    assert requests[1]["tenant"] == "ben" and requests[2]["error"] == "invalid_api_key"
    assert requests[-1]["path"] == "/%0aFORGED"
    assert len({r["request_id"] for r in requests}) == len(requests)


def test_what_nobody_expected_is_a_500_with_an_id_and_in_the_log(model, caplog):
    app = application(Engine(model, kv_budget=1 << 28))

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError("inside")

    with serving(app) as url:
        answer = httpx.get(f"{url}/broken", headers={"X-Request-ID": "the-one"})
        assert error(answer, 500)["type"] == "server_error" and "inside" not in answer.text
        assert answer.headers["X-Request-ID"] == "the-one"
        assert metrics(url)['kvgraph_http_requests_total{method="GET",route="/broken",status="5xx"}'] == 1
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# -- traces -----------------------------------------------------------------------------------------------------------


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP receiver: (its address, the spans it got)."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            assert self.path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{receiver.server_port}", spans
    finally:
        receiver.shutdown()
        receiver.server_close()


def test_traces_follow_a_request_through_the_engine(model):
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as (address, spans):
        app = application(Engine(model, kv_budget=1 << 28), otlp_endpoint=address)
        with serving(app) as url:
            server = Live(app, url)
            usage = server.ask({"traceparent": f"00-{trace}-{caller}-01"}, documents=DOCUMENTS).json()["usage"]
            server.ask(temperature=-1)
    found = {span.name: span for span in spans if span.trace_id.hex() == trace}
    assert set(found) == {"POST /v1/completions", "queued", "encode", "prefill", "decode"}
    root = found["POST /v1/completions"]
    assert root.parent_span_id.hex() == caller
    inner = [found[name] for name in ("queued", "encode", "prefill", "decode")]
    assert all(span.parent_span_id == root.span_id for span in inner)
    times = [t for span in inner for t in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    slack = 5_000_000  # the two clocks are read one after the other
    assert root.start_time_unix_nano - slack <= times[0] and times[-1] <= root.end_time_unix_nano + slack

    def attribute(span: Any, name: str) -> int:
        return next(a.value.int_value for a in span.attributes if a.key == name)

    assert attribute(found["encode"], "kvgraph.tokens.computed") == usage["kvgraph"]["document_tokens_computed"] > 0
    assert attribute(found["prefill"], "gen_ai.usage.input_tokens") == usage["prompt_tokens"]
    assert attribute(found["decode"], "gen_ai.usage.output_tokens") == 4
    refused = [s for s in spans if s.trace_id.hex() != trace and s.name == "POST /v1/completions"]
    assert [attribute(s, "http.response.status_code") for s in refused] == [400]


def test_traces_need_opentelemetry(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"kvgraph\[otel\]"):
        Server(Settings(model="m", otlp_endpoint="http://127.0.0.1:1"))
    Server(Settings(model="m"))


# -- limits -----------------------------------------------------------------------------------------------------------


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
        server.server._workers.submit(free.wait, 20)
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


# -- deadlines, and clients that leave --------------------------------------------------------------------------------


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
    server = live(kv_budget=(LONG + 100) * 6144)
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
        server.server._workers.submit(free.wait, 20)
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
    monkeypatch.setattr("kvgraph.server.routes.openai.LINGER", 0.1)
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


# -- tenants ----------------------------------------------------------------------------------------------------------


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
        assert error(server.ask(BEN, **{name: "anna"}), 400)["param"] == name
        assert name in error(server.ask(BEN, kvgraph={name: "anna"}), 400)["message"]
    for authorization in ("Bearer anna", "Basic " + SECRETS[2], "Bearer", SECRETS[2]):
        assert error(server.ask({"Authorization": authorization}), 401)["code"] == "invalid_api_key"


# -- the process ------------------------------------------------------------------------------------------------------


class Process:
    """`kvgraph serve` as a process, ready."""

    def __init__(self, folder: Path, *flags: object, **environment: str):
        self.name, self.log = folder.name, folder.parent / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "kvgraph.cli", "serve", "--model", str(folder), "--port", "0"]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *map(str, flags)], stderr=file, env={**os.environ, **environment}
            )

    def __enter__(self) -> Process:
        until(lambda: STARTED.search(self.said()) or self.process.poll() is not None, 60)
        found = STARTED.search(self.said())
        assert found, self.said()
        self.url = found[0]
        wait_ready(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=20)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def stream(self, **more: Any) -> Any:
        body = {"model": self.name, "prompt": "why?", "stream": True, "ignore_eos": True, **more}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60)


def test_sigterm_finishes_streams_and_keeps_what_was_computed(folder, tmp_path):
    with Process(folder, "--store", tmp_path / "kv") as server:
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
