"""Stored segments and graphs: texts that are encoded ahead of time, so that requests can name them."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvgraph import methods
from kvgraph.data.chat import DOCUMENT, Document
from kvgraph.data.library import DEFAULT_METHOD, State, StoredGraph, StoredSegment
from kvgraph.edges import named_edges
from kvgraph.engine.request import Request
from kvgraph.engine.result import Usage
from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.server import errors
from kvgraph.server.encode import QUERY, encoded, encoding, keys_of, segment_plan
from kvgraph.server.errors import APIError
from kvgraph.server.lifecycle import Call, TheCall
from kvgraph.server.prompts import with_fields
from kvgraph.server.schema import Citation, Name, Ref, Strict
from kvgraph.server.state import Server, TheCaller, TheServer
from kvgraph.server.tenants import Caller

router = APIRouter(prefix="/v1", responses=errors.DECLARED)

ID = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}$"
Id = Annotated[str, Field(pattern=ID)]
InPath = Annotated[str, Path(pattern=ID)]
After = Annotated[str, Query(max_length=200, description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000)]


class SegmentIn(Strict):
    """A text to store. Without an id it is named after its content."""

    id: Id | None = None
    title: str | None = None
    text: str


class SegmentsIn(Strict):
    """One text to store (`text`, maybe with `id` and `title`), or several (`segments`): all of them or none."""

    id: Id | None = None
    title: str | None = None
    text: str | None = None
    segments: Annotated[list[SegmentIn], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> SegmentsIn:
        if (self.segments is None) == (self.text is None) or (self.segments is not None and (self.id or self.title)):
            raise ValueError("give text, or segments")
        return self

    @property
    def texts(self) -> list[SegmentIn]:
        """What to store."""
        if self.segments is not None:
            return self.segments
        return [SegmentIn(id=self.id, title=self.title, text=self.text or "")]


class SegmentOut(BaseModel):
    """A stored segment. bytes: of its KV in memory, before any codec. created: seconds since the epoch."""

    id: str
    object: Literal["segment"] = "segment"
    title: str
    tokens: int
    bytes: int
    created: int


class SegmentEncoded(SegmentOut):
    """A segment that has just been stored: tokens that were computed for it, or found, by where they were."""

    computed_tokens: int
    reused_tokens: dict[str, int]


class SegmentDetails(SegmentOut):
    """A stored segment with its text. tier: where its KV is now (memory, disk); null: it is computed at its next use."""

    text: str
    tier: str | None


class SegmentsEncoded(BaseModel):
    """`PUT /v1/segments`."""

    object: Literal["list"] = "list"
    data: list[SegmentEncoded]


class SegmentList(BaseModel):
    """A page of segments, in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[SegmentOut]
    has_more: bool


class GraphIn(BaseModel):
    """A corpus graph: who reads whom. Fields besides these are fields of the method: `rounds`, `band`, `keep`, `layout`.

    segments: ids of stored ones, or texts to store with it. edges: pairs [source, reader] of segments by index or id, or
    a name: all, chain, top-k:3, last-k:3, layers:1-3, star:0. method: one that reads edges, by which
    a segment's KV depends on its sources alone: graph-kv in layout aligned or tight.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    id: Id | None = None
    segments: Annotated[list[Id | SegmentIn], Field(min_length=1)]
    edges: Name | list[tuple[Ref, Ref]] = []
    method: Name = DEFAULT_METHOD


class GraphOut(BaseModel):
    """A stored graph. done: segments whose versions are all encoded, of `segments`. spans, tokens, bytes: all versions.

    state: pending, running, ready, or failed with its error. A request may use it in any state: what isn't encoded yet
    is computed.
    """

    id: str
    object: Literal["graph"] = "graph"
    state: State
    done: int
    segments: int
    edges: int
    spans: int
    tokens: int
    bytes: int
    method: str
    fields: dict[str, Any]
    created: int
    error: str | None


class GraphList(BaseModel):
    """A page of graphs, in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[GraphOut]
    has_more: bool


class SearchIn(Strict):
    """What to find. top: how many segments at most. tokens: how many they may have in all."""

    query: Annotated[str, Field(min_length=1, max_length=100_000)]
    top: Annotated[int, Field(ge=1, le=1000)] = 10
    tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


class FoundSegment(Citation):
    """A segment that was found, with its text."""

    object: Literal["segment"] = "segment"
    text: str
    tokens: int


class SearchOut(BaseModel):
    """What was found, best first."""

    object: Literal["list"] = "list"
    data: list[FoundSegment]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["segment.deleted", "graph.deleted"]
    deleted: Literal[True] = True


# -- segments ---------------------------------------------------------------------------------------------------------


@router.put("/segments")
async def put_segments(body: SegmentsIn, call: TheCall) -> SegmentsEncoded:
    """Store one text or several and encode them, then answer. Storing the same again changes nothing."""
    async with call.admitted():
        segments, requests = await call.prepared(_stored, call.server, call.caller, body.texts)
        usages = await call.collected(_usages(call, requests))
    return SegmentsEncoded(data=[_encoded(call.server, *pair) for pair in zip(segments, usages, strict=True)])


@router.get("/segments")
async def list_segments(server: TheServer, caller: TheCaller, after: After = "", limit: Limit = 100) -> SegmentList:
    """The stored segments, a page at a time."""
    found = await server.workers.run(server.library.segments, caller.tenant, after, limit + 1)
    return SegmentList(data=[SegmentOut(**_facts(server, s)) for s in found[:limit]], has_more=len(found) > limit)


@router.get("/segments/{id}")
async def get_segment(id: InPath, server: TheServer, caller: TheCaller) -> SegmentDetails:
    """A stored segment, and where its KV is now."""

    def look() -> SegmentDetails:
        segment = server.library.segment(caller.tenant, id)
        (key,) = keys_of(server.engine, segment_plan(segment.tokens), caller.salt)
        return SegmentDetails(**_facts(server, segment), text=segment.text, tier=server.engine.tier(key, caller.salt))

    return await server.workers.run(look)


@router.delete("/segments/{id}")
async def delete_segment(id: InPath, server: TheServer, caller: TheCaller) -> Deleted:
    """Forget a segment and its KV; refused while a graph uses it."""
    segment = await server.workers.run(server.library.remove, caller.tenant, id)
    await _forget(server, caller, [segment_plan(segment.tokens)])
    return Deleted(id=id, object="segment.deleted")


def _stored(server: Server, caller: Caller, given: Sequence[SegmentIn]) -> tuple[list[StoredSegment], list[Request]]:
    """The segments of texts, kept in the library, and the requests that encode them."""
    segments = _tokenized(server, given)
    requests = [encoding(server.engine, segment_plan(s.tokens), caller.salt) for s in segments]
    return server.library.add(caller.tenant, segments, server.settings.max_segments), requests


def _tokenized(server: Server, given: Sequence[SegmentIn]) -> list[StoredSegment]:
    """Texts, filled into the document template, as segments. Raises APIError for too many, or one without tokens."""
    if len(given) > server.settings.max_documents:
        raise APIError(400, f"{len(given)} texts at once, but at most {server.settings.max_documents} are taken")
    template = server.settings.document_template or DOCUMENT
    segments = []
    for i, item in enumerate(given):
        text = Document(item.text, item.title or "").filled(template)
        tokens = tuple(server.engine.tokenize(text) if isinstance(text, str) else text)
        if not tokens:
            raise APIError(400, f"segment {item.id or i!r} has no tokens; give it a text", param=f"segments.{i}.text")
        segments.append(StoredSegment(item.id or _name(tokens), tokens, item.title or "", item.text))
    return segments


def _name(tokens: Sequence[int]) -> str:
    """An id for a segment that was given none: the same for the same content."""
    return f"seg-{hashlib.sha256(array('i', tokens).tobytes()).hexdigest()[:24]}"


async def _usages(call: Call, requests: Sequence[Request]) -> list[Usage]:
    """What each encoding took."""
    async with aclosing(encoded(call.submit, _each(requests))) as usages:
        return [usage async for usage in usages]


async def _each(requests: Sequence[Request]) -> AsyncIterator[Request]:
    for request in requests:
        yield request


def _facts(server: Server, segment: StoredSegment) -> dict[str, Any]:
    """What every answer says of a segment."""
    return {
        "id": segment.id,
        "title": segment.title,
        "tokens": len(segment.tokens),
        "bytes": len(segment.tokens) * server.engine.model.kv_bytes_per_token,
        "created": int(segment.created),
    }


def _encoded(server: Server, segment: StoredSegment, usage: Usage) -> SegmentEncoded:
    return SegmentEncoded(
        **_facts(server, segment), computed_tokens=usage.computed_tokens, reused_tokens=usage.reused_tokens
    )


async def _forget(server: Server, caller: Caller, plans: Sequence[Plan]) -> None:
    """Drop the records of spans from memory and store."""
    engine = server.engine

    def keys() -> list[str]:
        return [key for plan in plans for key in keys_of(engine, plan, caller.salt)]

    found = await server.workers.run(keys)
    await asyncio.wrap_future(server.runner.call(lambda: engine.forget(found, caller.salt)))


# -- graphs -----------------------------------------------------------------------------------------------------------


@router.post("/graphs", status_code=202)
async def post_graph(body: GraphIn, call: TheCall) -> GraphOut:
    """Store a graph and encode every round of it in the background; `GET` shows the progress. Storing the same graph
    again changes nothing, except that a failed one is started again."""
    async with call.admitted():  # to the end, whether or not the client stays: what is kept must be started too
        graph = await call.server.workers.run(_kept, call.server, call.caller, body)
    call.server.encoder.start(graph)
    return _shown(call.server, graph)


@router.get("/graphs")
async def list_graphs(server: TheServer, caller: TheCaller, after: After = "", limit: Limit = 100) -> GraphList:
    """The stored graphs, a page at a time."""
    found = await server.workers.run(server.library.graphs, caller.tenant, after, limit + 1)
    return GraphList(data=[_shown(server, graph) for graph in found[:limit]], has_more=len(found) > limit)


@router.get("/graphs/{id}")
async def get_graph(id: InPath, server: TheServer, caller: TheCaller) -> GraphOut:
    """A stored graph, and how far its encoding is."""
    return _shown(server, await server.workers.run(server.library.graph, caller.tenant, id))


@router.post("/graphs/{id}/search")
async def search_graph(id: InPath, body: SearchIn, call: TheCall) -> SearchOut:
    """Find segments of a graph: by words, by embeddings if it was indexed with a model, and along its edges."""

    def found(server: Server, tenant: str) -> list[FoundSegment]:
        graph = server.library.graph(tenant, id)
        made = []
        for hit in server.indexes.search(graph, body.query, body.top, body.tokens):
            segment = server.library.segment(tenant, hit.id)
            more = {"text": segment.text, "tokens": len(segment.tokens), "via": hit.via or None}
            made.append(FoundSegment(**hit._asdict() | more))
        return made

    async with call.admitted():
        return SearchOut(data=await call.prepared(found, call.server, call.caller.tenant))


@router.delete("/graphs/{id}")
async def delete_graph(id: InPath, server: TheServer, caller: TheCaller) -> Deleted:
    """Forget a graph and the KV of segments that were encoded along its edges. Its segments and their own KV stay."""
    graph = await server.workers.run(server.library.graph, caller.tenant, id)
    await server.encoder.stop(graph)

    def removed() -> list[str]:
        plan = graph.method.plan(server.library.part(graph).graph(QUERY))
        keys = server.engine.keys(plan, caller.salt)
        server.library.remove_graph(graph)
        server.indexes.forget(graph)
        return [key for key, span in zip(keys, plan.spans, strict=True) if key is not None and span.sees]

    keys = await server.workers.run(removed)
    await asyncio.wrap_future(server.runner.call(lambda: server.engine.forget(keys, caller.salt)))
    return Deleted(id=id, object="graph.deleted")


def _kept(server: Server, caller: Caller, body: GraphIn) -> StoredGraph:
    """The graph of a request, kept in the library if all of it can be encoded. Raises APIError or GraphError."""
    chosen = with_fields(methods.parse(body.method), body.model_extra)
    library, tenant = server.library, caller.tenant
    brought = _tokenized(server, [item for item in body.segments if isinstance(item, SegmentIn)])
    new = iter(brought)
    segments = [
        library.segment(tenant, item, "segments") if isinstance(item, str) else next(new) for item in body.segments
    ]
    names, tokens = [segment.id for segment in segments], [segment.tokens for segment in segments]
    graph = ContextGraph(tokens, QUERY, edges=_edges(server, body.edges, names), names=names)
    method = _for_corpus(chosen, max(map(len, tokens)))
    plan = method.plan(graph)
    limit = server.engine.model.limit
    if plan.highest_position >= limit:
        raise APIError(
            400,
            f"the graph reaches position {plan.highest_position}, but the model's limit is {limit}; "
            "use fewer rounds or shorter segments",
            code="context_length_exceeded",
        )
    spans = {key: len(span) for key, span in zip(plan.keys(""), plan.spans, strict=True) if key is not None}
    library.add(tenant, brought, server.settings.max_segments)
    return library.add_graph(
        tenant,
        body.id,
        method,
        names,
        graph.edges,
        spans=len(spans),
        tokens=sum(spans.values()),
        most=server.settings.max_graphs,
        most_edges=server.settings.max_tenant_edges,
    )


def _for_corpus(method: Method, longest: int) -> Method:
    """The method of a stored graph. Raises APIError 400 for one by which a part isn't encoded as in the whole."""
    try:
        return method.for_corpus(longest)
    except GraphError as error:
        raise APIError(400, str(error), param="method") from None


def _edges(server: Server, edges: str | list[tuple[Ref, Ref]], names: Sequence[str]) -> Sequence[tuple[Ref, Ref]]:
    """The edges as pairs. Raises APIError beyond what the settings allow, before they are made if a name stands for n²."""
    most = server.settings.max_graph_edges
    if isinstance(edges, str):
        builder = edges.strip().partition(":")[0].removesuffix("+self")
        if builder in ("all", "top-k", "last-k", "layers") and len(names) ** 2 > 4 * most:
            raise APIError(400, f"{edges!r} of {len(names)} segments may be too many; give the pairs", param="edges")
        edges = list(named_edges(edges, names))
    if len(edges) > most:
        raise APIError(400, f"{len(edges)} edges, but at most {most} are kept", param="edges")
    return edges


def _shown(server: Server, graph: StoredGraph) -> GraphOut:
    return GraphOut(
        id=graph.id,
        state=graph.state,
        done=graph.done,
        segments=graph.segments,
        edges=graph.edges,
        spans=graph.spans,
        tokens=graph.tokens,
        bytes=graph.tokens * server.engine.model.kv_bytes_per_token,
        method=graph.method.name,
        fields=methods.configuration(graph.method),
        created=int(graph.created),
        error=graph.error,
    )
