"""OpenAI's endpoints: chat completions, completions, models; streamed by server-sent events or not."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from kvgraph import methods
from kvgraph.server import errors, prompts, schema
from kvgraph.server.answers import ChatAnswer, TextAnswer
from kvgraph.server.lifecycle import Call, TheCall
from kvgraph.server.schema import ChatRequest, CompletionRequest
from kvgraph.server.state import Server, TheCaller, TheServer

router = APIRouter(prefix="/v1", responses=errors.DECLARED)

STREAMED: dict[str, Any] = {"text/event-stream": {}}  # a schema here would be one of single events


@router.get("/models", response_model=schema.ModelList)
def list_models(server: TheServer, caller: TheCaller) -> schema.ModelList:
    """The one model that is served."""
    return schema.ModelList(data=[card(server)])


@router.get("/models/{name:path}", response_model=schema.ModelCard)
def get_model(name: str, server: TheServer, caller: TheCaller) -> schema.ModelCard:
    """The served model by name."""
    server.require_name(name)
    return card(server)


def card(server: Server) -> schema.ModelCard:
    """The served model's data."""
    model = server.engine.model
    facts = {
        "default_method": server.method.name,
        "methods": list(methods.METHODS),
        "presets": list(methods.PRESETS),
        "tuned_for": list(model.tuned_for),
        "chat": bool(server.tokenizer.chat_template),
        "fingerprint": model.fingerprint,
    }
    return schema.ModelCard(
        id=server.settings.name, created=int(server.started), max_model_len=model.limit, kvgraph=facts
    )


@router.post(
    "/chat/completions",
    response_model=schema.ChatResponse,
    responses={200: {"content": STREAMED, "description": "The answer, or with `stream` its chunks as events."}},
)
async def chat_completions(body: ChatRequest, call: TheCall) -> Any:
    """Answer a conversation, over documents if there are any."""
    return await _answer(body, call, ChatAnswer)


@router.post(
    "/completions",
    response_model=schema.CompletionResponse,
    responses={200: {"content": STREAMED, "description": "The answer, or with `stream` its chunks as events."}},
)
async def completions(body: CompletionRequest, call: TheCall) -> Any:
    """Continue a prompt, over documents if there are any."""
    return await _answer(body, call, TextAnswer)


async def _answer(body: ChatRequest | CompletionRequest, call: Call, shape: type[ChatAnswer] | type[TextAnswer]) -> Any:
    """Answer at once or as a stream."""
    call.server.require_name(body.model)
    choices = body.n * (len(prompts.prompt_list(body.prompt)) if isinstance(body, CompletionRequest) else 1)
    form = body.response_format
    json = form is not None and form.type != "text"
    inference = call.generates(shape.operation, streamed=body.stream, choices=body.n, output="json" if json else "text")
    ignored = prompts.ignored(call.server, body)
    async with call.admitted(choices, body.kvgraph.timeout):
        laid = await call.prepared(prompts.lay_out, call.server, call.caller, body)
        answer = shape(call.server, body, laid, ignored)
        inference.response_id, inference.reasons = answer.head["id"], answer.reasons
        updates = call.updates(request for prompt in laid for request in prompt.requests)
        if body.stream:
            return call.streamed(answer.chunks(updates))
        return JSONResponse((await call.collected(answer.whole(updates))).model_dump())
