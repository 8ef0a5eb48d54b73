"""Calls as Mistral's models write them: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], since 2025 [TOOL_CALLS]NAME[ARGS]{...}.

Source: https://github.com/mistralai/mistral-common, its tokenizers of versions 3, 7, 11 and 13.
"""

from __future__ import annotations

import re
from typing import ClassVar

from kvgraph.server.tools.base import (
    Incoming,
    Named,
    Steps,
    ToolFormat,
    listed_calls,
    literal,
    matching,
    object_of,
    spaces,
)

OPEN, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[A-Za-z0-9_.-]{0,128}")


class Mistral(ToolFormat):
    """A list of objects after a mark. The list of an answer that ended may be left open."""

    name: ClassVar[str] = "mistral"
    opens: ClassVar[tuple[str, ...]] = (OPEN,)
    marks: ClassVar[tuple[str, ...]] = (OPEN, ARGS, ID)
    opening: ClassVar[str] = OPEN + "["
    tail: ClassVar[str] = "}"
    between: ClassVar[str | None] = ", "
    closing: ClassVar[str] = "]"

    def writes(self, text: str) -> bool:
        """A list after the mark."""
        return re.search(re.escape(OPEN) + r"\s*\[\s*\{", text) is not None

    def head(self, name: str) -> str:
        """An object's beginning."""
        return f'{{"name": "{name}", "arguments": '

    def read(self, source: Incoming) -> Steps[bool]:
        """A list, or one call of the newer spelling: models of either kind are told apart by what they write."""
        yield from literal(source, OPEN)
        yield from spaces(source)
        if (yield from literal(source, "[")):
            return (yield from listed_calls(source))
        return (yield from self._bare(source))

    def _bare(self, source: Incoming) -> Steps[bool]:
        name = yield from matching(source, _NAME)
        if not name:
            return False
        yield Named(name)
        if (yield from literal(source, ID)):
            yield from matching(source, _NAME)
        yield from literal(source, ARGS)
        yield from spaces(source)
        arguments = yield from object_of(source, told=True)
        return arguments is not None


class MistralArgs(Mistral):
    """A mark, a name, another mark and the arguments, for each call."""

    name: ClassVar[str] = "mistral-args"
    opening: ClassVar[str] = ""
    tail: ClassVar[str] = ""
    between: ClassVar[str | None] = ""
    closing: ClassVar[str] = ""

    def writes(self, text: str) -> bool:
        """A name after the mark."""
        return re.search(re.escape(OPEN) + r"\s*[A-Za-z0-9_.-]+\s*(\[|\{)", text) is not None

    def head(self, name: str) -> str:
        """Both marks and the name."""
        return f"{OPEN}{name}{ARGS}"
