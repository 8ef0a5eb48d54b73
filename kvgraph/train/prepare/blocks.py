"""Tulu 3 in blocks: every answer of a conversation, after a prompt that is cut at the seams of its text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise

from kvgraph.train.prepare.chats import NAMES, Message, Tulu, source, tulu, without_system
from kvgraph.train.prepare.source import Made

SEAMS = tuple(
    re.compile(pattern) for pattern in (r"\s*\n\n\s*", r"\s*-{3,}\s*", r"\s*={3,}\s*", r"\n\t", r"\s*\n\s*")
)  # blank lines; without any, rules; then indented lines; then lines
MOST = 14  # blocks of a prompt, including the last one; further ones are merged
LONG = 12  # messages; in a conversation this long, every message is a block
CUT = 0.45  # share of first questions that are cut
CODE = re.compile(r"```[a-z]|\bc(\+\+|#)", re.IGNORECASE)


def blocks(messages: list[Message], draw: random.Random) -> Iterator[Made]:
    """A record for every answer. Turns before its question become documents; of a first question, all blocks but the last.

    A conversation with code stays whole, in one record, because cut code is meaningless.
    """
    if any(CODE.search(message["content"]) for message in messages):
        yield {"messages": messages}
        return
    system, turns = without_system(messages)
    for i in range(0, len(turns), 2):
        question, answer = turns[i : i + 2]
        if i:
            documents, last = earlier(turns[:i], whole=len(messages) >= LONG), question["content"]
        else:
            *documents, last = (
                merged(seams(question["content"]), MOST) if draw.random() < CUT else [question["content"]]
            )
        made = {"messages": [*system, {"role": "user", "content": last}, answer]}
        yield {"documents": documents, **made} if documents else made


def earlier(turns: list[Message], *, whole: bool) -> list[str]:
    """Turns as blocks that name their role. whole: one block per turn."""
    found = []
    for turn in turns:
        text = turn["content"].strip()
        first, *others = [text] if whole else seams(text)
        pieces = [f"{NAMES[turn['role']]}: {first}", *others]
        pieces[-1] += "\n\n"
        found += pieces
    return found if whole else merged(found, MOST - 1)


def seams(text: str) -> list[str]:
    """A text cut after each seam, of the first kind of `SEAMS` that it has. Joined, the pieces are the text."""
    for pattern in SEAMS:
        cuts = [match.end() for match in pattern.finditer(text) if text[: match.start()] and match.end() < len(text)]
        if cuts:
            return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    return [text]


def merged(pieces: list[str], most: int) -> list[str]:
    """At most so many pieces: those neighbours that are shortest together become one until that is so."""
    pieces = list(pieces)
    while len(pieces) > most:
        i = min(range(len(pieces) - 1), key=lambda i: len(pieces[i]) + len(pieces[i + 1]))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


TULU_BLOCKS = source(
    "tulu-blocks",
    "Tulu 3: every answer, with its prompt cut into blocks at the seams of the text",
    "Block-Attention (arXiv 2409.15355; github.com/TemporaryLoRA/Block-Attention: tulu3/preprocess_block.py). There, system "
    "messages are blocks too, rules are blocks of their own, and blocks of different messages aren't merged",
    Tulu,
    tulu,
    blocks,
)
