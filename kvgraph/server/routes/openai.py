"""OpenAI's endpoints: chat completions, completions, models; streamed by server-sent events or not."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kvgraph import methods
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled
from kvgraph.server import errors, prompts, schema
from kvgraph.server.lifecycle import Call, TheCall
from kvgraph.server.prompts import PreparedPrompt
from kvgraph.server.runner import Update
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
    """What there is to say of the served model."""
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
    return await _answer(body, call, _Chat)


@router.post(
    "/completions",
    response_model=schema.CompletionResponse,
    responses={200: {"content": STREAMED, "description": "The answer, or with `stream` its chunks as events."}},
)
async def completions(body: CompletionRequest, call: TheCall) -> Any:
    """Continue a prompt, over documents if there are any."""
    return await _answer(body, call, _Text)


async def _answer(body: ChatRequest | CompletionRequest, call: Call, shape: type[_Shape]) -> Any:
    """Answer at once or as a stream."""
    call.server.require_name(body.model)
    choices = body.n * (len(prompts.prompt_list(body.prompt)) if isinstance(body, CompletionRequest) else 1)
    ignored = prompts.ignored(call.server, body)
    async with call.admitted(choices, body.kvgraph.timeout):
        laid = await call.prepared(prompts.lay_out, call.server, call.caller, body)
        answer = shape(call.server, body, laid, ignored)
        updates = call.updates(request for prompt in laid for request in prompt.requests)
        if body.stream:
            return call.streamed(answer.chunks(updates))
        return JSONResponse((await call.collected(answer.whole(updates))).model_dump())


@dataclass
class _Choice:
    """One choice as it grows."""

    text: list[str] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    length: int = 0  # characters sent
    result: Result | None = None


class _Shape:
    """How an answer is written: the parts that chat and plain completions share."""

    prefix: str

    def __init__(self, server: Server, body: Any, laid: list[PreparedPrompt], ignored: list[str]):
        self.server, self.body, self.laid, self.ignored = server, body, laid, ignored
        self.choices = [_Choice() for prompt in laid for _ in prompt.requests]
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.settings.name,
            "system_fingerprint": f"fp_{server.engine.model.fingerprint[:12]}",
        }

    async def whole(self, updates: AsyncIterator[tuple[int, Update]]) -> BaseModel:
        """The complete answer."""
        async for index, update in updates:
            choice = self.choices[index]
            choice.text.append(update.text)
            choice.sampled += update.sampled
            choice.result = update.result or choice.result
        choices = [self.choice(i, choice) for i, choice in enumerate(self.choices)]
        return self.response(choices=choices, usage=self.usage(), **self.head)

    async def chunks(self, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[BaseModel]:
        """The answer piece by piece, and the usage at the end if it was asked for."""
        options = self.body.stream_options
        async with aclosing(updates):
            async for index, update in updates:
                if chunk := self.chunk(index, self.choices[index], update):
                    yield self.part(choices=[chunk], **self.head)
        if options is not None and options.include_usage:
            yield self.part(choices=[], usage=self.usage(), **self.head)

    def usage(self) -> schema.UsageOut:
        """Tokens of all choices; a prompt counts once, as OpenAI counts it."""
        results = [choice.result for choice in self.choices if choice.result is not None]
        firsts = [r.usage for r in results[:: self.body.n]]
        prompt, completion = sum(u.prompt_tokens for u in firsts), sum(r.usage.completion_tokens for r in results)
        reused: dict[str, int] = {}
        for result in results:
            for tier, n in result.usage.reused_tokens.items():
                reused[tier] = reused.get(tier, 0) + n
        cached = sum(max(0, min(u.prompt_tokens - u.live_tokens, sum(u.reused_tokens.values()))) for u in firsts)
        u, with_documents = firsts[0], any(prompt.graph.segments for prompt in self.laid)
        details = schema.Details(
            method=self.laid[0].method.name,
            computed_tokens=sum(r.usage.computed_tokens for r in results),
            document_tokens_computed=sum(r.usage.document_tokens_computed for r in results) if with_documents else 0,
            reused_tokens=reused,
            kv_bytes=u.kv_bytes,
            queued=u.queued,
            encoded=u.encoded,
            ttft=u.ttft,
            decode=u.decode,
            dropped=[name for prompt in self.laid for name in prompt.dropped],
            ignored=self.ignored,
        )
        return schema.UsageOut(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=schema.PromptDetails(cached_tokens=cached),
            kvgraph=details,
        )

    def token(self, token: int) -> str:
        """A token as text; special tokens too, and bytes that are no character as U+FFFD."""
        return self.server.tokenizer.decode([token])

    response: Callable[..., BaseModel]
    part: Callable[..., BaseModel]

    def choice(self, index: int, choice: _Choice) -> BaseModel:
        raise NotImplementedError

    def chunk(self, index: int, choice: _Choice, update: Update) -> BaseModel | None:
        raise NotImplementedError


class _Chat(_Shape):
    prefix = "chatcmpl"
    response, part = schema.ChatResponse, schema.ChatChunk

    def choice(self, index: int, choice: _Choice) -> schema.ChatChoice:
        assert choice.result is not None
        return schema.ChatChoice(
            index=index,
            message=schema.AnswerMessage(content="".join(choice.text)),
            logprobs=self._logprobs(choice.sampled),
            finish_reason=finish_reason(choice.result),
        )

    def chunk(self, index: int, choice: _Choice, update: Update) -> schema.ChatChunkChoice | None:
        first, choice.result = choice.length == 0, update.result
        ended = None if update.result is None else finish_reason(update.result)
        logprobs = self._logprobs(update.sampled) if update.sampled else None
        if not (update.text or logprobs or ended or first):
            return None
        choice.length += 1
        delta = schema.Delta(role="assistant" if first else None, content=update.text or ("" if first else None))
        return schema.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=ended)

    def _logprobs(self, sampled: list[Sampled]) -> schema.ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return schema.ChatLogprobs(content=[self._entry(s) for s in sampled])

    def _entry(self, sampled: Sampled) -> schema.TokenLogprob:
        top = [schema.TopLogprob(**self._scored(t, p)) for t, p in sampled.top]
        return schema.TokenLogprob(**self._scored(sampled.token, sampled.logprob), top_logprobs=top)

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


class _Text(_Shape):
    prefix = "cmpl"
    response, part = schema.CompletionResponse, schema.CompletionResponse

    def choice(self, index: int, choice: _Choice) -> schema.TextChoice:
        assert choice.result is not None
        return schema.TextChoice(
            index=index,
            text="".join(choice.text),
            logprobs=self._logprobs(choice, choice.sampled),
            finish_reason=finish_reason(choice.result),
        )

    def chunk(self, index: int, choice: _Choice, update: Update) -> schema.TextChoice | None:
        choice.result = update.result
        ended = None if update.result is None else finish_reason(update.result)
        logprobs = self._logprobs(choice, update.sampled) if update.sampled else None
        if not (update.text or logprobs or ended):
            return None
        return schema.TextChoice(index=index, text=update.text, logprobs=logprobs, finish_reason=ended)

    def _logprobs(self, choice: _Choice, sampled: list[Sampled]) -> schema.TextLogprobs | None:
        if self.body.logprobs is None:
            return None
        tokens = [self.token(s.token) for s in sampled]
        offsets = []
        for text in tokens:
            offsets.append(choice.length)
            choice.length += len(text)
        return schema.TextLogprobs(
            tokens=tokens,
            token_logprobs=[finite(s.logprob) for s in sampled],
            top_logprobs=[{self.token(t): finite(p) for t, p in s.top} for s in sampled],
            text_offset=offsets,
        )


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold: an impossible token has -9999, as OpenAI's API has it."""
    return max(-9999.0, -9999.0 if logprob is None else logprob)


def finish_reason(result: Result) -> schema.FinishReason:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if result.finish_reason == "stop" else "length"
