"""What a format of calls is, and the tools to read one from a text that comes piece by piece.

A format reads with generators. Each yields what it found so far, or None when it needs more text, and returns whether what
it read were calls. So one description of a format serves complete and streamed answers.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

ARGUMENTS = ("arguments", "parameters")  # names that models give the object of a call's arguments
SPACES = re.compile(r"\s*")
_NEXT = re.compile(r'["{}\[\]]')  # what matters in JSON outside of strings
_QUOTE = re.compile(r'["\\]')  # and inside of one
_PLAIN = re.compile(r"[^\s,:{}\[\]\"]{0,400}")  # a number, true, false or null


@dataclass(frozen=True)
class Named:
    """A call begins: the name of its function."""

    name: str


@dataclass(frozen=True)
class Argued:
    """A piece of the JSON of the arguments of the call that began last."""

    text: str


Steps = Generator[Named | Argued | None, None, T]


class Incoming:
    """Text to be read. `text` grows until `ended` is true; what stands before `at` is read."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to read, for good."""
        return self.ended and self.at == len(self.text)

    def unfinished(self, marks: Sequence[str]) -> int:
        """How many characters at the end may yet become one of these texts."""
        if self.ended:
            return 0
        rest = self.text[max(self.at, len(self.text) - max(map(len, marks))) :]
        return max((n for mark in marks for n in range(1, len(mark)) if rest.endswith(mark[:n])), default=0)

    def forget(self) -> None:
        """Let go of what is read."""
        self.text, self.at = self.text[self.at :], 0


class ToolFormat(ABC):
    """How a family of models writes calls. Instances are stateless.

    name: of the format. opens: texts with which calls begin. first: whether calls are the whole answer, and can only
    begin it. marks: texts that a tokenizer may have as special tokens, which are shown in the answer all the same.

    Forced calls are written opening, then for each call head, arguments and tail, with `between` between two (None: there
    is never more than one), then closing.
    """

    name: ClassVar[str]
    opens: ClassVar[tuple[str, ...]]
    first: ClassVar[bool] = False
    marks: ClassVar[tuple[str, ...]] = ()
    opening: ClassVar[str] = ""
    tail: ClassVar[str]
    between: ClassVar[str | None] = None
    closing: ClassVar[str] = ""

    @abstractmethod
    def writes(self, text: str) -> bool:
        """Whether a template that rendered a call as in `text` uses this format."""

    @abstractmethod
    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""

    @abstractmethod
    def read(self, source: Incoming) -> Steps[bool]:
        """Read calls that begin with one of `opens`; whether they are well-formed, up to where they end."""


# -- parts of JSON ------------------------------------------------------------------------------------------------------


def literal(source: Incoming, text: str) -> Steps[bool]:
    """Read a text if it comes next."""
    while True:
        there = source.text[source.at : source.at + len(text)]
        if there == text:
            source.at += len(text)
            return True
        if source.ended or not text.startswith(there):
            return False
        yield None


def spaces(source: Incoming) -> Steps[None]:
    """Read white space."""
    yield from matching(source, SPACES)


def matching(source: Incoming, pattern: re.Pattern[str]) -> Steps[str]:
    """Read as much as a pattern matches, which may be nothing. More text may only lengthen a match."""
    while True:
        found = pattern.match(source.text, source.at)
        end = found.end() if found else source.at
        if end < len(source.text) or source.ended:
            text = source.text[source.at : end]
            source.at = end
            return text
        yield None


def value(source: Incoming, told: bool = False) -> Steps[str | None]:
    """Read a JSON value; its text, or None for what is none. told: give out an object piece by piece as it comes."""
    begun = source.at
    while begun == len(source.text) and not source.ended:
        yield None
    if source.text[begun : begun + 1] not in ("{", "[", '"'):
        text = yield from matching(source, _PLAIN)
        return text if loaded(text) is not NOTHING else None
    told = told and source.text[begun] == "{"
    depth, inside, given = 0, False, begun
    while True:
        while (found := (_QUOTE if inside else _NEXT).search(source.text, source.at)) is not None:
            char = found[0]
            if char == "\\":
                if found.end() == len(source.text):
                    source.at = found.start()  # what it escapes is still to come
                    break
                source.at = found.end() + 1
                continue
            source.at = found.end()
            if char == '"':
                inside = not inside
            else:
                depth += 1 if char in "{[" else -1
            if depth == 0 and not inside:
                text = source.text[begun : source.at]
                if told:
                    yield Argued(source.text[given : source.at])
                return text if loaded(text) is not NOTHING else None
        else:
            source.at = len(source.text)
        if told and given < source.at:
            yield Argued(source.text[given : source.at])
            given = source.at
        if source.ended:
            source.at = len(source.text)
            return None
        yield None


class _Nothing:
    pass


NOTHING = _Nothing()


def loaded(text: str | None) -> Any:
    """The value of a JSON text; NOTHING for what is none, in any way that Python's reader may fail or is too kind."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return NOTHING if text is None else json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return NOTHING


def call(source: Incoming) -> Steps[bool]:
    """Read a call that is one JSON object with a name and arguments. Other members are passed over."""
    name: str | None = None
    arguments: str | None = None
    if not (yield from literal(source, "{")):
        return False
    while True:
        yield from spaces(source)
        key = loaded((yield from value(source)))
        if not isinstance(key, str):
            return False
        yield from spaces(source)
        if not (yield from literal(source, ":")):
            return False
        yield from spaces(source)
        if key in ARGUMENTS and arguments is None:
            arguments = yield from object_of(source, told=name is not None)
            if arguments is None:
                return False
        elif key == "name" and name is None:
            name = loaded((yield from value(source)))
            if not isinstance(name, str):
                return False
            yield Named(name)
            if arguments is not None:
                yield Argued(arguments)
        elif (yield from value(source)) is None or key == "name" or key in ARGUMENTS:
            return False
        yield from spaces(source)
        if (yield from literal(source, "}")):
            break
        if not (yield from literal(source, ",")):
            return False
    if name is not None and arguments is None:
        yield Argued("{}")
    return name is not None


def listed_calls(source: Incoming) -> Steps[bool]:
    """Read calls in a list, after its "["; the last one of a text that ended needs no "]"."""
    while True:
        yield from spaces(source)
        if not (yield from call(source)):
            return False
        yield from spaces(source)
        if (yield from literal(source, "]")) or source.done:
            return True
        if not (yield from literal(source, ",")):
            return False


def object_of(source: Incoming, told: bool) -> Steps[str | None]:
    """Read the arguments of a call; the JSON of an object, or None. told: give it out too.

    Some models write the object as a text, or null for an empty one.
    """
    text = yield from value(source, told)
    found = loaded(text)
    if isinstance(found, dict):
        return text
    written = "{}" if found is None else found
    if not isinstance(written, str) or not isinstance(loaded(written), dict):
        return None
    if told:
        yield Argued(written)
    return written
