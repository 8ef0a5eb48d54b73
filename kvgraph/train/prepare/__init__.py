"""Preparing training data: sources, one small file a family. To add one, add a file and a line in SOURCES."""

from __future__ import annotations

from kvgraph.registry import Registry, named
from kvgraph.train.prepare.blocks import TULU_BLOCKS
from kvgraph.train.prepare.chats import DARING_ANTEATER, DARING_ANTEATER_MEM, TULU, TULU_MEM
from kvgraph.train.prepare.qa import QA_2WIKI, QA_TRIVIA
from kvgraph.train.prepare.source import PrepareError, Source
from kvgraph.train.prepare.summaries import MULTI_NEWS, XSUM
from kvgraph.train.prepare.text import FINEWEB_TEXT, FINEWEB_TEXT_INST, FINEWEB_TEXT_MEM

__all__ = ["SOURCES", "get"]

SOURCES: Registry[Source] = Registry(
    {
        source.name: source
        for source in (
            FINEWEB_TEXT,
            FINEWEB_TEXT_MEM,
            FINEWEB_TEXT_INST,
            DARING_ANTEATER,
            DARING_ANTEATER_MEM,
            TULU,
            TULU_MEM,
            TULU_BLOCKS,
            XSUM,
            MULTI_NEWS,
            QA_2WIKI,
            QA_TRIVIA,
        )
    },
    "kvgraph.sources",
    named(Source),
)
"""Sources by name. Other packages add some in the group "kvgraph.sources"; see `kvgraph.registry`."""


def get(name: str) -> Source:
    """The source called `name`. Raises PrepareError listing all names when there is none."""
    if name not in SOURCES:
        raise PrepareError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]
