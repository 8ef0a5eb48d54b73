"""Question answering from ten retrieved passages, as KVLink trains it (arXiv 2502.16002).

What KVLink does (github.com/UCSB-NLP-Chang/KVLink, scripts/data_process/gpt_answer.py and QA.py, and its README): 20,000
questions each of the train splits of 2WikiMultiHopQA and TriviaQA (from FiD, which brings 100 passages of DPR's
Wikipedia a question); the question's own passages ranked by Contriever (contriever-msmarco, mean pooling, dot product); the ten best; an answer by
gpt-4o-mini from these (`answers`); questions with fewer than ten passages, or of 4,096 tokens with them, left out; one half
for `qa`, the other for `qa_mem`.

Here, which half a record is trained as and how long it may be is the recipe's matter. Passages are looked for among those
of all questions, or in a collection; `corpus=own` ranks a question's own, as KVLink does. And the endpoint gets the
evaluation task's prompt, in which no passage has a number, so that what is learned answers what will be asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from pydantic import BaseModel

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.retrieval import Embedder
from kvgraph.data.retrieval.batch import Passages, best, ranked
from kvgraph.data.schema import Answers as References
from kvgraph.data.task import Hub, Task
from kvgraph.data.tasks import hotpotqa, triviaqa
from kvgraph.data.tasks.qa import joined
from kvgraph.data.tasks.wiki2 import WIKI2
from kvgraph.train.prepare.answers import AnswerRequest, Answers, Endpoint
from kvgraph.train.prepare.rows import Files
from kvgraph.train.prepare.source import Outcome, PrepareError, PrepareJob, RawRow, Setting, Source, checked

CONTRIEVER = "facebook/contriever"
BEST = 10  # passages a question
WORDS = 100  # of a passage that is cut out of a page, as in DPR's Wikipedia (arXiv 2004.04906, section 4.1)
POOLED, OWN = "pooled", "own"  # settings of `corpus`
NONE, GOLD = "none", "gold"  # of `retriever` and `answers`

Passage = dict[str, str]  # title and text


class RetrievalQuestion(NamedTuple):
    """A question of a data set. passages: what its record brings, in the record's order."""

    question: str
    answer: str
    passages: tuple[Passage, ...]


class Retrieved(BaseModel):
    """One of `ctxs`."""

    title: str
    text: str


class WithContexts(BaseModel):
    """A record of FiD's TriviaQA (github.com/facebookresearch/FiD, open_domain_data/TQA)."""

    question: str
    answers: References
    target: str = ""
    ctxs: list[Retrieved]


class Found(NamedTuple):
    """A question with its best passages, best first."""

    row: RawRow
    question: RetrievalQuestion
    passages: tuple[Passage, ...]


def wiki(row: RawRow) -> RetrievalQuestion:
    """A record of 2WikiMultiHopQA: a paragraph is a passage."""
    record = checked(hotpotqa.HotpotRecord, row)
    passages = tuple({"title": title, "text": joined(sentences)} for title, sentences in record.context)
    return RetrievalQuestion(record.question, record.answer[0], passages)


def trivia(row: RawRow) -> RetrievalQuestion:
    """A record of TriviaQA: pages, which are cut into passages; or FiD's, which brings passages."""
    if isinstance(row.record, Mapping) and "ctxs" in row.record:
        given = checked(WithContexts, row)
        return RetrievalQuestion(
            given.question, given.target or given.answers[0], tuple(c.model_dump() for c in given.ctxs)
        )
    record = checked(triviaqa.TriviaRecord, row)
    pages = [*record.entity_pages, *record.search_results]
    return RetrievalQuestion(
        record.question, record.answer.value, tuple(p for page in pages for p in cut(page.title, page.text))
    )


def cut(title: str, text: str) -> Iterator[Passage]:
    """A page as passages of WORDS words, each with the page's title."""
    words = text.split()
    for start in range(0, len(words), WORDS):
        yield {"title": title, "text": " ".join(words[start : start + WORDS])}


def read_trivia(path: Path) -> Iterator[Mapping[str, Any]]:
    """Records of TriviaQA's original layout: a file of qa/, or the folder over it, of which all qa/*-train.json are read.

    Other files and folders are read as everywhere.
    """
    if path.name.endswith((".tgz", ".tar.gz")):
        raise PrepareError(f"{path} is packed; unpack it and give its folder")
    original = sorted(path.glob("qa/*-train.json")) if path.is_dir() else [path] * _is_original(path)
    for file in original:
        yield from triviaqa.read(file)
    if not original:
        yield from (row.record for row in Files(path).rows())


def _is_original(path: Path) -> bool:
    """Whether a JSON file holds an object, as those of qa/ do, and not a list of records."""
    with open(path, "rb") as file:
        return path.suffix == ".json" and file.read(64).lstrip().startswith(b"{")


@dataclass(frozen=True)
class Questions:
    """What becomes of the questions of one data set. parse: a row as a question. task: whose prompt they get."""

    name: str
    task: Task
    parse: Callable[[RawRow], RetrievalQuestion]

    def __call__(self, rows: Iterator[RawRow], job: PrepareJob) -> Iterator[Outcome]:
        """See Source.outcomes. Unless they stay with their question, passages are pooled, embedded and searched first."""
        folder = job.folder / self.name
        folder.mkdir(exist_ok=True)
        if job.settings["answers"] == GOLD:
            for row, question, passages in self._found(rows, job, folder):
                yield self._outcome(row, question, passages, question.answer)
            return
        with Answers(folder / "answers.jsonl", endpoint(job.settings)) as answers:
            asked = ((self._request(*found), found) for found in self._found(rows, job, folder))
            with closing(answers.ask(asked)) as replies:
                for (row, question, passages), reply in replies:
                    job.progress(f"answers: {answers.spent}")
                    if reply.answer is None:
                        yield Outcome(row, skipped=f"no answer: {reply.reason}")
                    else:
                        yield self._outcome(row, question, passages, reply.answer)
            job.progress(f"answers: {answers.spent}")

    def _question(self, row: RawRow, job: PrepareJob) -> RetrievalQuestion:
        question = self.parse(row)
        if not question.passages and job.settings["corpus"] in (POOLED, OWN):
            raise PrepareError(f"{row.where} has no passages; give a corpus to search, --set corpus=FILE")
        try:
            io.line(question)
        except UnicodeEncodeError:
            raise PrepareError(
                f"{row.where} has half of a surrogate pair, which isn't valid text; fix or remove it"
            ) from None
        return question

    def _found(self, rows: Iterator[RawRow], job: PrepareJob, folder: Path) -> Iterator[Found]:
        """The best passages of each row's question."""
        retriever, corpus = job.settings["retriever"], job.settings["corpus"]
        if retriever == NONE:
            if corpus not in (POOLED, OWN):
                raise PrepareError("a corpus needs a retriever; leave out corpus or give a retriever")
            for row in rows:
                question = self._question(row, job)
                yield Found(row, question, question.passages[:BEST])
            return
        from kvgraph.models.embedder import SentenceEmbedder

        embedder = SentenceEmbedder(retriever)
        if corpus != OWN:
            yield from self._searched(rows, job, folder, embedder)
            return
        for row in rows:
            question = self._question(row, job)
            yield Found(row, question, ranked(embedder, question.question, question.passages, BEST))

    def _searched(self, rows: Iterator[RawRow], job: PrepareJob, folder: Path, embedder: Embedder) -> Iterator[Found]:
        """The best passages of each row's question in the pool or a collection."""
        corpus, index = job.settings["corpus"], job.settings["index"]
        asked, pool = folder / "questions.jsonl", folder / "passages.jsonl"
        pooled = corpus == POOLED
        passages = None if pooled else Passages(Path(corpus))  # fails before anything that takes long
        if not asked.is_file():
            self._gather(job, asked, pool if pooled else None)
        questions = [json.loads(line) for line in io.whole_lines(asked)]
        if passages is None:
            passages = Passages(pool)
        found = best(embedder, passages, questions, BEST, folder, Path(index) if index else folder, job.progress)
        job.progress("")
        for row in rows:
            question = self._question(row, job)
            if row.number >= len(questions) or questions[row.number] != question.question:
                raise PrepareError(f"{folder} is of other questions than {row.where}; delete it and start again")
            yield Found(row, question, tuple(passages[int(i)] for i in found[row.number]))

    def _gather(self, job: PrepareJob, asked: Path, pool: Path | None) -> None:
        """Write all questions, and all different passages that come with them, for the search."""
        seen: set[int] = set()
        with io.replacing(asked) as questions, io.replacing(pool or Path(os.devnull)) as passages:
            for row in job.rows():
                question = self._question(row, job)
                questions.write(io.line(question.question))
                for passage in question.passages if pool else ():
                    line = io.line(passage)
                    if (key := xxhash.xxh3_64_intdigest(line)) not in seen:
                        seen.add(key)
                        passages.write(line)
                if (row.number + 1) % 1000 == 0:
                    job.progress(f"{row.number + 1:,} questions read, with {len(seen):,} passages")

    def _request(self, row: RawRow, question: RetrievalQuestion, passages: tuple[Passage, ...]) -> AnswerRequest:
        """What the endpoint is asked: the task's own prompt, as `kvgraph.data.prompt.build` makes it for a chat model."""
        documents = "".join(str(Document(p["text"], p["title"]).filled(self.task.document)) for p in passages)
        user = documents + self.task.question.format(question=question.question)
        system = self.task.instruction.strip()
        return AnswerRequest(row.where, [{"role": "system", "content": system}, {"role": "user", "content": user}])

    def _outcome(self, row: RawRow, question: RetrievalQuestion, passages: tuple[Passage, ...], answer: str) -> Outcome:
        made = {
            "task": self.task.name,
            "question": question.question,
            "documents": list(passages),
            "answer": answer,
        }
        return Outcome(row, question.question, (made,))


def endpoint(settings: Mapping[str, str]) -> Endpoint:
    """The endpoint that the settings of a source describe. Raises PrepareError for what is no number."""
    try:
        read, written = (float(price) for price in settings["prices"].split("/"))
        concurrency = int(settings["concurrency"])
    except ValueError:
        read, concurrency = -1.0, 0
    if concurrency < 1 or not (0 <= read < inf and 0 <= written < inf):
        raise PrepareError("prices are two numbers, as in 0.15/0.60, and concurrency is a number from 1")
    return Endpoint(settings["answers"], settings["url"] or None, concurrency, (read, written))


SETTINGS = {
    "retriever": Setting(
        CONTRIEVER, f"a sentence-transformers model, or any other encoder; {NONE} takes the first {BEST} passages"
    ),
    "corpus": Setting(
        POOLED,
        f"where passages are looked for: {POOLED} from all records, in the question's {OWN} record, or a JSON Lines or "
        "TSV file",
    ),
    "index": Setting("", "folder for the embeddings of a corpus, to be shared; unless given, they are in --out", False),
    "answers": Setting("gpt-4o-mini", f"the model that answers; {GOLD} takes the data set's own answers"),
    "url": Setting("", "of the endpoint, as in http://localhost:8000/v1; unless given, OpenAI's", False),
    "concurrency": Setting("8", "requests at a time", False),
    "prices": Setting("0/0", "US dollars for a million tokens read and written, as in 0.15/0.60", False),
}
ORIGIN = "KVLink (arXiv 2502.16002): github.com/UCSB-NLP-Chang/KVLink, scripts/data_process/gpt_answer.py"

QA_2WIKI = Source(
    name="qa-2wiki",
    about="2WikiMultiHopQA's training questions with the 10 best passages, and an answer from these",
    origin=ORIGIN,
    hub=Hub("xanhho/2WikiMultihopQA", split="train", file="train.parquet"),
    sample="qa-2wiki.jsonl",
    outcomes=Questions("qa-2wiki", WIKI2, wiki),
    settings=SETTINGS,
)
QA_TRIVIA = Source(
    name="qa-trivia",
    about="TriviaQA's training questions with the 10 best passages, and an answer from these",
    origin=ORIGIN,
    hub=Hub("mandarjoshi/trivia_qa", "rc.wikipedia", split="train"),
    sample="qa-trivia.jsonl",
    outcomes=Questions("qa-trivia", triviaqa.TRIVIAQA, trivia),
    settings=SETTINGS,
    read=read_trivia,
)
