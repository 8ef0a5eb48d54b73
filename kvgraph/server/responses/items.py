"""The items of a response as they grow, and the events that tell of each: what the chunks of a chat come to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvgraph.server.responses.schema import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)
from kvgraph.server.schema import Delta, TokenLogprob

Told = tuple[str, dict[str, Any]]  # the name of an event without "response.", and its fields


class GrowingItem:
    """An item of the output while it grows. Each method gives the events of what it does."""

    item: OutputItem

    def begun(self) -> Iterator[Told]:
        """It is there, and empty."""
        yield "output_item.added", {"item": self.item.model_copy(deep=True)}

    def grown(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[Told]:
        """More text."""
        raise NotImplementedError

    def closed(self) -> Iterator[Told]:
        """What it holds is complete."""
        raise NotImplementedError

    def ended(self, status: ItemStatus) -> Iterator[Told]:
        """It is complete, or the answer ended within it."""
        yield from self.closed()
        self.item.status = status
        yield "output_item.done", {"item": self.item}


class GrowingMessage(GrowingItem):
    """A message: one part of text."""

    def __init__(self) -> None:
        self.item: OutputMessage = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
        self._place = {"item_id": self.item.id, "content_index": 0}

    def begun(self) -> Iterator[Told]:
        """It is there, and its part."""
        yield from super().begun()
        self.item.content.append(OutputText(text=""))
        yield "content_part.added", self._place | {"part": OutputText(text="")}

    def grown(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[Told]:
        """More text."""
        part = self.item.content[0]
        part.text += text
        part.logprobs += logprobs
        yield "output_text.delta", self._place | {"delta": text, "logprobs": logprobs}

    def closed(self) -> Iterator[Told]:
        """The text is complete."""
        part = self.item.content[0]
        yield "output_text.done", self._place | {"text": part.text, "logprobs": part.logprobs}
        yield "content_part.done", self._place | {"part": part}


class GrowingThoughts(GrowingItem):
    """The thoughts before an answer: one part of text."""

    def __init__(self) -> None:
        self.item: OutputReasoning = OutputReasoning(id=_new_id("rs"), status="in_progress", content=[])
        self._place = {"item_id": self.item.id, "content_index": 0}

    def begun(self) -> Iterator[Told]:
        """They are there, and their part."""
        yield from super().begun()
        self.item.content.append(ReasoningText(text=""))
        yield "content_part.added", self._place | {"part": ReasoningText(text="")}

    def grown(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[Told]:
        """More text; its log-probabilities aren't told."""
        self.item.content[0].text += text
        yield "reasoning_text.delta", self._place | {"delta": text}

    def closed(self) -> Iterator[Told]:
        """The text is complete."""
        part = self.item.content[0]
        yield "reasoning_text.done", self._place | {"text": part.text}
        yield "content_part.done", self._place | {"part": part}


class GrowingCall(GrowingItem):
    """A call of a function."""

    def __init__(self, call_id: str, name: str) -> None:
        self.item: OutputCall = OutputCall(id=_new_id("fc"), status="in_progress", call_id=call_id, name=name)

    def grown(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[Told]:
        """More of the arguments; their log-probabilities aren't told."""
        self.item.arguments += text
        yield "function_call_arguments.delta", {"item_id": self.item.id, "delta": text}

    def closed(self) -> Iterator[Told]:
        """The arguments are complete."""
        told = {"item_id": self.item.id, "name": self.item.name, "arguments": self.item.arguments}
        yield "function_call_arguments.done", told


@dataclass(frozen=True)
class Growth:
    """What a chunk adds: text to an item that `fits`, or to a new one that `make` gives."""

    fits: Callable[[GrowingItem | None], bool]
    make: Callable[[], GrowingItem]
    text: str
    logprobs: list[TokenLogprob]


def growths(delta: Delta, logprobs: list[TokenLogprob]) -> Iterator[Growth]:
    """What a chunk's delta adds, in order.

    Log-probabilities without text are those of tokens that are a part of a character, and belong to the answer's text.
    """
    if delta.reasoning_content:
        yield Growth(_is(GrowingThoughts), GrowingThoughts, delta.reasoning_content, [])
    if delta.content or (logprobs and not delta.reasoning_content and not delta.tool_calls):
        yield Growth(_is(GrowingMessage), GrowingMessage, delta.content or "", logprobs)
    for call in delta.tool_calls or ():
        text, named = call.function.arguments, call.id is not None
        make = partial(GrowingCall, call.id or "", call.function.name or "")
        yield Growth((lambda item: False) if named else _is(GrowingCall), make, text, [])


def _is(kind: type[GrowingItem]) -> Callable[[GrowingItem | None], bool]:
    return lambda item: isinstance(item, kind)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
