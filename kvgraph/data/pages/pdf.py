"""PDF: the text of its pages, by pypdf. A page's anchor is page=N, as links to PDF files have it."""

from __future__ import annotations

import io
import logging
from pathlib import PurePosixPath

from kvgraph.data.pages import plain
from kvgraph.data.pages.base import MissingReaderError, PageElement, Say, SourcePage, words

MOST_TEXT = 16 << 20  # characters of a file; streams that unpack to more are pypdf's own limit


def read(raw: bytes, id: str, where: str, say: Say) -> SourcePage:
    """The page of a PDF file. What can't be read of it is said, page by page for the first few."""
    try:
        import pypdf
    except ImportError:
        raise MissingReaderError("to read PDF, install pypdf: pip install 'kvgraph[index]'") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports every oddity of a file
    reader = pypdf.PdfReader(io.BytesIO(raw), strict=False)
    found: list[PageElement] = []
    size, failed = 0, []
    for number in range(1, len(reader.pages) + 1):
        try:
            text = reader.pages[number - 1].extract_text()
        except Exception as error:  # pypdf raises whatever a damaged file leads to
            failed.append(f"{number} ({type(error).__name__})")
            continue
        size += len(text)
        if size > MOST_TEXT:
            say(f"{where} is cut at page {number}: it has more than {MOST_TEXT >> 20} Mi characters")
            break
        for i, element in enumerate(plain.elements(text)):
            anchors = (f"page={number}",) if i == 0 else ()
            found.append(PageElement(element.text, anchors=anchors, links=element.links))
    if failed:
        say(f"{where}: can't read page {', '.join(failed[:3])}{f' and {len(failed) - 3} more' if failed[3:] else ''}")
    title = words(str(reader.metadata.title or "")) if reader.metadata else ""
    return SourcePage(id, title or PurePosixPath(id).stem, tuple(found), where)
