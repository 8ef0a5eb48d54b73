"""OpenTelemetry traces, with `kvgraph[otel]`: one span per request, and below it the inference and its phases.

    POST /v1/chat/completions      SERVER; continues the caller's trace if it sent a traceparent
    └─ chat MODEL                  INTERNAL, as OpenTelemetry's GenAI conventions describe it
       ├─ queued                   until the engine admitted it
       ├─ encode                   until every document it reads was at hand
       ├─ prefill                  until its first token
       └─ decode                   until its last

What only encodes has the phases without an inference. The engine knows these times anyway, so the inner spans are
written when the request ends. No span holds text of prompts or answers.

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
from kvgraph.server.logs import Exchange, Inference
from kvgraph.server.metrics import PROVIDER
from kvgraph.server.runner import EngineJob
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
        self._model, self._address = settings.name, (settings.host, settings.port)

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

    def end(self, span: Any, method: str, route: str, status: int, error: str | None, exchange: Exchange) -> None:
        """The request has been answered. error: the code of what ended it, if it failed."""
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
        inside, inner = set_span_in_context(span), None
        epoch = time.time_ns() - time.perf_counter_ns()  # the engine's clock has no date
        if exchange.inference is not None:
            name = f"{exchange.inference.operation} {self._model}"
            told = inference(exchange.inference, exchange.jobs, self._model, self._address)
            start = epoch + int(exchange.started * 1e9)
            inner = self._tracer.start_span(name, inside, attributes=told, start_time=start)
            inside = set_span_in_context(inner)
        for number, job in enumerate(exchange.jobs):
            request = job.request
            more = {"kvgraph.choice": number, "kvgraph.spans": len(request.keys)}
            for name, begun, ended, tokens in phases(request, job.last_token_at):
                times = [epoch + int(at * 1e9) for at in (begun, ended)]
                phase = self._tracer.start_span(name, inside, attributes=more | tokens, start_time=times[0])
                phase.end(times[1])
        for failed in (inner, span):
            if failed is not None and error is not None:
                failed.set_attribute("error.type", error)
                failed.set_status(StatusCode.ERROR)
        if inner is not None:
            inner.end()
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
    told = [{}, computed | reused, {"kvgraph.tokens.prompt": usage.prompt_tokens}]
    start = began
    for name, mark, tokens in zip(("queued", "encode", "prefill"), marks, told, strict=True):
        yield name, start, began + mark if mark else now, tokens
        if not mark or (name == "encode" and request.encode_only):
            return
        start = began + mark
    yield "decode", start, max(start, last or now), {"kvgraph.tokens.generated": len(request.token_ids)}


def inference(told: Inference, jobs: list[EngineJob], model: str, address: tuple[str, int]) -> dict[str, Any]:
    """Attributes of the span of an inference; those of the request are what its sampling came to.

    address: of this server. Source: Semantic conventions for generative client AI spans, at
    https://github.com/open-telemetry/semantic-conventions-genai.
    """
    found: dict[str, Any] = {
        "gen_ai.operation.name": told.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.output.type": told.output,
        "server.address": address[0],
        "server.port": address[1],
    }
    if told.streamed:
        found["gen_ai.request.stream"] = True
    if told.response_id is not None:
        found["gen_ai.response.id"] = told.response_id
    if not jobs:
        return found
    if reasons := told.reasons():
        found["gen_ai.response.finish_reasons"] = reasons
    params = jobs[0].request.params
    found |= {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    given: dict[str, Any] = {
        "choice.count": told.choices if told.choices > 1 else None,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "stop_sequences": list(params.stop),
        "top_k": params.top_k,
    }
    found |= {f"gen_ai.request.{name}": value for name, value in given.items() if value}
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    usages = [job.request.usage for job in jobs]
    firsts = usages[:: told.choices]  # a prompt counts once
    first = jobs[0].request.first_token_at
    if told.streamed and first:
        found["gen_ai.response.time_to_first_chunk"] = first - jobs[0].started
    return found | {
        "gen_ai.usage.input_tokens": sum(u.prompt_tokens for u in firsts),
        "gen_ai.usage.output_tokens": sum(len(job.request.token_ids) for job in jobs),
        "gen_ai.usage.cache_read.input_tokens": sum(u.cached_tokens for u in firsts),
        "gen_ai.usage.cache_creation.input_tokens": sum(u.document_tokens_computed for u in usages),
    }
