"""What a chat template does with tools, found out by letting it render some: it is a program, and its words aren't enough."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from kvgraph.server.tools.base import ToolFormat
from kvgraph.server.tools.hermes import CLOSE, OPEN, Hermes
from kvgraph.server.tools.reading import Marks
from kvgraph.server.tools.registry import format_of

OFFERED, CALLED, KEY, VALUE, RESULT = (f"kvgraph_{name}" for name in ("offered", "called", "key", "value", "result"))
THOUGHTS = (Marks("<think>", "</think>"), Marks("[THINK]", "[/THINK]"))
_WRITTEN = re.compile(rf'"{KEY}":\s*"{VALUE}"')  # the arguments, as JSON within JSON
_LONG, _SHORT = "call_0123456789abcdef01234567", "abcdef012"
BEFORE = 60  # characters before a function's name that may show the format of its call
Rendered = Mapping[str, Any]


@dataclass(frozen=True)
class Dialect:
    """What a template does with tools.

    tools: it tells the model of them. calls, results: it writes those of earlier turns. format: of the calls it writes,
    if that is known. text: arguments are given to it as JSON, not as an object. short: it wants ids of nine letters and
    digits. thoughts: what stands around them, if it knows of any.
    """

    tools: bool = False
    calls: bool = False
    results: bool = False
    format: ToolFormat | None = None
    text: bool = False
    short: bool = False
    thoughts: Marks | None = None

    @property
    def forced(self) -> ToolFormat:
        """The format of calls that are forced: also of a template that writes none."""
        return self.format or Hermes()

    def messages(self, messages: Sequence[Rendered]) -> list[Rendered]:
        """Messages as the template takes them; calls and their results that it would leave out become text."""
        names = {call["id"]: call["function"]["name"] for m in messages for call in m.get("tool_calls", ())}
        return [message for m in messages for message in self._taken(m, names)]

    def _taken(self, message: Rendered, names: Mapping[str, str]) -> list[Rendered]:
        if message["role"] == "tool":
            if not self.results and message.get("tool_call_id") in names:
                return [{"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}]
            name = message.get("name") or names.get(message.get("tool_call_id", ""))
            named = {"name": name} if name else {}
            given = {"tool_call_id": self._id(message["tool_call_id"])} if message.get("tool_call_id") else {}
            return [{**message, **named, **given}]
        if not message.get("tool_calls"):
            return [message]
        if not self.calls:
            written = [_written(call["function"]) for call in message["tool_calls"]]
            text = "\n".join(filter(None, (message["content"], *written)))
            return [{name: value for name, value in message.items() if name != "tool_calls"} | {"content": text}]
        return [{**message, "tool_calls": [self._call(call) for call in message["tool_calls"]]}]

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"] if self.text else _object(function["arguments"])
        return {
            "id": self._id(call["id"]),
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }

    def _id(self, given: str) -> str:
        """An id as the template takes it; equal ones stay equal."""
        if not self.short or re.fullmatch("[A-Za-z0-9]{9}", given):
            return given
        return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:9]


def told_of(functions: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says of functions where the template says nothing."""
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return (
        f"You can call these functions, each given as JSON:\n{listed}\n\nCall a function like this:\n"
        f'{OPEN}\n{{"name": NAME, "arguments": OBJECT}}\n{CLOSE}'
    )


def with_system(messages: Sequence[Rendered], text: str) -> list[Rendered]:
    """Messages with a text at the end of the system message, which they may not have yet."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def dialect_of(tokenizer: Any) -> Dialect:
    """What the tokenizer's chat template does with tools."""
    template = getattr(tokenizer, "chat_template", None)
    return _dialect(tokenizer, str(template)) if template else Dialect()


@lru_cache(maxsize=8)
def _dialect(tokenizer: Any, template: str) -> Dialect:
    user = {"role": "user", "content": "?"}
    offered = {
        "name": OFFERED,
        "description": "-",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string"}}},
    }
    tools = [{"type": "function", "function": offered}]
    found = Dialect(
        tools=OFFERED in (_rendered(tokenizer, [user], tools) or ""),
        thoughts=next((marks for marks in THOUGHTS if marks.end in template), None),
    )
    for answered, text, short in product((True, False), (False, True), (False, True)):
        call = {
            "id": _SHORT if short else _LONG,
            "type": "function",
            "function": {
                "name": CALLED,
                "arguments": json.dumps({KEY: VALUE}) if text else {KEY: VALUE},
            },
        }
        result = {"role": "tool", "content": RESULT, "tool_call_id": call["id"], "name": CALLED}
        messages = [user, {"role": "assistant", "content": "", "tool_calls": [call]}, *([result] if answered else ())]
        written = _rendered(tokenizer, messages, tools) or ""
        seen = replace(found, text=text, short=short, results=RESULT in written, calls=CALLED in written)
        form = format_of(written[max(0, written.find(CALLED) - BEFORE) :]) if seen.calls else None
        if seen.calls and (form is None or _WRITTEN.search(written)):
            return replace(seen, format=form)
        if written and not seen.calls:
            found = replace(found, results=found.results or seen.results)
    return found


def _rendered(tokenizer: Any, messages: Sequence[Rendered], tools: Sequence[Rendered]) -> str | None:
    """What the template makes of messages; None if it refuses them."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=list(tools), tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program and can raise anything
        return None
    return text


def _object(arguments: str) -> Any:
    """The arguments as an object; as the text they are if they are none."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _written(function: Mapping[str, Any]) -> str:
    return f"{Hermes().head(function['name'])}{function['arguments'] or '{}'}{Hermes.tail}"
