"""OpenAI's endpoints: chat completions, completions, models; streamed by server-sent events or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled
from kvgraph.server import errors, prompts, schema
from kvgraph.server.lifecycle import ClientLeft, done_by, finish_reason, in_time, unless_gone
from kvgraph.server.prompts import Laid
from kvgraph.server.runner import Job, Update, merged
from kvgraph.server.schema import ChatRequest, CompletionRequest
from kvgraph.server.state import Server, TheCaller, TheServer
from kvgraph.server.tenants import Caller

router = APIRouter(prefix="/v1", responses=errors.DECLARED)

T = TypeVar("T")

LINGER = 5.0  # seconds a client has for reading its last events

STREAMED: dict[str, Any] = {"text/event-stream": {}}  # a schema here would be one of single events


@router.get("/models", response_model=schema.ModelList)
def list_models(server: TheServer, caller: TheCaller) -> schema.ModelList:
    """The one model that is served."""
    return schema.ModelList(data=[server.card()])


@router.get("/models/{name:path}", response_model=schema.ModelCard)
def get_model(name: str, server: TheServer, caller: TheCaller) -> schema.ModelCard:
    """The served model by name."""
    server.require_name(name)
    return server.card()


@router.post(
    "/chat/completions",
    response_model=schema.ChatResponse,
    responses={200: {"content": STREAMED, "description": "The answer, or with `stream` its chunks as events."}},
)
async def chat_completions(http: Request, body: ChatRequest, server: TheServer, caller: TheCaller) -> Any:
    """Answer a conversation, over documents if there are any."""
    return await _answer(http, body, server, caller, _Chat)


@router.post(
    "/completions",
    response_model=schema.CompletionResponse,
    responses={200: {"content": STREAMED, "description": "The answer, or with `stream` its chunks as events."}},
)
async def completions(http: Request, body: CompletionRequest, server: TheServer, caller: TheCaller) -> Any:
    """Continue a prompt, over documents if there are any."""
    return await _answer(http, body, server, caller, _Text)


async def _answer(
    http: Request, body: ChatRequest | CompletionRequest, server: Server, caller: Caller, shape: type[_Shape]
) -> Any:
    """Admit, lay out, submit, and answer at once or as a stream. Whatever ends early gives back what it held."""
    async with AsyncExitStack() as held:
        server.require_name(body.model)
        choices = body.n * (len(prompts.prompt_list(body.prompt)) if isinstance(body, CompletionRequest) else 1)
        server.admit(caller, choices, held)
        deadline = server.deadline(body.kvgraph.timeout)
        laid = await unless_gone(http, done_by(deadline, server.off_loop(prompts.lay_out, server, caller, body)))
        jobs: list[Job] = []
        for request in (request for prompt in laid for request in prompt.requests):
            jobs.append(server.runner.submit(request))
            held.callback(jobs[-1].cancel)  # also if nobody ever asks for its updates
        answer = shape(server, body, laid, jobs)
        work = in_time(deadline, merged(jobs))
        if body.stream:
            return EventStream(http, answer.events(work), held.pop_all(), deadline)
        return JSONResponse(await unless_gone(http, answer.whole(work)))


class EventStream(StreamingResponse):
    """Server-sent events; `held` is closed when the response ends, also if the client left before its first byte.

    A client that doesn't read is cut off `LINGER` seconds after the deadline (event loop time).
    """

    def __init__(self, http: Request, events: AsyncGenerator[str], held: AsyncExitStack, deadline: float):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._http, self._events, self._held, self._deadline = http, events, held, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._events):
            with suppress(ClientLeft, OSError, TimeoutError):  # nobody is there to be told
                async with asyncio.timeout_at(self._deadline + LINGER):
                    # Sending alone notices that the client has left only when there is something to send.
                    await unless_gone(self._http, self.stream_response(send))


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

    def __init__(self, server: Server, body: Any, laid: list[Laid], jobs: list[Job]):
        self.server, self.body, self.laid = server, body, laid
        self.choices = [_Choice() for _ in jobs]
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.settings.name,
            "system_fingerprint": f"fp_{server.engine.model.fingerprint[:12]}",
        }

    async def whole(self, work: AsyncIterator[tuple[int, Update]]) -> dict[str, Any]:
        """The JSON of the complete answer."""
        async for index, update in work:
            choice = self.choices[index]
            choice.text.append(update.text)
            choice.sampled += update.sampled
            choice.result = update.result or choice.result
        choices = [self.choice(i, choice) for i, choice in enumerate(self.choices)]
        return dumped(self.response(choices=choices, usage=self.usage(), **self.head))

    async def events(self, work: AsyncIterator[tuple[int, Update]]) -> AsyncGenerator[str]:
        """The answer as server-sent events. An error in the middle is an event of its own, after which nothing follows."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        try:
            async for index, update in work:
                if chunk := self.chunk(index, self.choices[index], update):
                    yield event(dumped(self.part(choices=[chunk], **self.head)))
            if with_usage:
                yield event(dumped(self.part(choices=[], usage=self.usage(), **self.head)))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(errors.body(errors.report(error)))
        finally:
            await work.aclose()  # type: ignore[attr-defined]

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
        u = firsts[0]
        details = schema.Details(
            method=self.laid[0].method.name,
            computed_tokens=sum(r.usage.computed_tokens for r in results),
            document_tokens_computed=sum(r.usage.document_tokens_computed for r in results),
            reused_tokens=reused,
            kv_bytes=u.kv_bytes,
            queued=u.queued,
            encoded=u.encoded,
            ttft=u.ttft,
            decode=u.decode,
            dropped=[name for prompt in self.laid for name in prompt.dropped],
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


def dumped(model: BaseModel) -> dict[str, Any]:
    """The JSON of a response."""
    return model.model_dump()


# Line ends that JSON may have as they are, and at which clients that read by Python's idea of a line would cut.
LINE_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}


def event(data: Any) -> str:
    """One server-sent event, on one line whoever splits it."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':')).translate(LINE_ENDS)}\n\n"
