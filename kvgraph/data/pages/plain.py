"""Plain text: paragraphs between blank lines. A line underlined with punctuation is a heading, as in reStructuredText."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from kvgraph.data.pages.base import PageElement, Say, SourcePage, decoded, unique, words

UNDERLINE = re.compile(r"([=\-~^\"'`#*+])\1{2,}\s*$")
URL = re.compile(r"https?://[^\s<>\"')\]]+")
TARGET = re.compile(r"\.\. _([^:\n]{1,200}):\s*(\S*)")  # of reStructuredText


def read(raw: bytes, id: str, where: str, say: Say) -> SourcePage:
    """The page of a text file. Its title is its first heading, or the file's name."""
    found = elements(decoded(raw, where, say))
    first = next((element.text for element in found if element.kind == "heading"), "")
    return SourcePage(id, words(first) or PurePosixPath(id).stem, found, where)


def elements(text: str) -> tuple[PageElement, ...]:
    """The paragraphs and headings of a text."""
    found: list[PageElement] = []
    levels: list[str] = []  # the signs that underline headings, highest first
    anchors: list[str] = []
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        lines = paragraph.strip("\n").split("\n")
        while len(lines) > 1 and _is_heading(lines):
            sign = lines[1].strip()[0]
            if sign not in levels:
                levels.append(sign)
            found.append(PageElement(lines[0].strip(), "heading", levels.index(sign) + 1, unique(anchors)))
            lines, anchors = lines[2:], []
        body = "\n".join(lines)
        if not body.strip():
            continue
        anchors += [name.strip("` ") for name, target in TARGET.findall(body) if not target]
        found.append(PageElement(body.rstrip(), anchors=unique(anchors), links=unique(URL.findall(body))))
        anchors = []
    return tuple(found)


def _is_heading(lines: list[str]) -> bool:
    name, line = lines[0].strip(), lines[1].strip()
    return 0 < len(name) <= 120 and UNDERLINE.match(line) is not None and len(line) >= min(len(name), 3)
