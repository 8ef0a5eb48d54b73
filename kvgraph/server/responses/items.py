"""The items of a response as they grow, and the events that tell of each: what the chunks of a chat come to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from kvgraph.server.responses.schema import ItemStatus, OutputItem, OutputMessage, OutputText
from kvgraph.server.schema import Delta, TokenLogprob

Told = tuple[str, dict[str, Any]]  # the name of an event without "response.", and its fields


class GrowingItem:
    """An item of the output while it grows. Each method gives the events of what it does."""

    item: OutputItem

    def begun(self) -> Iterator[Told]:
        """It is there, and empty."""
        yield "output_item.added", {"item": self.item.model_copy(deep=True)}

    def ended(self, status: ItemStatus) -> Iterator[Told]:
        """It is complete, or the answer ended within it."""
        yield from self.closed()
        self.item.status = status
        yield "output_item.done", {"item": self.item}

    def closed(self) -> Iterator[Told]:
        """What it holds is complete."""
        raise NotImplementedError


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


Growth = tuple[GrowingItem | None, Callable[[Any], Iterator[Told]]]


def growing(delta: Delta, logprobs: list[TokenLogprob], item: GrowingItem | None) -> Iterator[Growth]:
    """What a chunk's delta adds: an item to begin first, if any, and what to do with the item that then grows.

    item: the one that grows now. Log-probabilities without text are those of tokens that are a part of a character.
    """
    text = delta.content or ""
    if text or logprobs:
        new = None if isinstance(item, GrowingMessage) else GrowingMessage()
        yield new, lambda message: message.grown(text, logprobs)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
