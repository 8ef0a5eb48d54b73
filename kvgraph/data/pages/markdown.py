"""Markdown: blocks as markdown-it finds them, their text as it is written. Links are Markdown's, and wikis' [[Page#part]]."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from kvgraph.data.pages.base import MissingReaderError, PageElement, Say, SourcePage, decoded, unique, words

INLINE = re.compile(r"\]\(\s*<?([^)\s>]{1,2000})")
REFERENCE = re.compile(r"\[([^\[\]\n]{1,200})\](?:\[([^\[\]\n]{0,200})\])?")
WIKI = re.compile(r"\[\[([^\[\]|\n]{1,300})(?:\|[^\[\]\n]{0,300})?\]\]")
AUTO = re.compile(r"<(https?://[^\s<>]{1,2000})>")
NAMED = re.compile(r"""<[^<>]{0,300}?\b(?:id|name)=["']([^"'<>]{1,200})["']""")
ATTRIBUTES = re.compile(r"\s*\{[^{}\n]*?#([\w.:-]{1,200})[^{}\n]*\}\s*$")
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
TITLE = re.compile(r"^title:\s*[\"']?(.*?)[\"']?\s*$", re.MULTILINE)


def read(raw: bytes, id: str, where: str, say: Say) -> SourcePage:
    """The page of a Markdown file. Its title is in its front matter, or its first heading, or the file's name."""
    text = decoded(raw, where, say)
    front = FRONT.match(text)
    named = TITLE.search(front[1]) if front else None
    found = elements(text[front.end() :] if front else text)
    first = next((element.text.lstrip("# ") for element in found if element.kind == "heading"), "")
    return SourcePage(id, (named[1] if named else "") or words(first) or PurePosixPath(id).stem, found, where)


def elements(text: str) -> tuple[PageElement, ...]:
    """The blocks of a Markdown text.

    Only blocks are parsed; links are looked for by their form. So a page of any size and depth takes time in proportion.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise MissingReaderError("to read Markdown, install markdown-it-py: pip install 'kvgraph[index]'") from None
    parser, env = MarkdownIt("commonmark").enable("table").disable("inline"), {}  # type: ignore[var-annotated]
    lines = text.split("\n")
    tokens = parser.parse(text, env)
    references = {name.casefold(): ref["href"] for name, ref in env.get("references", {}).items()}
    slugs: Counter[str] = Counter()
    found: list[PageElement] = []
    done = 0  # lines that are in an element
    for i, token in enumerate(tokens):
        kind = _kind(tokens, i)
        if kind is None or token.map is None or token.map[0] < done:
            continue
        start, done = token.map
        body = "\n".join(lines[start:done]).rstrip()
        if not body.strip():
            continue
        anchors, level = NAMED.findall(body), 0
        if kind == "heading":
            level, body = int(token.tag[1]), tokens[i + 1].content
            given = ATTRIBUTES.search(body)
            body = words(body[: given.start()] if given else body)
            anchors += [given[1]] if given else []
            anchors.append(_slug(body, slugs))
        found.append(PageElement(body, kind, level, unique(anchors), _links(body, references)))
    return tuple(found)


def _kind(tokens: Sequence[Any], i: int) -> Any:
    """What kind of element begins with a token; None for one that is within, or begins, another."""
    kinds = {"heading_open": "heading", "paragraph_open": "paragraph", "fence": "code", "code_block": "code"}
    kinds |= {"list_item_open": "item", "tr_open": "row", "html_block": "paragraph"}
    if tokens[i].type == "blockquote_open" and tokens[i + 1].type == "blockquote_close":
        return "paragraph"  # what it quotes is nested deeper than the parser goes
    return kinds.get(tokens[i].type)


def _links(text: str, references: dict[str, str]) -> tuple[str, ...]:
    named = [references.get((ref or label).casefold(), "") for label, ref in REFERENCE.findall(text)]
    wiki = [f"wiki:{target.strip()}" for target in WIKI.findall(text)]
    return unique([*INLINE.findall(text), *named, *AUTO.findall(text), *wiki])


def _slug(heading: str, seen: Counter[str]) -> str:
    """The anchor that GitHub and MkDocs give a heading; repeated ones are numbered."""
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
    seen[slug] += 1
    return slug if seen[slug] == 1 else f"{slug}-{seen[slug] - 1}"
