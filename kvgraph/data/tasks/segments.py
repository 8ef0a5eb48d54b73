"""One long text as consecutive segments, for tasks whose data has no documents."""

from __future__ import annotations

import re

from kvgraph.data.chat import Document

DOCUMENT = "{text}"  # segments keep their white space, so that joined they are the text again

LINE_ENDS = re.compile(r"(?<=\n)")
SENTENCE_ENDS = re.compile(r"(?<=[.!?]\s)(?!\n)|(?<=[。！？])")


def segments(text: str, size: int) -> tuple[Document, ...]:
    """The text in pieces of at most `size` characters, which joined are the text.

    Cuts are made only after lines and, in lines longer than `size`, after sentences. A longer sentence stays whole.
    """
    pieces = [""]
    for unit in _units(text, size):
        if pieces[-1] and len(pieces[-1]) + len(unit) > size:
            pieces.append("")
        pieces[-1] += unit
    return tuple(Document(piece, id=str(i)) for i, piece in enumerate(pieces) if piece)


def _units(text: str, size: int) -> list[str]:
    lines = LINE_ENDS.split(text)
    return [unit for line in lines for unit in (SENTENCE_ENDS.split(line) if len(line) > size else [line])]
