"""Corpora: documents from records, text files and folders, one at a time. Pure Python.

A record of a JSON Lines, JSON, CSV or Parquet file (`kvgraph.data.io`) is one document: a template such as
"{title}\\n{text}\\n" says which fields make its text. Any other file is text, and one document. A folder stands for all
files in it, recursively, in sorted order. Hidden ones are left out, and with a warning those that are neither text nor
records, such as images. A name ending in .gz is decompressed.
"""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kvgraph.data import io
from kvgraph.data.pages.base import SNIFFED, is_binary

RECORD_TEMPLATE = "{title}\n{text}\n"
TEXT_TEMPLATE = "{text}"
ID_FIELDS = ("id", "_id")
RECORDS = tuple(filter(None, io.SUFFIXES))


class CorpusError(io.DataError):
    """A corpus can't be read: a missing file, a bad line, a missing field. The message names the file and line."""


@dataclass(frozen=True)
class CorpusDocument:
    """One document.

    name: its id: the field "id" or "_id" of a record, or a text file's path in its folder; "" without one.
    where: its file and line, for messages.
    """

    text: str
    name: str
    where: str


def load(
    path: str | Path, template: str | None = None, limit: int | None = None, token_ids: bool = False
) -> list[CorpusDocument]:
    """All documents of a corpus (or the first `limit`) in order; see `read`. Raises CorpusError if there are none."""
    documents = list(islice(read(path, template, token_ids), limit))
    if not documents:
        raise CorpusError(f"{path} holds no documents")
    return documents


def read(path: str | Path, template: str | None = None, token_ids: bool = False) -> Iterator[CorpusDocument]:
    """Documents of a file of records, a text file, or a folder of such files, as they are read.

    template: text with fields in braces, and "{{" for a brace. The default is "{title}\\n{text}\\n" for records
        ("{text}\\n" for CSV without a column `title`) and the text for text files. The fields of a text file are
        `title` (its name without its ending) and `text`.
    token_ids: a field may also be a list of integers, for documents given as token ids.

    Raises CorpusError, naming file and line, for missing or empty files, text that isn't UTF-8, bad JSON, missing
    fields, fields that are neither texts nor numbers, and a template without a field.
    """
    root = Path(path)
    if not root.exists():
        raise CorpusError(f"there is no file or folder {root}")
    if not root.is_dir():
        yield from _file(root, root.name, template, token_ids)
        return
    for file in io.files(root, CorpusError):
        if reason := _no_document(file):
            warnings.warn(f"{file} is left out: {reason}", stacklevel=2)
        else:
            yield from _file(file, file.relative_to(root).as_posix(), template, token_ids)


def pick(documents: Sequence[CorpusDocument], wanted: Iterable[str]) -> list[CorpusDocument]:
    """The picked documents, in the order given. Each is given by its id, or by its number from 0.

    Raises CorpusError for an unknown document, one picked twice, or an id that several documents have.
    """
    by_name: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        if document.name:
            by_name.setdefault(document.name, []).append(i)
    chosen: dict[int, str] = {}
    for ref in wanted:
        index, *others = by_name.get(ref) or [_number(ref)]
        if others:
            first, second = documents[index].where, documents[others[0]].where
            raise CorpusError(f"{first} and {second} both have the id {ref!r}; change one of them, or pick by number")
        if not 0 <= index < len(documents):
            known = f"numbers 0 to {len(documents) - 1}" + (" or their ids" if by_name else "")
            raise CorpusError(f"there is no document {ref[:40]!r} to pick; documents have {known}")
        if index in chosen:
            raise CorpusError(f"document {ref!r} is picked twice; pick it once")
        chosen[index] = ref
    return [documents[i] for i in chosen]


def _number(ref: str) -> int:
    """The number in a text, or -1. At most 18 digits are ample, and Python refuses thousands of them."""
    return int(ref) if ref.isascii() and ref.isdigit() and len(ref) <= 18 else -1


def _no_document(path: Path) -> str:
    """Why a file that lies among documents can't be one; "" if it can."""
    if io.suffix(path) in io.WHOLE:
        whole = io.read_json(path, CorpusError)
        try:
            io.listed(whole, path, CorpusError)
        except CorpusError:
            return "it holds no list of records"
        return ""
    if io.suffix(path) in RECORDS:
        return ""
    with io.opened(path, CorpusError) as file:
        return "it is not text" if is_binary(file.read(SNIFFED)) else ""


def _file(path: Path, name: str, template: str | None, token_ids: bool) -> Iterator[CorpusDocument]:
    if io.suffix(path) not in RECORDS:
        fields = {"title": Path(name).stem, "text": io.read_text(path, CorpusError)}
        filled = _filled(TEXT_TEMPLATE if template is None else template, fields, str(path), token_ids)
        yield CorpusDocument(filled, name, str(path))
        return
    for where, row in io.records(path, CorpusError):
        id_ = next((str(row[f]) for f in ID_FIELDS if isinstance(row.get(f), str | int)), "")
        chosen = template
        if chosen is None:
            untitled = io.suffix(path) in io.TABLE and "title" not in row
            chosen = "{text}\n" if untitled else RECORD_TEMPLATE
        yield CorpusDocument(_filled(chosen, row, where, token_ids), id_, where)


def _filled(template: str, fields: Mapping[str, Any], where: str, token_ids: bool) -> str:
    """The template with its fields filled in; values are texts, numbers, or (with token_ids) lists of integers."""
    out = []
    for literal, field in _parts(template):
        out.append(literal)
        if field is None:
            continue
        if field not in fields:
            raise CorpusError(
                f"{where} has no field {field!r}; it has {', '.join(fields) or 'none'}; change the template"
            )
        value = fields[field]
        ids = token_ids and isinstance(value, list) and all(type(item) is int for item in value)
        if not (isinstance(value, str | int | float) or ids) or isinstance(value, bool):
            shown = json.dumps(value, ensure_ascii=False)[:40]
            raise CorpusError(f"{where}: field {field!r} is {shown}, not text; change the template or the corpus")
        out.append(str(value))
    return "".join(out)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """A template as (text, name of the field after it or None)."""
    try:
        parts = [(literal, field, spec, how) for literal, field, spec, how in string.Formatter().parse(template)]
    except ValueError as error:
        raise CorpusError(f"the template {template!r} is wrong: {error}; write '{{{{' for a brace") from None
    for _, field, spec, how in parts:
        if field is not None and (not field or spec or how):
            raise CorpusError(f"the template {template!r} is wrong: braces hold the plain name of a field")
    if all(field is None for _, field, _, _ in parts):
        raise CorpusError(
            f"the template {template!r} names no field, so all documents would be the same; write {{text}}"
        )
    return [(literal, field) for literal, field, _, _ in parts]
