"""What OpenTelemetry gets."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from kvgraph import Engine
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.state import Server
from serving import DOCUMENTS, SECRETS, Live, application, serving


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


def attribute(span: Any, name: str) -> Any:
    """The value of a span's attribute; None if it hasn't got it."""
    for found in span.attributes:
        if found.key == name:
            value = getattr(found.value, found.value.WhichOneof("value"))
            return [v.string_value for v in value.values] if name.endswith(("reasons", "sequences")) else value
    return None


def test_traces_follow_a_request_through_the_engine(model):
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as (address, spans):
        app = application(Engine(model, kv_budget=1 << 28), otlp_endpoint=address)
        with serving(app) as url:
            server = Live(app, url)
            usage = server.ask({"traceparent": f"00-{trace}-{caller}-01"}, documents=DOCUMENTS).json()["usage"]
            server.ask(temperature=-1)
    found = {span.name: span for span in spans if span.trace_id.hex() == trace}
    inference = f"text_completion {server.name}"
    assert set(found) == {"POST /v1/completions", inference, "queued", "encode", "prefill", "decode"}
    root = found["POST /v1/completions"]
    assert root.parent_span_id.hex() == caller and found[inference].parent_span_id == root.span_id
    inner = [found[name] for name in ("queued", "encode", "prefill", "decode")]
    assert all(span.parent_span_id == found[inference].span_id for span in inner)
    times = [t for span in inner for t in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    slack = 5_000_000  # the two clocks are read one after the other
    for around in (root, found[inference]):
        assert around.start_time_unix_nano - slack <= times[0] and times[-1] <= around.end_time_unix_nano + slack
    assert attribute(found["encode"], "kvgraph.tokens.computed") == usage["kvgraph"]["document_tokens_computed"] > 0
    assert attribute(found["prefill"], "kvgraph.tokens.prompt") == usage["prompt_tokens"]
    assert attribute(found["decode"], "kvgraph.tokens.generated") == 4
    refused = [s for s in spans if s.trace_id.hex() != trace and s.name == "POST /v1/completions"]
    assert [attribute(s, "http.response.status_code") for s in refused] == [400]


def test_an_inference_is_told_in_the_words_of_the_conventions(model):
    """Every attribute is one of OpenTelemetry's GenAI conventions; none holds text of a prompt or an answer."""
    fields = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "stop": ["never"], "n": 2}
    messages = [{"role": "user", "content": SECRETS[0]}]
    with collector() as (address, spans):
        app = application(Engine(model, kv_budget=1 << 28), otlp_endpoint=address)
        with serving(app) as url:
            server = Live(app, url)
            chat = {"model": server.name, "messages": messages, "ignore_eos": True, **fields}
            told = [httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).json() for _ in range(2)][1]
            form = {"format": {"type": "json_object"}}
            body = {"model": server.name, "input": SECRETS[0], "text": form, "stream": True, "max_output_tokens": 2}
            httpx.post(f"{url}/v1/responses", json=body, timeout=60)
            tool = {
                "type": "function",
                "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}},
            }
            forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
            forced |= {"n": 1, "ignore_eos": False, "stop": None}
            httpx.post(f"{url}/v1/chat/completions", json=chat | forced, timeout=60)
            httpx.post(f"{url}/v1/chat/completions", json=chat | {"documents": [{"segment": "none"}]}, timeout=60)
    found = [span for span in spans if span.name == f"chat {server.name}"]
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    others = {"server.address", "server.port", "error.type"}
    assert {a.key for span in found for a in span.attributes} <= known | others
    assert not [span for span in spans if SECRETS[0] in str(span)]
    plain, structured, calling, failed = found[1:]
    want = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kvgraph",
        "gen_ai.request.model": server.name,
        "gen_ai.response.model": server.name,
        "gen_ai.output.type": "text",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 4,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["never"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": None,
        "gen_ai.response.id": told["id"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": told["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": told["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": told["usage"]["prompt_tokens_details"]["cached_tokens"],
        "error.type": None,
    }
    assert {name: attribute(plain, name) for name in want} == want
    assert attribute(structured, "gen_ai.output.type") == "json"
    assert attribute(structured, "gen_ai.response.id").startswith("resp_")
    assert attribute(structured, "gen_ai.request.stream") is True
    assert attribute(structured, "gen_ai.response.time_to_first_chunk") > 0
    assert attribute(calling, "gen_ai.response.finish_reasons") == ["tool_calls"]
    assert attribute(failed, "error.type") == "404" and failed.status.code == 2


def test_traces_need_opentelemetry(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"kvgraph\[otel\]"):
        Server(Settings(model="m", otlp_endpoint="http://127.0.0.1:1"))
    Server(Settings(model="m"))
