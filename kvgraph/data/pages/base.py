"""What a page is: a document with its structure, as a reader of one file format gives it.

To add a format: a file with a reader in this folder, and a line in `READERS` of `kvgraph.data.pages`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvgraph.data import io

ElementKind = Literal["heading", "term", "paragraph", "code", "item", "row"]
Say = Callable[[str], None]
"""Takes one line about something that was left out or read in another way than it asks for."""

ENTITY = "entity:"  # begins the id of a page that stands for an entity of a knowledge graph, and links to it
MESSAGE = "mid:"  # begins the id of a message, and links to it, as RFC 2392 has it
MOST_BYTES = 32 << 20  # of a file that is read as one page; records and messages are read one at a time
SNIFFED = 8192  # bytes that tell text from binary data
CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)


class PageError(io.DataError):
    """A source can't be read: it is missing, holds no page, or needs a library that isn't installed."""


class MissingReaderError(PageError):
    """A library that reads a file's format isn't installed."""


@dataclass(frozen=True)
class PageElement:
    """A part of a page that belongs together: a paragraph, an item of a list, a row of a table, a code block.

    term: the name of what the following elements describe. level: of a heading, 1 is the highest. anchors: names by
    which links lead here. links: targets as they are written in it.
    """

    text: str
    kind: ElementKind = "paragraph"
    level: int = 0
    anchors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourcePage:
    """A document with its structure.

    id: unique in its source: a path in the folder, the id of a record or message, or an entity. url: where else it is
    known. where: file, and line if there is one, for messages. sources: ids of pages that its own data says it reads.
    """

    id: str
    title: str
    elements: tuple[PageElement, ...]
    where: str = ""
    url: str = ""
    sources: tuple[str, ...] = ()


Reader = Callable[[bytes, str, str, Say], SourcePage]
"""The page of (a file's bytes, its id, where it is, what takes remarks). May raise anything: the caller names the file."""


def content(path: Path) -> bytes | str:
    """The bytes of a file to be read as one page, or why it can't be."""
    if not io.is_gz(path) and path.stat().st_size > MOST_BYTES:  # the size of a pipe or a device is 0
        return _too_large(path)
    with io.opened(path, PageError) as file:
        raw = file.read(MOST_BYTES + 1)
    return raw if len(raw) <= MOST_BYTES else _too_large(path)


def _too_large(path: Path) -> str:
    return f"{path} is left out: it has more than {MOST_BYTES >> 20} MiB; split it, or give its texts as JSON Lines"


def is_binary(raw: bytes) -> bool:
    """Whether bytes don't look like text in any encoding."""
    head = raw[:SNIFFED]
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def decoded(raw: bytes, where: str, say: Say, declared: str = "") -> str:
    """Bytes as text: in UTF-8 or UTF-16 if they can be, else as declared, else as Windows-1252, and then it is said.

    Every byte of the last has a meaning, so nothing is lost. Half surrogates and NUL become the replacement character.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _clean(raw.decode("utf-16", "replace"))
    try:
        return _clean(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        pass
    try:
        return _clean(raw.decode(declared)) if declared else _guessed(raw, where, say)
    except (LookupError, ValueError):
        return _guessed(raw, where, say)


def _guessed(raw: bytes, where: str, say: Say) -> str:
    say(f"{where} is not UTF-8; it is read as Windows-1252")
    return _clean(raw.decode("cp1252", "replace") if b"\x81" not in raw else raw.decode("latin-1"))


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    return text.encode("utf-8", "replace").decode() if any("\ud800" <= c <= "\udfff" for c in text) else text


def words(text: str) -> str:
    """Text on one line, with single spaces."""
    return " ".join(text.split())


def unique(items: Iterable[str]) -> tuple[str, ...]:
    """The items without empty and repeated ones, in order."""
    return tuple(dict.fromkeys(filter(None, items)))
