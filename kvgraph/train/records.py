"""Training records as examples for a model, with the tokens that evaluation and server would give it.

`docs/reference/data.md` describes the three kinds of records. Records are text without prompts. The prompt is made here, by the
code that evaluation (`kvgraph.data.prompt`) and server (`kvgraph.data.chat`) use.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvgraph.data import chat, io, tasks
from kvgraph.data import prompt as prompts
from kvgraph.data.chat import Document, Prompt
from kvgraph.data.task import Item, Task, TaskError
from kvgraph.errors import GraphError, KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.train.example import Example, Question

PREPARED = "prepared.json"
SPLITS = TRAIN, VALIDATION = ("train", "validation")
AS_THEY_ARE = "{text}"  # the template of documents in conversations, which have their own line ends
RECITED = 48  # tokens of a quoted document
FIRST_WORDS = 6  # words by which a document without a title is asked for

Record = Mapping[str, Any]


class RecordError(KVGraphError, ValueError):
    """A prepared folder or one of its records can't be used. The message names the file, and the line if it is one."""


def example(
    record: Record, tokenizer: Any, *, max_tokens: int | None = None, recite: int = 0, seed: str = ""
) -> Example | None:
    """The example that a training record gives with this tokenizer.

    Its graph is tokenized piece by piece, as in the engine. The tokens to learn are: of a text, all; of a conversation, the
    assistant's messages and the ends of its turns; of a task, the answer and the end of its turn.

    recite: the number of a task's documents, drawn by the seed, that are asked for after its questions. The answer is the
        first RECITED tokens of the document's text.
    max_tokens: of the whole example, with each document counted once. A longer text is cut at its end.

    Returns None for any other record that is too long, for one without anything left to learn, and for one that the chat
    template refuses. Raises RecordError for a record of no kind, for a conversation without a chat template, and for a
    chat template that no answer can be trained with; TaskError for an unknown task.
    """
    make = _KINDS[kind(record)]
    try:
        graph, questions = make(record, tokenizer)
        if recite and "task" in record:
            questions += _recitations(record, tokenizer, recite, random.Random(seed))
    except chat.ChatError:
        return None
    context = sum(map(len, (*graph.prefix, *graph.segments)))
    if max_tokens is not None and context + sum(len(q.query) + len(q.answer) for q in questions) > max_tokens:
        if "text" not in record:
            return None
        (text,) = questions
        questions = [text._replace(answer=text.answer[: max(0, max_tokens - context - len(text.query))])]
    questions = [q for q in questions if q.answer and len(q.query) + len(q.answer) >= 2]
    return Example(graph, questions) if questions else None


def kind(record: Record) -> str:
    """The kind of a record: "text", "messages" or "task". Raises RecordError if it is none of them or several."""
    found = [name for name in _KINDS if name in record]
    if len(found) != 1:
        raise RecordError(f"record {record.get('id', '')!r} must have one of {', '.join(_KINDS)}; it has {found}")
    return found[0]


def texts(record: Record) -> Iterator[str]:
    """Every text of a record: documents with their titles, then questions and answers."""
    for document in record.get("documents", ()):
        yield document if isinstance(document, str) else document["title"] + document["text"]
    yield from (message["content"] for message in record.get("messages", ()))
    for part in (record, *record.get("questions", ())):
        yield from (part[name] for name in ("text", "question", "answer") if name in part)


class _Made(NamedTuple):
    graph: ContextGraph
    questions: list[Question]


def _encoder(tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    """`Engine.tokenize`."""
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))


def _text(record: Record, tokenizer: Any) -> _Made:
    """BOS, documents, text. Without documents BOS is the query, so that the first token is learned too."""
    encode, bos = _encoder(tokenizer), chat.opening(tokenizer)
    documents = [encode(text) for text in record.get("documents", ())]
    graph = ContextGraph(documents, prefix=bos if documents else ())
    return _Made(graph, [Question(() if documents else bos, encode(record["text"]))])


def _conversation(record: Record, tokenizer: Any) -> _Made:
    """The prompt of the first question; then everything after it, in pieces of which every second is learned."""
    messages, documents = list(record["messages"]), list(record.get("documents", ()))
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not first or messages[-1]["role"] != "assistant" or (documents and first + 1 < len(messages)):
        raise RecordError(
            f"record {record.get('id', '')!r}: messages must begin with a question and end with the assistant's answer, "
            "which with documents is the only one"
        )
    _around(tokenizer, _template(tokenizer))  # raises an error that would concern every conversation
    made = chat.chat(tokenizer, messages[:first], [Document(text) for text in documents], template=AS_THEY_ARE)
    encode = _encoder(tokenizer)
    answer: list[int] = []
    learned: list[bool] = []
    for text, learn in _turns(tokenizer, made, messages):
        tokens = encode(text) if text else ()
        answer += tokens
        learned += [learn] * len(tokens)
    graph = made.graph().with_query("").tokenized(encode)
    return _Made(graph, [Question(encode(made.query), tuple(answer), tuple(learned))])


def _task(record: Record, tokenizer: Any) -> _Made:
    """The prompt of the evaluation task, and the answer: inside the text that the chat template puts around it, or after a space.

    A record has one question and its answer, or any number of them under `questions`. plain: the questions are asked
    unchanged, as in a chat, without the task's instruction.
    """
    if template := _template(tokenizer):
        _around(tokenizer, template)  # raises an error that would concern every answer
    task = task_of(record)
    asked = record.get("questions", [record])
    links = tuple((source, reader) for source, reader in record.get("links", ()))
    documents = tuple(Document(document["text"], document["title"]) for document in record["documents"])
    first = asked[0]["question"] if asked else ""
    made = prompts.build(task, Item(record.get("id", ""), first, (), documents, links=links), tokenizer)
    graph = made.graph(links).with_query("").tokenized(_encoder(tokenizer))
    some = documents[:1]
    return _Made(graph, [_asked(task, some, one["question"], one["answer"], tokenizer) for one in asked])


def task_of(record: Record) -> Task:
    """The task that gives the prompt of a record's questions. Raises TaskError for an unknown one."""
    task = tasks.get(record["task"])
    return replace(task, instruction="", question="{question}") if record.get("plain") else task


def _asked(
    task: Task, documents: tuple[Document, ...], question: str, answer: str, tokenizer: Any, *, most: int | None = None
) -> Question:
    """A task's question with its answer, cut to a maximum of tokens.

    documents: one is enough, and faster: the query depends only on whether there are any.
    """
    template = _template(tokenizer)
    before, after = _around(tokenizer, template) if template else (" ", tokenizer.eos_token or "")
    query = prompts.build(task, Item("", question, (), documents), tokenizer).query
    if not template and query[-1:].isspace():
        before = ""
    encode = _encoder(tokenizer)
    return Question(encode(query), encode(before + answer + after)[:most])


def _recitations(record: Record, tokenizer: Any, count: int, rng: random.Random) -> list[Question]:
    """Questions for some of a task's documents, in the place of its own kind of question."""
    task, documents = replace(task_of(record), question="{question}"), record["documents"]
    told = [i for i, document in enumerate(documents) if document["text"].strip()]
    chosen, some = rng.sample(told, min(count, len(told))), (Document("-"),)
    return [_asked(task, some, recitation(documents, i), documents[i]["text"], tokenizer, most=RECITED) for i in chosen]


def recitation(documents: Sequence[Mapping[str, str]], which: int) -> str:
    """The question for a document: by its title or, without a title of its own, by its first words."""
    title = documents[which]["title"]
    if title and sum(document["title"] == title for document in documents) == 1:
        return f'Quote the passage titled "{title}".'
    return f'Quote the passage that begins with "{" ".join(documents[which]["text"].split()[:FIRST_WORDS])}".'


_KINDS: Mapping[str, Callable[[Record, Any], _Made]] = {"text": _text, "messages": _conversation, "task": _task}


def _template(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "chat_template", None) or "")


@lru_cache(maxsize=8)
def _around(tokenizer: Any, template: str) -> tuple[str, str]:
    """The text that a chat template puts between its generation prompt and an answer, and the text that ends the turn."""
    mark = chat.MARK.format("answer")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        ((text, _),) = _turns(tokenizer, chat.chat(tokenizer, messages[:1]), messages)
    except chat.ChatError as error:
        raise RecordError(str(error)) from None
    before, after = text.split(mark)
    return before, after


def _turns(tokenizer: Any, made: Prompt, messages: Sequence[Record]) -> Iterator[tuple[str, bool]]:
    """The text after a prompt, in pieces: (the assistant's words, True), (the text before its next turn, False), ...

    messages: all of them; the prompt `made` renders the first ones. A turn ends with the first special token that the
    template puts after it. If the template has none, the last turn ends with EOS.
    """
    start = "".join((*made.prefix, *map(str, made.segments), made.query))
    contents, literals = _taken_apart(tokenizer, messages, "".join(map(str, made.segments)))
    if not literals[0].startswith(start):
        raise chat.ChatError("the chat template renders an answered question differently; it can't be trained")
    before = literals[0].removeprefix(start)
    for i, (content, after) in enumerate(zip(contents, literals[1:], strict=True)):
        end = _end(tokenizer, after)
        last = i == len(contents) - 1
        yield before + content + (end or (tokenizer.eos_token or "" if last else "")), True
        before = ""
        if not last:
            yield after.removeprefix(end), False


def _taken_apart(tokenizer: Any, messages: Sequence[Record], documents: str) -> tuple[list[str], list[str]]:
    """The assistant's messages, and the text that the template puts before, between and after them.

    documents: only with a single exchange. A template may strip the user's message, but not the documents.
    """
    key = os.urandom(8).hex()
    said_here, documents_here = chat.MARK.format(f"said-{key}"), chat.MARK.format(f"documents-{key}")
    asked = list(messages)
    if documents:
        asked[-2] = {**asked[-2], "content": documents_here + asked[-2]["content"]}
    marked = [{**m, "content": said_here} if m["role"] == "assistant" else m for m in asked]
    literals = [text.replace(documents_here, documents) for text in _rendered(tokenizer, marked).split(said_here)]
    whole = _rendered(tokenizer, asked).replace(documents_here, documents)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for contents in (said, [text.strip() for text in said]):  # many templates strip messages
        if len(literals) == len(contents) + 1:
            pairs = zip(literals, [*contents, ""], strict=True)
            if "".join(literal + content for literal, content in pairs) == whole:
                return contents, literals
    raise chat.ChatError("the chat template doesn't render what the assistant says as it is; it can't be trained")


def _rendered(tokenizer: Any, messages: Sequence[Record]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=False))
    except Exception as error:  # a template is a program that can raise anything
        raise chat.ChatError(f"the model's chat template refuses these messages: {error}") from None


def _end(tokenizer: Any, text: str) -> str:
    """The beginning of a text up to and including its first special token; empty if it has none."""
    found = chat.first_special(tokenizer, text)
    return "" if found is None else text[: found[0] + len(found[1])]


# -- prepared folders -------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> dict[str, Any]:
    """The contents of a folder's prepared.json. Raises RecordError if there is none."""
    try:
        return dict(json.loads((folder / PREPARED).read_bytes()))
    except FileNotFoundError:
        raise RecordError(f"{folder} holds no prepared data; `kvgraph data prepare` makes it") from None
    except (ValueError, TypeError):
        raise RecordError(f"{folder / PREPARED} is damaged; delete the folder and prepare it again") from None


class Records:
    """The examples of one split ("train" or "validation") of a prepared folder, by number; a number always means the same.

    None stands for a record without an example. Opening reads an index of lines, which is kept beside the file. Raises
    RecordError for a missing folder or split, an unfinished one, or a damaged line.
    """

    def __init__(
        self, folder: str | Path, split: str, tokenizer: Any, *, max_tokens: int | None = None, recite: int = 0
    ):
        folder, self.recite = Path(folder), recite
        if split not in SPLITS:
            raise RecordError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
        if not prepared(folder).get("finished"):
            raise RecordError(f"{folder} isn't finished; run its `kvgraph data prepare` again to complete it")
        self.path, self.tokenizer, self.max_tokens = folder / f"{split}.jsonl", tokenizer, max_tokens
        try:
            self.lines = io.Lines(self.path, _starts(self.path))
        except OSError as error:
            raise RecordError(f"can't read {self.path}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, index: int) -> dict[str, Any]:
        """The training record with this number."""
        try:
            return dict(json.loads(self.lines[index]))
        except (ValueError, TypeError) as error:
            raise RecordError(f"{self._where(index)} is damaged: {error}; prepare the folder again") from None

    def __getitem__(self, index: int) -> Example | None:
        record = self.record(index)
        try:
            return example(record, self.tokenizer, max_tokens=self.max_tokens, recite=self.recite, seed=f"{index}")
        except (LookupError, TypeError, AttributeError) as error:
            raise RecordError(f"{self._where(index)} isn't a training record: {error!r}") from None
        except (RecordError, TaskError, GraphError) as error:
            raise RecordError(f"{self._where(index)}: {error}") from None

    def _where(self, index: int) -> str:
        return f"{self.path}:{range(len(self))[index] + 1}"


def _starts(path: Path) -> np.ndarray:
    """Where each line of a file starts, and where the file ends: int64 [lines + 1]. Kept in a file beside it."""
    kept, stat = path.with_suffix(".index.npy"), path.stat()
    try:
        if kept.stat().st_mtime_ns >= stat.st_mtime_ns:
            starts = np.load(kept, mmap_mode="r")
            if starts[-1] == stat.st_size:
                return np.asarray(starts)
    except (OSError, ValueError, IndexError):
        pass
    starts = io.line_starts(path)
    with suppress(OSError), io.replacing(kept) as file:  # in a read-only folder, the index is made every time
        np.save(file, starts)
    return starts
