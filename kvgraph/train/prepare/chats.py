"""Conversations: Daring-Anteater and Tulu 3, whole, or with their earlier turns as documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel, Field

from kvgraph.data.task import Hub
from kvgraph.train.prepare.source import Made, PrepareJob, Skip, Source, each

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
NAMES = {USER: "User", ASSISTANT: "Assistant"}  # in documents
LEFT_OUT = (
    "oasst1_converted",
    "tulu_v3.9_aya_100k",
    "tulu_v3.9_wildchat_100k",
)  # parts of Tulu that KVLink leaves out


class Turn(BaseModel):
    """A turn as Daring-Anteater has it."""

    who: str = Field(validation_alias="from")
    value: str


class DaringAnteater(BaseModel):
    """A row of Daring-Anteater."""

    system: str = ""
    conversations: list[Turn]


class Written(BaseModel):
    """A message as Tulu has it."""

    role: str
    content: str


class Tulu(BaseModel):
    """A row of the Tulu 3 SFT mixture. Its `id` isn't unique, so it isn't used."""

    messages: list[Written]
    source: str = ""


Schema = TypeVar("Schema", bound=BaseModel)


def anteater(row: DaringAnteater) -> list[Message]:
    """The conversation of a row."""
    turns = [{"role": turn.who.lower(), "content": turn.value} for turn in row.conversations]
    return alternating([{"role": SYSTEM, "content": row.system}, *turns] if row.system.strip() else turns)


def tulu(row: Tulu) -> list[Message]:
    """The conversation of a row."""
    return alternating([{"role": message.role, "content": message.content} for message in row.messages])


def alternating(messages: Sequence[Message]) -> list[Message]:
    """A system message if there is one, then user and assistant in turns, the assistant last.

    A first message of the assistant and a last one of the user are left out. Raises Skip for any other order, which many
    chat templates refuse, and for messages without text.
    """
    start = 1 if messages and messages[0]["role"] == SYSTEM else 0
    turns = list(messages[start:])
    if turns and turns[0]["role"] == ASSISTANT:
        del turns[0]
    if turns and turns[-1]["role"] == USER:
        del turns[-1]
    if not turns:
        raise Skip("no question with an answer")
    if any(turn["role"] != (USER, ASSISTANT)[i % 2] for i, turn in enumerate(turns)) or len(turns) % 2:
        raise Skip("user and assistant don't take turns")
    if not all(turn["content"].strip() for turn in turns):
        raise Skip("an empty message")
    return [*messages[:start], *turns]


def without_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, if any, and the turns."""
    start = 1 if messages[0]["role"] == SYSTEM else 0
    return list(messages[:start]), list(messages[start:])


def told(turn: Message) -> str:
    """The text of a turn in a document."""
    return f"{NAMES[turn['role']]}: {turn['content'].strip()}\n\n"


def earlier_as_documents(messages: Sequence[Message]) -> Made:
    """The last question and its answer; every exchange before them is a document. Raises Skip if there is only one exchange."""
    system, turns = without_system(messages)
    if len(turns) < 4:
        raise Skip("one exchange only")
    earlier = [told(user) + told(assistant) for user, assistant in zip(turns[:-2:2], turns[1:-2:2], strict=True)]
    return {"documents": earlier, "messages": [*system, *turns[-2:]]}


def opening(messages: Sequence[Message]) -> str:
    """The first question: conversations that share it are on the same side of the split."""
    return without_system(messages)[1][0]["content"]


def source(
    name: str,
    about: str,
    origin: str,
    schema: type[Schema],
    messages: Callable[[Schema], list[Message]],
    make: Callable[[list[Message], random.Random], Iterable[Made]],
) -> Source:
    """A source of conversations. make: training records of one."""

    def made(row: Schema, job: PrepareJob, draw: random.Random) -> Iterable[Made]:
        return make(messages(row), draw)

    hub, sample = _FROM[schema]
    return Source(name, about, origin, hub, sample, each(schema, lambda row: opening(messages(row)), made))


def _whole(messages: list[Message], draw: random.Random) -> Iterator[Made]:
    yield {"messages": messages}


def _mem(messages: list[Message], draw: random.Random) -> Iterator[Made]:
    yield earlier_as_documents(messages)


def _kvlinks_tulu(row: Tulu) -> list[Message]:
    if any(part in row.source for part in LEFT_OUT):
        raise Skip("a part that KVLink leaves out")
    return tulu(row)


_FROM = {
    DaringAnteater: (Hub("nvidia/Daring-Anteater", split="train"), "daring_anteater.jsonl"),
    Tulu: (Hub("allenai/tulu-3-sft-mixture", split="train"), "tulu.jsonl"),
}
_KVLINK = "KVLink (arXiv 2502.16002; github.com/UCSB-NLP-Chang/KVLink: {})"

DARING_ANTEATER = source(
    "daring-anteater",
    "Daring-Anteater: conversations",
    _KVLINK.format("daring_anteater.py, sft"),
    DaringAnteater,
    anteater,
    _whole,
)

DARING_ANTEATER_MEM = source(
    "daring-anteater-mem",
    "Daring-Anteater: the last exchange, with every earlier one as a document",
    _KVLINK.format("daring_anteater.py, sft_mem; `process_sftmem`"),
    DaringAnteater,
    anteater,
    _mem,
)

TULU = source(
    "tulu",
    "Tulu 3: conversations, without the three parts that KVLink leaves out",
    _KVLINK.format("tulu.py"),
    Tulu,
    _kvlinks_tulu,
    _whole,
)

TULU_MEM = source(
    "tulu-mem",
    "Tulu 3, all parts: the last exchange, with every earlier one as a document",
    "as daring-anteater-mem, on another data set; KVLink doesn't have this one",
    Tulu,
    tulu,
    _mem,
)
