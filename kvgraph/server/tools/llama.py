"""Calls as Llama 3.1 and later write them: {"name": ..., "parameters": {...}} as the whole answer, maybe several after ";".

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/, "JSON based tool calling".
"""

from __future__ import annotations

import re
from typing import ClassVar

from kvgraph.server.tools.base import Incoming, Steps, ToolFormat, call, literal, spaces

PYTHON = "<|python_tag|>"


class LlamaJSON(ToolFormat):
    """Objects and nothing else. An answer that goes on after them is a text."""

    name: ClassVar[str] = "llama"
    opens: ClassVar[tuple[str, ...]] = (PYTHON, "{")
    first: ClassVar[bool] = True
    marks: ClassVar[tuple[str, ...]] = (PYTHON,)
    tail: ClassVar[str] = "}"
    between: ClassVar[str | None] = "; "

    def writes(self, text: str) -> bool:
        """An object with a name and parameters, which stands in no list."""
        return re.search(r'[^\[,\s]\s*\{\s*"name":\s*"[^"]*",\s*"parameters":', text) is not None

    def head(self, name: str) -> str:
        """The object's beginning."""
        return f'{{"name": "{name}", "parameters": '

    def read(self, source: Incoming) -> Steps[bool]:
        """All objects, up to the end of the answer."""
        yield from literal(source, PYTHON)
        yield from spaces(source)
        while True:
            if not (yield from call(source)):
                return False
            yield from spaces(source)
            if source.done:
                return True
            yield from literal(source, ";")
            yield from spaces(source)
