"""`POST /v1/plan`: what a request would do, without doing it: who reads whom, at which positions, and what is cached."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel, Discriminator, Tag

from kvgraph.server import errors, prompts
from kvgraph.server.errors import APIError
from kvgraph.server.lifecycle import TheCall
from kvgraph.server.schema import ChatRequest, CompletionRequest
from kvgraph.server.state import Server
from kvgraph.server.tenants import Caller

router = APIRouter(prefix="/v1", responses=errors.DECLARED)


def _kind(body: Any) -> str:
    """Which request a body is: one with a prompt is a completion's, any other is checked as a chat's."""
    is_completion = "prompt" in body if isinstance(body, dict) else isinstance(body, CompletionRequest)
    return "CompletionRequest" if is_completion else "ChatRequest"


PlanRequest = Annotated[
    Annotated[ChatRequest, Tag("ChatRequest")] | Annotated[CompletionRequest, Tag("CompletionRequest")],
    Discriminator(_kind),
    Body(),
]


class ViewOut(BaseModel):
    """A view of an earlier span: its tokens lo to hi - 1, token 0 of it standing at position `at` for the reader."""

    span: int
    at: int
    lo: int
    hi: int


class SpanOut(BaseModel):
    """Tokens computed together.

    segment: the index of the document it is a version of, and round which version; null for the rest of the prompt.
    positions: runs [first, last], as the method counts them. tier: where its KV is now (memory, disk, ...); null: it
    would be computed, as a span that isn't cached always is.
    """

    index: int
    name: str
    segment: int | None
    round: int | None
    tokens: int
    start: int
    positions: list[tuple[int, int]]
    cached: bool
    tier: str | None
    sees: list[ViewOut]


class PlanResponse(BaseModel):
    """The plan of a request, spans in encoding order; the last is the prompt span.

    edges: pairs [source, reader] of segments by index, builders and ids resolved. segments: their names. dropped:
    documents left out because they don't fit (setting `overflow`).
    """

    object: str = "kvgraph.plan"
    model: str
    method: str
    segments: list[str]
    edges: list[tuple[int, int]]
    spans: list[SpanOut]
    highest_position: int
    dropped: list[str]


@router.post("/plan", response_model=PlanResponse)
async def show_plan(body: PlanRequest, call: TheCall) -> PlanResponse:
    """The plan of a chat or completion request (same body), without answering it; nothing is encoded or counted as used."""
    call.server.require_name(body.model)
    prompts.ignored(call.server, body)
    async with call.admitted(timeout=body.kvgraph.timeout):
        return await call.prepared(_planned, call.server, call.caller, body.model_copy(update={"n": 1}))


def _planned(server: Server, caller: Caller, body: ChatRequest | CompletionRequest) -> PlanResponse:
    """Raises APIError or GraphError for what can't be laid out."""
    if isinstance(body, CompletionRequest) and len(prompts.prompt_list(body.prompt)) != 1:
        raise APIError(400, "several prompts are given, but a plan is shown for one at a time", param="prompt")
    (laid,) = prompts.lay_out(server, caller, body)
    keys = [*laid.requests[0].keys, None]  # the prompt span, which is the last, has none
    spans = []
    for index, (span, key) in enumerate(zip(laid.plan.spans, keys, strict=True)):
        spans.append(
            SpanOut(
                index=index,
                name=span.name,
                segment=span.segment,
                round=span.round,
                tokens=len(span),
                start=span.start,
                positions=_runs(span.positions),
                cached=span.cached,
                tier=server.engine.tier(key, caller.salt) if key is not None and span.cached else None,
                sees=[ViewOut(span=p.span, at=p.at, lo=p.lo, hi=p.hi or 0) for p in span.sees],
            )
        )
    return PlanResponse(
        model=server.settings.name,
        method=laid.method.name,
        segments=list(laid.graph.names),
        edges=list(laid.graph.edges),
        spans=spans,
        highest_position=laid.plan.highest_position,
        dropped=list(laid.dropped),
    )


def _runs(positions: range | tuple[int, ...]) -> list[tuple[int, int]]:
    """Ascending positions as runs without gaps: (first, last) each."""
    if isinstance(positions, range) and positions.step == 1:
        return [(positions[0], positions[-1])]
    runs = [[p for _, p in run] for _, run in groupby(enumerate(positions), key=lambda item: item[1] - item[0])]
    return [(run[0], run[-1]) for run in runs]
