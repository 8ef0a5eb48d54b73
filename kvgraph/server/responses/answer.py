"""A chat's answer as a response: its chunks become items, and events that tell of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any

from kvgraph.server import errors
from kvgraph.server.answers import ChatAnswer
from kvgraph.server.responses.items import GrowingItem, GrowingMessage, Told, growths
from kvgraph.server.responses.schema import (
    IncompleteDetails,
    InputDetails,
    ItemStatus,
    OutputDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    TextFormat,
)
from kvgraph.server.runner import Update
from kvgraph.server.schema import ChatChunkChoice, FinishReason

OPENING = 2  # events that come before the first token


class ResponseAnswer:
    """The answer to a request for a response, as it grows. keep: called with the response once it has ended well."""

    def __init__(self, body: ResponseRequest, chat: ChatAnswer, keep: Callable[[ResponseObject], None]):
        self.chat, self._keep = chat, keep
        self.response = _begun(body, chat.server.settings.name)
        self._numbers = count()
        self._item: GrowingItem | None = None
        self._finish: FinishReason | None = None

    async def whole(self, updates: AsyncGenerator[tuple[int, Update]]) -> ResponseObject:
        """The complete response."""
        async for _ in self._events(updates):
            pass
        return self.response

    async def events(self, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[ResponseEvent]:
        """The response event by event. An error is the last one."""
        try:
            async with aclosing(self._events(updates)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            told = errors.body(errors.report(error))["error"]
            failure = ResponseFailure(code=told["code"] or "server_error", message=told["message"])
            self.response = self.response.model_copy(update={"status": "failed", "error": failure})
            yield self._event("response.failed", {"response": self.response})

    async def _events(self, updates: AsyncGenerator[tuple[int, Update]]) -> AsyncGenerator[ResponseEvent]:
        async with aclosing(updates):
            yield self._event("response.created", {"response": self.response})
            yield self._event("response.in_progress", {"response": self.response})
            async with aclosing(self.chat.chunks(updates)) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:  # type: ignore[attr-defined]
                        for event in self._grown(choice):
                            yield event
        status: ItemStatus = "incomplete" if self._finish == "length" else "completed"
        if self._item is None and not self.response.output:
            for event in self._begin(GrowingMessage()):
                yield event
        for event in self._end(status):
            yield event
        ended: dict[str, Any] = {"status": status, "usage": self._usage()}
        if status == "completed":
            ended["completed_at"] = int(time.time())
        else:
            ended["incomplete_details"] = IncompleteDetails(reason="max_output_tokens")
        self.response = self.response.model_copy(update=ended)
        self._keep(self.response)
        yield self._event(f"response.{status}", {"response": self.response})

    def _grown(self, choice: ChatChunkChoice) -> Iterator[ResponseEvent]:
        """The events of what is new in the chat's answer. Items follow each other: a new one ends the one before."""
        self._finish = choice.finish_reason or self._finish
        logprobs = (choice.logprobs.content if choice.logprobs else None) or []
        for growth in growths(choice.delta, logprobs):
            if not growth.fits(self._item):
                yield from self._end("completed")
                yield from self._begin(growth.make())
            assert self._item is not None
            if growth.text or growth.logprobs:
                yield from self._told(self._item.grown(growth.text, growth.logprobs))

    def _begin(self, item: GrowingItem) -> Iterator[ResponseEvent]:
        self._item = item
        yield from self._told(item.begun())

    def _end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._item is not None:
            yield from self._told(self._item.ended(status))
            self.response = self.response.model_copy(update={"output": [*self.response.output, self._item.item]})
            self._item = None

    def _told(self, told: Iterator[Told]) -> Iterator[ResponseEvent]:
        for kind, fields in told:
            yield self._event(f"response.{kind}", {"output_index": len(self.response.output), **fields})

    def _event(self, kind: str, fields: dict[str, Any]) -> ResponseEvent:
        return ResponseEvent(type=kind, sequence_number=next(self._numbers), **fields)

    def _usage(self) -> ResponseUsage:
        told, result = self.chat.usage(), self.chat.choices[0].result
        assert told.kvgraph is not None and told.prompt_tokens_details is not None and result is not None
        return ResponseUsage(
            input_tokens=told.prompt_tokens,
            input_tokens_details=InputDetails(
                cached_tokens=told.prompt_tokens_details.cached_tokens,
                cache_write_tokens=result.usage.document_tokens_computed,
            ),
            output_tokens=told.completion_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=told.total_tokens,
            kvgraph=told.kvgraph,
        )


def _begun(body: ResponseRequest, model: str) -> ResponseObject:
    """The response before there is any answer."""
    form = body.text.format or TextFormat(type="text")
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": body.reasoning.effort, "summary": None},
        store=body.store,
        temperature=1.0 if body.temperature is None else body.temperature,
        tool_choice=body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        tools=[tool.model_dump() for tool in body.tools],
        text={"format": form.model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
        top_logprobs=body.top_logprobs,
        top_p=1.0 if body.top_p is None else body.top_p,
    )
