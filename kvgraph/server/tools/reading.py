"""What an answer says, as it comes: thoughts, text, and calls of functions.

However a text is cut into pieces, the same is read.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from kvgraph.server.tools.base import SPACES, Argued, Incoming, Named, ToolFormat, spaces


@dataclass(frozen=True)
class Said:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True)
class Thought:
    """Text of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call begins. index: among the calls of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON of a call's arguments."""

    index: int
    text: str


Event = Said | Thought | CallBegun | CallArguments


@dataclass(frozen=True)
class Marks:
    """What begins and ends the thoughts before an answer."""

    begin: str
    end: str


@dataclass(frozen=True)
class Reading:
    """How an answer is to be read; `reader` gives what reads one. Without a format and thoughts, it is a text.

    names: of the functions that may be called; anything else is no call. most: of calls; further ones are left out.
    guided: the answer keeps to a grammar of calls, so a call is told as it comes. Without that, one is told when it is
    complete, because a malformed one is text. forced: there is nothing but calls. thinking: the prompt ends within the
    thoughts.
    """

    format: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    most: int | None = None
    guided: bool = False
    forced: bool = False
    thoughts: Marks | None = None
    thinking: bool = False

    def reader(self) -> AnswerReader:
        """What reads one answer."""
        return AnswerReader(self)


PLAIN = Reading()


@dataclass
class CallMade:
    """A call that an answer asks for. arguments: JSON, of an object unless the answer was cut short."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """What a complete answer says."""

    text: str = ""
    thoughts: str = ""
    calls: list[CallMade] = field(default_factory=list)


class AnswerReader:
    """Reads one answer: `feed` with every piece of its text, then `end`."""

    def __init__(self, reading: Reading):
        self._reading = reading
        self._source = Incoming()
        self._read = self._answer()
        self.calls = 0  # told so far
        self._begun = 0  # with those that are left out

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text makes certain."""
        self._source.text += text
        return self._events()

    def end(self) -> list[Event]:
        """What the end of the text makes certain. Nothing may follow."""
        self._source.ended = True
        return self._events()

    def _events(self) -> list[Event]:
        return [_joined(list(part)) for _, part in groupby(self._certain(), key=_part)]

    def _certain(self) -> Iterator[Event]:
        """What can be told before more text is there."""
        for event in self._read:
            if event is None:
                return
            yield event

    def _answer(self) -> Generator[Event | None]:
        """All events; None where more text is needed."""
        reading, source = self._reading, self._source
        if reading.thoughts is not None:
            yield from self._thoughts(reading.thoughts)
        if reading.format is not None:
            yield from self._text_and_calls(reading.format)
        while not source.done:
            if source.at < len(source.text):
                yield Said(source.text[source.at :])
                source.at = len(source.text)
            source.forget()
            yield None

    def _thoughts(self, marks: Marks) -> Generator[Event | None]:
        """Thoughts, if the answer begins with them, without the white space around them."""
        source = self._source
        if not self._reading.thinking:
            begun = 0
            while True:
                begun = _after_spaces(source, begun)
                start = source.text[begun : begun + len(marks.begin)]
                if start == marks.begin:
                    break
                if source.ended or not marks.begin.startswith(start):
                    return
                yield None
            source.at = begun + len(marks.begin)
        waiting: list[str] = []
        told = False
        while True:
            found = source.text.find(marks.end, source.at)
            end = found if found >= 0 else len(source.text) - source.unfinished((marks.end,))
            new = source.text[source.at : end]
            source.at = end
            if shown := _shown(waiting, new):
                yield Thought(shown if told else shown.lstrip())
                told = True
            if found >= 0:
                source.at += len(marks.end)
                break
            if source.ended:
                return
            source.forget()
            yield None
        for _ in spaces(source):
            yield None

    def _text_and_calls(self, form: ToolFormat) -> Generator[Event | None]:
        """White space before calls, and after the last one, is left out."""
        source, first = self._source, True
        waiting: list[str] = []
        while True:
            found = _opening(source, form, first)
            end = len(source.text) - _held(source, form, first) if found is None else found
            new = source.text[source.at : end]
            source.at = end
            if shown := _shown(waiting, new):
                first = False
                yield Said(shown)
            if found is not None:
                first = False
                text = yield from self._region(form)
                if text is None:
                    waiting.clear()
                elif shown := _shown(waiting, text):
                    yield Said(shown)
            elif source.ended:
                break
            else:
                source.forget()
                yield None
        if waiting and not self.calls:
            yield Said("".join(waiting))

    def _region(self, form: ToolFormat) -> Generator[Event | None, None, str | None]:
        """What begins like a call; it is text, which is returned, if it isn't well-formed."""
        source, reading, begun = self._source, self._reading, self._source.at
        read = form.read(source)
        held: list[Named | Argued] = []
        told = self.calls
        while True:
            try:
                step = next(read)
            except StopIteration as stopped:
                fine = bool(stopped.value)
                break
            if step is None:
                yield None
            elif isinstance(step, Named) and step.name not in reading.names:
                fine = False
                break
            elif reading.guided:
                yield from self._told(step)
            else:
                held.append(step)
        if reading.guided and (fine or reading.forced or self.calls > told):  # and cut short, if it isn't fine
            return None
        if not fine:
            return source.text[begun : source.at]
        for step in held:
            yield from self._told(step)
        return None

    def _told(self, step: Named | Argued) -> Iterator[Event]:
        """A call, or a part of its arguments, unless there are too many."""
        most = self._reading.most
        if isinstance(step, Named):
            self._begun += 1
            if most is None or self._begun <= most:
                self.calls += 1
                yield CallBegun(self.calls - 1, f"call_{secrets.token_hex(12)}", step.name)
        elif most is None or self._begun <= most:
            yield CallArguments(self.calls - 1, step.text)


def message(events: Iterable[Event]) -> Message:
    """What all events of an answer say together."""
    found = Message()
    for event in events:
        if isinstance(event, Said):
            found.text += event.text
        elif isinstance(event, Thought):
            found.thoughts += event.text
        elif isinstance(event, CallBegun):
            found.calls.append(CallMade(event.id, event.name))
        else:
            found.calls[event.index].arguments += event.text
    return found


def _part(event: Event) -> tuple[type[Event], int]:
    """Which text this is a part of; a call's beginning is one by itself."""
    return type(event), event.index if isinstance(event, CallBegun | CallArguments) else 0


def _joined(parts: list[Event]) -> Event:
    """Parts of one text as one."""
    first = parts[0]
    if isinstance(first, CallBegun):
        return first
    text = "".join(part.text for part in parts if not isinstance(part, CallBegun))
    return replace(first, text=text)


def _shown(waiting: list[str], new: str) -> str:
    """What can be told of new text: all but the white space at its end, which waits with what waited for it."""
    shown = new.rstrip()
    if shown:
        shown = "".join(waiting) + shown
        new = new[len(new.rstrip()) :]
        waiting.clear()
    if new:
        waiting.append(new)
    return shown


def _after_spaces(source: Incoming, at: int) -> int:
    found = SPACES.match(source.text, at)
    return at if found is None else found.end()


def _opening(source: Incoming, form: ToolFormat, first: bool) -> int | None:
    """Where calls begin in what isn't read yet. first: nothing but white space was read."""
    if not form.first:
        return min((at for mark in form.opens if (at := source.text.find(mark, source.at)) >= 0), default=None)
    at = _after_spaces(source, source.at)
    return at if first and source.text.startswith(form.opens, at) else None


def _held(source: Incoming, form: ToolFormat, first: bool) -> int:
    """How many characters at the end may yet become the beginning of calls."""
    if source.ended or not form.first:
        return source.unfinished(form.opens)
    at = _after_spaces(source, source.at)
    begun = first and any(mark.startswith(source.text[at:]) for mark in form.opens)
    return len(source.text) - at if begun else 0
