"""Pages of a source: a folder, or a file of Markdown, HTML, text, records, PDF, messages or triples.

A folder stands for all files in it, as in `kvgraph.data.io`. What can't be read is left out, and one line says why. No
file is held in memory beyond `MOST_BYTES`, and records and messages are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvgraph.data import io
from kvgraph.data.pages import html, mail, markdown, pdf, plain, triples
from kvgraph.data.pages.base import (
    MOST_BYTES,
    MissingReaderError,
    PageElement,
    PageError,
    Reader,
    Say,
    SourcePage,
    content,
    is_binary,
    words,
)

__all__ = ["READERS", "PageElement", "PageError", "SourcePage", "read"]

READERS: dict[str, Reader] = {
    **dict.fromkeys((".md", ".markdown", ".mdown"), markdown.read),
    **dict.fromkeys((".html", ".htm", ".xhtml"), html.read),
    ".pdf": pdf.read,
}
"""Readers by suffix. Any other file is text, unless it holds records, messages or triples."""

RECORDS = tuple(filter(None, io.SUFFIXES))
TRIPLES = (".tsv", ".nt")
MAILBOXES = (".mbox", ".mbx")
# What Sphinx makes beside its pages: folders (sources again, and what pages load), and lists of what is where in files.
SPHINX = {"_sources", "_static", "_images", "_downloads"}
SPHINX_LISTS = ("genindex*.html", "py-modindex.html", "search.html", "searchindex.js", "objects.inv")
TEXT_FIELDS = ("text", "body", "content", "abstract")


def read(source: str | Path, say: Say) -> Iterator[SourcePage]:
    """The pages of a source, in the order of its files' paths. Pages that share an id get numbers.

    Raises PageError if there is no such source, or a library that a file needs isn't installed.
    """
    root = Path(source)
    if not root.exists():
        raise PageError(f"there is no file or folder {root}")
    files = io.files(root, PageError) if root.is_dir() else [root]
    beside = {file for file in files if not SPHINX.isdisjoint(file.relative_to(root).parts[:-1])}
    listing = [file for file in files if any(fnmatch(file.name, pattern) for pattern in SPHINX_LISTS)]
    lists = {file for file in listing if (file.parent / "searchindex.js").exists()}
    if beside:
        say(
            f"{len(beside):,} files in {', '.join(sorted(SPHINX))} are left out: Sphinx makes these folders beside its pages"
        )
    if lists:
        say(f"{len(lists):,} lists that Sphinx makes, such as {min(lists).name}, are left out")
    beside |= lists
    seen: dict[str, int] = {}  # the numbers given to ids
    for file in (file for file in files if file not in beside):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        for page in _file(file, name, say):
            if not page.elements:
                say(f"{page.where} is left out: it has no text")
                continue
            new = page.id
            while new in seen:
                seen[page.id] += 1
                new = f"{page.id}-{seen[page.id]}"
            seen[new] = 1
            if new != page.id:
                say(f"{page.where}: there is another page {page.id!r}; this one is called {new!r}")
                page = SourcePage(new, page.title, page.elements, page.where, page.url, page.sources)
            yield page


def _file(path: Path, name: str, say: Say) -> Iterator[SourcePage]:
    kind = io.suffix(path)
    if not path.is_file():  # a pipe would be waited for, a link may lead nowhere
        say(f"{path} is left out: it is not an ordinary file")
        return
    try:
        if kind in MAILBOXES:
            yield from mail.read(path, say)
            return
        if kind in RECORDS:
            yield from _records(path, name, say)
            return
        if kind in TRIPLES and (found := triples.read(path, say)) is not None:
            yield from triples.pages(found, str(path))
            return
        raw = content(path)
        if isinstance(raw, str):
            say(raw)
        elif kind != ".pdf" and is_binary(raw):
            say(f"{path} is left out: it is not text")
        else:
            yield READERS.get(kind, plain.read)(raw, name, str(path), say)
    except MissingReaderError:
        raise
    except PageError as error:
        say(f"{error}; it is left out")
    except (OSError, io.DataError) as error:
        say(f"{path} is left out: {io.first_line(error)}")
    except Exception as error:  # a reader's library raises whatever a broken file leads to
        say(f"{path} is left out: {type(error).__name__}: {io.first_line(error)}")


def _records(path: Path, name: str, say: Say) -> Iterator[SourcePage]:
    """A page for each record, and the pages of entities if records are triples."""
    facts = []
    if io.suffix(path) in io.WHOLE and path.stat().st_size > MOST_BYTES:
        say(f"{path} is left out: it has more than {MOST_BYTES >> 20} MiB; give its records as JSON Lines")
        return
    try:
        for number, found in enumerate(io.scan(path, PageError), 1):
            try:
                record = found.parse()
            except PageError as error:
                say(f"{error}; it is left out")
                continue
            if triples.is_triple(record):
                facts.append(triples.of_record(record))
            else:
                yield _record(record, f"{name}:{number}", found.where)
    except PageError as error:  # the rest of the file can't be read
        say(f"{error}; the rest of it is left out")
    yield from triples.pages(facts, str(path))


def _record(record: dict[str, Any], name: str, where: str) -> SourcePage:
    """A record with its fields id, title, text, url, and the ids of pages that it reads: links, or cites.

    Without a field that holds its text, all fields are its text, one a line.
    """
    id = next((str(record[field]) for field in ("id", "_id") if isinstance(record.get(field), str | int)), name)
    text = next((record[field] for field in TEXT_FIELDS if isinstance(record.get(field), str)), None)
    if text is None:
        kept = {field: value for field, value in record.items() if isinstance(value, str | int | float)}
        text = "\n".join(f"{field}: {value}" for field, value in kept.items())
    title = record.get("title")
    listed: list[Any] = next((record[field] for field in ("links", "cites") if isinstance(record.get(field), list)), [])
    url = record.get("url")
    return SourcePage(
        id,
        words(title) if isinstance(title, str) and title.strip() else id,
        plain.elements(text.replace("\r\n", "\n").replace("\0", "\ufffd").encode("utf-8", "replace").decode()),
        where,
        url if isinstance(url, str) else "",
        tuple(str(ref) for ref in listed if isinstance(ref, str | int)),
    )
