"""What OpenTelemetry gets."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kvgraph import Engine
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.state import Server
from serving import DOCUMENTS, Live, application, serving


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
