"""Knowledge graphs as triples: TSV with three columns, JSON Lines with subject, predicate and object, or N-Triples.

An entity that is the subject of triples is a page, one item a triple; it links to the objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from kvgraph.data import io
from kvgraph.data.pages.base import ENTITY, PageElement, PageError, Say, SourcePage, decoded, words

N_TRIPLE = re.compile(
    r'\s*(<[^<>]*>|_:\S+)\s+(<[^<>]*>)\s+(<[^<>]*>|_:\S+|"(?:[^"\\]|\\.)*"(?:\^\^<[^<>]*>|@[\w-]+)?)\s*\.\s*(?:#.*)?'
)
FIELDS = ("subject", "predicate", "object")
ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")


class Triple(NamedTuple):
    """A fact: subject and object are entities, or the object is a plain value."""

    subject: str
    predicate: str
    object: str


def is_triple(record: Mapping[str, Any]) -> bool:
    """Whether a record is a triple."""
    return all(isinstance(record.get(field), str) for field in FIELDS)


def of_record(record: Mapping[str, Any]) -> Triple:
    """The triple of a record."""
    return Triple(*(words(record[field]) for field in FIELDS))


def read(path: Path, say: Say) -> list[Triple] | None:
    """The triples of a .tsv or .nt file; None for a .tsv whose first line hasn't three columns. Bad lines are said."""
    kind = io.suffix(path)
    found: list[Triple] = []
    wrong: list[int] = []
    with io.opened(path, PageError) as file:
        for number, line in enumerate(file, 1):
            text = decoded(line, f"{path}:{number}", say).rstrip("\n")
            if not text.strip() or (kind == ".nt" and text.lstrip().startswith("#")):
                continue
            triple = _n_triple(text) if kind == ".nt" else _row(text)
            if triple is not None:
                found.append(triple)
            elif kind == ".tsv" and not found:
                return None
            else:
                wrong.append(number)
    if wrong:
        say(f"{path}: {len(wrong)} lines are no triples and are left out, the first is line {wrong[0]}")
    return found


def _row(text: str) -> Triple | None:
    cells = [words(cell) for cell in text.split("\t")]
    return Triple(*cells) if len(cells) == 3 and all(cells) else None


def _n_triple(text: str) -> Triple | None:
    match = N_TRIPLE.fullmatch(text)
    return Triple(*map(_name, match.groups())) if match else None


def _name(term: str) -> str:
    """The name of a term for people: the last part of an IRI, the text of a literal."""
    if term.startswith('"'):
        return words(ESCAPE.sub(_unescaped, term[1 : term.rindex('"')]))
    iri = unquote(term.strip("<>"))
    return words(re.split(r"[/#]", iri.rstrip("/#"))[-1].replace("_", " ")) or iri


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "uU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"
    return {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f"}.get(code, code)


def pages(triples: Iterable[Triple], where: str) -> Iterator[SourcePage]:
    """A page for each subject, in the order of their names, with its triples sorted."""
    facts: dict[str, set[Triple]] = {}
    for triple in triples:
        facts.setdefault(triple.subject, set()).add(triple)
    for subject in sorted(facts):
        found = tuple(
            PageElement(sentence(triple), "item", links=(f"{ENTITY}{triple.object}",))
            for triple in sorted(facts[subject])
        )
        yield SourcePage(f"{ENTITY}{subject}", subject, found, where)


def sentence(triple: Triple) -> str:
    """A triple as text."""
    predicate = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", triple.predicate).replace("_", " ").lower()
    return f"{triple.subject} {predicate} {triple.object}."
