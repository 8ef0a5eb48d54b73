"""Answers from any OpenAI-compatible endpoint. Each is saved as it arrives, so nothing is paid for twice.

KVLink has gpt-4o-mini answer each question from its ten passages, at temperature 0.7, with at most 200 tokens
(github.com/UCSB-NLP-Chang/KVLink, scripts/data_process/gpt_answer.py); these are the defaults.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvgraph.data import io
from kvgraph.errors import KVGraphError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
AHEAD = 4  # requests sent ahead, as a multiple of those in flight, so that one slow answer doesn't stop the others
HOPELESS = 20  # requests in a row without an answer: the endpoint is down or doesn't understand the requests
GRACE = 10.0  # seconds for requests in flight when this ends early, because they are paid for

T = TypeVar("T")


class AnswersError(KVGraphError):
    """Answers can't be generated: no key, no endpoint, a model the endpoint doesn't have, or only failures."""


class AnswerRequest(NamedTuple):
    """A question as chat messages. name: for people. Answers are found again by the messages."""

    name: str
    messages: Sequence[Mapping[str, str]]


class Reply(NamedTuple):
    """The answer, or the reason why there is none, and the tokens read and written for it.

    outage: there is no answer because the endpoint was down or too busy, whatever the question.
    """

    answer: str | None
    reason: str = ""
    tokens: tuple[int, int] = (0, 0)
    outage: bool = False


class _Asked(NamedTuple):
    """A request whose reply is due next. what: given with the request. fresh: its reply isn't from the journal."""

    what: Any
    key: str
    promise: Future[Reply]
    fresh: bool


@dataclass(frozen=True)
class Endpoint:
    """An endpoint for answers, and its settings.

    url: of the API, such as http://localhost:8000/v1; None: OPENAI_BASE_URL, otherwise OpenAI's.
    concurrency: requests at a time.
    prices: US dollars for a million tokens read, and written.
    timeout: seconds.
    retries: after 429, 5xx, time-outs and lost connections, with a growing wait or the one that Retry-After asks for, up to
        two minutes.
    """

    model: str = "gpt-4o-mini"
    url: str | None = None
    concurrency: int = 8
    prices: tuple[float, float] = (0.0, 0.0)
    max_tokens: int = 200
    temperature: float = 0.7
    timeout: float = 120.0
    retries: int = 8

    def client(self) -> AsyncOpenAI:
        """The client. The key comes only from the environment; an endpoint other than OpenAI's may need none.

        Raises AnswersError if OpenAI's endpoint has no key.
        """
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise AnswersError("to generate answers, install openai: pip install 'kvgraph[train]'") from None
        url, key = self.url or os.environ.get(URL) or None, os.environ.get(KEY)
        if not key and url is None:
            raise AnswersError(f"{KEY} isn't set; set it, or give an endpoint (--set url=...) or --set answers=gold")
        return AsyncOpenAI(api_key=key or "none", base_url=url, timeout=self.timeout, max_retries=self.retries)

    def key(self, request: AnswerRequest) -> str:
        """The key an answer is found again by: everything it depends on except the endpoint's address."""
        asked = [self.model, self.max_tokens, self.temperature, request.messages]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass
class Spent:
    """Tokens read and written so far, also for answers that can't be used."""

    prices: tuple[float, float]
    read: int = 0
    written: int = 0

    def add(self, tokens: tuple[int, int]) -> None:
        """Count one reply's tokens."""
        self.read, self.written = self.read + tokens[0], self.written + tokens[1]

    @property
    def dollars(self) -> float:
        """Their price in US dollars."""
        return (self.read * self.prices[0] + self.written * self.prices[1]) / 1e6

    def __str__(self) -> str:
        cost = f", ${self.dollars:,.{2 if self.dollars >= 1 else 4}f}" if any(self.prices) else ""
        return f"{self.read:,} tokens read, {self.written:,} written{cost}"


@dataclass
class Answers:
    """Answers and their journal: one JSON object per line, in the order of arrival.

    An incomplete last line is cut off. Only one process may write the journal. spent: for everything in the journal.
    """

    path: Path
    endpoint: Endpoint
    spent: Spent = field(init=False)

    def __post_init__(self) -> None:
        self.spent = Spent(self.endpoint.prices)
        self._replies: dict[str, Reply] = {}
        self._file = open(self.path, "a+b", buffering=0)  # closed by __exit__
        self._read()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def ask(self, requests: Iterable[tuple[AnswerRequest, T]]) -> Generator[tuple[T, Reply]]:
        """Each request's reply, in the order of requests, with the value given with it; `concurrency` are in flight at a time.

        Only requests that aren't in the journal are sent, at most AHEAD * concurrency of them ahead. A reply without an
        answer says why, and is held back until an answer has followed it. Raises AnswersError if HOPELESS new requests in
        a row have no answer, or if all fail to the end because the endpoint is down; those requests can be sent again.
        Also raises AnswersError for a wrong key or model.
        """
        held: list[tuple[T, Reply]] = []
        useless, answered = 0, False
        for asked in self._asked(requests):
            reply = asked.promise.result()
            held.append((asked.what, reply))
            if reply.answer is not None:
                yield from held
                held, useless, answered = [], 0, True
            elif asked.fresh and (useless := useless + 1) == HOPELESS:
                raise AnswersError(f"{HOPELESS} requests in a row gave no answer, the last one: {reply.reason}")
        if not answered and held and held[-1][1].outage:
            raise AnswersError(f"no request was answered: {held[-1][1].reason}; run the same command again to continue")
        yield from held

    def _asked(self, requests: Iterable[tuple[AnswerRequest, T]]) -> Iterator[_Asked]:
        """All requests in order. When one is yielded, the next AHEAD * concurrency have been sent already."""
        with self._asking() as submit:
            left = iter(requests)
            window: deque[_Asked] = deque()
            promised: dict[str, Future[Reply]] = {}
            while True:
                for request, what in islice(left, AHEAD * self.endpoint.concurrency - len(window)):
                    key = self.endpoint.key(request)
                    known = self._known(key)
                    if key not in promised:
                        promised[key] = known or submit(key, request)
                    window.append(_Asked(what, key, promised[key], known is None))
                if not window:
                    return
                yield window[0]
                promised.pop(window.popleft().key, None)

    @contextmanager
    def _asking(self) -> Iterator[Callable[[str, AnswerRequest], Future[Reply]]]:
        """A function that sends a request and returns a future of its reply. At the end, replies in flight get GRACE to arrive."""
        client = self.endpoint.client()
        slots, ending = asyncio.Semaphore(self.endpoint.concurrency), threading.Event()
        underway: set[Future[Reply]] = set()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)

        async def ask(key: str, request: AnswerRequest) -> Reply:
            async with slots:
                if ending.is_set():
                    raise asyncio.CancelledError
                try:
                    reply, arrived = await _reply(client, self.endpoint, request)
                except AnswersError:
                    ending.set()
                    raise
                if arrived:
                    self._write(key, request, reply)
                return reply

        def submit(key: str, request: AnswerRequest) -> Future[Reply]:
            underway.difference_update([future for future in underway if future.done()])
            underway.add(future := asyncio.run_coroutine_threadsafe(ask(key, request), loop))
            return future

        thread.start()
        try:
            yield submit
        finally:
            ending.set()
            for late in wait(underway, GRACE).not_done:
                late.cancel()
            asyncio.run_coroutine_threadsafe(client.close(), loop).result(GRACE)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _known(self, key: str) -> Future[Reply] | None:
        if key not in self._replies:
            return None
        known: Future[Reply] = Future()
        known.set_result(self._replies[key])
        return known

    def _write(self, key: str, request: AnswerRequest, reply: Reply) -> None:
        line = {
            "key": key,
            "name": request.name,
            "answer": reply.answer,
            "reason": reply.reason,
            "tokens": reply.tokens,
        }
        io.append(self._file, io.line(line))
        self._keep(key, reply)

    def _keep(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        self.spent.add(reply.tokens)

    def _read(self) -> None:
        for number, line in enumerate(io.whole_lines(self.path), 1):
            try:
                row = json.loads(line)
                read, written = row["tokens"]
                self._keep(row["key"], Reply(row["answer"], row["reason"], (read, written)))
            except (ValueError, LookupError, TypeError):
                raise AnswersError(f"{self.path}:{number} isn't an answer; fix or remove the line") from None


async def _reply(client: AsyncOpenAI, endpoint: Endpoint, request: AnswerRequest) -> tuple[Reply, bool]:
    """One reply, and whether it came from the model. Raises AnswersError for a failure that every request would have."""
    import openai

    try:
        completion = await client.chat.completions.create(
            model=endpoint.model,
            messages=list(request.messages),  # type: ignore[arg-type]  # plain dicts are messages too
            max_tokens=endpoint.max_tokens,
            temperature=endpoint.temperature,
        )
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise AnswersError(
            f"{client.base_url} refuses the model {endpoint.model} or the key: {io.first_line(error)}"
        ) from None
    except openai.APIStatusError as error:
        busy = error.status_code == 429 or error.status_code >= 500
        return Reply(None, f"HTTP {error.status_code}", outage=busy), False
    except openai.APITimeoutError:
        return Reply(None, "no reply in time", outage=True), False
    except openai.APIConnectionError:
        return Reply(None, "no connection", outage=True), False
    except (openai.APIError, ValueError):  # the reply isn't JSON
        return Reply(None, "malformed reply"), True
    return _checked(completion, endpoint), True


def _checked(completion: Any, endpoint: Endpoint) -> Reply:
    """The text of a completion, or why it can't be used. A truncated answer is refused: it would teach to stop midway."""
    try:
        tokens = int(completion.usage.prompt_tokens), int(completion.usage.completion_tokens)
    except (AttributeError, TypeError, ValueError):  # some endpoints don't count
        tokens = 0, 0
    try:
        (choice,) = completion.choices
        text, finish = choice.message.content, choice.finish_reason
    except (AttributeError, TypeError, ValueError):
        return Reply(None, "malformed reply", tokens)
    if finish == "length":
        return Reply(None, f"longer than {endpoint.max_tokens} tokens", tokens)
    if finish == "content_filter":
        return Reply(None, "filtered by the endpoint", tokens)
    if not isinstance(text, str) or not text.strip():
        return Reply(None, "empty reply", tokens)
    return Reply(text.strip(), "", tokens)
