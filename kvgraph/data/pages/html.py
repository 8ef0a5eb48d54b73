"""HTML: what is in the main part of a page, without navigation, scripts and styles. Broken markup is read as browsers do."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from kvgraph.data.pages import plain
from kvgraph.data.pages.base import (
    CHARSET,
    SNIFFED,
    MissingReaderError,
    PageElement,
    Say,
    SourcePage,
    decoded,
    unique,
    words,
)

SKIPPED = {"script", "style", "nav", "noscript", "template", "svg", "head", "iframe", "object", "select", "button"}
CLASSES = {"headerlink", "sphinxsidebar", "related", "toctree-wrapper"}  # signs and navigation of Sphinx
HEADINGS = {f"h{level}": level for level in range(1, 7)}
BLOCKS = {
    *"p div section article main aside body blockquote figure figcaption table tbody thead dl dd ul ol hr".split()
}
BLOCKS |= {*"form fieldset address details summary header footer caption center".split()}
STARTS = {"li": "item", "tr": "row", "pre": "code", "dt": "term"} | dict.fromkeys(HEADINGS, "heading")
LAID_OUT = ("table", "ul", "ol", "dl", "pre", *HEADINGS)  # a row with one of these is there for layout
TAG = re.compile(r"<[^<>]{0,10000}>")
MAIN = "//main | //*[@role='main'] | //article"


def read(raw: bytes, id: str, where: str, say: Say) -> SourcePage:
    """The page of an HTML file. Its title is its first heading of level 1, else its <title>, else the file's name."""
    declared = CHARSET.search(raw[:SNIFFED])
    return page(decoded(raw, where, say, declared[1].decode() if declared else ""), id, where, say)


def page(text: str, id: str, where: str, say: Say) -> SourcePage:
    """The page of HTML as text."""
    try:
        from lxml import etree, html
    except ImportError:
        raise MissingReaderError("to read HTML, install lxml: pip install 'kvgraph[index]'") from None
    parser = html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    name = PurePosixPath(id).stem
    if not text.strip():
        return SourcePage(id, name, (), where)
    root = etree.fromstring(text.encode(), parser)
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log):
        say(f"{where} is nested too deep; it is read without its structure")
        return SourcePage(id, name, plain.elements(TAG.sub("\n\n", text)), where)
    if root is None:
        return SourcePage(id, name, (), where)
    titles = root.xpath("//title")
    canonical = root.xpath("//link[@rel='canonical']/@href")
    main = max(root.xpath(MAIN), key=lambda node: len(node.xpath("string()")), default=root)
    walk = _Walk()
    walk.over(main, etree)
    found = tuple(walk.found)
    first = next((element.text for element in found if element.level == 1), "")
    named = words(titles[0].xpath("string()")) if titles else ""
    return SourcePage(id, first or named or name, found, where, url=str(canonical[0]) if canonical else "")


class _Walk:
    """Gathers elements while it goes through a tree, without recursion: pages may be nested thousands deep."""

    def __init__(self) -> None:
        self.found: list[PageElement] = []
        self.parts: list[str] = []
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.kinds: list[tuple[Any, str]] = []  # elements that are open and say what their text is
        self.code = 0  # open <pre>
        self.row: Any = None  # the open row of a table; nothing in it ends an element

    def over(self, root: Any, etree: Any) -> None:
        """Gather what is in a tree."""
        walker = etree.iterwalk(root, events=("start", "end"))
        for event, node in walker:
            tag = node.tag if isinstance(node.tag, str) else ""
            if event == "start":
                if node is not root and self._is_skipped(node, tag):
                    walker.skip_subtree()
                    continue
                self._start(node, tag)
                self._text(node.text)
            else:
                skipped = node is not root and self._is_skipped(node, tag)
                if not skipped:
                    self._end(node, tag)
                if node is not root:
                    self._text(node.tail)
        self.flush()

    def _is_skipped(self, node: Any, tag: str) -> bool:
        return (
            not tag
            or tag in SKIPPED
            or node.get("role") == "navigation"
            or not CLASSES.isdisjoint((node.get("class") or "").split())
        )

    def _start(self, node: Any, tag: str) -> None:
        if self.row is None and (tag in BLOCKS or tag in STARTS):
            self.flush()
            if tag in STARTS and (tag != "tr" or next(node.iter(*LAID_OUT), None) is None):
                self.kinds.append((node, STARTS[tag]))
                self.row = node if tag == "tr" else None
        elif tag in BLOCKS or tag in STARTS:
            self.parts.append(" ")
        self.code += tag == "pre"
        self.anchors += filter(None, (node.get("id"), node.get("name") if tag == "a" else None))
        if tag == "a" and node.get("href"):
            self.links.append(node.get("href").strip())
        if tag == "br":
            self.parts.append("\n")
        if tag in ("td", "th") and self.row is not None and "".join(self.parts[-2:]).strip():
            self.parts.append(" | ")

    def _end(self, node: Any, tag: str) -> None:
        if self.row is node:
            self.row = None
        if self.row is None and (tag in BLOCKS or tag in STARTS):
            self.flush()
        if self.kinds and self.kinds[-1][0] is node:
            self.kinds.pop()
        self.code -= tag == "pre"

    def _kind(self) -> str:
        return self.kinds[-1][1] if self.kinds else "paragraph"

    def _text(self, text: str | None) -> None:
        if text:
            self.parts.append(text if self.code else re.sub(r"\s+", " ", text))

    def flush(self) -> None:
        """End the element that is being gathered."""
        kind = self._kind()
        text = "".join(self.parts)
        text = text.strip("\n").rstrip() if self.code else "\n".join(map(words, text.split("\n"))).strip()
        if not text:
            self.parts = []
            return  # anchors wait for the text that follows them
        if kind == "code":
            text = f"```\n{text}\n```"
        elif kind == "item":
            text = f"- {text}"
        elif kind == "heading":
            text = words(text)
        level = HEADINGS[self.kinds[-1][0].tag] if kind == "heading" else 0
        self.found.append(PageElement(text, kind, level, unique(self.anchors), unique(self.links)))  # type: ignore[arg-type]
        self.parts, self.anchors, self.links = [], [], []
