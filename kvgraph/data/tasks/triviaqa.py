"""TriviaQA for reading comprehension: trivia questions with the Wikipedia or web pages that may answer them."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.schema import checked, references, rows
from kvgraph.data.task import Hub, Item, TaskError
from kvgraph.data.tasks import qa

WORDS = 800  # kept from the beginning of a page, as by the data set's own convert_to_squad_format.py
WIKIPEDIA, WEB = "evidence/wikipedia/", "evidence/web/"


class Page(NamedTuple):
    """A page: its file in the data set, its title, its text."""

    filename: str
    title: str
    text: str


class Answer(BaseModel):
    """The answer's usual form, and all its names."""

    value: str
    aliases: list[str] = []


class TriviaRecord(BaseModel):
    """A row of the hub's table. `read` makes the same from the original files, and adds their domain."""

    question: str
    question_id: str
    domain: str = "wikipedia"
    entity_pages: Annotated[list[Page], rows("filename", "title", "wiki_context")] = []
    search_results: Annotated[list[Page], rows("filename", "title", "search_context")] = []
    answer: Answer


class OriginalPage(BaseModel):
    """One of `EntityPages` or `SearchResults`; its text is in another file."""

    Filename: str
    Title: str


class OriginalAnswer(BaseModel):
    """`Answer`, without its normalised forms."""

    Value: str
    Aliases: list[str] = []


class OriginalQuestion(BaseModel):
    """One of a file's `Data`."""

    Question: str
    QuestionId: str
    Answer: OriginalAnswer
    EntityPages: list[OriginalPage] = []
    SearchResults: list[OriginalPage] = []


class OriginalFile(BaseModel):
    """A file of qa/, such as wikipedia-dev.json; those without answers are refused."""

    Domain: str
    Data: list[OriginalQuestion]


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per record, one document per page: Wikipedia's pages, then the web's, each in the record's order.

    Only the first 800 words of a page are kept; `answer_shown` says whether they contain the answer. A page counts as
    gold if they contain one of the answer's names; nobody has checked that it answers the question.
    """
    for record in checked(TriviaRecord, records):
        answers = references([record.answer.value, record.answer.aliases])
        pages = [*record.entity_pages, *record.search_results]
        documents = tuple(Document(_beginning(page.text), page.title, page.filename) for page in pages)
        names = [answer.casefold() for answer in answers]
        gold = [i for i, document in enumerate(documents) if any(name in document.text.casefold() for name in names)]
        yield Item(
            id=f"{record.domain}-{record.question_id}",
            question=record.question,
            references=answers,
            documents=documents,
            kind=record.domain,
            facts={"answer_shown": "yes" if gold else "no", **qa.support(gold, len(documents))},
        )


def _beginning(text: str) -> str:
    """The first WORDS words of a text, with the white space between them."""
    end = 0
    for word in islice(re.finditer(r"\S+", text), WORDS):
        end = word.end()
    return text[:end].lstrip()


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """Records of the original layout: those of a file in qa/, with evidence/ beside that folder, or of a folder or .tgz
    archive. From the latter two, all qa/*-dev.json are read except the verified-* ones, which repeat a part.

    A missing page raises TaskError. A large archive is read faster when unpacked.
    """
    if path.name.endswith((".tgz", ".tar.gz")):
        yield from _read_archive(path)
        return
    root = path if path.is_dir() else path.absolute().parent.parent
    files = sorted(file for file in path.glob("qa/*") if _is_dev(f"qa/{file.name}")) if path.is_dir() else [path]
    for file in files:
        for domain, question in _questions(str(file), file.read_bytes()):
            texts = {name: (root / name).read_bytes() for name in _files(question) if (root / name).is_file()}
            yield _record(domain, question, texts, root)


def _read_archive(path: Path) -> Iterator[Mapping[str, Any]]:
    """Reads in two passes, first questions, then their pages, because an archive can't be read backwards."""
    files = _members(path, _is_dev)
    questions = [pair for name in sorted(files) for pair in _questions(f"{path}:{name}", files[name])]
    texts = _members(path, {name for _, question in questions for name in _files(question)}.__contains__)
    for domain, question in questions:
        yield _record(domain, question, texts, path)


def _members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of an archive whose names are wanted."""
    try:
        with tarfile.open(path) as archive:
            return {
                member.name: file.read()
                for member in archive
                if wanted(member.name) and (file := archive.extractfile(member))
            }
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise TaskError(f"can't read {path}: {error}") from None


def _is_dev(name: str) -> bool:
    return name.startswith("qa/") and name.endswith("-dev.json") and not name.startswith("qa/verified-")


def _questions(where: str, content: bytes) -> Iterator[tuple[str, OriginalQuestion]]:
    """The questions of a file of qa/, each with the file's domain: "web" or "wikipedia"."""
    raw = io.parse(content, where, TaskError)
    try:
        (file,) = checked(OriginalFile, [raw])
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from None
    for question in file.Data:
        yield file.Domain.lower(), question


def _files(question: OriginalQuestion) -> list[str]:
    """The files with the question's pages: Wikipedia's, then the web's."""
    wikipedia = [f"{WIKIPEDIA}{page.Filename}" for page in question.EntityPages]
    return wikipedia + [f"{WEB}{page.Filename}" for page in question.SearchResults]


def _record(domain: str, question: OriginalQuestion, texts: Mapping[str, bytes], where: Path) -> Mapping[str, Any]:
    """What the hub's table has for a question of the original files."""

    def rows(folder: str, pages: Iterable[OriginalPage]) -> list[Page]:
        return [Page(p.Filename, p.Title, texts[folder + p.Filename].decode(errors="replace")) for p in pages]

    if missing := [name for name in _files(question) if name not in texts]:
        raise TaskError(f"{where} has no {missing[0]}, which question {question.QuestionId} needs")
    return {
        "question": question.Question,
        "question_id": question.QuestionId,
        "domain": domain,
        "entity_pages": rows(WIKIPEDIA, question.EntityPages),
        "search_results": rows(WEB, question.SearchResults),
        "answer": {"value": question.Answer.Value, "aliases": question.Answer.Aliases},
    }


TRIVIAQA = qa.task(
    name="triviaqa",
    about="TriviaQA (reading comprehension): trivia questions over Wikipedia or web pages, 800 words of each",
    source="TriviaQA (arXiv 1705.03551): nlp.cs.washington.edu/triviaqa, triviaqa-rc.tar.gz",
    items=items,
    read=read,
    metrics=("substring_em", "em", "f1"),
    hub=Hub("mandarjoshi/trivia_qa", "rc.wikipedia"),
    breakdowns=("kind", "answer_shown"),
)
