"""Graph-KV's own four endpoints, so that its published client (`inference.py`) runs against kvgraph unchanged.

`blocks`, [prefix, middle, contexts..., query], come in; {"ret": 0, "generated": text, "message": ""} goes out. As in the
original server, each text is tokenized alone and without special tokens, BOS included; nothing but `/generate_vanilla`
reads the middle; the end token serves as padding, so contexts lose theirs where others read them. Unlike there, one
decode policy serves all four endpoints: greedy, up to the model's end tokens, without special tokens in the text. The
original ends an answer at stop strings for `block` alone, and shows special tokens for `block` and `gapemp` alone. Nor is
a long context cut short: what doesn't fit the model is refused.

Errors are those of all routes: a status of 400 or above, and {"error": ...}. The client looks at the status alone.

Source: `server/generate_server.py`, `server/block_generate_server.py`, `pcw.py` and `inference.py` of the code released
with Graph-KV (arXiv 2506.07334).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from kvgraph.edges import all_pairs, top_k
from kvgraph.engine.request import Request
from kvgraph.engine.sampling import SamplingParams
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method, get
from kvgraph.server import errors
from kvgraph.server.errors import APIError
from kvgraph.server.lifecycle import Call, TheCall
from kvgraph.server.prompts import check_edges
from kvgraph.server.runner import Update
from kvgraph.server.state import Server
from kvgraph.server.tenants import Caller

router = APIRouter(responses=errors.DECLARED)


class BlocksRequest(BaseModel):
    """`blocks` are texts: prefix, middle, any number of contexts, query. Fields that aren't known are ignored.

    max_new_tokens: maximum length of the answer. The original doesn't have this field and always allows 1024.
    """

    model_config = ConfigDict(strict=True)

    blocks: Annotated[list[str], Field(min_length=3)]
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 1024

    @property
    def prefix(self) -> str:
        """What comes before the contexts."""
        return self.blocks[0]

    @property
    def contexts(self) -> list[str]:
        """The documents, in order."""
        return self.blocks[2:-1]

    @property
    def query(self) -> str:
        """What is asked."""
        return self.blocks[-1]


class LocalBlocksRequest(BlocksRequest):
    """num_local_attention_blocks: the number of blocks, prefix included, that are encoded alone; the rest is query."""

    num_local_attention_blocks: Annotated[int, Field(ge=0)] = 10_000


class TopKRequest(BlocksRequest):
    """top_k: every context reads the last `top_k` contexts, where the client puts the best; 0 means all."""

    top_k: Annotated[int, Field(ge=0)]


class Generated(BaseModel):
    """The answer."""

    ret: Literal[0] = 0
    generated: str
    message: Literal[""] = ""


Body = TypeVar("Body", bound=BlocksRequest)
Problem = tuple[Method, ContextGraph]
Lay = Callable[[Body, int | None], Problem]  # of a request and the tokenizer's end token


@router.post("/generate_vanilla")
async def generate_vanilla(body: BlocksRequest, call: TheCall) -> Generated:
    """Graph-KV's baseline: all blocks, the middle too, joined to one text and prefilled as it is."""
    return await _answer(body, call, _vanilla)


@router.post("/generate_block")
async def generate_block(body: LocalBlocksRequest, call: TheCall) -> Generated:
    """Block-Attention: prefix and contexts are encoded alone, at sequential positions."""
    return await _answer(body, call, _block)


@router.post("/generate_gapemp")
async def generate_gapemp(body: BlocksRequest, call: TheCall) -> Generated:
    """Graph-KV: contexts are encoded alone, then again while each reads all of them (preset graph-kv-rag)."""
    return await _answer(body, call, _gapemp, edges=len(body.contexts) ** 2)


@router.post("/generate_gapemp_appr")
async def generate_gapemp_appr(body: TopKRequest, call: TheCall) -> Generated:
    """Graph-KV's Top-k: as gapemp, but each reads the last top_k contexts (preset graph-kv-rag-top-k)."""
    count = len(body.contexts)
    return await _answer(body, call, _gapemp_appr, edges=count * min(body.top_k or count, count))


def _vanilla(body: BlocksRequest, eos: int | None) -> Problem:
    return get("full"), ContextGraph([], "".join(body.blocks))


def _block(body: LocalBlocksRequest, eos: int | None) -> Problem:
    blocks, alone = [body.prefix, *body.contexts], body.num_local_attention_blocks
    query = "".join([*blocks[alone:], body.query])
    return get("block"), ContextGraph(blocks[1:alone], query, blocks[0] if alone else "")


def _gapemp(body: BlocksRequest, eos: int | None) -> Problem:
    edges = all_pairs(len(body.contexts), self_edges=True)
    return get("graph-kv-rag", drop_token=eos), ContextGraph(body.contexts, body.query, body.prefix, edges)


def _gapemp_appr(body: TopKRequest, eos: int | None) -> Problem:
    edges = top_k(len(body.contexts), body.top_k, self_edges=True, last=True)
    return get("graph-kv-rag-top-k", drop_token=eos), ContextGraph(body.contexts, body.query, body.prefix, edges)


async def _answer(body: Body, call: Call, lay: Lay[Body], edges: int = 0) -> Generated:
    """edges: how many `lay` makes."""
    call.generates("text_completion")
    async with call.admitted():
        request = await call.prepared(_prepared, call.server, call.caller, body, lay, edges)
        return Generated(generated=await call.collected(_text(call.updates([request]))))


def _prepared(server: Server, caller: Caller, body: Body, lay: Lay[Body], edges: int) -> Request:
    """The engine's request. Raises APIError for too many contexts or edges, GraphError, PlanError or CapacityError."""
    if len(body.contexts) > server.settings.max_documents:
        raise APIError(
            400,
            f"{len(body.contexts)} contexts, but at most {server.settings.max_documents} are taken",
            param="blocks",
        )
    check_edges(server, edges)  # before they are made
    method, graph = lay(body, server.tokenizer.eos_token_id)
    params = SamplingParams(max_tokens=body.max_new_tokens)
    return server.engine.prepare(server.engine.plan(graph, method), params, salt=caller.salt)


async def _text(updates: AsyncIterator[tuple[int, Update]]) -> str:
    """The whole answer."""
    said: list[str] = []
    async for _, update in updates:
        if update.again:
            said.clear()
        said.append(update.text)
    return "".join(said)
