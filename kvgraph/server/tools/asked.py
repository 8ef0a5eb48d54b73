"""What a request asks of tools: which functions may be called, which must be, and the grammar that sees to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvgraph.engine.guide import JSON, Grammar
from kvgraph.server.tools.base import ToolFormat
from kvgraph.server.tools.reading import Marks, Reading

Special = Callable[[str], int | None]


@dataclass(frozen=True)
class Function:
    """A function that may be called. parameters: a JSON schema. strict: arguments are kept to it also in a free answer."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def told(self) -> dict[str, Any]:
        """As the template gets it."""
        described = {"description": self.description} if self.description else {}
        return {"name": self.name, **described, "parameters": self.parameters or {"type": "object", "properties": {}}}

    def schema(self) -> dict[str, Any]:
        """The schema of its arguments, which are an object whatever it says, and only those that are declared."""
        parameters = {"properties": {}} if self.parameters is None else self.parameters
        return closed({**parameters, "type": "object"})


@dataclass(frozen=True)
class ToolUse:
    """What a request asks. functions: all of them, which the model is told of. allowed: names of those that may be called."""

    functions: tuple[Function, ...]
    choice: Literal["auto", "required"]
    allowed: frozenset[str]
    parallel: bool = True

    @property
    def callable(self) -> tuple[Function, ...]:
        """The functions that may be called."""
        return tuple(function for function in self.functions if function.name in self.allowed)

    @property
    def forced(self) -> bool:
        """Whether there must be a call."""
        return self.choice == "required"

    def told(self) -> list[dict[str, Any]]:
        """The functions as a template gets them."""
        return [{"type": "function", "function": function.told()} for function in self.functions]

    def only(self, name: str) -> ToolUse:
        """The same of one function."""
        return ToolUse(self.functions, self.choice, frozenset((name,)), self.parallel)

    def guided(self, answer: bool) -> bool:
        """Whether the answer is kept to a grammar. answer: the request says what a text must be."""
        return self.forced or answer or any(function.strict for function in self.callable)

    def reading(self, form: ToolFormat, thoughts: Marks | None, thinking: bool, answer: bool) -> Reading:
        """How the answer is read. thinking: the prompt ends within the thoughts."""
        return Reading(
            form,
            self.allowed,
            most=None if self.parallel else 1,
            guided=self.guided(False) and (self.forced or not answer),
            forced=self.forced,
            thoughts=thoughts,
            thinking=thinking,
        )


def grammar(
    asked: ToolUse, form: ToolFormat, special: Special, before: str | None = None, answer: str | None = None
) -> Grammar:
    """The answers that keep to what is asked: calls alone where they are forced, else calls or a text.

    special: the id of a text that is a special token, or None. before: a text that ends what stands before a forced call.
    answer: a JSON schema of the text; with it, an answer is such a text or calls.
    """
    lark = _Lark(form, special, [before] if before else [])
    calls = lark.calls(asked.callable, asked.parallel)
    if asked.forced:
        thought = f"thought{lark.lazy(before)}" if before else ""
        rules = [f"start: {'thought SPACE ' if before else ''}{calls}", thought, r"SPACE: /\s{0,4}/" if before else ""]
    elif answer is not None:
        rules = [f"start: answer | {calls}", f"answer: %json {_guided(json.loads(answer))}"]
    elif form.first:
        rules = [f"start: {calls} | FREE", r"FREE: /\s*([^{\s](.|\n)*)?/"]
    else:
        rules = [f"start: region{'*' if asked.parallel else '?'} TEXT", f"open{lark.lazy(form.opens[0])}"]
        rules.append(f"region: open {lark.region(asked.callable, asked.parallel)}")
    return Grammar("lark", "\n".join(filter(None, (*rules, r"TEXT: /(.|\n)*/", *lark.rules.values()))))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with no other properties than those named, where it says nothing of others: functions take no more.

    One whose parts add up to an object stays as it is, because no part names all properties.
    """
    found: dict[str, Any] = schema if _adds_up(schema) else _closed(schema)
    return found


def _adds_up(schema: Any) -> bool:
    """Whether an object of this schema may be described in several places."""
    if isinstance(schema, list):
        return any(map(_adds_up, schema))
    if not isinstance(schema, dict):
        return False
    beside = ("anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas")
    here = "allOf" in schema or ("properties" in schema and any(name in schema for name in beside))
    return here or any(map(_adds_up, schema.values()))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found[name] = {key: _closed(part) for key, part in value.items()}
        elif name in ("items", "prefixItems", "anyOf", "oneOf"):
            found[name] = _closed(value)
    others = ("additionalProperties", "unevaluatedProperties", "patternProperties")
    if "properties" in schema and not any(name in schema for name in others):
        found["additionalProperties"] = False
    return found


class _Lark:
    """Parts of a Lark grammar of calls. rules: those of functions, which the parts name."""

    def __init__(self, form: ToolFormat, special: Special, marks: Sequence[str] = ()):
        self._form, self._special, self._marks = form, special, marks
        self.rules: dict[str, str] = {}

    def calls(self, functions: Sequence[Function], parallel: bool) -> str:
        """All calls, with what stands around them."""
        form, one = self._form, self._call(functions)
        more = f"({self._text(form.between)} {one})*" if parallel and form.between is not None else ""
        return f"{self._text(form.opening)} {one} {more} {self._text(form.closing)}"

    def region(self, functions: Sequence[Function], parallel: bool) -> str:
        """What comes after the text with which calls open: all of them, or one where each opens anew."""
        form, mark = self._form, self._form.opens[0]
        if not form.opening:
            return self._call(functions, len(mark))
        one = self._call(functions)
        more = f"({self._text(form.between)} {one})*" if parallel and form.between is not None else ""
        return f"{self._text(form.opening[len(mark) :])} {one} {more} {self._text(form.closing)}"

    def lazy(self, mark: str) -> str:
        """The rest of a rule for a text up to a mark."""
        return f"[lazy]: TEXT {self._text(mark)}" if self._special(mark) is None else f": TEXT {self._text(mark)}"

    def _call(self, functions: Sequence[Function], skipped: int = 0) -> str:
        """A call of one of the functions, without its first characters."""
        options = []
        for number, function in enumerate(functions):
            rule = f"arguments_{number}"
            self.rules[rule] = f"{rule}: %json {_guided(function.schema())}"
            head = self._form.head(function.name)[skipped:]
            options.append(f"{self._text(head)} {rule} {self._text(self._form.tail)}")
        return f"({' | '.join(options)})"

    def _text(self, text: str | None) -> str:
        """A text, in which special tokens are themselves."""
        parts, text = [], text or ""
        known = (*self._form.marks, *self._marks)
        marks = {mark: token for mark in known if (token := self._special(mark)) is not None}
        while found := min(((text.find(mark), mark) for mark in marks if mark in text), default=None):
            at, mark = found
            parts += [json.dumps(text[:at])] * bool(at) + [f"<[{marks[mark]}]>"]
            text = text[at + len(mark) :]
        return " ".join([*parts, *([json.dumps(text)] if text else ())])


def _guided(schema: Mapping[str, Any]) -> str:
    """A JSON schema within a Lark grammar, whose JSON is written as elsewhere."""
    return json.dumps({**schema, "x-guidance": JSON}, ensure_ascii=False)
