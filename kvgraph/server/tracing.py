"""OpenTelemetry traces, with `kvgraph[otel]`: one span per request, and below it the phases of each answer.

    POST /v1/chat/completions      SERVER; continues the caller's trace if it sent a traceparent
    ├─ queued                      until the engine admitted it
    ├─ encode                      until every document it reads was at hand
    ├─ prefill                     until its first token
    └─ decode                      until its last

The engine knows these times anyway, so the inner spans are written when the request ends.

OpenTelemetry's instrumentation of FastAPI isn't simpler: it would write the outermost span alone, and end it apart from the
account of the request (`middleware.Observed`) that the inner ones are made from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from kvgraph import __version__
from kvgraph.engine.request import Request
from kvgraph.server.logs import Exchange
from kvgraph.server.settings import Settings, SettingsError


class Tracing:
    """Where traces go; nowhere, at no cost, without the setting `otlp_endpoint`.

    Raises SettingsError if traces are wanted and OpenTelemetry isn't installed.
    """

    def __init__(self, settings: Settings):
        self._tracer: Any = None
        if settings.otlp_endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError:
            raise SettingsError(
                "otlp_endpoint is set, but OpenTelemetry isn't installed: pip install 'kvgraph[otel]'"
            ) from None
        url = urlsplit(settings.otlp_endpoint)
        if url.path in ("", "/"):
            url = url._replace(path="/v1/traces")
        resource = Resource.create({"service.name": "kvgraph", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url.geturl(), timeout=5)))
        self._tracer = self._provider.get_tracer("kvgraph")
        self._model = settings.name

    def start(self, method: str, headers: Headers, exchange: Exchange) -> Any:
        """The span of a request that has just come; its trace's id goes into the logs."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER)
        exchange.trace = f"{span.get_span_context().trace_id:032x}"
        return span

    def end(self, span: Any, method: str, route: str, status: int, exchange: Exchange) -> None:
        """The request has been answered."""
        if span is None:
            return
        from opentelemetry.trace import StatusCode, set_span_in_context

        span.update_name(f"{method} {route}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "kvgraph.request_id": exchange.id,
            }
        )
        if status >= 500 or exchange.error is not None:
            span.set_attribute("error.type", exchange.error or str(status))
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        epoch = time.time_ns() - time.perf_counter_ns()  # the engine's clock has no date
        for number, job in enumerate(exchange.jobs):
            request = job.request
            more = {"gen_ai.request.model": self._model, "kvgraph.choice": number, "kvgraph.spans": len(request.keys)}
            for name, begun, ended, tokens in phases(request, job.last_token_at):
                times = [epoch + int(at * 1e9) for at in (begun, ended)]
                inner = self._tracer.start_span(name, inside, attributes=more | tokens, start_time=times[0])
                inner.end(times[1])
        span.end()

    async def close(self) -> None:
        """Send what is pending."""
        if self._tracer is not None:
            await asyncio.to_thread(self._provider.shutdown)


def phases(request: Request, last: float | None) -> Iterator[tuple[str, float, float, dict[str, int]]]:
    """(name, start, end, token counts) of what a request went through, in seconds of `time.perf_counter`.

    last: when its last token came, None if there is none. A request that ended early is in its last phase until now.
    """
    usage, began, now = request.usage, request.submitted, time.perf_counter()
    marks = [usage.queued, usage.encoded, usage.ttft]
    reused = {f"kvgraph.tokens.reused.{tier}": n for tier, n in usage.reused_tokens.items()}
    computed = {"kvgraph.tokens.computed": usage.document_tokens_computed}
    told = [{}, computed | reused, {"gen_ai.usage.input_tokens": usage.prompt_tokens}]
    start = began
    for name, mark, tokens in zip(("queued", "encode", "prefill"), marks, told, strict=True):
        yield name, start, began + mark if mark else now, tokens
        if not mark or (name == "encode" and request.encode_only):
            return
        start = began + mark
    yield "decode", start, max(start, last or now), {"gen_ai.usage.output_tokens": len(request.token_ids)}
