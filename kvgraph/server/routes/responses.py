"""OpenAI's Responses API: answers that are kept, so that the next request may go on from them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from kvgraph.server import errors, prompts
from kvgraph.server.answers import ChatAnswer
from kvgraph.server.errors import APIError, printable
from kvgraph.server.lifecycle import TheCall
from kvgraph.server.prompts import PreparedPrompt
from kvgraph.server.responses.answer import OPENING, ResponseAnswer
from kvgraph.server.responses.kept import KeptTurn
from kvgraph.server.responses.schema import NAMED, ResponseDeleted, ResponseObject, ResponseRequest
from kvgraph.server.schema import MOST_MESSAGES, ChatRequest, Sampling
from kvgraph.server.state import Server, TheCaller, TheServer
from kvgraph.server.tenants import Caller

router = APIRouter(prefix="/v1/responses", responses=errors.DECLARED)

STREAMED: dict[str, Any] = {"text/event-stream": {}}  # a schema here would be one of single events


@router.post(
    "",
    response_model=ResponseObject,
    responses={200: {"content": STREAMED, "description": "The response, or with `stream` its events."}},
)
async def create_response(body: ResponseRequest, call: TheCall) -> Any:
    """Answer text or messages, also after those of a kept response, and over documents if there are any."""
    server, caller = call.server, call.caller
    server.require_name(body.model)
    form = body.text.format
    json_ = form is not None and form.type != "text"
    inference = call.generates("chat", streamed=body.stream, output="json" if json_ else "text")
    ignored = prompts.ignored(server, body)
    before = None
    if body.previous_response_id is not None:
        before = _turn(server, caller, body.previous_response_id, "previous_response_id")
    new = body.messages()
    async with call.admitted(timeout=body.kvgraph.timeout):
        chat, laid = await call.prepared(_laid_out, server, caller, body, before, new)

        def keep(response: ResponseObject) -> None:
            if body.store:
                said = [*new, *response.messages()]
                turn = KeptTurn(response.model_dump_json().encode(), json.dumps(said).encode(), before)
                server.responses.put(caller.tenant, response.id, turn)

        written = ChatAnswer(server, chat, laid, ignored)
        answer = ResponseAnswer(body, written, keep)
        inference.response_id, inference.reasons = answer.response.id, written.reasons
        updates = call.updates(laid[0].requests)
        if body.stream:
            return call.streamed(answer.events(updates), OPENING, named=True)
        return JSONResponse((await call.collected(answer.whole(updates))).model_dump())


@router.get("/{name}", response_model=ResponseObject)
async def get_response(name: str, server: TheServer, caller: TheCaller, stream: bool = False) -> Any:
    """A kept response as it was. It can't be streamed again."""
    if stream:
        raise APIError(400, "a kept response isn't streamed; leave out stream", param="stream", code="invalid_value")
    return Response(_turn(server, caller, name, "response_id").response, media_type="application/json")


@router.delete("/{name}", response_model=ResponseDeleted)
async def delete_response(name: str, server: TheServer, caller: TheCaller) -> ResponseDeleted:
    """Forget a response. What kept responses go on from stays part of them."""
    _turn(server, caller, name, "response_id")
    server.responses.delete(caller.tenant, name)
    return ResponseDeleted(id=name)


def _turn(server: Server, caller: Caller, name: str, param: str) -> KeptTurn:
    """A response of the caller's tenant. Raises APIError 404."""
    turn = server.responses.get(caller.tenant, name)
    if turn is None:
        raise APIError(
            404,
            f"there is no response {printable(name, most=100)!r} here; a server keeps those with store: true until it "
            f"ends, the latest {server.responses.capacity:,} bytes of them",
            param=param,
            code="previous_response_not_found" if param == "previous_response_id" else "response_not_found",
        )
    return turn


def _laid_out(
    server: Server, caller: Caller, body: ResponseRequest, before: KeptTurn | None, new: list[dict[str, Any]]
) -> tuple[ChatRequest, list[PreparedPrompt]]:
    """The request as a chat, and its prompt. Raises APIError or GraphError for what can't be laid out.

    Errors name the fields as they are called here.
    """
    chat = _chat(body, [] if before is None else before.conversation(), new)
    try:
        return chat, prompts.lay_out(server, caller, chat)
    except APIError as error:
        field = error.param or ""
        here = NAMED.get(field, field.replace(".function.", ".").replace(".allowed_tools.", "."))
        if here == field:
            raise
        told = str(error)
        told = here + told.removeprefix(field) if told.startswith(field) else told
        raise APIError(error.status, told, param=here, code=error.code) from None


def _chat(body: ResponseRequest, before: list[dict[str, Any]], new: list[dict[str, Any]]) -> ChatRequest:
    """The chat that a request asks for. Raises APIError 400."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    messages = [*instructions, *before, *new]
    if not new or len(messages) > MOST_MESSAGES:
        what = "is empty" if not new else f"makes {len(messages):,} messages, but at most {MOST_MESSAGES:,} are taken"
        raise APIError(400, f"input {what}", param="input", code="invalid_value")
    shared = {name: getattr(body, name) for name in Sampling.model_fields if name in body.model_fields_set}
    choice = body.tool_choice
    return ChatRequest.model_validate(
        {
            **shared,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "response_format": None if body.text.format is None else body.text.format.of_chat(),
            "logprobs": body.logprobs,
            "top_logprobs": body.top_logprobs if body.logprobs else None,
            "chat_template_kwargs": body.chat_template_kwargs,
            "reasoning_effort": body.reasoning.effort,
            "tools": [tool.of_chat() for tool in body.tools],
            "tool_choice": choice if isinstance(choice, str) else choice.of_chat(),
            "parallel_tool_calls": body.parallel_tool_calls,
        }
    )
