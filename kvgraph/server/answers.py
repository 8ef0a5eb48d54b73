"""How answers are written: as chat completions or as plain ones, complete or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel

from kvgraph.checks.quality import Fidelity
from kvgraph.engine.request import Request
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled
from kvgraph.server import logs, schema
from kvgraph.server.errors import LostError
from kvgraph.server.prompts import PreparedPrompt, max_tokens, prompt_list
from kvgraph.server.runner import Update
from kvgraph.server.shadow import Answered
from kvgraph.server.state import Server
from kvgraph.server.tokens import Offsets
from kvgraph.server.tools.reading import CallBegun, Event, Said, Thought, message


@dataclass
class Choice:
    """One choice as it grows. begun: whether a chunk of it was written."""

    request: Request
    text: list[str] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    tokens: int = 0  # generated so far
    begun: bool = False
    result: Result | None = None


class AnswerForm:
    """What the answers to chat and plain completions share. silent: the request wants no new token.

    operation: what OpenTelemetry's GenAI conventions call it.
    """

    prefix: str
    operation: str
    response: Callable[..., BaseModel]
    part: Callable[..., BaseModel]

    def __init__(self, server: Server, body: Any, laid: list[PreparedPrompt], ignored: list[str]):
        self.server, self.body, self.laid, self.ignored = server, body, laid, ignored
        self.silent = max_tokens(body) == 0
        self.fidelity: Fidelity | None = None  # with `full`, if the request asks for it
        self.choices = [Choice(request) for prompt in laid for request in prompt.requests]
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.settings.name,
            "system_fingerprint": f"fp_{server.engine.model.fingerprint[:12]}",
        }

    async def whole(self, updates: AsyncIterator[tuple[int, Update]]) -> BaseModel:
        """The complete answer."""
        async for index, update in updates:
            choice = self.choices[index]
            if update.again:
                choice.text, choice.sampled = [], []
            choice.text.append(update.text)
            choice.sampled += update.sampled
            choice.result = update.result or choice.result
        await self._shadow()
        choices = [self.choice(i, choice) for i, choice in enumerate(self.choices)]
        return self.response(choices=choices, usage=self.usage(), citations=self.citations(), **self.head)

    async def chunks(self, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[BaseModel]:
        """The answer piece by piece, and the usage at the end if it was asked for."""
        options = self.body.stream_options or schema.StreamOptions()
        always = options.include_usage and options.continuous_usage_stats
        async with aclosing(updates):
            async for index, update in updates:
                if update.again:  # what was sent can't be taken back
                    raise LostError()
                choice = self.choices[index]
                choice.tokens += len(update.sampled)
                choice.result = update.result or choice.result
                ended = all(choice.result is not None for choice in self.choices)
                for chunk in self.chunk(index, choice, update):
                    choice.begun = True
                    yield self.part(
                        choices=[chunk],
                        usage=self.usage_so_far() if always else None,
                        citations=self.citations() if ended and getattr(chunk, "finish_reason", None) else None,
                        **self.head,
                    )
        await self._shadow()
        if options.include_usage:
            yield self.part(choices=[], usage=self.usage(), **self.head)

    def citations(self) -> list[schema.Citation] | None:
        """What was found for the question; None if nothing was looked for."""
        found = self.laid[0].citations
        return None if found is None else list(found)

    async def _shadow(self) -> None:
        """Compare the first choice with `full`: now, if the request asks for it, or maybe later."""
        first, prompt, exchange = self.choices[0].result, self.laid[0], logs.current.get()
        if first is None or self.silent:
            return
        who = "" if exchange is None else exchange.id
        asked = Answered(prompt.graph, prompt.method, prompt.salt, tuple(first.token_ids), who)
        if self.body.kvgraph.shadow:
            self.fidelity = await self.server.shadow.compare(asked)
        else:
            self.server.shadow.offer(asked)

    def usage_so_far(self) -> schema.UsageOut:
        """Tokens of all choices while they grow."""
        prompt = sum(choice.request.usage.prompt_tokens for choice in self.choices[:: self.body.n])
        completion = 0 if self.silent else sum(choice.tokens for choice in self.choices)
        return schema.UsageOut(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def usage(self) -> schema.UsageOut:
        """Tokens of all choices; a prompt counts once, as OpenAI counts it."""
        results = [choice.result for choice in self.choices if choice.result is not None]
        firsts = [r.usage for r in results[:: self.body.n]]
        prompt = sum(u.prompt_tokens for u in firsts)
        completion = 0 if self.silent else sum(r.usage.completion_tokens for r in results)
        reused: dict[str, int] = {}
        for result in results:
            for tier, n in result.usage.reused_tokens.items():
                reused[tier] = reused.get(tier, 0) + n
        cached = sum(u.cached_tokens for u in firsts)
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
            shadow=None if self.fidelity is None else schema.Shadowed(**asdict(self.fidelity)),
        )
        return schema.UsageOut(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=schema.PromptDetails(cached_tokens=cached),
            kvgraph=details,
        )

    def reason(self, index: int, result: Result) -> schema.FinishReason:
        """Why a choice ended."""
        return finish_reason(result)

    def reasons(self) -> list[str]:
        """Why each choice ended that has."""
        return [self.reason(i, choice.result) for i, choice in enumerate(self.choices) if choice.result is not None]

    def choice(self, index: int, choice: Choice) -> BaseModel:
        """A complete choice."""
        raise NotImplementedError

    def chunk(self, index: int, choice: Choice, update: Update) -> Iterator[BaseModel]:
        """What is new of a choice, in as many chunks as that takes."""
        raise NotImplementedError


class ChatAnswer(AnswerForm):
    """The answer to a chat."""

    prefix, operation = "chatcmpl", "chat"
    response, part = schema.ChatResponse, schema.ChatChunk

    def __init__(self, server: Server, body: Any, laid: list[PreparedPrompt], ignored: list[str]):
        super().__init__(server, body, laid, ignored)
        self._readers = [laid[0].reading.reader() for _ in self.choices]

    def choice(self, index: int, choice: Choice) -> schema.ChatChoice:
        """A message."""
        assert choice.result is not None
        reader = self._readers[index]
        said = message([*reader.feed("".join(choice.text)), *reader.end()])
        calls = [
            schema.ToolCallOut(id=call.id, function=schema.FunctionOut(name=call.name, arguments=call.arguments))
            for call in said.calls
        ]
        return schema.ChatChoice(
            index=index,
            message=schema.AnswerMessage(
                content=said.text if said.text or not calls else None,
                reasoning_content=said.thoughts or None,
                tool_calls=calls or None,
            ),
            logprobs=self._logprobs(choice.sampled),
            finish_reason=self.reason(index, choice.result),
        )

    def chunk(self, index: int, choice: Choice, update: Update) -> Iterator[schema.ChatChunkChoice]:
        """What is new in a message; the first chunk tells the role, and a call isn't told in the last."""
        reader = self._readers[index]
        events = reader.feed(update.text)
        ended = None
        if update.result is not None:
            events += reader.end()
            ended = self.reason(index, update.result)
        logprobs = self._logprobs(update.sampled) if update.sampled else None
        deltas = [_delta(event) for event in events]
        if ended and deltas and deltas[-1].tool_calls:
            deltas.append(schema.Delta())
        if not deltas and (logprobs or ended or not choice.begun):
            deltas.append(schema.Delta(content=None if choice.begun else ""))
        for i, delta in enumerate(deltas):
            if not choice.begun:
                delta.role = "assistant"
            yield schema.ChatChunkChoice(
                index=index,
                delta=delta,
                logprobs=None if i else logprobs,
                finish_reason=ended if i == len(deltas) - 1 else None,
            )

    def reason(self, index: int, result: Result) -> schema.FinishReason:
        """Why an answer ended: for its calls, if it has any and wasn't cut short."""
        reason = finish_reason(result)
        return "tool_calls" if self._readers[index].calls and reason == "stop" else reason

    def _logprobs(self, sampled: Sequence[Sampled]) -> schema.ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return schema.ChatLogprobs(content=[self._entry(s) for s in sampled])

    def _entry(self, sampled: Sampled) -> schema.TokenLogprob:
        tokens = self.server.tokens
        names = tokens.names(sampled)
        top = [
            schema.TopLogprob(token=names[token], logprob=finite(logprob), bytes=list(tokens.bytes(token)))
            for token, logprob in sampled.top
        ]
        return schema.TokenLogprob(
            token=names[sampled.token],
            logprob=finite(sampled.logprob or 0.0),
            bytes=list(tokens.bytes(sampled.token)),
            top_logprobs=top,
        )


class TextAnswer(AnswerForm):
    """The continuation of a prompt, maybe after the prompt itself."""

    prefix, operation = "cmpl", "text_completion"
    response, part = schema.CompletionResponse, schema.CompletionResponse

    def __init__(self, server: Server, body: Any, laid: list[PreparedPrompt], ignored: list[str]):
        super().__init__(server, body, laid, ignored)
        given = prompt_list(body.prompt)
        self.prompts = [given[i // body.n] for i in range(len(self.choices))]
        self.offsets = [Offsets(server.tokens) for _ in self.choices]

    def choice(self, index: int, choice: Choice) -> schema.TextChoice:
        """A text."""
        assert choice.result is not None
        return self._written(index, choice, "".join(choice.text), choice.sampled)

    def chunk(self, index: int, choice: Choice, update: Update) -> Iterator[schema.TextChoice]:
        """What is new in a text."""
        if update.text or update.sampled or update.result:
            written = self._written(index, choice, update.text, update.sampled)
            if written.text or written.logprobs or written.finish_reason:
                yield written

    def _written(self, index: int, choice: Choice, text: str, sampled: Sequence[Sampled]) -> schema.TextChoice:
        """New text and tokens, after the prompt if nothing was written and it is to be shown."""
        if self.silent:
            text, sampled = "", ()
        echoed, tokens = self._prompt(index, choice) if self.body.echo and not choice.begun else ("", [])
        offsets = [offset for _, offset in tokens] + [self.offsets[index](s.token) for s in sampled]
        scored = [*(s for s, _ in tokens), *sampled]
        return schema.TextChoice(
            index=index,
            text=echoed + text,
            logprobs=self._logprobs(scored, offsets) if scored else None,
            finish_reason=None if choice.result is None else finish_reason(choice.result),
        )

    def _prompt(self, index: int, choice: Choice) -> tuple[str, list[tuple[Sampled, int]]]:
        """The prompt's text, and its tokens with their offsets in it; nothing comes before the first to score it by."""
        given, offset, server = self.prompts[index], self.offsets[index], self.server
        ids = choice.request.plan.prompt.tokens
        text = given if isinstance(given, str) else server.engine.detokenize(list(ids))
        if isinstance(given, str):  # which holds every token but those that were put before it
            added = len(ids) - len(server.engine.tokenize(given))
            shown = [i >= added for i in range(len(ids))]
        else:
            shown = [not server.tokens.is_special(token) for token in ids]
        data = b"".join(server.tokens.bytes(token) for token, there in zip(ids, shown, strict=True) if there)
        if data == b" " + text.encode():
            offset.skip(1)  # the space before the first word, which the text doesn't have
        offsets = [offset(token, there) for token, there in zip(ids, shown, strict=True)]
        scored = [Sampled(ids[0]), *choice.request.scored] if self.body.logprobs is not None else []
        return text, list(zip(scored, offsets, strict=False))

    def _logprobs(self, scored: Sequence[Sampled], offsets: list[int]) -> schema.TextLogprobs | None:
        if self.body.logprobs is None:
            return None
        return schema.TextLogprobs(
            tokens=[self.server.tokens.name(s.token) for s in scored],
            token_logprobs=[None if s.logprob is None else finite(s.logprob) for s in scored],
            top_logprobs=[None if s.logprob is None else self._top(s, s.logprob) for s in scored],
            text_offset=offsets,
        )

    def _top(self, sampled: Sampled, logprob: float) -> dict[str, float]:
        """The likeliest tokens by name, and the chosen one."""
        top = dict(sampled.top) | ({sampled.token: logprob} if sampled.top else {})
        names = self.server.tokens.names(sampled)
        return {names[token]: finite(logprob) for token, logprob in top.items()}


def _delta(event: Event) -> schema.Delta:
    """What is new, as a part of a message."""
    if isinstance(event, Said):
        return schema.Delta(content=event.text)
    if isinstance(event, Thought):
        return schema.Delta(reasoning_content=event.text)
    if isinstance(event, CallBegun):
        function = schema.FunctionOut(name=event.name)
        call = schema.ToolCallDelta(index=event.index, id=event.id, type="function", function=function)
    else:
        call = schema.ToolCallDelta(index=event.index, function=schema.FunctionOut(arguments=event.text))
    return schema.Delta(tool_calls=[call])


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: an impossible token has -9999, as OpenAI's API has it."""
    return max(-9999.0, logprob)


def finish_reason(result: Result) -> schema.FinishReason:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if result.finish_reason == "stop" else "length"
