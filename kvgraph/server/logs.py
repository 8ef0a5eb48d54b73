"""Logs: one line per event, as text or JSON, with the id of its request. They never contain prompts or keys."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kvgraph.server.runner import EngineJob

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Inference:
    """What a request that generates asks for, in the words of OpenTelemetry's GenAI conventions.

    operation: "chat" or "text_completion". choices: of each prompt. output: "text" or "json". reasons: gives why each
    choice ended.
    """

    operation: str
    streamed: bool = False
    choices: int = 1
    output: str = "text"
    response_id: str | None = None
    reasons: Callable[[], list[str]] = list


@dataclass(eq=False)
class Exchange:
    """An HTTP request being answered, as its access line will tell it. jobs: what it asked of the engine, as it is now."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    tenant: str = ""
    jobs: list[EngineJob] = field(default_factory=list)
    error: str | None = None  # the code of the error it ended with, also where a stream had begun with 200
    left: bool = False  # the client went before its answer was complete
    trace: str | None = None
    inference: Inference | None = None  # for requests that generate

    @property
    def first_token_at(self) -> float | None:
        """When the first token of any answer was there, on the clock of `time.perf_counter`."""
        return min((job.request.first_token_at for job in self.jobs if job.request.first_token_at), default=None)

    def tokens(self) -> dict[str, int]:
        """Tokens computed, reused and generated for it so far; empty if it asked nothing of the engine."""
        if not self.jobs:
            return {}
        usages = [job.request.usage for job in self.jobs]
        return {
            "computed": sum(u.computed_tokens for u in usages),
            "reused": sum(sum(u.reused_tokens.values()) for u in usages),
            "generated": sum(len(job.request.token_ids) for job in self.jobs),
        }


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The request that the running code works for."""


def request_id(given: str | None) -> str:
    """The id a client gave its request, if it is harmless (letters, digits, dots, dashes; at most 128), else a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


class Formatter(logging.Formatter):
    """Lines such as `2026-01-31T12:00:00.000Z INFO kvgraph.access [ID] GET /health 200 seconds=0.001`, or JSON objects."""

    def __init__(self, form: Literal["text", "json"]):
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line, but for the traceback of an error in text."""
        exchange = current.get()
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "request_id": None if exchange is None else exchange.id,
            "trace_id": None if exchange is None else exchange.trace,
            "message": " ".join(record.getMessage().split()),
        }
        more: dict[str, Any] = getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        if self.form == "json":
            told = fields | more | ({"traceback": trace} if trace else {})
            return json.dumps({name: value for name, value in told.items() if value is not None}, default=str)
        who = f" [{fields['request_id']}]" if exchange else ""
        rest = "".join(f" {name}={value}" for name, value in more.items() if value is not None)
        line = f"{fields['time']} {fields['level']} {fields['logger']}{who} {fields['message']}{rest}"
        return f"{line}\n{trace}" if trace else line


def setup(form: Literal["text", "json"]) -> None:
    """Let all loggers of this process, uvicorn's and Python's warnings among them, write one format to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    ours = logging.getLogger("kvgraph")
    ours.handlers, ours.propagate = [], True  # the command line's own handler ends here

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            ours.warning("%s", message)

    warnings.showwarning = show  # type: ignore[assignment]
