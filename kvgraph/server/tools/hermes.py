"""Calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one element a call.

Source: https://github.com/NousResearch/Hermes-Function-Calling, and the chat templates of Qwen2.5 and Qwen3. SmolLM2 writes a list
of calls into one element (https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B-Instruct).
"""

from __future__ import annotations

import re
from typing import ClassVar

from kvgraph.server.tools.base import Incoming, Steps, ToolFormat, call, listed_calls, literal, spaces

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """Elements with JSON in them, anywhere in an answer. The last one may be left open."""

    name: ClassVar[str] = "hermes"
    opens: ClassVar[tuple[str, ...]] = (OPEN,)
    marks: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    tail: ClassVar[str] = "}\n" + CLOSE
    between: ClassVar[str | None] = "\n"

    def writes(self, text: str) -> bool:
        """An element that begins with an object."""
        return re.search(OPEN + r"\s*\{", text) is not None

    def head(self, name: str) -> str:
        """The element's beginning."""
        return f'{OPEN}\n{{"name": "{name}", "arguments": '

    def read(self, source: Incoming) -> Steps[bool]:
        """One element."""
        yield from literal(source, OPEN)
        yield from spaces(source)
        listed = yield from literal(source, "[")
        if not (yield from (listed_calls(source) if listed else call(source))):
            return False
        yield from spaces(source)
        return (yield from literal(source, CLOSE)) or source.done
